"""Spectra: densities, eigenvalues, singular values, and angles between gradients."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from basinax.landscape._density import Density
from basinax.landscape._eigenpairs import Eigenpairs
from basinax.landscape._gradient_cosines import GradientCosines
from basinax.landscape._plot_style import (
    BLUE,
    INK,
    VERMILION,
    Axes,
    Scale,
    colour_bar,
    dress,
    hatch,
    legend,
    new_axis,
    vector,
    wants_log,
)

# A density spans many decades; below this share of its peak there is nothing to see.
_FLOOR = 1e-6
# Numbers in the cells of a matrix are readable up to this size.
_CELLS = 10


def density(
    density: Density,
    *,
    ax: Axes | None = None,
    outliers: ArrayLike | None = None,
    title: str | None = None,
) -> Axes:
    """Plot a spectral density on a logarithmic scale, with its error band.

    The band is one standard error to either side, cut at the floor of the plot; it is
    left out for a single probe, whose error is unknown.

    Args:
        density: result of `spectral_density`.
        ax: where to draw; None makes a new figure, which is `ax.figure` of the result.
        outliers: eigenvalues to mark below the curve, for instance
            `eigenpairs(...).values`.
        title: None takes "Spectral density".

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
    axis = new_axis(ax)
    grid, curve, error = (
        np.asarray(x, np.float64)
        for x in (density.grid, density.density, density.standard_error)
    )
    peak = np.nanmax(curve, initial=0.0)
    floor = _FLOOR * peak if peak > 0 else 1.0
    axis.plot(grid, curve, color=BLUE, linewidth=1.6, label="density")
    if np.isfinite(error).any():
        low, high = np.maximum(curve - error, floor), np.maximum(curve + error, floor)
        axis.fill_between(
            grid,
            low,
            high,
            color=BLUE,
            alpha=0.3,
            linewidth=0,
            label="± one standard error",
        )
    if outliers is not None:
        values = np.atleast_1d(np.asarray(outliers, np.float64))
        axis.plot(
            values,
            np.full(values.shape, 2 * floor),
            "^",
            color=VERMILION,
            markersize=6,
            label="outliers",
        )
    axis.set_yscale("log")
    axis.set_ylim(floor, 3 * peak if peak > 0 else 10.0)
    legend(axis)
    text = "Spectral density" if title is None else title
    dress(axis, text, "eigenvalue", "density")
    return axis


