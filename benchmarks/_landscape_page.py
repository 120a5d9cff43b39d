"""Figures and the page of a curvature report, from its results."""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from basinax.benchmarks._figures import headline, new_figure, tidy
from basinax.benchmarks._landscape_report import draw, tables
from basinax.benchmarks._page import (
    Section,
    facts_html,
    figure_html,
    page_html,
    table_html,
)
from basinax.benchmarks._surface_figures import restored
from basinax.landscape import Density, plots

TITLES = {
    "hessian": ("Hessian axes", "eigenvector of λ1", "eigenvector of λ2"),
    "random": ("Random axes, by filter", "direction 1", "direction 2"),
    "path": ("Axes of the path of training", "", ""),
}
DENSITY = "landscape.png"
PLANES = "planes.png"
CAPTIONS = {
    DENSITY: "Spectral density of the Hessian of the training loss; the band is one "
    "standard error, triangles are eigenvalues computed one by one.",
    PLANES: "The same point along different axes. Hessian axes are in distances of "
    "weight space and show the sharpest directions; random axes are in filter norms "
    "and rarely hit one; the axes of the path are its two principal directions.",
}


def draw_planes(results: dict[str, Any]) -> Figure:
    """Draw the training loss in every plane that was looked at, one scale for all."""
    planes = {name: restored(plane) for name, plane in results["planes"].items()}
    losses = np.concatenate([plane.losses.ravel() for plane in planes.values()])
    finite = losses[np.isfinite(losses) & (losses > 0)]
    limits: dict[str, Any] = {"scale": "log"} if finite.size else {}
    if finite.size:
        limits |= {"vmin": float(finite.min()), "vmax": float(finite.max())}
    figure = new_figure(3.4 * len(planes) + 0.8, 3.6)
    axes = np.atleast_1d(figure.subplots(1, len(planes)))
    for axis, (name, plane) in zip(axes, planes.items(), strict=True):
        title, xlabel, ylabel = TITLES[name]
        path = None
        if name == "path":
            path = np.array(results["planes"]["path"]["coordinates"])
            shares = results["planes"]["path"]["explained"]
            xlabel, ylabel = (
                f"direction {k + 1}, {100 * share:.0f} % of the motion"
                for k, share in enumerate(shares)
            )
        last = axis is axes[-1]  # one colour bar for all, as they share their levels
        plots.surface(plane, ax=axis, path=path, colorbar=last, **limits)
        tidy(axis, title, xlabel, ylabel)
        axis.grid(visible=False)
    headline(
        figure,
        f"{results['task']['title']} · {results['model']}",
    )
    return figure


def draw_all(results: dict[str, Any], density: Density, out: Path) -> dict[str, str]:
    """Draw and save the figures; return file names with captions."""
    draw(results, density).savefig(out / DENSITY)
    if not results.get("planes"):
        return {DENSITY: CAPTIONS[DENSITY]}
    draw_planes(results).savefig(out / PLANES)
    return CAPTIONS


def write_report(results: dict[str, Any], figures: dict[str, str], out: Path) -> Path:
    """Write ``report.html`` into ``out`` and return its path."""
    environment, task = results["environment"], results["task"]
    drawn = "".join(figure_html(out / name, text) for name, text in figures.items())
    sections = [
        Section("Spectrum and surfaces", drawn),
        *(Section(table.title, table_html(table)) for table in tables(results)),
        Section("Model and data", facts_html({"model": results["model"], **task})),
        Section(
            "Reproduce",
            f"<pre>{escape(results['command'])}</pre>"
            + facts_html({**environment, "took": f"{results['seconds']:.0f} s"}),
        ),
    ]
    path = out / "report.html"
    page = page_html(
        f"basinax landscape: {task['name']}",
        f"{task['title']}; {results['model']}. Test loss {results['test_loss']:.4f}, "
        f"accuracy {100 * results['test_accuracy']:.1f} %.",
        f"{environment['hardware']} · {environment['date']}",
        sections,
    )
    path.write_text(page, encoding="utf-8")
    return path
