"""Figures of the training loss around the final points of a comparison."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from basinax.benchmarks._figures import INK, headline, new_figure, styles, tidy
from basinax.landscape import Plane, plots

COLUMNS = 3
LEVELS = 14


def restored(stored: dict[str, Any]) -> Plane:
    """Read a plane from results, where a loss that was not finite is null."""
    x, y, losses = (
        np.array(stored.get(key, stored["x"]), np.float64)
        for key in ("x", "y", "losses")
    )
    return Plane(x, y, losses)  # pyright: ignore[reportArgumentType]


def seen(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what was measured around each final point, by optimizer."""
    done = results["optimizers"].items()
    return {n: o["surroundings"] for n, o in done if o.get("surroundings")}


def common_levels(planes: dict[str, Plane]) -> list[float]:
    """Space levels geometrically over the losses of all planes together."""
    losses = np.concatenate([plane.losses.ravel() for plane in planes.values()])
    positive = losses[np.isfinite(losses) & (losses > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    return np.geomspace(low * 0.999, max(high, 1.01 * low) * 1.001, LEVELS).tolist()


def surface_figure(results: dict[str, Any]) -> Figure:
    """Draw every optimizer's plane, on the same axes and the same colours."""
    planes = {name: restored(around["plane"]) for name, around in seen(results).items()}
    levels = common_levels(planes)
    columns = min(COLUMNS, len(planes))
    rows = math.ceil(len(planes) / columns)
    figure = new_figure(3.0 * columns + 0.9, 2.7 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    filled = None
    for axis, (name, plane) in zip(axes.flat, planes.items(), strict=False):
        axis.set_aspect("equal")
        plots.surface(plane, ax=axis, scale="log", levels=levels, colorbar=False)
        centre = plane.losses[len(plane.x) // 2, len(plane.y) // 2]
        tidy(axis, name, "", "")
        axis.grid(visible=False)
        axis.text(
            0.03,
            0.03,
            f"{centre:.3g} at its point",
            transform=axis.transAxes,
            fontsize=8,
            color=INK,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
        )
        if axis.collections:
            filled = axis.collections[0]
    for axis in axes.flat[len(planes) :]:
        axis.set_visible(False)
    if filled is not None:
        bar = figure.colorbar(filled, ax=axes, shrink=0.8, aspect=30)
        ticks = levels[:: max(1, LEVELS // 7)]
        bar.set_ticks(ticks, labels=[f"{level:.2g}" for level in ticks])
        bar.set_label("training loss (nats)", color=INK, fontsize=9)
        bar.ax.tick_params(labelsize=8.5, colors=INK)
    figure.supxlabel("random direction 1, in filter norms", fontsize=9, color=INK)
    figure.supylabel("random direction 2", fontsize=9, color=INK)
    headline(
        figure,
        f"{results['task']['title']} · training loss around the final point, one seed",
    )
    return figure


def line_figure(results: dict[str, Any]) -> Figure:
    """Draw the loss along every optimizer's sharpest direction."""
    looks = styles(results)
    figure = new_figure(9.6, 4.2)
    axis = figure.subplots()
    for name, around in seen(results).items():
        steps, losses = (
            np.array(around["line"][key], np.float64) for key in ("steps", "losses")
        )
        axis.plot(steps, losses, label=name, **looks[name])
    axis.set_yscale("log")
    tidy(
        axis,
        "Along the sharpest direction",
        "distance in weight space",
        "training loss (nats)",
    )
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside right center",
        frameon=False,
        fontsize=9,
        handlelength=2.6,
    )
    headline(
        figure,
        f"{results['task']['title']} · along the eigenvector of the largest Hessian "
        "eigenvalue, one seed",
    )
    return figure
