"""Gradients stacked on a leading axis: one row per example, micro-batch or source.

A row is index i on the leading axis of every leaf. Sums over a row are sums over
leaves of sums over their other axes, so that nothing is concatenated and, on a mesh,
only a few numbers per row travel. Before squaring, every row is divided by a power of
two near its largest entry, which is exact.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from basinax.landscape._vectors import wide_dtype


def check_rows(stacked: PyTree, least: int, caller: str) -> None:
    """Raise ValueError unless a tree is made of rows of real numbers.

    Args:
        stacked: tree to check; None subtrees are fine.
        least: smallest number of rows that `caller` is defined for.
        caller: name of the public function.
    """
    leaves = jax.tree_util.tree_leaves_with_path(stacked)
    need = (
        f"{caller} needs gradients stacked on a leading axis, such as "
        "jax.vmap(jax.grad(loss), (None, 0))(params, batch) or the field `shared` of "
        "multi-task gradients"
    )
    if not leaves:
        raise ValueError(f"{need}, but got a tree without arrays.")
    counts = {}
    for path, leaf in leaves:
        name = f"grads{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{need}, of real floating-point numbers, but {name} is "
                f"{jnp.result_type(leaf)}; put None in the place of such leaves."
            )
        if not jnp.ndim(leaf):
            raise ValueError(f"{need}, but {name} is a scalar.")
        counts.setdefault(jnp.shape(leaf)[0], name)
    if len(counts) > 1:
        found = ", ".join(f"{count} in {name}" for count, name in counts.items())
        raise ValueError(f"{need}, of one length in all leaves, but found {found}.")
    (count,) = counts
    if count < least:
        raise ValueError(f"{need}, at least {least} of them, but found {count}.")


def power_of_two(peak: Float[Array, "*n"]) -> tuple[Array, Array]:
    """Round positive numbers down to powers of two; return these and their inverses.

    Zeros and what is not finite become 1.
    """
    usable = jnp.isfinite(peak) & (peak > 0)
    _, exponent = jnp.frexp(jnp.where(usable, peak, 1))
    # Devices flush the inverse of the largest powers of two to zero.
    limit = -int(jnp.finfo(peak.dtype).minexp)
    exponent = jnp.where(usable, jnp.clip(exponent - 1, -limit, limit), 0)
    one = jnp.ones_like(peak)
    return jnp.ldexp(one, exponent), jnp.ldexp(one, -exponent)


def per_row(values: Float[Array, "n"], like: Array) -> Array:
    """Give one value per row the number of axes of a stacked leaf."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def row_sums(function: Callable[..., Array], *stacked: PyTree) -> Float[Array, "n"]:
    """Sum an elementwise function of stacked trees over each row."""

    def sums(*leaves: Array) -> Array:
        values = function(*leaves)
        return replicated(jnp.sum(values, range(1, values.ndim)))

    parts = jax.tree.leaves(jax.tree.map(sums, *stacked))
    return functools.reduce(jnp.add, parts)


def unit_rows(stacked: PyTree) -> tuple[PyTree, Float[Array, "n"]]:
    """Divide each row by a power of two near its largest entry.

    Returns:
        The rows in the widest dtype among the leaves and float32, and the divisors.
    """

    def peaks(x: Array) -> Array:
        peak = jnp.max(jnp.abs(x), range(1, x.ndim), initial=0)
        return replicated(peak.astype(wide_dtype(x)))

    scale, inverse = power_of_two(
        functools.reduce(jnp.maximum, map(peaks, jax.tree.leaves(stacked)))
    )

    def divide(x: Array) -> Array:
        # The inverse of a small float64 would overflow in float32.
        return x.astype(inverse.dtype) * per_row(inverse, x)

    return jax.tree.map(divide, stacked), scale


def row_lengths(stacked: PyTree) -> Float[Array, "n"]:
    """Compute the l2 norm of each row."""
    rows, scale = unit_rows(stacked)
    return scale * jnp.sqrt(row_sums(jnp.square, rows))


def mean_row(stacked: PyTree) -> PyTree:
    """Average the rows, in at least float32, without overflow of their sum."""

    def mean(x: Array) -> Array:
        (whole,), (scale,) = unit_rows([x[None]])
        return scale * (_sum_of_rows(whole[0]) / len(x))

    return jax.tree.map(mean, stacked)


def _sum_of_rows(rows: Float[Array, "n *s"]) -> Float[Array, "*s"]:
    # As a product, since a reduction over a leading axis takes some 50 times as long on
    # CPUs. On an Explicit mesh such a product must name the layout of its result.
    place = jax.typeof(rows).sharding
    typed = AxisType.Explicit in place.mesh.axis_types
    rest = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    return jax.lax.dot_general(
        jnp.ones(len(rows), rows.dtype),
        rows,
        (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=rest if typed else None,
    )


def replicated(x: Array) -> Array:
    """Hand a few numbers to every device where layouts are part of the type."""
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))
