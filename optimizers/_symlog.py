"""Symmetric logarithm: the map that turns softmax into StableMax.

    φ(x) = sign(x) log(1 + |x|),    φ'(x) = 1 / (1 + |x|)

Prieto et al., "Grokking at the Edge of Numerical Stability" (ICLR 2025,
arXiv:2501.04697), Proposition 1: StableMax is softmax of φ.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def symlog(x: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Compress magnitudes to logarithms, sign kept, with slope 1 at zero.

    Use it on logits (see `log_stablemax`) or on any regression target that spans
    decades.  The formula left to automatic differentiation has slope 0 at exactly zero,
    where the derivatives of sign and |x| both vanish, so that a head of zeros would
    never train; this one has slope 1 there.

    Args:
        x: real floating-point array of any shape.

    Returns:
        sign(x) log(1 + |x|) in the shape and dtype of `x`; computed in float32 for
        half precision.  Infinities map to infinities and NaN to NaN.

    Raises:
        TypeError: if `x` is not real floating point.

    Example:
        >>> import jax
        >>> from basinax.optimizers import symlog
        >>> round(float(symlog(-9.0)), 4), float(jax.grad(symlog)(0.0))
        (-2.3026, 1.0)

    Reference:
        arXiv:2501.04697, Proposition 1.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"symlog needs real floating point, got {x.dtype}; cast integers first."
        )
    return _symlog(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


@jax.custom_jvp
def _symlog(x: Array) -> Array:
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


@_symlog.defjvp
def _symlog_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return _symlog(x), slope(x) * dx


@jax.custom_jvp
def symlog_difference(
    x: Float[Array, "*shape"], z: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """Compute φ(x) - φ(z) without cancellation.

    On one side of zero φ(x) - φ(z) = ± log((1 + |x|) / (1 + |z|)), and log1p keeps
    the digits when the two are close.
    """
    a, b = jnp.abs(x), jnp.abs(z)
    low = jnp.minimum(a, b)
    near = jnp.sign(x - z) * jnp.log1p((jnp.maximum(a, b) - low) / (1 + low))
    return jnp.where((x >= 0) == (z >= 0), near, _symlog(x) - _symlog(z))


@symlog_difference.defjvp
def _symlog_difference_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, z), (dx, dz) = primals, tangents
    return symlog_difference(x, z), slope(x) * dx - slope(z) * dz


def quarter(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute (1 + |x|)/4, whose reciprocal is a normal number for every finite x.

    1 / (1 + |x|) is subnormal for the largest numbers, and devices flush it to zero.
    """
    return 0.25 + 0.25 * jnp.abs(x)


def slope(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute φ'(x) = 1 / (1 + |x|)."""
    return 0.25 * (1 / quarter(x))
