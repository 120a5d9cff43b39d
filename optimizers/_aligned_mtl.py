"""Aligned-MTL: gradients rotated and stretched as little as makes them orthogonal.

    w = √λ_min · V Λ^(-1/2) Vᵀ 1/T        for G = V Λ Vᵀ

The aligned gradients are the rows of √λ_min V Λ^(-1/2) Vᵀ J: orthogonal, and as long as
the smallest singular value of J, so that no task dominates and none conflicts.
Senushkin et al., "Independent Component Alignment for Multi-Task Learning" (CVPR 2023,
arXiv:2305.19000).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from basinax.optimizers._unit_gramian import (
    check_gramian,
    rounding_of,
    unit_gramian,
    weigh,
)


def aligned_mtl_weights(gramian: Float[Array, "T T"]) -> Float[Array, " T"]:
    """Weigh tasks by the mean of their gradients after alignment.

    Use it where gradients nearly cancel: it bounds the condition number of the system
    of gradients by one.  The update is as short as the least singular value of J, so
    raise the learning rate or follow it with an optimizer that normalises.  Weights can
    be negative.  Singular values that are zero to rounding, of tasks that depend on
    each other, are left out.

    One eigendecomposition of a T x T matrix.

    Args:
        gramian: inner products of the task gradients, (T, T).

    Returns:
        Weights (T,), dtype of `gramian`; zero for a zero matrix, NaN if an entry is not
        finite.

    Raises:
        ValueError: if `gramian` is not a square matrix.
        TypeError: if it is not real floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import aligned_mtl_weights
        >>> gradients = jnp.array([[4.0, 0.0], [0.0, 1.0]])
        >>> weights = aligned_mtl_weights(gradients @ gradients.T)
        >>> [round(float(w), 3) for w in weights]
        [0.125, 0.5]

    Reference:
        arXiv:2305.19000, algorithm 1.
    """
    return _aligned_mtl_weights(check_gramian(gramian))


@jax.jit
def _aligned_mtl_weights(gramian: Array) -> Array:
    return weigh(_align, gramian, rounding_of(gramian))


def _align(gramian: Array, rounding: float) -> Array:
    unit, _ = unit_gramian(gramian, 0.0)
    values, vectors = jnp.linalg.eigh(unit)
    kept = values > len(gramian) * rounding * jnp.max(values)
    smallest = jnp.min(jnp.where(kept, values, jnp.inf))
    stretch = jnp.where(kept, jnp.sqrt(smallest / jnp.where(kept, values, 1)), 0)
    return vectors @ (stretch * jnp.mean(vectors, 0))
