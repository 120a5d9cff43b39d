"""Lanczos steps on a basis of parameter trees, fully reorthogonalised.

One step extends an orthonormal basis V = (v_0 ... v_j) of a Krylov space of a
symmetric operator A:

    w = A v_j;   twice: w <- w - V (Vᵀ w);   α_j = v_jᵀ A v_j,  β_j = ‖w‖,
    v_{j+1} = w / β_j.

Without reorthogonalisation float32 Lanczos returns "ghosts", many copies of the
largest eigenvalue; two passes of classical Gram-Schmidt hold VᵀV = I to rounding and
subtract the terms α_j v_j + β_{j-1} v_{j-1} on their way. A β_j at rounding level
means that V spans an invariant subspace: β_j is then set to zero, nothing is divided
by it, and the caller may go on from a random vector orthogonal to V.

The basis is a tree whose leaves have a leading axis of slots, so each leaf keeps its
sharding. Slots beyond the live ones are masked.

References:
    Paige, *Accuracy and effectiveness of the Lanczos algorithm for the symmetric
    eigenproblem*, Linear Algebra Appl. 34, 1980. Giraud, Langou, Rozložník, van den
    Eshof, *Rounding error analysis of the classical Gram-Schmidt orthogonalization
    process*, Numer. Math. 101, 2005 (twice is enough).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from basinax.landscape._vectors import check_same, norm, placement, wide_dtype

# β below this many rounding units of ‖A‖ is noise. Not √eps, which lies within the
# range of legitimate β in float32.
BREAKDOWN = 64

_HIGHEST = jax.lax.Precision.HIGHEST


class Step(NamedTuple):
    """What one Lanczos step returns.

    Attributes:
        basis: the basis with v_{j+1} in its slot.
        vector: v_{j+1} in the dtypes of the parameters, the operator's next argument.
        coefficients: α_j and β_j; β_j is exactly zero after a breakdown.
        scale: largest |v_iᵀ A v_j| so far, a lower bound of ‖A‖.
    """

    basis: PyTree
    vector: PyTree
    coefficients: Float[Array, "2"]
    scale: Float[Array, ""]


def allocate(like: PyTree, slots: int) -> PyTree:
    """Make an empty basis: the leaves of `like` with a leading axis of `slots`."""
    return jax.tree.map(
        lambda leaf: jnp.zeros(
            (slots, *jnp.shape(leaf)),
            wide_dtype(leaf),
            device=placement(leaf, stacked=True),
        ),
        like,
    )


def rounding_unit(basis: PyTree) -> float:
    """Return the eps of the arithmetic a basis is kept in."""
    return float(max(jnp.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(basis)))


def _components(
    basis: PyTree, vector: PyTree, live: Int[Array, ""] | int
) -> Float[Array, "slots"]:
    """Compute Vᵀ w over the first `live` slots."""

    def contract(rows: Float[Array, "slots *s"], x: Float[Array, "*s"]) -> Array:
        # On an Explicit mesh a contraction over sharded axes must name its result.
        whole = NamedSharding(jax.typeof(rows).sharding.mesh, PartitionSpec(None))
        return jnp.einsum(
            "i...,...->i", rows, x, precision=_HIGHEST, out_sharding=whole
        )

    parts = jax.tree.leaves(jax.tree.map(contract, basis, vector))
    total = functools.reduce(jnp.add, parts)
    return jnp.where(jnp.arange(total.size) < live, total, 0)


@jax.jit
def _orthogonalize(
    basis: PyTree, vector: PyTree, live: Int[Array, ""] | int
) -> tuple[PyTree, Float[Array, "slots"]]:
    """Subtract V (Vᵀ w) over the first `live` slots; return what is left and Vᵀ w."""
    vector = jax.tree.map(lambda rows, x: x.astype(rows.dtype), basis, vector)
    components = _components(basis, vector, live)
    rest = jax.tree.map(
        lambda rows, x: (
            x - jnp.tensordot(components.astype(x.dtype), rows, 1, precision=_HIGHEST)
        ),
        basis,
        vector,
    )
    return rest, components


@functools.partial(jax.jit, donate_argnames="basis")
def _append(
    basis: PyTree,
    like: PyTree,
    rest: PyTree,
    components: tuple[Float[Array, "slots"], Float[Array, "slots"]],
    index: Int[Array, ""] | int,
    scale: Float[Array, ""],
) -> Step:
    """Normalise what is left and write it to a slot, unless it is rounding noise."""
    first, second = components
    alpha = (first + second)[index - 1]
    beta = norm(rest)
    scale = jnp.maximum(scale, jnp.maximum(jnp.max(jnp.abs(first)), beta))
    # Compared before anything is divided; NaN compares false and is passed on.
    beta = jnp.where(beta <= BREAKDOWN * rounding_unit(basis) * scale, 0, beta)
    divisor = jnp.where(beta > 0, beta, 1)
    vector = jax.tree.map(
        lambda x: jnp.where(beta > 0, x / divisor.astype(x.dtype), 0), rest
    )
    basis = jax.tree.map(
        lambda rows, x: jax.lax.dynamic_update_index_in_dim(rows, x, index, 0),
        basis,
        vector,
    )
    coefficients = jnp.stack([alpha, beta])
    return Step(basis, optax.tree.cast_like(vector, like), coefficients, scale)


def extend(
    basis: PyTree,
    like: PyTree,
    product: PyTree,
    index: Int[Array, ""] | int,
    scale: Float[Array, ""],
) -> Step:
    """Take one Lanczos step, given the product A v of the vector in a slot.

    The passes are compiled apart from the rest and shared with `start`, because one
    program for the whole step takes three times as long to compile.

    Args:
        basis: basis whose slots up to `index` are live; its memory is reused.
        like: parameters; only their dtypes matter.
        product: A v_index, shaped like the parameters.
        index: slot of the vector that was multiplied.
        scale: largest |v_iᵀ A v_j| of the earlier steps, zero before the first.

    Returns:
        The step; its vector is zero after a breakdown or a NaN.
    """
    check_same(product, like, "the operator's result")
    rest, first = _orthogonalize(basis, product, index + 1)
    rest, second = _orthogonalize(basis, rest, index + 1)
    return _append(basis, like, rest, (first, second), index + 1, scale)


@jax.jit
def _centred(bits: PyTree, basis: PyTree) -> PyTree:
    return jax.tree.map(lambda b, x: b.astype(x.dtype) - (2**15 - 0.5), bits, basis)


def start(
    basis: PyTree, like: PyTree, bits: PyTree, index: Int[Array, ""] | int
) -> tuple[PyTree, PyTree]:
    """Begin a chain at a slot with a random unit vector orthogonal to earlier slots.

    Args:
        basis: basis whose first `index` slots are live; its memory is reused.
        like: parameters; only their dtypes matter.
        bits: random 16-bit integers, a tree shaped like the parameters.
        index: slot to write.

    Returns:
        The basis and the vector in the dtypes of the parameters.
    """
    rest, first = _orthogonalize(basis, _centred(bits, basis), index)
    rest, second = _orthogonalize(basis, rest, index)
    no_scale = jnp.zeros_like(first[0])
    step = _append(basis, like, rest, (first, second), index, no_scale)
    return step.basis, step.vector


@jax.jit
def combine(basis: PyTree, weights: Float[Array, "slots k"]) -> PyTree:
    """Return k linear combinations of the basis, stacked on a leading axis."""
    return jax.tree.map(
        lambda rows: jnp.einsum(
            "i...,ij->j...", rows, weights.astype(rows.dtype), precision=_HIGHEST
        ),
        basis,
    )


@functools.partial(jax.jit, donate_argnames="basis")
def compress(basis: PyTree, weights: Float[Array, "slots k"]) -> PyTree:
    """Replace the first k slots by linear combinations of all slots."""
    return jax.tree.map(
        lambda rows, new: jax.lax.dynamic_update_slice_in_dim(rows, new, 0, 0),
        basis,
        combine(basis, weights),
    )