def _ranks(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def eigenvalues(
    found: Eigenpairs | ArrayLike,
    *,
    ax: Axes | None = None,
    residuals: ArrayLike | None = None,
    scale: Scale = "auto",
    title: str | None = None,
) -> Axes:
    """Plot the leading eigenvalues with the bounds on their errors.

    An eigenvalue of the operator lies within the error bar, its residual, of each one.
    Those not converged have hollow dots, negative ones another colour.

    Args:
        found: result of `eigenpairs`, or eigenvalues of shape (k,).
        ax: where to draw; None makes a new figure, which is `ax.figure` of the result.
        residuals: error bars of bare eigenvalues, shape (k,); a result of `eigenpairs`
            has its own.
        scale: "linear", "log" or "auto": logarithmic where no value is negative and
            they span a factor above 50.
        title: None takes "Eigenvalues".

    Returns:
        The axis. Values that are not finite leave gaps.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there are none, residuals of another shape or given twice, or for
            an unknown scale.

    Example:
        >>> from basinax.landscape import plots
        >>> axis = plots.eigenvalues([5.0, 3.0, -1.0], residuals=[0.1, 0.2, 0.1])
        >>> axis.get_ylabel()
        'eigenvalue'

    Reference:
        Wu and Simon, *Thick-restart Lanczos method for large symmetric eigenvalue
        problems*, SIAM J. Matrix Anal. Appl. 22, 2000.
    """
    pairs: Any = found if hasattr(found, "values") else None
    values = vector(found if pairs is None else pairs.values, "the eigenvalues")
    converged = np.ones(values.size, bool)
    if pairs is not None:
        if residuals is not None:
            raise ValueError("residuals were given, but the eigenpairs have their own.")
        residuals, converged = pairs.residuals, np.asarray(pairs.converged)
    axis = new_axis(ax)
    at = np.arange(1, values.size + 1)
    logarithmic = wants_log(values, scale)
    if logarithmic:
        axis.set_yscale("log")
    else:
        axis.axhline(0.0, color=INK, linewidth=0.8)
        colours = [VERMILION if value < 0 else BLUE for value in values]
        axis.vlines(at, 0.0, values, colors=colours, linewidth=2.5, alpha=0.6)
    if residuals is not None:
        bars = vector(residuals, "residuals", values.size)
        axis.errorbar(
            at, values, bars, fmt="none", ecolor=INK, elinewidth=1.2, capsize=4
        )
    for sign, colour, name in ((1, BLUE, "positive"), (-1, VERMILION, "negative")):
        for done in (True, False):
            chosen = ((values < 0) == (sign < 0)) & (converged == done)
            if chosen.any():
                axis.plot(
                    at[chosen],
                    values[chosen],
                    "o",
                    color=colour,
                    markersize=7,
                    markerfacecolor=colour if done else "none",
                    label=name if done else f"{name}, not converged",
                )
    _ranks(axis)
    axis.set_xlim(0.5, values.size + 0.5)
    if (values < 0).any() or not converged.all():
        legend(axis)
    text = "Eigenvalues" if title is None else title
    dress(axis, text, "rank", "eigenvalue")
    return axis


def _singular_values(x: Any, name: str) -> np.ndarray:
    found = np.asarray(x, np.float64)
    if found.ndim not in (1, 2) or not found.size:
        raise ValueError(
            f"{name} must be a matrix or a vector of its singular values, got shape "
            f"{found.shape}."
        )
    if not np.isfinite(found).all():
        raise ValueError(
            f"{name} has entries that are not finite, so it has no singular values."
        )
    values = np.linalg.svd(found, compute_uv=False) if found.ndim == 2 else found
    return np.sort(values)[::-1]


def singular_values(
    before: ArrayLike,
    after: ArrayLike | None = None,
    *,
    ax: Axes | None = None,
    threshold: float | None = None,
    scale: Scale = "auto",
    title: str | None = None,
) -> Axes:
    """Plot the singular values of an update before and after it was clipped.

    Args:
        before: matrix (m, n), or its singular values (k,) in any order.
        after: the matrix that came of it, or its singular values; None for one spectrum
            alone.
        ax: where to draw; None makes a new figure, which is `ax.figure` of the result.
        threshold: level to draw dotted, the one that singular values are clipped to.
        scale: "linear", "log" or "auto": logarithmic where they span a factor above
            50.
        title: None takes "Singular values".

    Returns:
        The axis. Zeros are below a logarithmic scale.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: on what is neither a matrix nor a vector, on entries that are not
            finite, or an unknown scale.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import plots
        >>> update = jnp.diag(jnp.array([1.0, 4.0, 2.0]))
        >>> clipped = jnp.array([1.0, 2.0, 2.0])
        >>> axis = plots.singular_values(update, clipped, threshold=2.0)
        >>> axis.lines[0].get_ydata().round(4).tolist()
        [4.0, 2.0, 1.0]

    Reference:
        *SPECTRA*, arXiv:2603.14315.
    """
    spectra = {"before": _singular_values(before, "before")}
    if after is not None:
        spectra["after"] = _singular_values(after, "after")
    axis = new_axis(ax)
    for (name, values), colour in zip(spectra.items(), (VERMILION, BLUE), strict=False):
        axis.plot(
            np.arange(1, values.size + 1),
            values,
            color=colour,
            linewidth=1.6,
            marker="o" if values.size <= 64 else "",
            markersize=4,
            label=name,
        )
    if wants_log(np.concatenate([*spectra.values()]), scale):
        axis.set_yscale("log")
    if threshold is not None:
        label = f"threshold {threshold:.3g}"
        axis.axhline(threshold, color=INK, linestyle=":", linewidth=1.6, label=label)
    _ranks(axis)
    if len(axis.lines) > 1:
        legend(axis)
    text = "Singular values" if title is None else title
    dress(axis, text, "rank", "singular value")
    return axis


def cosines(
    found: GradientCosines | ArrayLike,
    *,
    ax: Axes | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
) -> Axes:
    """Plot the cosines between gradients of several tasks or sources as a matrix.

    Blue agrees, red conflicts. Cosines that are not finite leave hatched gaps.

    Args:
        found: result of `gradient_cosines`, or a matrix (T, T).
        ax: where to draw; None makes a new figure, which is `ax.figure` of the result.
        labels: names of the T tasks; None numbers them.
        title: None takes "Gradient cosines", with the mean and the share of conflicts
            where they are known.

    Returns:
        The axis. The numbers are in the cells of up to ten tasks.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: on what is not a square matrix, or on labels of another number.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import gradient_cosines, plots
        >>> grads = jnp.array([[1.0, 0.0], [-3.0, 4.0]])
        >>> axis = plots.cosines(gradient_cosines(grads), labels=["parse", "tag"])
        >>> axis.get_title(loc="left")
        'Gradient cosines: mean -0.60, 100% of pairs conflict'

    Reference:
        Yu et al., *Gradient surgery for multi-task learning*, NeurIPS 2020,
        arXiv:2001.06782.
    """
    matrix = np.asarray(getattr(found, "cosines", found), np.float64)
    if matrix.ndim != 2 or len(set(matrix.shape)) != 1 or not matrix.size:
        raise ValueError(f"cosines must be a matrix (T, T), got shape {matrix.shape}.")
    count = len(matrix)
    names = [*map(str, labels if labels is not None else range(count))]
    if len(names) != count:
        raise ValueError(f"labels must name {count} tasks, got {len(names)}.")
    axis = new_axis(ax, 6.4, 5.2)
    if not np.isfinite(matrix).all():
        hatch(axis, (-0.5, -0.5), count, count)
    image = axis.imshow(
        np.ma.masked_invalid(matrix),
        cmap="RdBu",
        vmin=-1.0,
        vmax=1.0,
        interpolation="nearest",
    )
    if count <= _CELLS:
        for (i, j), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                ink = "#FFFFFF" if abs(value) > 0.6 else "#222222"
                text = f"{value:.2f}"
                axis.text(j, i, text, ha="center", va="center", fontsize=9, color=ink)
    colour_bar(axis, image, "cosine", ticks=[-1.0, -0.5, 0.0, 0.5, 1.0])
    if labels is not None or count <= _CELLS:
        axis.set_xticks(range(count), names)
        axis.set_yticks(range(count), names)
        if max(map(len, names)) * count > 40:
            for text in axis.get_xticklabels():
                text.set(rotation=45, ha="right", rotation_mode="anchor")
    text = "Gradient cosines"
    summary: Any = found if hasattr(found, "conflict") else None
    if summary is not None:
        mean, share = float(summary.mean), float(summary.conflict)
        text = f"{text}: mean {mean:.2f}, {share:.0%} of pairs conflict"
    dress(axis, text if title is None else title, "task", "task", grid=False)
    axis.spines[:].set_visible(False)
    return axis
