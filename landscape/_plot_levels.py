"""Contour levels at round values, in arithmetic or in geometric progression."""

from typing import Any

import numpy as np

from basinax.landscape._plot_style import Scale, vector, wants_log

# Losses that differ by less, relatively, have levels that no float64 tells apart.
_FLAT = 1e-12
# Round numbers within a decade, fewer and fewer.
_MANTISSAS = (
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    (1, 1.5, 2, 3, 5, 7),
    (1, 2, 5),
    (1, 3),
    (1,),
)


def contour_levels(
    seen: np.ndarray,
    scale: Scale,
    levels: Any,
    vmin: float | None,
    vmax: float | None,
) -> tuple[np.ndarray, bool]:
    """Choose the levels, and whether their colours are on a logarithmic scale."""
    from matplotlib.ticker import MaxNLocator

    edges = None if isinstance(levels, int) else vector(levels, "levels")
    if edges is not None:
        if edges.size < 2 or not (np.diff(edges) > 0).all():
            raise ValueError(f"levels must be two or more, ascending; got {edges}.")
        logarithmic = wants_log(edges, scale) and (edges[0] > 0 or scale == "log")
        low, high = edges[0], edges[-1]
    else:
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}.")
        fixed = vmin is not None and vmax is not None
        # The same for every surface with the same limits, whatever its losses are.
        logarithmic = wants_log(np.array([vmin, vmax]) if fixed else seen, scale)
        low, high = _limits(seen, logarithmic, vmin, vmax)
    if not low <= high or (logarithmic and low <= 0):
        wanted = "be positive on a logarithmic scale and " * logarithmic
        raise ValueError(
            f"the limits of the losses must {wanted}ascend; got {low:g} to {high:g}."
        )
    if edges is not None:
        return edges, logarithmic
    if high - low <= _FLAT * max(abs(low), abs(high)):  # a flat surface has one colour
        pad = 0.1 * max(abs(low), abs(high)) or 1.0
        return np.array([low - pad, high + pad]), logarithmic
    if logarithmic and high > 2 * low:
        return _log_levels(low, high, levels), True
    ticks = np.asarray(MaxNLocator(levels - 1).tick_values(low, high))
    edges = _covering(ticks, low, high)
    return edges, logarithmic and bool(edges[0] > 0)


def _limits(
    seen: np.ndarray, logarithmic: bool, vmin: float | None, vmax: float | None
) -> tuple[float, float]:
    """Take what is given, else the extremes of the losses."""
    lowest, highest = float(seen.min()), float(seen.max())
    if logarithmic and highest > 0:
        # A single point may be smaller by any number of decades than all others.
        positive = seen[seen > 0]
        most = np.quantile(positive, 0.05, method="lower")
        lowest = float(max(positive.min(), 0.1 * most))
    # A limit beyond all losses leaves one colour.
    if vmin is None:
        vmin = lowest if vmax is None else min(lowest, vmax)
    return float(vmin), float(max(highest, vmin) if vmax is None else vmax)


def _log_levels(low: float, high: float, count: int) -> np.ndarray:
    """Choose round levels in geometric progression, the most that are allowed."""
    exponents = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    stride = int(np.ceil((len(exponents) - 1) / count))
    choices = [np.outer(10.0**exponents, mantissas).ravel() for mantissas in _MANTISSAS]
    sparse = np.arange(exponents[0], exponents[-1] + stride, stride)
    choices.append(10.0**sparse)
    return next(
        found for x in choices if len(found := _covering(x, low, high)) <= count + 1
    )


def _covering(levels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Drop the levels that are not needed to cover an interval."""
    first = np.searchsorted(levels, low, side="right") - 1
    last = np.searchsorted(levels, high, side="left")
    return levels[max(first, 0) : last + 1]
