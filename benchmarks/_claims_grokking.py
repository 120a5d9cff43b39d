"""The claims of "Grokking at the Edge of Numerical Stability" (arXiv:2501.04697).

Long after a network fits its training data it may come to predict the rest, or never.
The paper names two obstacles and a remedy for each: gradients that merely scale the
weights, removed by ⊥Grad, and softmax costs that round to zero, avoided by StableMax.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from basinax.benchmarks._claims import Finding, Part
from basinax.benchmarks._claims_grokking_collapse import (
    quartet,
    stablemax_modular,
    stablemax_parity,
)
from basinax.benchmarks._claims_grokking_perp import orthogonal, rivals
from basinax.benchmarks._figures import headline, new_figure, tidy

PARTS = (
    Part("⊥Grad, p = 31", orthogonal),
    # Figures 1a and 6b of the paper, at their size.
    Part(
        "⊥Grad, p = 113",
        partial(
            orthogonal,
            p=113,
            fraction=0.4,
            width=200,
            steps=300,
            seeds=(0, 1),
        ),
    ),
    Part("rivals of ⊥Grad", rivals),
    Part("collapse by precision", quartet),
    Part(
        "collapse by precision, longer",
        partial(quartet, steps=12_000, every=200, seeds=(0, 1)),
        slow="two to four minutes on two cores",
    ),
    Part("StableMax, 20 bits", stablemax_parity(20, 500, 2000)),
    Part(
        "StableMax, 25 bits",
        stablemax_parity(25, 400, 10_000),
        slow="about a minute on two cores",
    ),
    Part(
        "StableMax, p = 47",
        stablemax_modular(47, 0.8, 96, 20_000, seeds=2),
        slow="two to four minutes on two cores",
    ),
)

# Figure 1b of the paper, at its size: hours on a CPU.
LARGE = Part(
    "StableMax, p = 113",
    stablemax_modular(113, 0.4, 200, 80_000, seeds=1),
    slow="minutes on a GPU, by estimate",
)
if jax.default_backend() != "cpu":
    PARTS = (*PARTS, LARGE)

# Okabe and Ito's colours; what a paper proposes is blue everywhere.
COLOURS = {
    "⊥AdamW": "#0072B2",
    "AdamW": "#D55E00",
    "AdamW, decay 1": "#009E73",
    "Grokfast": "#E69F00",
    "Grokfast, decay 1": "#CC79A7",
    "StableMax": "#0072B2",
    "softmax, float32": "#D55E00",
    "softmax, float64": "#009E73",
    "float16": "#999999",
    "float32": "#D55E00",
    "float64": "#009E73",
    "collapse-free float32": "#0072B2",
}


def _band(axis: Axes, run: dict[str, Any], key: str, **style: Any) -> None:
    """Draw the mean over the seeds, and their range."""
    steps = np.asarray(run["curves"]["step"])[0]
    # What overflowed is None in the record and NaN here: a gap.
    values = np.asarray(run["curves"][key], np.float64)
    axis.plot(steps, values.mean(axis=0), **style)
    axis.fill_between(
        steps,
        values.min(axis=0),
        values.max(axis=0),
        color=style["color"],
        alpha=0.13,
        linewidth=0,
    )


def _legend(axis: Axes, names: Iterable[str], **place: Any) -> None:
    lines = [Line2D([], [], color=COLOURS[name], lw=2.0, label=name) for name in names]
    axis.legend(
        handles=lines,
        fontsize=8,
        handlelength=1.3,
        frameon=True,
        edgecolor="none",
        **place,
    )


def _accuracy(
    axis: Axes,
    title: str,
    finding: Finding,
    *,
    training: bool = True,
    place: dict[str, Any] | None = None,
) -> None:
    """Draw held-out accuracy in full lines and training accuracy dashed."""
    runs = finding.numbers["runs"]
    for name, run in runs.items():
        colour = COLOURS[name]
        _band(axis, run, "test_accuracy", color=colour, lw=2.0, label=name)
        if training:
            _band(axis, run, "train_accuracy", color=colour, lw=1.1, ls=(0, (4, 1.5)))
    axis.set_xscale("log")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_ylim(bottom=-0.02, top=1.03 if training else None)
    tidy(axis, title, "step", "accuracy" if training else "held-out accuracy")
    _legend(axis, runs, **(place or {"loc": "best"}))


def _loss(axis: Axes, title: str, finding: Finding) -> None:
    for name, run in finding.numbers["runs"].items():
        colour = COLOURS[name]
        # Blue on green: the two curves lie on one another for most of the run.
        dash = (0, (3, 2)) if name == "collapse-free float32" else "-"
        _band(axis, run, "train_loss", color=colour, lw=2.0, ls=dash, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    tidy(axis, title, "step", "true training loss (nats)")
    _legend(axis, finding.numbers["runs"], loc="lower left")


def _panels(name: str, finding: Finding) -> list[Callable[[Axes], None]]:
    """Choose the panels of an experiment."""
    problem, _, _ = finding.numbers["problem"].partition(",")
    if name.startswith("collapse"):
        title = f"Precision of the softmax: {problem}"
        held_out = partial(_accuracy, training=False, place={"loc": "upper left"})
        return [partial(one, title=title, finding=finding) for one in (_loss, held_out)]
    if name.startswith("rivals"):
        # Between the curve that rises first and those that rise last.
        place = {"loc": "upper left", "bbox_to_anchor": (0.39, 0.97)}
        title = f"⊥Grad and its rivals: {problem}"
        return [partial(_accuracy, title=title, finding=finding, place=place)]
    method, _, _ = name.partition(",")
    return [partial(_accuracy, title=f"{method}: {problem}", finding=finding)]


def draw(findings: dict[str, Finding]) -> Figure:
    """Draw accuracies over steps, one panel per experiment that ran."""
    panels = [_panels(name, finding) for name, finding in findings.items()]
    flat = list(itertools.chain.from_iterable(panels))
    columns = min(2, max(1, len(flat)))
    rows = max(1, -(-len(flat) // columns))
    figure = new_figure(4.8 * columns, 3.1 * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, flat, strict=False):
        panel(axis)
    for axis in axes[len(flat) :]:
        axis.set_axis_off()
    headline(
        figure,
        "Full lines: held-out accuracy (or loss) · dashed: training accuracy · "
        "means over seeds, bands their range",
    )
    return figure
