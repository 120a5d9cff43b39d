"""The claims of SAM and of "SAMO" (arXiv:2507.07883), on small problems.

Sharpness-aware minimization looks at the loss a step uphill; SAMO gives each of many
tasks an uphill direction of its own, half of it from two forward passes.  Asked here:
does that help where there is something to gain, is the place where it ends flatter, and
would noise in place of the forward passes do the same?
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from basinax.benchmarks import _yeast
from basinax.benchmarks._claims import Finding, Part
from basinax.benchmarks._claims_landscape_optimizers import Contestant, equal_loss
from basinax.benchmarks._claims_samo_digits import clean, combiners, sign, sweep
from basinax.benchmarks._claims_samo_edge import edges
from basinax.benchmarks._claims_samo_toy import toy
from basinax.benchmarks._figures import new_figure, reference_line, tidy

NOISY, CLEAN, EDGE = "noisy labels", "clean labels", "edge of SAM"

CONTESTANTS = (
    Contestant("adamw", "adamw", 3e-3, "base"),
    Contestant("SAM, ρ 0.1", "adamw", 3e-3, "claim", rho=0.1),
    Contestant("adamw, 3× rate", "adamw", 1e-2, "control"),
)

PARTS = (
    Part("toy, five starts", toy),
    Part(NOISY, sweep),
    Part("local part", sign),
    Part(
        CLEAN,
        partial(
            sweep, problem=clean, where="With clean labels", radii=(0.05, 0.2, 0.5)
        ),
    ),
    Part("task weightings", partial(combiners, weightings=("MGDA", "FairGrad"))),
    Part(EDGE, edges),
    Part(
        "SAM at equal loss",
        partial(equal_loss, contestants=CONTESTANTS, method="SAM"),
    ),
    Part(
        "local part, 64 samples",
        partial(sign, others=("SAMO, 64 samples", "SAM per task"), seeds=(0, 1, 2)),
        slow="five to ten minutes on two cores",
    ),
    Part("all task weightings", combiners, slow="several minutes on two cores"),
)

if _yeast.find() is not None:
    genes = partial(
        sweep,
        problem=cache(_yeast.problem),
        where="On fourteen functions of yeast genes",
        radii=(0.05, 0.2),
    )
    PARTS = (*PARTS, Part("yeast", genes, slow="some minutes on two cores"))

# Okabe and Ito's colours, as in the other figures.
STYLES = {
    "SAM": ("#D55E00", "-"),
    "SAMO": ("#0072B2", "-"),
    "SAMO, coin": ("#56B4E9", (0, (2, 1.5))),  # on SAMO, most of the time
}
EDGE_COLOURS = ("#009E73", "#CC79A7")


def _over_radius(
    axis: Axes,
    finding: Finding,
    against_base: Callable[[np.ndarray, np.ndarray], np.ndarray],
    key: str,
) -> None:
    """Draw means over seeds against the radius, bands their range.

    Each seed deals out its own examples, so a run is compared with that of the same
    seed with equal weights.
    """
    runs = finding.numbers["runs"]

    def values(run: dict[str, Any]) -> np.ndarray:
        return np.mean(np.asarray(run[key], np.float64), axis=-1)

    (base,) = (values(run) for run in runs.values() if not run["rho"])
    radii = finding.numbers["radii"]
    for method, (colour, dash) in STYLES.items():
        found = np.array(
            [
                against_base(values(run), base)
                for run in runs.values()
                if run["method"] == method
            ]
        )
        style = {"color": colour, "linestyle": dash, "linewidth": 1.8}
        mean = found.mean(axis=1)
        axis.plot(radii, mean, "o", markersize=4, label=method, **style)
        low, high = found.min(axis=1), found.max(axis=1)
        axis.fill_between(radii, low, high, color=colour, alpha=0.13, linewidth=0)
    axis.set_xscale("log")
    axis.set_xticks(radii, [f"{rho:g}" for rho in radii])
    axis.minorticks_off()


def _accuracy(axis: Axes, finding: Finding, name: str) -> None:
    _over_radius(axis, finding, lambda x, base: 100 * (x - base), "accuracy")
    reference_line(axis, 0.0, "equal weights")
    tidy(axis, f"Test accuracy, {name}", "radius ρ", "points over equal weights")
    axis.legend(frameon=False, fontsize=8, loc="best")


def _flatness(axis: Axes, finding: Finding, name: str) -> None:
    _over_radius(axis, finding, np.divide, "lambda_max")
    axis.set_yscale("log")
    axis.set_ylim(top=1.5)
    axis.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
    axis.minorticks_off()
    reference_line(axis, 1.0, "equal weights")
    title = f"Largest Hessian eigenvalue, {name}"
    tidy(axis, title, "radius ρ", "ratio to equal weights")
    axis.legend(frameon=False, fontsize=8, loc="lower left")


def _edge(axis: Axes, finding: Finding, name: str) -> None:
    """Draw late sharpness of every seed and the mean edge against the radius."""
    del name
    for colour, (loss, by_radius) in zip(
        EDGE_COLOURS, finding.numbers["runs"].items(), strict=False
    ):
        radii = [rho for rho in by_radius if rho]

        def late(key: str, radii: Any = radii, runs: Any = by_radius) -> np.ndarray:
            return np.array([[run[key] for run in runs[rho]] for rho in radii])

        axis.plot(radii, late("lambda_max"), "o", color=colour, markersize=4)
        axis.plot([], [], "o", color=colour, markersize=4, label=f"SAM, {loss}")
        edge = late("edge").mean(axis=1)
        axis.plot(radii, edge, color=colour, linewidth=1.4, label="its edge")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axis.minorticks_off()
    tidy(axis, "SAM at its edge, full batch", "radius ρ", "largest eigenvalue")
    axis.legend(frameon=False, fontsize=8, loc="lower left")


PANELS: tuple[tuple[str, Callable[[Axes, Finding, str], None]], ...] = (
    (NOISY, _accuracy),
    (NOISY, _flatness),
    (CLEAN, _accuracy),
    (EDGE, _edge),
)


def draw(findings: dict[str, Finding]) -> Figure:
    """Draw accuracy and sharpness against the radius, of what ran."""
    panels = [(name, panel) for name, panel in PANELS if name in findings]
    rows = max(1, -(-len(panels) // 2))
    figure = new_figure(9.6, 3.3 * rows)
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for axis, (name, panel) in zip(axes, panels, strict=False):
        panel(axis, findings[name], name)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure
