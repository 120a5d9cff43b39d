"""Scale to unit size before squaring, so that squares neither overflow nor vanish."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def unit_scale(
    x: Float[Array, "..."], axes: tuple[int, ...] | None = (-2, -1)
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Divide by the largest absolute entry.

    Args:
        x: floating-point array.
        axes: axes that share one scale; None for all.

    Returns:
        x / max|x|, all zero where that maximum is zero or not finite, and the maximum
        with the reduced axes kept.
    """
    scale = jnp.max(jnp.abs(x), axes, keepdims=True)
    usable = jnp.isfinite(scale) & (scale > 0)
    # The reciprocal of the largest numbers is subnormal, which devices flush to zero.
    shrink = jnp.where(scale > 1, 0.25, 1).astype(x.dtype)
    divisor = jnp.where(usable, scale * shrink, 1)
    return jnp.where(usable, x * shrink / divisor, 0), scale


def power_of_two(
    peak: Float[Array, "*n"],
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Round down to powers of two, by which division is exact.

    Args:
        peak: largest absolute entries, non-negative.

    Returns:
        The powers and their inverses; for a peak that is zero or not finite, those of
        the largest other one, or 1.
    """
    usable = jnp.isfinite(peak) & (peak > 0)
    largest = jnp.max(jnp.where(usable, peak, 0))
    substitute = jnp.where(largest > 0, largest, 1)
    _, exponent = jnp.frexp(jnp.where(usable, peak, substitute))
    # Devices flush the inverse of the largest powers of two to zero.
    limit = -int(jnp.finfo(peak.dtype).minexp)
    exponent = jnp.clip(exponent - 1, -limit, limit)
    one = jnp.ones_like(peak)
    return jnp.ldexp(one, exponent), jnp.ldexp(one, -exponent)
