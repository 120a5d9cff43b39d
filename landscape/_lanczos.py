"""Lanczos steps on a basis of parameter trees, fully reorthogonalised.

One step extends an orthonormal basis V = (v_0 ... v_j) of a Krylov space of a
symmetric operator A:

    w = A v_j - α_j v_j - β_{j-1} v_{j-1};   w <- w - V (Vᵀ w);   β_j = ‖w‖,
    v_{j+1} = w / β_j,   α_j = v_jᵀ A v_j.

Without the second formula, reorthogonalisation, float32 Lanczos returns "ghosts", many
copies of the largest eigenvalue. Once the recurrence has taken the large components
out, one pass of classical Gram-Schmidt over V holds VᵀV = I to rounding; the pass is
repeated where it takes away more than a third of ‖w‖, as it does after a restart. A β_j
at rounding level means that V spans an invariant subspace: β_j is then set to zero,
nothing is divided by it, and the caller may go on from a random vector orthogonal to V.

The basis is a tree whose leaves have a leading axis of slots, so each leaf keeps its
sharding. Slots beyond the live ones are masked, and skipped as far as whole chunks of
them go: a chunk is read once for both products, which memory traffic bounds.

References:
    Paige, *Accuracy and effectiveness of the Lanczos algorithm for the symmetric
    eigenproblem*, Linear Algebra Appl. 34, 1980. Daniel, Gragg, Kaufman, Stewart,
    *Reorthogonalization and stable algorithms for updating the Gram-Schmidt QR
    factorization*, Math. Comp. 30, 1976 (when to repeat). Giraud, Langou, Rozložník,
    van den Eshof, *Rounding error analysis of the classical Gram-Schmidt
    orthogonalization process*, Numer. Math. 101, 2005 (twice is enough).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from basinax.landscape._vectors import (
    check_same,
    inner,
    norm,
    placement,
    size,
    wide_dtype,
    widen,
)

# β below this many rounding units of ‖A‖ is noise. Not √eps, which lies within the
# range of legitimate β in float32.
BREAKDOWN = 64
# A pass that leaves this share of a vector or more need not be repeated.
_KEEPS = 0.7
_PASSES = 3
# Slots that are taken out together: few enough to stay in cache for both products.
_CHUNK = 16

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


def check_memory(like: PyTree, slots: int, limit: int | None, advice: str) -> None:
    """Raise ValueError if a basis would need more bytes than the caller allows.

    Args:
        like: parameters.
        slots: number of vectors to hold at once.
        limit: bytes, or None for no limit.
        advice: what to change, for the message.
    """
    need = slots * sum(
        size(leaf) * wide_dtype(leaf).itemsize for leaf in jax.tree.leaves(like)
    )
    if limit is not None and need > limit:
        raise ValueError(
            f"{slots} vectors the size of the parameters take {need:.3g} bytes, more "
            f"than max_bytes={limit:.3g}; {advice}."
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
) -> tuple[PyTree, Float[Array, "slots"], Float[Array, ""]]:
    """Subtract V (Vᵀ w) over the first `live` slots.

    Returns:
        What is left, Vᵀ w, and the norm of what is left.
    """
    slots = len(jax.tree.leaves(basis)[0])
    width = min(_CHUNK, slots)

    def one_chunk(number: Array, state: tuple) -> tuple:
        vector, total = state
        # The last chunk may have to begin early; what it repeats is rounding by then.
        first = jnp.minimum(number * width, slots - width)
        rows = jax.tree.map(
            lambda rows: jax.lax.dynamic_slice_in_dim(rows, first, width, 0), basis
        )
        found = _components(rows, vector, live - first)
        rest = jax.tree.map(
            lambda rows, x: (
                x - jnp.tensordot(found.astype(x.dtype), rows, 1, precision=_HIGHEST)
            ),
            rows,
            vector,
        )
        old = jax.lax.dynamic_slice_in_dim(total, first, width, 0)
        return rest, jax.lax.dynamic_update_slice_in_dim(total, old + found, first, 0)

    def one_pass(state: tuple) -> tuple:
        vector, total, _, before, count = state
        chunks = (live + width - 1) // width
        rest, total = jax.lax.fori_loop(0, chunks, one_chunk, (vector, total))
        return rest, total, before, norm(rest), count + 1

    def unsafe(state: tuple) -> Bool[Array, ""]:
        *_, before, after, count = state
        return (count == 0) | ((after < _KEEPS * before) & (count < _PASSES))

    vector = jax.tree.map(lambda rows, x: x.astype(rows.dtype), basis, vector)
    length = norm(vector)
    none = jnp.zeros_like(_components(basis, vector, 0))
    state = (vector, none, length, length, jnp.zeros((), jnp.int32))
    rest, total, _, length, _ = jax.lax.while_loop(unsafe, one_pass, state)
    return rest, total, length


@jax.jit
def _recur(
    basis: PyTree, product: PyTree, index: Int[Array, ""] | int
) -> tuple[PyTree, Float[Array, "2"]]:
    """Subtract the terms along the last two vectors; return what is left and them."""
    rest, found = widen(product), []
    for slot in (index, jnp.maximum(index - 1, 0)):
        vector = take(basis, slot)
        found.append(inner(vector, rest))
        rest = jax.tree.map(
            lambda x, v, c=found[-1]: x - c.astype(x.dtype) * v, rest, vector
        )
    return rest, jnp.stack(found)


@functools.partial(jax.jit, donate_argnames="basis")
def _append(
    basis: PyTree,
    like: PyTree,
    rest: PyTree,
    coefficients: tuple[Float[Array, ""], Float[Array, ""]],
    index: Int[Array, ""] | int,
    scale: Float[Array, ""],
) -> Step:
    """Normalise what is left and write it to a slot, unless it is rounding noise."""
    alpha, beta = coefficients
    scale = jnp.maximum(scale, beta)
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
    vector = optax.tree.cast_like(vector, like)
    return Step(basis, vector, jnp.stack([alpha, beta]), scale)


@jax.jit
def _merge(
    local: Float[Array, "2"],
    found: Float[Array, "slots"],
    index: Int[Array, ""] | int,
    scale: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return α_j and the largest component so far."""
    peak = jnp.maximum(jnp.max(jnp.abs(local)), jnp.max(jnp.abs(found)))
    return local[0] + found[index], jnp.maximum(scale, peak)


