"""Contours of the loss over a plane, and the paths that training took in it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from basinax.landscape._plot_levels import contour_levels
from basinax.landscape._plot_style import (
    COLOURS,
    INK,
    Axes,
    Scale,
    colour_bar,
    dress,
    hatch,
    named,
    new_axis,
    vector,
)
from basinax.landscape._surface import Plane
from basinax.landscape._trajectory_directions import TrajectoryDirections

Points = ArrayLike | TrajectoryDirections
Paths = Points | Mapping[str, Points]

# Matplotlib's contours end at 1e250, and begin at 1e-250 on a logarithmic scale.
_HUGE, _TINY = 1e200, 1e-200
# Marks over a colour map: readable on its dark and on its bright end.
_LIGHT, _DARK = "#FFFFFF", "#222222"
# How much of the way to the border the longest arrow goes.
_REACH = 0.6


def _fill(
    axis: Axes,
    grid: tuple[np.ndarray, np.ndarray, np.ndarray],
    edges: np.ndarray,
    logarithmic: bool,
    colorbar: bool,
) -> None:
    """Draw contours of the finite losses, with their colour bar."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter

    x, y, losses = grid
    seen = losses[np.isfinite(losses)]
    below, above = bool(seen.min() < edges[0]), bool(seen.max() > edges[-1])
    shown = np.ma.masked_invalid(losses.T)
    filled = axis.contourf(
        x,
        y,
        np.ma.maximum(shown, _TINY) if logarithmic else shown,
        levels=edges,
        cmap="viridis",
        norm=(LogNorm if logarithmic else Normalize)(edges[0], edges[-1]),
        extend={(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[
            below, above
        ],
    )
    inside = edges[(edges > seen.min()) & (edges < seen.max())]
    if inside.size:
        axis.contour(
            x, y, shown, levels=inside, colors=_LIGHT, linewidths=0.6, alpha=0.5
        )
    if colorbar:
        notes = ["log scale"] * logarithmic
        notes += [f"smallest {seen.min():.3g}"] * below
        notes += [f"largest {seen.max():.3g}"] * above
        label = f"loss ({', '.join(notes)})" if notes else "loss"
        flat = len(edges) == 2 and np.ptp(seen) == 0
        ticks = seen[:1] if flat else edges
        short = FuncFormatter(lambda value, _: f"{value:.6g}")
        colour_bar(axis, filled, label, ticks=ticks, format=short)


def _halo(width: float, colour: str) -> list:
    from matplotlib.patheffects import Normal, Stroke

    return [Stroke(linewidth=width, foreground=colour), Normal()]


def _coordinates(path: Any, name: str) -> np.ndarray:
    found = np.asarray(getattr(path, "coordinates", path), np.float64)
    if found.ndim != 2 or found.shape[1] < 2 or not len(found):
        raise ValueError(
            f"{name} must be coordinates in the plane, of shape (n, 2); "
            f"got shape {found.shape}."
        )
    return found[:, :2]


def _draw_path(axis: Axes, at: np.ndarray, name: str, colour: str, edge: str) -> None:
    """Draw a path from a dot to a star."""
    dots = "o" if len(at) <= 100 else ""
    (line,) = axis.plot(
        *at.T,
        color=colour,
        linewidth=1.8,
        marker=dots,
        markersize=3,
        label=name,
        zorder=3,
    )
    if edge != INK:
        line.set_path_effects(_halo(3.2, edge))
    for end, marker, size in ((at[:1], "o", 7), (at[-1:], "*", 13)):
        (mark,) = axis.plot(*end.T, marker, color=colour, markersize=size, zorder=4)
        mark.set(markeredgecolor=edge, label="_end")


def _draw_directions(axis: Axes, directions: Any, span: np.ndarray) -> None:
    """Draw arrows from the centre on one scale, with their names at the tips."""
    if not isinstance(directions, Mapping):
        rows = np.atleast_2d(np.asarray(directions, np.float64))
        directions = {str(k + 1): row for k, row in enumerate(rows)}
    rows = {name: vector(row, name, 2) for name, row in directions.items()}
    moves = np.array(list(rows.values()))
    room = np.where(moves > 0, span[:, 1], -span[:, 0])
    shares = np.abs(moves) / np.where(room > 0, room, np.ptp(span, axis=1))
    longest = shares.max(initial=0.0)
    if not 0 < longest < np.inf:
        raise ValueError(
            "directions must be finite and must not all vanish in the plane; "
            f"got {moves.tolist()}."
        )
    tips = moves * (_REACH / longest)
    axis.quiver(
        np.zeros(len(tips)),
        np.zeros(len(tips)),
        *tips.T,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.008,
        color=_LIGHT,
        edgecolor=_DARK,
        linewidth=0.6,
        zorder=3,
    )
    for name, tip in zip(rows, tips, strict=True):
        axis.annotate(
            name,
            tip,
            xytext=6 * tip / np.hypot(*tip) if tip.any() else (6, 6),
            textcoords="offset points",
            ha="left" if tip[0] >= 0 else "right",
            va="bottom" if tip[1] >= 0 else "top",
            fontsize=10,
            color=_LIGHT,
            path_effects=_halo(2.2, _DARK),
            zorder=5,
        )


def _direction_labels(path: Any) -> tuple[str, str]:
    """Name the axes, with the explained shares where they are known."""
    explained = getattr(path, "explained", None)
    if explained is None:
        return "direction 1", "direction 2"
    first, second = np.asarray(explained, np.float64)[:2]
    return (
        f"direction 1, {first:.1%} of the motion",
        f"direction 2, {second:.1%} of the motion",
    )


def surface(
    plane: Plane,
    *,
    ax: Axes | None = None,
    path: Paths | None = None,
    directions: ArrayLike | Mapping[str, ArrayLike] | None = None,
    scale: Scale = "auto",
    levels: int | Sequence[float] = 12,
    vmin: float | None = None,
    vmax: float | None = None,
    colorbar: bool = True,
    title: str | None = None,
) -> Axes:
    """Plot contours of the loss over a plane through the parameters.

    The centre, where the parameters are, has a cross. Losses that are not finite, or
    beyond 1e200, leave a hatched gap. Surfaces that are to be compared need the same
    `vmin` and `vmax`: then their levels and colours agree; what lies beyond the levels
    takes the colour at the end of the bar, whose label says how far it goes.

    Args:
        plane: result of `plane`, or anything with its fields: `x` of shape (n,), `y`
            of shape (m,), and `losses` of shape (n, m).
        ax: where to draw; None makes a new figure, which is `ax.figure` of the result.
        path: points to draw in the plane, from a dot to a star: coordinates of shape
            (n, 2), a result of `trajectory_directions`, whose explained shares then
            name the axes, or a mapping of names to any of these.
        directions: arrows from the centre, one per row of (k, 2) or a mapping of names
            to pairs; coordinates of eigenvectors, say. The arrows have a common scale,
            on which the longest stays inside.
        scale: of the colours, "linear", "log" or "auto": logarithmic where the losses
            are not negative and span a factor above 50. Zeros are below a logarithmic
            scale.
        levels: at most how many bands between round values, or their values, ascending.
        vmin: loss at which the levels start; None takes the smallest.
        vmax: loss at which they end; None takes the largest.
        colorbar: whether to draw a colour bar.
        title: None takes "Loss surface".

    Returns:
        The axis.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: on shapes that do not fit, fewer than two points in `x` or `y`,
            limits or levels that do not ascend, or an unknown scale.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import plane, plots
        >>> def loss(w):
        ...     return w[0] ** 2 + 4 * w[1] ** 2
        >>> across, up = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> bowl = plane(loss, jnp.zeros(2), across, up, x=jnp.linspace(-1.0, 1.0, 5))
        >>> axis = plots.surface(bowl, path=jnp.array([[0.9, 0.8], [0.0, 0.0]]))
        >>> axis.get_xlabel(), axis.get_ylabel()
        ('direction 1', 'direction 2')

    Reference:
        Li, Xu, Taylor, Studer, Goldstein, *Visualizing the loss landscape of neural
        nets*, NeurIPS 2018, arXiv:1712.09913.
    """
    axis = new_axis(ax, 6.4, 4.8)
    x, y = vector(plane.x, "x"), vector(plane.y, "y")
    if not jax.tree_util.all_leaves([plane.losses]):
        raise ValueError(
            "losses is a tree; draw one of its grids, for instance "
            "plots.surface(plane._replace(losses=plane.losses['test']))."
        )
    losses = np.asarray(plane.losses, np.float64)
    if losses.shape != (x.size, y.size) or min(losses.shape) < 2:
        raise ValueError(
            "a surface needs losses of shape (len(x), len(y)), both at least 2; got "
            f"shape {losses.shape} for {x.size} x and {y.size} y."
        )
    paths = {} if path is None else named(path, "path")
    points = {name: _coordinates(p, name) for name, p in paths.items()}
    finite = np.abs(losses) < _HUGE
    losses = np.where(finite, losses, np.nan)
    if not finite.all():
        hatch(axis, (x.min(), y.min()), np.ptp(x), np.ptp(y))
    if finite.any():
        seen = losses[finite]
        edges, logarithmic = contour_levels(seen, scale, levels, vmin, vmax)
        _fill(axis, (x, y, losses), edges, logarithmic, colorbar)
    span = np.array([[x.min(), x.max()], [y.min(), y.max()]])
    if (span[:, 0] <= 0).all() and (span[:, 1] >= 0).all():
        axis.plot([0.0], [0.0], "+", color=_LIGHT, markersize=10, markeredgewidth=1.8)
        axis.lines[-1].set(path_effects=_halo(3.2, _DARK), label="_centre", zorder=4)
    if directions is not None:
        _draw_directions(axis, directions, span)
    for number, (name, at) in enumerate(points.items()):
        _draw_path(axis, at, name, COLOURS[(number + 1) % len(COLOURS)], _LIGHT)
    _set_limits(axis, span, list(points.values()))
    if len(points) > 1 or not finite.all():
        axis.legend(fontsize=9, labelcolor=_DARK, facecolor=_LIGHT, framealpha=0.85)
    text = "Loss surface" if title is None else title
    dress(axis, text, *_direction_labels(path), grid=False)
    return axis


def _set_limits(axis: Axes, span: np.ndarray, points: list[np.ndarray]) -> None:
    """Show the whole plane, and every path that leaves it with a margin."""
    for (low, high), limit, k in zip(
        span, (axis.set_xlim, axis.set_ylim), (0, 1), strict=True
    ):
        seen = np.concatenate([p[:, k] for p in points] or [np.zeros(0)])
        seen = seen[np.isfinite(seen)]
        margin = 0.05 * max(np.ptp([*seen, low, high]), 0.0)
        left, right = seen.min(initial=low), seen.max(initial=high)
        limit(left - margin * (left < low), right + margin * (right > high))


def trajectory(found: Any, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Plot the path that training took, in its two principal directions.

    On top of the loss in that plane it is drawn by `surface(..., path=found)`.

    Args:
        found: result of `trajectory_directions`, or coordinates of shape (n, 2), or a
            mapping of names to either.
        ax: where to draw; None makes a new figure, which is `ax.figure` of the result.
        title: None takes "Trajectory".

    Returns:
        The axis.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: on coordinates in fewer than two directions, or none at all.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import plots
        >>> axis = plots.trajectory(jnp.array([[2.0, 1.0], [1.0, 0.2], [0.0, 0.0]]))
        >>> axis.lines[0].get_xdata().tolist()
        [2.0, 1.0, 0.0]

    Reference:
        arXiv:1712.09913, section 7.
    """
    axis = new_axis(ax)
    points = {n: _coordinates(p, n) for n, p in named(found, "path").items()}
    for number, (name, at) in enumerate(points.items()):
        _draw_path(axis, at, name, COLOURS[number % len(COLOURS)], INK)
    if len(points) > 1:
        axis.legend(frameon=False, labelcolor=INK, fontsize=9)
    text = "Trajectory" if title is None else title
    dress(axis, text, *_direction_labels(found))
    return axis
