"""What is said about loss landscapes: outliers, edges, paths, generalization.

Statements that the instruments of `basinax.landscape` can test on small networks,
where whole spectra and whole training runs take seconds.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from basinax.benchmarks._claims import Finding, Part
from basinax.benchmarks._claims_landscape_axes import axes as hessian_axes
from basinax.benchmarks._claims_landscape_axes import draw as draw_axes
from basinax.benchmarks._claims_landscape_edge import edges, walkers
from basinax.benchmarks._claims_landscape_generalization import (
    SHARPNESS,
    generalization,
)
from basinax.benchmarks._claims_landscape_optimizers import equal_loss
from basinax.benchmarks._claims_landscape_outliers import FEW, outliers
from basinax.benchmarks._claims_landscape_paths import draw as draw_paths
from basinax.benchmarks._claims_landscape_paths import paths
from basinax.benchmarks._figures import new_figure, reference_line, tidy

EDGE, LONG_EDGE = "edge of stability", "edge of stability, three seeds"

PARTS = (
    Part("outliers", outliers),
    Part(EDGE, edges),
    Part("sharpness at equal loss", equal_loss),
    Part("axes", hessian_axes),
    Part("paths", paths),
    Part(
        LONG_EDGE,
        partial(edges, contestants=walkers(2), seeds=(0, 1, 2)),
        slow="one to two minutes on two cores",
    ),
    Part(
        "sharpness and generalization",
        generalization,
        slow="about a minute on two cores",
    ),
)

# Okabe and Ito's colours.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY, INK = "#999999", "#333333"


def _outliers(axis: Axes, finding: Finding) -> None:
    """Draw the largest eigenvalues by rank, filled as far as the largest gap."""
    runs = finding.numbers["runs"]
    colours = iter(PALETTE)
    for name, run in runs.items():
        values = np.asarray(run["largest"], np.float64)
        number = run["outliers"][0]
        rank = np.arange(1, len(values) + 1)
        relative = values / values[0]
        colour = next(colours) if run["classes"] >= FEW else GREY
        dash = ":" if run["classes"] < FEW - 1 else "-"
        axis.plot(
            rank,
            relative,
            "o",
            linestyle=dash,
            color=colour,
            markersize=4,
            linewidth=1.0,
            markerfacecolor="white",
        )
        axis.plot(
            rank[:number],
            relative[:number],
            "o",
            color=colour,
            linestyle=dash,
            linewidth=1.6,
            markersize=5.5,
            label=f"{name}: {number}",
        )
    axis.set_yscale("log")
    axis.set_xticks(range(1, 22, 2))
    tidy(axis, "Outliers of the Hessian", "rank", "eigenvalue over the largest")
    axis.legend(
        frameon=False,
        fontsize=8,
        title="classes: outliers (filled)",
        title_fontsize=8,
        loc="upper right",
    )


def _edges(axis: Axes, finding: Finding) -> None:
    """Draw the sharpness in units of the edge; the first seed full, others thin."""
    runs = finding.numbers["runs"]
    colours = iter(PALETTE)
    for name, run in runs.items():
        colour = GREY if run["control"] else next(colours)
        for index, seen in enumerate(run["seeds"]):
            course = seen["course"]
            ratio = np.asarray(course["sharpness"], np.float64) / seen["threshold"]
            axis.plot(
                np.asarray(course["step"]),
                ratio,
                color=colour,
                linewidth=0.7 if index else 1.6,
                alpha=0.6 if index else 1.0,
                label=None if index else name,
            )
    axis.set_yscale("log")
    reference_line(axis, 1.0, "edge of stability")
    tidy(axis, "Sharpness over its edge", "step", "largest eigenvalue over edge")
    axis.legend(frameon=False, fontsize=8, loc="center right")


def _equal_loss(axis: Axes, finding: Finding) -> None:
    """Draw sharpness over training loss: means over seeds, bands their range."""
    levels = np.asarray(finding.numbers["levels"], np.float64)
    colours = iter(PALETTE)
    for name, run in finding.numbers["runs"].items():
        colour = GREY if run["role"] == "control" else next(colours)
        reached = [
            [
                passing[level]
                for passing in run["passings"]
                if passing[level] is not None
            ]
            for level in range(len(levels))
        ]
        some = [index for index, found in enumerate(reached) if found]
        values = [np.array([p.sharpness for p in reached[index]]) for index in some]
        axis.plot(
            levels[some],
            [x.mean() for x in values],
            "o-",
            color=colour,
            markersize=4,
            label=name,
        )
        axis.fill_between(
            levels[some],
            [x.min() for x in values],
            [x.max() for x in values],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.invert_xaxis()
    axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axis.minorticks_off()
    axis.set_xticks(levels, [f"{level:g}" for level in levels])
    tidy(
        axis,
        "Sharpness at equal training loss",
        "training loss, first reached (nats)",
        "largest eigenvalue",
    )
    axis.legend(frameon=False, fontsize=8, loc="lower left")


def _generalization(axis: Axes, finding: Finding) -> None:
    """Draw Kendall's tau with its interval, a bar per measure."""
    taus = finding.numbers["taus"]
    for row, (name, found) in enumerate(taus.items()):
        axis.barh(
            row,
            found["tau"],
            color=PALETTE[0] if name in SHARPNESS else GREY,
            height=0.62,
        )
        axis.plot([found["low"], found["high"]], [row, row], color=INK, linewidth=1.4)
    axis.set_yticks(range(len(taus)), list(taus))
    axis.invert_yaxis()
    axis.axvline(0.0, color=INK, linewidth=0.9)
    axis.set_xlim(-1, 1)
    tidy(
        axis,
        "Agreement with the generalization gap",
        "Kendall's tau, 95 % interval (grey: no sharpness)",
        "",
    )
    axis.tick_params(axis="y", length=0)


PANELS: dict[str, Callable[[Axes, Finding], Any]] = {
    "outliers": _outliers,
    EDGE: _edges,
    LONG_EDGE: _edges,
    "sharpness at equal loss": _equal_loss,
    "axes": draw_axes,
    "paths": draw_paths,
    "sharpness and generalization": _generalization,
}


def draw(findings: dict[str, Finding]) -> Figure:
    """Draw one panel per experiment that ran; of the edge the longer one."""
    names = [n for n in findings if n != EDGE or LONG_EDGE not in findings]
    columns = min(2, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = new_figure(4.9 * columns, 3.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, name in zip(axes, sorted(names, key=list(PANELS).index), strict=False):
        PANELS[name](axis, findings[name])
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    return figure