def extend(
    basis: PyTree,
    like: PyTree,
    product: PyTree,
    index: Int[Array, ""] | int,
    scale: Float[Array, ""],
) -> Step:
    """Take one Lanczos step, given the product A v of the vector in a slot.

    The pass is compiled apart from the rest and shared with `absorb`, because one
    program for the whole step takes longer to compile.

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
    rest, local = _recur(basis, product, index)
    rest, found, beta = _orthogonalize(basis, rest, index + 1)
    alpha, scale = _merge(local, found, index, scale)
    return _append(basis, like, rest, (alpha, beta), index + 1, scale)


class Column(NamedTuple):
    """What `absorb` returns: one column of a QR factorisation.

    Attributes:
        basis: the basis with the new unit vector in its slot.
        vector: that vector in the dtypes of the parameters.
        components: Vᵀ w over the earlier slots, zero beyond.
        length: norm of what was new in w; exactly zero where it was rounding noise.
    """

    basis: PyTree
    vector: PyTree
    components: Float[Array, "slots"]
    length: Float[Array, ""]


def absorb(
    basis: PyTree, like: PyTree, vector: PyTree, index: Int[Array, ""] | int
) -> Column:
    """Write to a slot the unit vector along what is new in a vector.

    Args:
        basis: basis whose first `index` slots are live; its memory is reused.
        like: parameters; only their dtypes matter.
        vector: tree shaped like the parameters.
        index: slot to write; it is zeroed if the vector holds nothing new.
    """
    rest, components, beta = _orthogonalize(basis, vector, index)
    # The first entry is an α in a chain and nothing here.
    step = _append(basis, like, rest, (beta, beta), index, _norm(vector))
    return Column(step.basis, step.vector, components, step.coefficients[1])


@jax.jit
def _norm(vector: PyTree) -> Float[Array, ""]:
    return norm(vector)


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
    column = absorb(basis, like, _centred(bits, basis), index)
    return column.basis, column.vector


@jax.jit
def components(basis: PyTree, vector: PyTree) -> Float[Array, "slots"]:
    """Compute Vᵀ w over all slots."""
    vector = jax.tree.map(lambda rows, x: x.astype(rows.dtype), basis, vector)
    return _components(basis, vector, len(jax.tree.leaves(basis)[0]))


@jax.jit
def complement(basis: PyTree, vector: PyTree) -> PyTree:
    """Subtract V (Vᵀ w) over all slots."""
    return _orthogonalize(basis, vector, len(jax.tree.leaves(basis)[0]))[0]


@jax.jit
def take(basis: PyTree, index: Int[Array, ""] | int) -> PyTree:
    """Read one slot."""
    return jax.tree.map(
        lambda rows: jax.lax.dynamic_index_in_dim(rows, index, 0, keepdims=False),
        basis,
    )


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
