"""Plots of what the instruments measure, on matplotlib axes of your choice.

Every function draws on `ax`, or on a new figure of its own, and returns the axis, so
that plots go side by side, get titles and are saved like any other:

    >>> import jax, jax.numpy as jnp
    >>> from matplotlib.figure import Figure
    >>> from basinax.landscape import plots, spectral_density
    >>> scale = jnp.array([0.0, 1.0, 1.0, 5.0])
    >>> found = spectral_density(
    ...     lambda v: scale * v, scale, key=jax.random.key(0), num_probes=2, num_steps=3
    ... )
    >>> figure = Figure()
    >>> axis = plots.density(found, ax=figure.subplots(), outliers=[5.0])
    >>> axis.get_xlabel()
    'eigenvalue'

Matplotlib is needed only here, when a function is called: `pip install basinax[plot]`.
Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from basinax.landscape._density import Density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any  # annotations are evaluated by checkers that need no matplotlib

__all__ = ["density", "monitored"]

_BLUE, _VERMILION, _INK = "#0072B2", "#D55E00", "#333333"
# A density spans many decades; below this share of its peak there is nothing to see.
_FLOOR = 1e-6


def _axis(ax: Axes | None) -> Axes:
    """Return the given axis or that of a new figure, without global state."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "basinax.landscape.plots needs matplotlib: pip install 'basinax[plot]'"
        ) from error
    return Figure(layout="constrained").subplots()


def density(
    density: Density, *, ax: Axes | None = None, outliers: ArrayLike | None = None
) -> Axes:
    """Plot a spectral density on a logarithmic scale, with its error band.

    The band is one standard error to either side, cut at the floor of the plot; it is
    left out for a single probe, whose error is unknown.

    Args:
        density: result of `spectral_density`.
        ax: where to draw; None makes a new figure, which is `ax.figure` of the result.
        outliers: eigenvalues to mark below the curve, for instance
            `eigenpairs(...).values`.

    Returns:
        The axis.

    Raises:
        ImportError: if matplotlib is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import Density, plots
        >>> grid, curve = jnp.array([0.0, 1.0]), jnp.array([0.9, 0.1])
        >>> one = jnp.ones((1, 1))
        >>> axis = plots.density(Density(grid, curve, 0.1 * curve, one, one))
        >>> axis.get_yscale()
        'log'

    Reference:
        Ghorbani, Krishnan, Xiao 2019.
    """
    axis = _axis(ax)
    grid, curve, error = (
        np.asarray(x, np.float64)
        for x in (density.grid, density.density, density.standard_error)
    )
    peak = np.nanmax(curve, initial=0.0)
    floor = _FLOOR * peak if peak > 0 else 1.0
    axis.plot(grid, curve, color=_BLUE, linewidth=1.4, label="density")
    if np.isfinite(error).any():
        low, high = np.maximum(curve - error, floor), np.maximum(curve + error, floor)
        axis.fill_between(
            grid,
            low,
            high,
            color=_BLUE,
            alpha=0.25,
            linewidth=0,
            label="± one standard error",
        )
    if outliers is not None:
        values = np.atleast_1d(np.asarray(outliers, np.float64))
        axis.plot(
            values,
            np.full(values.shape, 2 * floor),
            "^",
            color=_VERMILION,
            markersize=6,
            label="outliers",
        )
    axis.set_yscale("log")
    axis.set_ylim(floor, 3 * peak if peak > 0 else 10.0)
    axis.set_xlabel("eigenvalue")
    axis.set_ylabel("density")
    axis.legend(frameon=False)
    return axis


def monitored(
    steps: ArrayLike,
    values: ArrayLike,
    *,
    ax: Axes | None = None,
    threshold: float | ArrayLike | None = None,
) -> Axes:
    """Plot a monitored value over training, beside a threshold.

    Made for the sharpness and the edge of stability, from values that a training loop
    collected out of the state of `monitor`.

    Args:
        steps: step of every measurement, shape (n,).
        values: what was measured, shape (n,); gaps where not finite.
        ax: where to draw; None makes a new figure, which is `ax.figure` of the result.
        threshold: level to draw dotted, such as 2 / learning rate; a number, or one per
            step under a schedule.

    Returns:
        The axis.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if `steps` and `values` are not vectors of one length.

    Example:
        >>> from basinax.landscape import plots
        >>> axis = plots.monitored([0, 100, 200], [3.0, 4.8, 5.1], threshold=5.0)
        >>> len(axis.lines)
        2
    """
    at, seen = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if at.ndim != 1 or at.shape != seen.shape:
        raise ValueError(
            "steps and values must be vectors of one length, got shapes "
            f"{at.shape} and {seen.shape}."
        )
    axis = _axis(ax)
    axis.plot(at, seen, color=_BLUE, linewidth=1.6, label="measured")
    if threshold is not None:
        level = np.broadcast_to(np.asarray(threshold, np.float64), at.shape)
        axis.plot(at, level, ":", color=_INK, linewidth=1.2, label="threshold")
    axis.set_xlabel("step")
    axis.legend(frameon=False)
    return axis
