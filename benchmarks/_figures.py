"""Figures of a comparison, drawn on plain matplotlib Figure objects.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. An optimizer and
its SPECTRA version share a colour; the base of another is dashed.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

FAMILY_COLOURS = {
    "adamw": "#0072B2",
    "signum": "#D55E00",
    "ademamix": "#009E73",
    "lion": "#CC79A7",
    "muon": "#E69F00",
    "perp_adamw": "#56B4E9",
}
OTHER_COLOURS = ("#000000", "#999999")
INK = "#333333"
DPI = 160


def styles(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Choose colour and dash for every optimizer in the results."""
    done = results["optimizers"]
    extended = {numbers["base"] for numbers in done.values()}
    found, spare = {}, iter(OTHER_COLOURS * len(done))
    for name, numbers in done.items():
        family = numbers["base"] or name
        colour = FAMILY_COLOURS.get(name) or FAMILY_COLOURS.get(family) or next(spare)
        dashed = name in extended
        found[name] = {
            "color": colour,
            "linestyle": (0, (4, 1.5)) if dashed else "-",
            "linewidth": 1.4 if dashed else 1.8,
        }
    return found


def new_figure(width: float, height: float) -> Figure:
    """Make a figure that draws anywhere, without a display or global state."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def tidy(axis: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Give an axis its texts and the common look."""
    axis.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axis.set_xlabel(xlabel, color=INK)
    axis.set_ylabel(ylabel, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=8.5)


def headline(figure: Figure, text: str) -> None:
    """Say in one grey line what all panels have in common."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=9.5, color="#666666")


def reference_line(axis: Axes, level: float, text: str) -> None:
    """Draw a dotted horizontal line with its meaning, readable over curves."""
    axis.axhline(level, color=INK, linewidth=0.9, linestyle=":")
    axis.annotate(
        text,
        (0.99, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
        color=INK,
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0},
    )


def curves(results: dict[str, Any], name: str, key: str) -> np.ndarray:
    """Stack one curve over the seeds: (seeds, looks), NaN where it blew up."""
    seeds = results["optimizers"][name]["seeds"]
    return np.array([seed["curves"][key] for seed in seeds], dtype=np.float64)


def _band(axis: Axes, x: np.ndarray, y: np.ndarray, style: dict[str, Any]) -> None:
    """Draw mean and spread; on the logarithm, so that the band stays positive."""
    log = np.log(np.where(y > 0, y, np.nan))
    good = np.isfinite(log).all(axis=0)
    if not good.any():
        return
    log, x = log[:, good], x[good]
    centre = log.mean(axis=0)
    axis.plot(x, np.exp(centre), **style)
    if len(log) > 1:
        sd = log.std(axis=0, ddof=1)
        low, high = np.exp(centre - sd), np.exp(centre + sd)
        axis.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)


def _panels(
    results: dict[str, Any], panels: list[tuple[str, str, str]], title: str
) -> tuple[Figure, list[Axes]]:
    figure = new_figure(9.6, 4.3)
    axes = list(figure.subplots(1, len(panels)))
    looks = styles(results)
    for axis, (key, heading, ylabel) in zip(axes, panels, strict=True):
        for name, style in looks.items():
            steps = curves(results, name, "step")[0]
            _band(axis, steps, curves(results, name, key), {**style, "label": name})
        axis.set_yscale("log")
        axis.set_xlim(left=0)
        tidy(axis, heading, "step", ylabel)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, max(1, len(labels))),
        frameon=False,
        fontsize=9,
        handlelength=2.6,
    )
    headline(figure, title)
    return figure, axes


def loss_figure(results: dict[str, Any]) -> Figure:
    """Draw training and validation loss over steps."""
    count = len(results["settings"]["seeds"])
    figure, axes = _panels(
        results,
        [
            ("train_loss", "Training minibatches", "loss (nats)"),
            ("validation_loss", "Validation split", "loss (nats)"),
        ],
        f"{results['task']['title']} · geometric mean ± one sd over {count} seeds",
    )
    target = results["settings"]["target_validation_loss"]
    reference_line(axes[1], target, f"target {target:g}")
    return figure


def norm_figure(results: dict[str, Any]) -> Figure:
    """Draw the spectral norms of steps and weights over training."""
    figure, axes = _panels(
        results,
        [
            ("update_norm", "Largest step, in peak learning rates", "spectral norm"),
            ("weight_norm", "Largest weight matrix", "spectral norm"),
        ],
        f"{results['task']['title']} · largest spectral norm over all matrices",
    )
    ceiling = results["settings"]["step_norm_ceiling"]
    reference_line(axes[0], ceiling, f"SPECTRA bound {ceiling:.3g}")
    axes[1].set_yscale("linear")
    return figure


def curvature_figure(results: dict[str, Any]) -> Figure:
    """Draw held-out loss beside curvature, one row per optimizer, a dot per seed."""
    done, looks = results["optimizers"], styles(results)
    # Best at the top, so that agreement between the panels can be seen at a glance.
    order = sorted(
        done,
        key=lambda name: done[name]["summary"]["test_loss"]["mean"] or np.inf,
        reverse=True,
    )
    figure = new_figure(9.6, 1.6 + 0.34 * len(order))
    axes = list(figure.subplots(1, 3, sharey=True))
    panels = [
        ("test_loss", "Test loss", "nats", False),
        ("lambda_max", "Largest Hessian eigenvalue", "λmax, training loss", True),
        ("trace", "Hessian trace", "trace, training loss", True),
    ]
    for axis, (key, heading, xlabel, logarithmic) in zip(axes, panels, strict=True):
        for row, name in enumerate(order):
            found = [seed.get(key) for seed in done[name]["seeds"]]
            values = np.array([np.nan if v is None else v for v in found], float)
            values = values[np.isfinite(values)]
            colour = looks[name]["color"]
            filled = looks[name]["linestyle"] == "-"
            axis.plot(
                values,
                np.full(values.shape, row),
                "o",
                color=colour,
                alpha=0.45,
                markersize=4,
                markeredgewidth=0,
            )
            if values.size:
                axis.plot(
                    [values.mean()],
                    [row],
                    "D",
                    color=colour,
                    markerfacecolor=colour if filled else "white",
                    markersize=7,
                )
        if logarithmic:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(numticks=6))
            axis.xaxis.set_minor_formatter(NullFormatter())
        tidy(axis, heading, xlabel, "")
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(order)), order)
    axes[0].set_ylim(-0.6, len(order) - 0.4)
    headline(
        figure,
        f"{results['task']['title']} · dots are seeds, diamonds their mean "
        "(hollow: base of another)",
    )
    return figure
