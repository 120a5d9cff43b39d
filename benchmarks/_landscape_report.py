"""Tables and the figure of a curvature report, from its results alone."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from basinax.benchmarks._figures import headline, new_figure, tidy
from basinax.benchmarks._table import Table, short
from basinax.landscape import Density, plots

LABELS = {
    "sums": "trace and Frobenius norm",
    "spectrum": "spectral density",
    "largest": "largest eigenvalues",
    "smallest": "smallest eigenvalue",
    "ascent": "sharpness by ascent",
    "noise": "sharpness under noise",
    "edge": "edge of stability",
    "planes": "loss surfaces",
    "done": "done",
}


def error(found: dict[str, float], digits: int = 3) -> str:
    """Write an estimate with its standard error."""
    return f"{short(found['value'], digits)} ± {short(found['standard_error'], 2)}"


def _percent(found: dict[str, float]) -> str:
    return error({key: 100 * value for key, value in found.items()}) + " %"


def eigenvalues(results: dict[str, Any]) -> Table:
    """Tabulate the extreme eigenvalues with their residuals."""
    top, bottom = results["largest"], results["smallest"]
    values, rows = top["values"], []
    for index, (value, residual, good) in enumerate(
        zip(values, top["residuals"], top["converged"], strict=True)
    ):
        last = index + 1 == len(values)
        ratio = np.nan if last or values[index + 1] <= 0 else value / values[index + 1]
        rows.append(
            (
                f"λ{index + 1}" + ("" if good else " ~"),
                short(value, 4),
                f"{residual:.0e}",
                short(ratio),
            )
        )
    rows.append(
        (
            "smallest" + ("" if bottom["converged"][0] else " ~"),
            short(bottom["values"][0], 4),
            f"{bottom['residuals'][0]:.0e}",
            "–",
        )
    )
    notes = [
        "Residual: an eigenvalue is within that distance, up to rounding. Gap: over "
        "the next one.",
        f"{top['matvecs']} and {bottom['matvecs']} Hessian products.",
    ]
    if any("~" in row[0] for row in rows):
        notes.append("~ not converged to one part in a thousand.")
    return Table(
        "Hessian eigenvalues",
        ("pair", "value", "residual", "gap"),
        tuple(rows),
        tuple(notes),
    )


def spectrum(results: dict[str, Any]) -> Table:
    """Tabulate what sums over the whole spectrum say."""
    sums, found = results["sums"], results["spectrum"]
    size, edge = results["parameters"], results["edge"]
    dimension = found["effective_dimension"]
    floor, damping = short(found["floor"], 2), short(dimension["damping"], 2)
    rows = [
        ("trace", error(sums["trace"])),
        ("Frobenius norm", error(sums["frobenius_norm"])),
        (f"effective dimension of {size:,}", error(dimension)),
        ("eigenvalues near zero", _percent(found["small_share"])),
        ("negative eigenvalues", _percent(found["negative_share"])),
        ("|smallest| over largest", error(found["extreme_ratio"])),
        (
            "largest stable rate of gradient descent",
            short(edge["gradient_descent_largest_stable_rate"]),
        ),
    ]
    if "adam_ratio_at_peak_rate" in edge:
        rows.append(
            (
                "Adam's sharpness over its edge, peak rate",
                short(edge["adam_ratio_at_peak_rate"]),
            )
        )
    return Table(
        "Whole spectrum and stability",
        ("quantity", "value"),
        tuple(rows),
        (
            f"± one standard error. Near zero: within 0.1 % of λ1, {floor}; negative: "
            "below minus that.",
            f"Effective dimension: Σ λ/(λ + {damping}). Largest stable rate: 2/λ1. "
            "Adam's sharpness: of its preconditioned Hessian.",
        ),
    )


def sharpness(results: dict[str, Any]) -> Table:
    """Tabulate the sharpness measures, in units of the loss."""
    rows = [
        (name, short(value, 4))
        if not isinstance(value, dict)
        else (name, error(value, 4))
        for name, value in {**results["ascent"], **results["noise"]}.items()
    ]
    return Table(
        "Sharpness of the training loss",
        ("measure", "value"),
        tuple(rows),
        (
            "Rises of the training loss in nats, unless units are given. Adaptive: "
            "perturbations in proportion to each weight.",
        ),
    )


def tables(results: dict[str, Any]) -> list[Table]:
    """Build every table of the report."""
    return [eigenvalues(results), spectrum(results), sharpness(results)]


def draw(results: dict[str, Any], density: Density) -> Figure:
    """Draw the spectral density with its error band, outliers marked."""
    figure = new_figure(8.6, 4.0)
    axis = figure.subplots()
    extremes = results["largest"]["values"] + results["smallest"]["values"]
    plots.density(density, ax=axis, outliers=extremes)
    tidy(
        axis,
        f"Hessian spectrum, {results['parameters']:,} parameters",
        "eigenvalue",
        "density",
    )
    # The marks are the eigenvalues that were computed one by one.
    handles, labels = axis.get_legend_handles_labels()
    number = len(results["largest"]["values"])
    labels = [
        f"{number} largest and the smallest eigenvalue" if x == "outliers" else x
        for x in labels
    ]
    axis.legend(handles, labels, frameon=False, fontsize=8.5)
    headline(
        figure,
        f"{results['task']['title']} · {results['model']}",
    )
    return figure
