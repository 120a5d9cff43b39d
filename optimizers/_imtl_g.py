"""IMTL-G: the combination with equal projections onto all unit gradients.

    ⟨Jᵀw, g_t/‖g_t‖⟩ = const,  Σ w = 1        w ∝ D⁻¹ C⁺ 1    for G = D C D, diag C = 1

the closed form of the paper without its choice of a first task.
Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from basinax.optimizers._unit_gramian import (
    check_gramian,
    cosine_gramian,
    rounding_of,
    weigh,
)


def imtl_g_weights(gramian: Float[Array, "T T"]) -> Float[Array, " T"]:
    """Weigh tasks so that the update projects equally onto every task's direction.

    Use it where each task should advance at the same pace along its own gradient,
    whatever the lengths.  Weights can be negative.  With more tasks than independent
    gradients the projections are as equal as least squares make them.

    One eigendecomposition of a T x T matrix.

    Args:
        gramian: inner products of the task gradients, (T, T).

    Returns:
        Weights with sum one, dtype of `gramian`.  A task whose gradient is zero has no
        direction and gets weight zero.  Where the sum vanishes next to the weights, no
        weight exceeds the reciprocal root of the machine epsilon.  NaN if an entry of
        `gramian` is not finite.

    Raises:
        ValueError: if `gramian` is not a square matrix.
        TypeError: if it is not real floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import imtl_g_weights
        >>> gradients = jnp.array([[4.0, 0.0], [0.0, 1.0]])
        >>> weights = imtl_g_weights(gradients @ gradients.T)
        >>> [round(float(w), 3) for w in weights]
        [0.2, 0.8]

    Reference:
        Liu et al. (ICLR 2021), equations 5 and 6.
    """
    return _imtl_g_weights(check_gramian(gramian))


@jax.jit
def _imtl_g_weights(gramian: Array) -> Array:
    return weigh(_equal_projections, gramian, rounding_of(gramian))


def _equal_projections(gramian: Array, rounding: float) -> Array:
    cosines, norms = cosine_gramian(gramian, 0.0)
    alive = norms > 0
    values, vectors = jnp.linalg.eigh(cosines)
    cutoff = len(gramian) * rounding * jnp.max(values)
    kept = values > cutoff
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    v = vectors @ (inverse * (alive.astype(gramian.dtype) @ vectors))
    shortest = jnp.min(jnp.where(alive, norms, jnp.inf))
    w = jnp.where(alive, v * (shortest / jnp.where(alive, norms, 1)), 0)
    total, size = jnp.sum(w), jnp.sum(jnp.abs(w))
    floor = jnp.sqrt(rounding) * size
    total = jnp.where(total < 0, -1, 1) * jnp.maximum(jnp.abs(total), floor)
    return jnp.where(size > 0, w / jnp.where(size > 0, total, 1), 0)
