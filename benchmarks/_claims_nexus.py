"""What is said about Nexus: common minima, gradient agreement, unseen sources.

Statements of arXiv:2604.09258 in a problem where they can be seen, to first order, and
on a small language model, each beside accumulation of the same gradients.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from basinax.benchmarks._claims import Finding, Part
from basinax.benchmarks._claims_nexus_language import draw_differences, language_model
from basinax.benchmarks._claims_nexus_theory import (
    cosine_expansion,
    median,
    raw_expansion,
)
from basinax.benchmarks._claims_nexus_valley import draw_losses, draw_paths, valley
from basinax.benchmarks._figures import new_figure, tidy

VALLEY, COSINE = "valley", "first order, unit steps"
LANGUAGE = "language model of several sources"

PARTS = (
    Part(VALLEY, valley),
    Part("first order, raw steps", raw_expansion),
    Part(COSINE, cosine_expansion),
    Part("unit gradients without walking", median),
    Part(LANGUAGE, language_model, slow="about ten minutes on two cores"),
)


def _residuals(axis: Axes, finding: Finding) -> None:
    """Draw what every first-order form leaves, over γ."""
    gammas = np.asarray(finding.numbers["gammas"])
    forms = {
        "twice": ("#56B4E9", "s--", "raw, (K-1)/2"),
        "cosine": ("#D55E00", "s--", "unit, gradient of the cosine"),
        "raw": ("#0072B2", "o-", "raw, (K-1)/4"),
        "normalised": ("#E69F00", "o-", "unit, J_i u_j"),
    }
    for name, (colour, style, label) in forms.items():
        left = finding.numbers["residuals"][name]
        axis.loglog(gammas, left, style, color=colour, markersize=4, label=label)
    tidy(axis, "Left by the first-order form", "γ", "norm of the residual")
    axis.legend(frameon=False, fontsize=8)


PANELS: dict[str, tuple[Callable[[Axes, Finding], Any], ...]] = {
    VALLEY: (draw_paths, draw_losses),
    COSINE: (_residuals,),
    LANGUAGE: (draw_differences,),
}


def draw(findings: dict[str, Finding]) -> Figure:
    """Draw the paths in the valley, and below what else ran."""
    panels = [
        (panel, findings[name])
        for name, drawn in PANELS.items()
        if name in findings
        for panel in drawn
    ]
    rows = max(1, -(-len(panels) // 2))
    figure = new_figure(9.8, 3.9 * rows)
    axes = figure.subplots(rows, 2, squeeze=False, width_ratios=[1.25, 1]).ravel()
    for axis, (panel, finding) in zip(axes, panels, strict=False):
        panel(axis, finding)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure
