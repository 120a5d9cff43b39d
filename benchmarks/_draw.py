"""Draw and save every figure of a comparison."""

from pathlib import Path
from typing import Any

from basinax.benchmarks._figures import curvature_figure, loss_figure, norm_figure
from basinax.benchmarks._surface_figures import line_figure, seen, surface_figure

FIGURES = {
    "loss.png": (
        loss_figure,
        "Loss over training; the band is one standard deviation over seeds.",
    ),
    "norms.png": (
        norm_figure,
        "Spectral norms of steps and weights; dotted: the bound that SPECTRA "
        "guarantees for every step.",
    ),
    "curvature.png": (
        curvature_figure,
        "Held-out loss beside the curvature of the training loss at the end of "
        "training.",
    ),
}
SURFACES = {
    "surfaces.png": (
        surface_figure,
        "Training loss around each final point along two random directions, the same "
        "draws for all, normalised filter by filter. Same axes and colours everywhere; "
        "such planes rarely hit the sharpest directions.",
    ),
    "lines.png": (
        line_figure,
        "Training loss along each final point's sharpest direction, in distances of "
        "weight space, where networks with smaller weights look sharper.",
    ),
}


def draw_all(results: dict[str, Any], out: Path) -> dict[str, str]:
    """Draw and save every figure; return file names with captions."""
    if not results["optimizers"]:
        return {}
    out.mkdir(parents=True, exist_ok=True)
    chosen = FIGURES | SURFACES if seen(results) else FIGURES
    for name, (draw, _) in chosen.items():
        draw(results).savefig(out / name)
    return {name: caption for name, (_, caption) in chosen.items()}
