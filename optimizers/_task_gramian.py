"""The Gram matrix of task gradients, all that most ways to combine them look at.

    G = J Jᵀ,    G_st = Σ_leaves ⟨J_s, J_t⟩

where row t of J is the gradient of task t: index t on the leading axis of every leaf.
The sums over leaves are T×T numbers, so nothing is concatenated and, on a mesh, only
they travel.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from basinax.optimizers._layout import explicit_axes
from basinax.optimizers._scaling import power_of_two

# Squares of numbers within 2^±40 = 1e±12 can be summed in float32 with room to spare.
_SAFE_EXPONENT = 40


class TaskGramian(NamedTuple):
    """A Gram matrix whose rows have been scaled to unit size: G = diag(r) H diag(r).

    Attributes:
        unit: H, Gram matrix of the rows divided by r.
        scale: r, the largest absolute entry of each row rounded down to a power of
            two, so that the division is exact; for a row that is zero or not finite,
            that of the largest other row.
    """

    unit: Float[Array, "T T"]
    scale: Float[Array, " T"]

    @property
    def matrix(self) -> Float[Array, "T T"]:
        """G, or G times a constant if its entries would leave the range of the dtype.

        They would if the largest entry of J is beyond 1e±12.
        """
        largest = jnp.max(jnp.abs(self.scale))
        exponent = jnp.abs(jnp.log2(largest))
        scale = jnp.where(exponent <= _SAFE_EXPONENT, self.scale, self.scale / largest)
        return self.unit * scale[:, None] * scale[None, :]

    @property
    def norms(self) -> Float[Array, " T"]:
        """Length of each row."""
        return self.scale * jnp.sqrt(jnp.diagonal(self.unit))

    @property
    def cosines(self) -> Float[Array, "T T"]:
        """Cosines of the angles between rows; zero for rows of zeros."""
        lengths = jnp.sqrt(jnp.diagonal(self.unit))
        inverse = jnp.where(lengths == 0, 0, 1 / jnp.where(lengths == 0, 1, lengths))
        return self.unit * inverse[:, None] * inverse[None, :]


def task_gramian(stacked: PyTree[Float[Array, "T ..."]]) -> TaskGramian:
    """Compute the Gram matrix of gradients stacked on a leading task axis.

    Args:
        stacked: tree of arrays (T, ...), at least one; None and leaves without entries
            contribute nothing.

    Returns:
        The Gram matrix in at least float32.  An entry of a gradient that is not finite
        makes its row and column not finite.
    """
    leaves = jax.tree.leaves(stacked)
    dtypes = [leaf.real.dtype for leaf in leaves]
    dtype = functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))
    peaks = [_peak(x).astype(dtype) for x in leaves]
    scale, inverse = power_of_two(functools.reduce(jnp.maximum, peaks))
    products = [_product(x, inverse) for x in leaves]
    return TaskGramian(functools.reduce(jnp.add, products), scale)


def per_task(values: Float[Array, " T"], like: Array) -> Array:
    """Give one value per task the number of axes of a stacked leaf."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _peak(x: Float[Array, "T ..."]) -> Float[Array, " T"]:
    peak = jnp.max(jnp.abs(x), range(1, x.ndim), initial=0)
    whole = _replicated(peak)
    return peak if whole is None else jax.sharding.reshard(peak, whole)


def _product(x: Float[Array, "T ..."], inverse: Float[Array, " T"]) -> Array:
    wide = jnp.promote_types(x.dtype, inverse.dtype)
    # Fused with the scaling, the product would not reach the fast routine on CPUs.
    x = jax.lax.optimization_barrier(x.astype(wide) * per_task(inverse, x))
    if jax.typeof(x).sharding.mesh.empty:
        # Nor would one over several axes; on a mesh, though, flattening gathers shards.
        x = x.reshape(x.shape[0], -1)
    axes = tuple(range(1, x.ndim))
    product = jax.lax.dot_general(
        x,
        x.conj(),
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        # Sharded contracting axes leave the layout open on Explicit meshes.
        out_sharding=_replicated(x),
    )
    return product.real


def _replicated(array: Array) -> NamedSharding | None:
    """Return the layout of numbers that every device has, where layouts are typed."""
    if not explicit_axes([array]):
        return None
    return NamedSharding(jax.typeof(array).sharding.mesh, PartitionSpec())
