"""Epsilon-sharpness: the largest relative rise of the loss within a box.

    100 · (max L(w + d) - L(w)) / (1 + L(w))  over  |d_i| <= epsilon (|w_i| + 1)

or over a box in a random subspace.

Reference: Keskar, Mudigere, Nocedal, Smelyanskiy, Tang, *On large-batch training*
(ICLR 2017, arXiv:1609.04836).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from basinax.landscape._draws import normal_like
from basinax.landscape._sandwich import as_partial
from basinax.landscape._sharpness import check_radius, unit, value_at
from basinax.landscape._vectors import check_vector, size, widen
from basinax.landscape._worst_case import ascend, check_count

_HIGHEST = jax.lax.Precision.HIGHEST


class EpsilonSharpness(NamedTuple):
    """Result of `epsilon_sharpness`.

    Attributes:
        value: 100 (max L - L) / (1 + L), a percentage.
        rise: max L - L, in units of the loss.
    """

    value: Float[Array, ""]
    rise: Float[Array, ""]


def epsilon_sharpness(
    loss_fn: Callable[..., Float[Array, ""]],
    params: PyTree,
    *args: PyTree,
    epsilon: Float[Array, ""] | float = 1e-3,
    steps: int = 20,
    num_directions: int | None = None,
    key: PRNGKeyArray | None = None,
) -> EpsilonSharpness:
    """Measure the sharpness of Keskar et al.: the relative rise within a box.

    The box is |d_i| <= epsilon (|w_i| + 1), so that it neither vanishes for zero
    weights nor is absolute for large ones. In a random subspace, d = A y with p
    Gaussian unit directions as columns of A, it is |y_i| <= epsilon (|(A⁺ w)_i| + 1).

    The maximum is sought by the sign ascent of `worst_case_sharpness` rather than by a
    quasi-Newton method.

    Args:
        loss_fn: scalar loss, called as `loss_fn(params, *args)`.
        params: tree of real floating-point arrays w.
        *args: further arguments, such as a batch.
        epsilon: half the width of the box; 1e-3 and 5e-4 are in use.
        steps: number of ascent steps.
        num_directions: dimension p of the random subspace, which needs p times the
            memory of the parameters; None for the whole space.
        key: random key for the subspace.

    Returns:
        The percentage and the rise. NaN as in `worst_case_sharpness`.

    Raises:
        ValueError: for a negative epsilon, fewer than one step, a dimension beyond the
            number of parameters, a subspace without key, or parameters as in
            `sam_sharpness`.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import epsilon_sharpness
        >>> loss = lambda w: 1 + jnp.sum(w)
        >>> result = epsilon_sharpness(loss, jnp.array([1.0, -1.0]), epsilon=0.25)
        >>> float(result.rise), float(result.value)  # 2 · 0.25 · 2; 100 · 1 / (1 + 1)
        (1.0, 50.0)

    Reference:
        arXiv:1609.04836, Metric 2.1.
    """
    check_radius("epsilon", epsilon)
    check_count("steps", steps)
    check_vector(params, "params")
    loss = as_partial(loss_fn)
    if num_directions is None:
        scale = _box(params)
        rise = ascend(loss, params, args, scale, epsilon, steps, "linf")
    else:
        if not 1 <= num_directions <= size(params):
            raise ValueError(
                "num_directions must lie between 1 and the number of parameters, "
                f"{size(params)}; got {num_directions}."
            )
        if key is None:
            raise ValueError("A random subspace needs key=jax.random.key(...).")
        draws = [
            _unit(normal_like(jax.random.fold_in(key, index), params))
            for index in range(num_directions)
        ]
        basis = jax.tree.map(lambda *rows: jnp.stack(rows), *draws)
        coordinates = _coordinates(basis, params)
        inside = Partial(_on_subspace, loss)
        rise = ascend(
            inside,
            jnp.zeros_like(coordinates),
            (params, basis, args),
            _box(coordinates),
            epsilon,
            steps,
            "linf",
        )
    return EpsilonSharpness(100 * rise / (1 + value_at(loss, params, args)), rise)


_unit = jax.jit(unit)


@jax.jit
def _box(params: PyTree) -> PyTree:
    return jax.tree.map(lambda w: jnp.abs(w) + 1, widen(params))


def _contract(rows: Array, others: Array, spec: str) -> Array:
    # On an Explicit mesh a contraction over sharded axes must name its result.
    axes = (None,) * len(spec.split("->")[1])
    whole = NamedSharding(jax.typeof(rows).sharding.mesh, PartitionSpec(*axes))
    return jnp.einsum(spec, rows, others, precision=_HIGHEST, out_sharding=whole)


@jax.jit
def _coordinates(basis: PyTree, params: PyTree) -> Float[Array, "p"]:
    """Compute A⁺ w by the normal equations of nearly orthogonal columns."""

    def total(other: PyTree, spec: str) -> Array:
        parts = jax.tree.map(lambda a, b: _contract(a, b, spec), basis, other)
        return functools.reduce(jnp.add, jax.tree.leaves(parts))

    gram = total(basis, "i...,j...->ij")
    return jnp.linalg.solve(gram, total(widen(params), "i...,...->i"))


def _on_subspace(
    loss: Partial,
    coordinates: Float[Array, "p"],
    params: PyTree,
    basis: PyTree,
    args: tuple,
) -> Float[Array, ""]:
    moved = jax.tree.map(
        lambda w, rows: (
            w
            + jnp.tensordot(
                coordinates.astype(rows.dtype), rows, 1, precision=_HIGHEST
            ).astype(w.dtype)
        ),
        params,
        basis,
    )
    return value_at(loss, moved, args)
