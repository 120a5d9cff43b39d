"""Thin singular value decompositions of stacks of matrices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

from basinax.optimizers._layout import replicate_matrix


class ThinSVD(NamedTuple):
    """X = U diag(s) Vᵀ with k = min(m, n) columns.

    Attributes:
        u: left singular vectors.
        s: singular values, largest first.
        vt: right singular vectors, transposed.
    """

    u: Float[Array, "*batch m k"]
    s: Float[Array, "*batch k"]
    vt: Float[Array, "*batch k n"]


def thin_svd(x: Float[Array, "*batch m n"]) -> ThinSVD:
    """Decompose every matrix of a stack.

    On CPU one after the other, under `jax.vmap` too: the batched routine there waits
    for helpers from the very thread pool it occupies, and where several such calls meet
    it can wait for ever (seen with jaxlib 0.10.2 on two cores).
    """
    x = replicate_matrix(x)

    def one_by_one(x: Array) -> ThinSVD:
        if x.ndim == 2:
            return sequential_vmap(_svd)(x)
        flat = jax.lax.map(sequential_vmap(_svd), x.reshape(-1, *x.shape[-2:]))
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), flat)

    return jax.lax.platform_dependent(x, cpu=one_by_one, default=_svd)


def keep_numerical_rank(
    s: Float[Array, "*batch k"], size: int
) -> Float[Array, "*batch k"]:
    """Zero the singular values that are rounding noise of the largest.

    A threshold below the noise would otherwise lift the null space up to it.

    Args:
        s: singular values.
        size: larger side of the matrices.

    Returns:
        The singular values, those below size · eps · max(s) replaced by zero.
    """
    noise = size * jnp.finfo(s.dtype).eps * jnp.max(s, -1, keepdims=True)
    return jnp.where(s > noise, s, 0)


def _svd(x: Array) -> ThinSVD:
    return ThinSVD(*jnp.linalg.svd(x, full_matrices=False))
