"""The plane in which a training run moved most.

With the displacements D_t = w_t - w_T from the last point as rows of a matrix, the
directions are its leading right singular vectors,

    D v_i = s_i u_i,        explained_i = s_i² / Σ_t ‖D_t‖²,

found from the T x T Gram matrix D Dᵀ, as D itself would be as long as the parameters.

References: Lorch, *Visualizing deep network training trajectories with PCA* (2016); Li
et al., *Visualizing the loss landscape of neural nets*, arXiv:1712.09913, section 7.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from basinax.landscape._lanczos import combine, components, rounding_unit, take
from basinax.landscape._moves import check_direction, is_none, movable
from basinax.landscape._vectors import (
    check_concrete,
    check_same,
    inner,
    norm,
    size,
    widen,
)

_HIGHEST = jax.lax.Precision.HIGHEST


class TrajectoryDirections(NamedTuple):
    """The plane (or space) of a training run.

    Attributes:
        directions: orthonormal trees like the parameters in at least float32, the one
            along which the run moved most first.
        coordinates: of the points in units of the directions, shape (T, num); those of
            the last point, the origin, are 0.
        explained: share of the squared distances from the last point that lies along
            each direction, shape (num,).
    """

    directions: tuple[PyTree, ...]
    coordinates: Float[Array, "T num"]
    explained: Float[Array, "num"]


def _stacked(trajectory: Any) -> PyTree:
    """Check a trajectory; return a tree with a leading axis of time."""
    if type(trajectory) in (list, tuple):
        trees = [movable(tree) for tree in trajectory]
        shapes = [jax.tree.map(jnp.shape, tree) for tree in trees]
        for index, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    "all points of a trajectory must be trees of the same shapes, but "
                    f"point 0 has {shapes[0]} and point {index} has {shape}."
                )
        rows = jax.tree.map(lambda *x: jnp.stack(x), *trees) if trees else None
    else:
        rows = movable(trajectory)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(rows)}
    if len(lengths) != 1 or min(lengths) in ((), (0,), (1,)) or not size(rows):
        shapes = jax.tree.map(jnp.shape, trajectory)
        raise ValueError(
            "a trajectory needs at least two points: a list of trees like the "
            "parameters, or one tree with a leading axis of time on every leaf; got "
            f"shapes {shapes}."
        )
    return rows


@jax.jit
def _displacements(rows: PyTree) -> tuple[PyTree, Float[Array, ""], Float[Array, ""]]:
    """Subtract the last point; scale to length one over all rows together.

    Returns:
        The scaled displacements, their length before, and that of the points.
    """
    rows = widen(rows)
    moved = jax.tree.map(lambda x: x - x[-1:], rows)
    length = norm(moved)
    unit = jnp.where(length > 0, length, 1)
    return (
        jax.tree.map(lambda x: x / unit.astype(x.dtype), moved),
        length,
        norm(rows),
    )


@jax.jit
def _gram(rows: PyTree) -> Float[Array, "T T"]:
    def contract(x: Float[Array, "T *s"]) -> Float[Array, "T T"]:
        # On an Explicit mesh a contraction over sharded axes must name its result.
        whole = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(None, None))
        return jnp.einsum("i...,j...->ij", x, x, precision=_HIGHEST, out_sharding=whole)

    return functools.reduce(jnp.add, map(contract, jax.tree.leaves(rows)))


@jax.jit
def _unit(direction: PyTree) -> PyTree:
    length = norm(direction)
    return jax.tree.map(lambda x: x / length.astype(x.dtype), direction)


@jax.jit
def _without(rows: PyTree, direction: PyTree, along: Float[Array, "T"]) -> PyTree:
    """Subtract from every row its part along a unit direction."""

    def subtract(x: Float[Array, "T *s"], d: Float[Array, "*s"]) -> Array:
        amounts = along.astype(x.dtype).reshape((-1,) + (1,) * d.ndim)
        return x - amounts * d[None]

    return jax.tree.map(subtract, rows, direction)


def trajectory_directions(
    trajectory: PyTree | Sequence[PyTree], *, num: int = 2
) -> TrajectoryDirections:
    """Find the directions along which a training run moved most.

    In random directions a path of training looks like a point, as it is orthogonal to
    nearly all of them. These directions come from a principal component analysis of the
    displacements from the last point, so draw them around it:

        found = trajectory_directions(points)
        surface = plane(loss, points[-1], *found.directions, images, labels)

    with the path at `found.coordinates`; `coordinates` locates further points. The
    displacements are not centred: the plane goes through the last point and, of all
    that do, lies closest to the path. A large explained share is no sign of structure
    by itself, as the path of a random walk in many dimensions has it too.

    Args:
        trajectory: the points in order, at least `num` + 1: a list or tuple of trees of
            parameters, or one tree with a leading axis of time on every leaf. All are
            copied twice in at least float32.
        num: number of directions.

    Returns:
        The directions, the path in their coordinates, and explained shares. Signs are
        such that the coordinate of largest magnitude is positive. Leaves that are not
        floating point are None.

    Raises:
        ValueError: for fewer than two points, points of different shapes, all equal or
            not finite, points that span fewer than `num` directions (up to the rounding
            of the points), a `num` below one, and traced arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import trajectory_directions
        >>> path = jnp.array([[3.0, 4.0, 1.0], [3.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
        >>> found = trajectory_directions(path)
        >>> float(found.explained.sum().round(3))  # the path lies in a plane
        1.0
        >>> len(found.directions), found.coordinates.shape
        (2, (3, 2))

    Reference:
        arXiv:1712.09913, section 7.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}.")
    check_concrete(trajectory, "trajectory_directions")
    rows, length, scale = _displacements(_stacked(trajectory))
    if not np.isfinite([length, scale]).all():
        raise ValueError("the points of a trajectory must be finite; found NaN or inf.")
    eps = rounding_unit(rows)
    if length <= eps * scale:
        raise ValueError("all points of the trajectory are equal, up to rounding.")
    rest, directions, shares = rows, [], []
    for index in range(num):
        # From what earlier ones left, as the Gram matrix squares the ratio of lengths;
        # and twice, after which what is left is orthogonal to them.
        for direction in 2 * directions:
            rest = _without(rest, direction, components(rest, direction))
        gram = np.asarray(_gram(rest), np.float64)
        if length * np.sqrt(np.trace(gram)) <= eps * scale:
            raise ValueError(
                f"the points of the trajectory span {index} direction(s) only, but "
                f"num={num} were asked for."
            )
        values, vectors = np.linalg.eigh(gram)
        weights = vectors[:, -1:] * np.sign(
            vectors[np.abs(vectors[:, -1]).argmax(), -1]
        )
        directions.append(_unit(take(combine(rest, jnp.asarray(weights)), 0)))
        shares.append(values[-1])
    columns = [components(rows, direction) for direction in directions]
    dtype = jnp.result_type(*columns)
    return TrajectoryDirections(
        tuple(directions),
        length.astype(dtype) * jnp.stack(columns, 1),
        jnp.asarray(np.array(shares) / max(1, sum(shares)), dtype),
    )


def coordinates(
    params: PyTree, origin: PyTree, directions: Sequence[PyTree]
) -> Float[Array, "d"]:
    """Locate a point in the plane of some directions, by least squares.

    Args:
        params: tree of parameters of the point.
        origin: tree of parameters that the plane goes through.
        directions: trees like the parameters, of any lengths and angles, with None for
            leaves that stay put.

    Returns:
        The multiples a for which origin + Σ a_i d_i comes closest to the point.

    Raises:
        ValueError: for trees that do not fit, directions that are zero, not finite or
            linearly dependent, and traced arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import coordinates
        >>> directions = (jnp.array([1.0, 0.0, 0.0]), jnp.array([1.0, 1.0, 0.0]))
        >>> found = coordinates(jnp.array([3.0, 2.0, 7.0]), jnp.zeros(3), directions)
        >>> found.round(3).tolist()
        [1.0, 2.0]
    """
    check_concrete((params, origin, directions), "coordinates")
    check_same(movable(params), movable(origin), "params")
    directions = [
        check_direction(direction, origin, f"directions[{index}]")
        for index, direction in enumerate(directions)
    ]
    gram, right = _normal_equations(movable(params), movable(origin), directions)
    lengths = np.sqrt(np.diag(gram))
    cosines = np.asarray(gram, np.float64) / np.outer(lengths, lengths)
    if np.linalg.eigvalsh(cosines)[0] < 16 * jnp.finfo(gram.dtype).eps:
        raise ValueError(
            "the directions are linearly dependent, so a point has no unique "
            f"coordinates; the cosines between them are {cosines.round(6).tolist()}."
        )
    found = np.linalg.solve(cosines, np.asarray(right, np.float64) / lengths) / lengths
    return jnp.asarray(found, gram.dtype)


@jax.jit
def _normal_equations(
    params: PyTree, origin: PyTree, directions: list[PyTree]
) -> tuple[Float[Array, "d d"], Float[Array, "d"]]:
    away = jax.tree.map(jnp.subtract, widen(params), widen(origin))

    def product(direction: PyTree, other: PyTree) -> Float[Array, ""]:
        pairs = jax.tree.map(
            lambda d, x: None if d is None or x is None else inner(d, x),
            direction,
            other,
            is_leaf=is_none,
        )
        return functools.reduce(jnp.add, jax.tree.leaves(pairs))

    gram = [[product(d, other) for other in directions] for d in directions]
    return jnp.stack([jnp.stack(row) for row in gram]), jnp.stack(
        [product(d, away) for d in directions]
    )
