"""The loss along a line and over a plane through the parameters.

    L(w + t d)        and        L(w + x d₁ + y d₂)

Reference: Li, Xu, Taylor, Studer, Goldstein, *Visualizing the loss landscape of neural
nets* (NeurIPS 2018, arXiv:1712.09913).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from basinax.landscape._moves import check_direction, shifted
from basinax.landscape._points import Batches, evaluate_points
from basinax.landscape._vectors import check_concrete


class Line(NamedTuple):
    """Losses along a line.

    Attributes:
        steps: multiples t of the direction.
        losses: L(w + t d), one per step; a tree of such if the loss returns a tree.
    """

    steps: Float[Array, "n"]
    losses: PyTree


class Plane(NamedTuple):
    """Losses over a plane.

    Attributes:
        x: multiples of the first direction.
        y: multiples of the second direction.
        losses: `losses[i, j]` is L(w + x[i] d₁ + y[j] d₂); a tree of such grids if the
            loss returns a tree.
    """

    x: Float[Array, "nx"]
    y: Float[Array, "ny"]
    losses: PyTree


def _point(amounts: Float[Array, "d"], operands: PyTree) -> PyTree:
    params, directions = operands
    return shifted(params, directions, amounts)


def _grid(values: Any, name: str) -> np.ndarray:
    grid = np.asarray(values, np.float64)
    if grid.ndim != 1 or len(grid) < 2 or not np.isfinite(grid).all():
        raise ValueError(
            f"{name} must be a list of at least two finite numbers, got "
            + (f"{grid.tolist()}." if grid.size < 9 else f"shape {grid.shape}.")
        )
    return grid


def _dtype(losses: PyTree) -> jnp.dtype:
    return jnp.result_type(*jax.tree.leaves(losses))


def line(
    loss_fn: Callable[..., PyTree],
    params: PyTree,
    direction: PyTree,
    *args: PyTree,
    steps: Float[ArrayLike, "n"] | Sequence[float] | None = None,
    batches: Batches | None = None,
    weights: Sequence[float] | None = None,
    recalibrate: Callable[..., PyTree] | None = None,
    chunk_size: int | None = None,
    progress: Callable[[int, int | None], Any] | None = None,
) -> Line:
    """Evaluate the loss along a line through the parameters.

    See `plane` for what loss, batches and statistics have to look like.

    Args:
        loss_fn: called as `loss_fn(params, *args, *batch)`, returns one real number or
            a tree of such.
        params: tree of parameters w.
        direction: tree d like the parameters, with None for leaves that stay put; see
            `random_directions`, `eigen_directions`, `trajectory_directions`.
        *args: further arguments of the loss, such as one batch.
        steps: multiples t; by default 51 from -1 to 1.
        batches: batches to average over, as in `plane`.
        weights: number of examples of each batch.
        recalibrate: called as `recalibrate(params, *args)` at every point, as in
            `plane`.
        chunk_size: points evaluated at once, as in `plane`.
        progress: called as `progress(done, total)` after every chunk.

    Returns:
        The steps and the losses there.

    Raises:
        ValueError: as `plane` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import line
        >>> def loss(w):
        ...     return jnp.sum(w**2)
        >>> w, d = jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])
        >>> found = line(loss, w, d, steps=[-1.0, 0.0, 1.0])
        >>> found.losses.tolist()
        [1.0, 1.0, 5.0]
    """
    check_concrete((params, direction, args), "line")
    amounts = _grid(np.linspace(-1, 1, 51) if steps is None else steps, "steps")
    losses = evaluate_points(
        _point,
        loss_fn,
        amounts[:, None],
        (params, (check_direction(direction, params, "direction"),)),
        args,
        batches=batches,
        weights=weights,
        recalibrate=recalibrate,
        chunk_size=chunk_size,
        progress=progress,
    )
    return Line(jnp.asarray(amounts, _dtype(losses)), losses)


def plane(
    loss_fn: Callable[..., PyTree],
    params: PyTree,
    d1: PyTree,
    d2: PyTree,
    *args: PyTree,
    x: Float[ArrayLike, "nx"] | Sequence[float] | None = None,
    y: Float[ArrayLike, "ny"] | Sequence[float] | None = None,
    batches: Batches | None = None,
    weights: Sequence[float] | None = None,
    recalibrate: Callable[..., PyTree] | None = None,
    chunk_size: int | None = None,
    progress: Callable[[int, int | None], Any] | None = None,
) -> Plane:
    """Evaluate the loss over a plane through the parameters.

    The surfaces of published pictures. Directions come from `random_directions`,
    `eigen_directions` or `trajectory_directions`, all of which return tuples:
    `plane(loss, params, *random_directions(params, key), images, labels)`.

    The points are made inside one compiled program, a chunk at a time, so that memory
    does not grow with their number, and calling again with new parameters, directions
    or data of the same shapes compiles nothing. The loss must be deterministic: switch
    dropout off or fix its key, or the surface is noise.

    Batch normalisation in evaluation mode uses stored statistics, which belong to w and
    not to the points around it, so that the surface is one of a network that training
    would never see. Let the statistics be part of the parameters, where as tensors of
    one axis they do not move, and compute them anew with `recalibrate`. It gets `args`
    only, so with `batches` hand it data there, which the loss then gets as well.

    Half-precision parameters reach the loss in float32, where the points of a grid
    can be told apart; a model that casts them back sees stairs.

    Args:
        loss_fn: called as `loss_fn(params, *args, *batch)`, returns one real number or
            a tree of such, as in `{"loss": ..., "accuracy": ...}`. Compiled once per
            function object.
        params: tree of parameters w. Leaves that are not real floating point stay put.
        d1: tree like the parameters, with None for leaves that stay put.
        d2: another one. They need not be orthogonal or of equal length.
        *args: further arguments of the loss, such as one batch.
        x: multiples of `d1`; by default 25 from -1 to 1.
        y: multiples of `d2`; by default those of `d1`.
        batches: batches to average over, if the data do not fit at once: a tuple of
            stacked arrays, a list of tuples, or a data loader, as in `over_batches`.
            They are gone through once, all points at each.
        weights: number of examples of each batch, or of whatever the loss is a mean
            over. Default: the length of the leading axis of its arrays.
        recalibrate: called as `recalibrate(params, *args)` at every point, and for
            every batch; returns the parameters that the loss gets.
        chunk_size: points evaluated at once, by `jax.vmap`. Default: 1 on CPU, where
            convolutions with different kernels side by side are several times slower
            than in turn, and 16 elsewhere. A small dense network may gain on CPU too.
        progress: called as `progress(done, total)` after every chunk, in evaluations of
            the loss: points times batches. The total is None if `batches` has no
            length.

    Returns:
        The grids and the losses, in at least float32. NaN and infinity stay.

    Raises:
        ValueError: for directions that do not fit the parameters, are zero or not
            finite, grids that are not two or more finite numbers, a chunk size below
            one, batches or weights that do not fit, a loss that returns anything but
            real numbers, and traced arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import plane
        >>> def loss(w):
        ...     return w[0] ** 2 + 10 * w[1] ** 2
        >>> w, d1, d2 = jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> found = plane(loss, w, d1, d2, x=[0.0, 1.0], y=[0.0, 1.0, 2.0])
        >>> found.losses.tolist()
        [[0.0, 10.0, 40.0], [1.0, 11.0, 41.0]]

    Reference:
        arXiv:1712.09913.
    """
    check_concrete((params, d1, d2, args), "plane")
    rows = _grid(np.linspace(-1, 1, 25) if x is None else x, "x")
    columns = rows if y is None else _grid(y, "y")
    directions = (
        check_direction(d1, params, "d1"),
        check_direction(d2, params, "d2"),
    )
    losses = evaluate_points(
        _point,
        loss_fn,
        np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2),
        (params, directions),
        args,
        batches=batches,
        weights=weights,
        recalibrate=recalibrate,
        chunk_size=chunk_size,
        progress=progress,
    )
    grids = jax.tree.map(lambda z: z.reshape(len(rows), len(columns)), losses)
    dtype = _dtype(losses)
    return Plane(jnp.asarray(rows, dtype), jnp.asarray(columns, dtype), grids)
