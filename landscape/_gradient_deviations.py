"""How far each gradient is from the mean gradient: all that noise measures need.

    d_i = g_i - ḡ,   ḡ = Σ_i g_i / n

The 2n numbers ‖d_i‖ and ⟨d_i, ḡ⟩ give the variance, the coherence, the noise scale and
the values that these would have without gradient i, hence standard errors. Taken from
the differences, they do not suffer when gradients nearly agree.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from basinax.landscape._per_example import check_batch
from basinax.landscape._sandwich import as_partial, scalar
from basinax.landscape._stacked import (
    check_rows,
    mean_row,
    power_of_two,
    row_sums,
    unit_rows,
)
from basinax.landscape._vectors import check_vector, wide_dtype


class GradientDeviations(NamedTuple):
    """Deviations d_i of n gradients from their mean, as lengths in units of g.

    Attributes:
        mean_norm: ‖ḡ‖.
        lengths: ‖d_i‖, shape (n,).
        projections: ⟨d_i, ḡ⟩ / ‖ḡ‖, shape (n,); 0 where ḡ vanishes.
    """

    mean_norm: Float[Array, ""]
    lengths: Float[Array, "n"]
    projections: Float[Array, "n"]

    def in_units(self) -> tuple["GradientDeviations", Float[Array, ""]]:
        """Divide by a power of two near the largest number, so that squares stay."""
        peak = jnp.maximum(self.mean_norm, jnp.max(self.lengths))
        unit, inverse = power_of_two(peak)
        return GradientDeviations(*(inverse * x for x in self)), unit


def gradient_deviations(
    per_example_loss_fn: Callable[..., Float[Array, ""]],
    params: PyTree,
    batch: tuple[PyTree, ...],
    *,
    chunk_size: int | None = None,
) -> GradientDeviations:
    """Measure how far per-example gradients are from their mean, without keeping them.

    The result stands for the gradients in `coherence`, `gradient_noise_scale` and
    `gradient_variance`, so that one pass over the examples serves all three.

    Args:
        per_example_loss_fn: scalar loss of one example, called as
            `per_example_loss_fn(params, *example)` where the arguments have lost the
            leading axis of `batch`. Compiled once per function object.
        params: tree of real floating-point arrays.
        batch: tuple of trees of arrays with a common leading axis of n examples.
        chunk_size: number of per-example gradients, each the size of the parameters, to
            hold at a time; None for all. Chunks go through compiled code in a Python
            loop, twice: once for the mean and once for the deviations, which may still
            be faster where many gradients do not fit in the cache. Let it divide n, or
            the rest is compiled as well. Examples sharded over devices want None.

    Returns:
        The deviations, in at least float32; a NaN in one gradient makes all NaN.

    Raises:
        ValueError: if the batch is no tuple or its leading axes differ, for parameters
            that are empty or not real floating point, a chunk size below 1, or a loss
            that is not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import coherence, gradient_deviations
        >>> def loss(w, x):  # whose gradient is x
        ...     return jnp.dot(w, x)
        >>> batch = (jnp.array([[1.0, 2.0], [1.0, -2.0]]),)
        >>> deviations = gradient_deviations(loss, jnp.zeros(2), batch, chunk_size=1)
        >>> float(deviations.mean_norm), deviations.lengths.tolist()
        (1.0, [2.0, 2.0])
        >>> round(float(coherence(deviations).alpha), 6)  # ‖ḡ‖² over mean ‖g‖²
        0.2
    """
    check_batch(batch, chunk_size, smallest=1)
    check_vector(params, "params")
    loss, batch = as_partial(per_example_loss_fn), tuple(batch)
    count = jnp.shape(jax.tree.leaves(batch)[0])[0]
    if chunk_size is None or chunk_size >= count:
        return _at_once(loss, params, batch)
    starts = range(0, count, chunk_size)
    chunks = [_rows(batch, start, start + chunk_size) for start in starts]
    sizes = (min(chunk_size, count - start) for start in starts)
    parts = (
        _share(loss, params, chunk, size / count)
        for chunk, size in zip(chunks, sizes, strict=True)
    )
    mean = functools.reduce(_add, parts)
    found = [_against(loss, params, chunk, mean) for chunk in chunks]
    lengths, projections = (
        jnp.concatenate([getattr(part, name) for part in found])
        for name in ("lengths", "projections")
    )
    return GradientDeviations(found[0].mean_norm, lengths, projections)


def as_deviations(
    grads: PyTree | GradientDeviations, least: int, caller: str
) -> GradientDeviations:
    """Return the deviations of stacked gradients, or those handed in.

    Args:
        grads: tree of arrays (n, ...), or deviations.
        least: smallest n that `caller` is defined for.
        caller: name of the public function.
    """
    if not isinstance(grads, GradientDeviations):
        check_rows(grads, least, caller)
        return _of_stacked(grads)
    if len(grads.lengths) < least:
        raise ValueError(
            f"{caller} needs at least {least} gradients, but the deviations are those "
            f"of {len(grads.lengths)}."
        )
    return grads


def _rows(batch: PyTree, start: int, stop: int) -> PyTree:
    return jax.tree.map(lambda x: x[start:stop], batch)


def _deviations(stacked: PyTree, mean: PyTree) -> GradientDeviations:
    def subtract(x: Array, m: Array) -> Array:
        return x.astype(wide_dtype(x)) - m[None]

    rows, scales = unit_rows(jax.tree.map(subtract, stacked, mean))
    unit, scale = unit_rows(jax.tree.map(lambda m: m[None], mean))
    length = jnp.sqrt(row_sums(jnp.square, unit))
    products = row_sums(jnp.multiply, rows, unit)
    return GradientDeviations(
        mean_norm=(scale * length)[0],
        lengths=scales * jnp.sqrt(row_sums(jnp.square, rows)),
        projections=scales * products / jnp.where(length == 0, 1, length),
    )


@jax.jit
def _of_stacked(stacked: PyTree) -> GradientDeviations:
    return _deviations(stacked, mean_row(stacked))


def _gradients(loss: Partial, params: PyTree, batch: tuple[PyTree, ...]) -> PyTree:
    def one(params: PyTree, example: tuple[PyTree, ...]) -> Float[Array, ""]:
        return scalar(loss(params, *example), "per_example_loss_fn")

    return jax.vmap(jax.grad(one), (None, 0))(params, batch)


@jax.jit
def _at_once(loss: Partial, params: PyTree, batch: PyTree) -> GradientDeviations:
    return _of_stacked(_gradients(loss, params, batch))


@jax.jit
def _share(
    loss: Partial, params: PyTree, chunk: PyTree, share: Float[Array, ""]
) -> PyTree:
    mean = mean_row(_gradients(loss, params, chunk))
    return jax.tree.map(lambda m: share.astype(m.dtype) * m, mean)


@jax.jit
def _against(
    loss: Partial, params: PyTree, chunk: PyTree, mean: PyTree
) -> GradientDeviations:
    return _deviations(_gradients(loss, params, chunk), mean)


@jax.jit
def _add(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, x, y)
