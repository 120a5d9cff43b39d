"""Hard spectral clipping: the projection onto the spectral-norm ball.

    clip_c(X) = P diag(min(σ, c)) Qᵀ    for X = P diag(σ) Qᵀ

is the clip of the theory in Jiang, Semenov and Stich, "Enhancing LLM Training via
Spectral Clipping" (ICML 2026, arXiv:2603.14315): with it a step with decoupled weight
decay is exactly a step of composite Frank-Wolfe on a spectral-norm ball.  It is also
the closest point of that ball to X in Frobenius norm.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from basinax.optimizers._checks import check_matrix_and_threshold
from basinax.optimizers._decompose import ThinSVD, keep_numerical_rank, thin_svd
from basinax.optimizers._layout import on_wide_matrices
from basinax.optimizers._scaling import unit_scale
from basinax.optimizers._spectral_derivative import PRECISION, spectral_tangent


def hard_spectral_clip(
    x: Float[Array, "*batch m n"], threshold: Any
) -> Float[Array, "*batch m n"]:
    """Map each singular value s of x to min(s, c), by singular value decomposition.

    Use it where the exact projection matters (theory, tests, tiny matrices);
    `soft_spectral_clip` is smooth and several times cheaper.

    Args:
        x: one matrix, or a stack of them on leading axes.
        threshold: c >= 0, in the units of `x`; a scalar or one value per matrix.

    Returns:
        The clipped matrices, shape and dtype of `x`; x itself where nothing exceeds c.
        A matrix with a non-finite entry comes back as NaN in every entry.

    Raises:
        TypeError: if `x` is not real floating point.
        ValueError: if `x` has fewer than two axes, or the threshold is a negative or
            NaN number or does not broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import hard_spectral_clip
        >>> clipped = hard_spectral_clip(jnp.diag(jnp.array([3.0, 4.0])), 3.5)
        >>> [round(float(s), 3) for s in jnp.diag(clipped)]
        [3.0, 3.5]

    Reference:
        arXiv:2603.14315, hard spectral clipping.
    """
    x, threshold = check_matrix_and_threshold(x, threshold)
    return _hard_spectral_clip(x, threshold)


@jax.jit
def _hard_spectral_clip(x: Array, threshold: Array) -> Array:
    return on_wide_matrices(hard_clip, x, threshold)


def hard_clip(x: Array, threshold: Array) -> Array:
    """Clip matrices, without checks."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    c = jnp.broadcast_to(threshold.astype(y.dtype), y.shape[:-2])
    return _clip(y, c).astype(x.dtype)


@jax.custom_jvp
def _clip(x: Array, c: Array) -> Array:
    return _decompose_and_clip(x, c)[0]


@_clip.defjvp
def _clip_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, c), (dx, dc) = primals, tangents
    value, (u, s, vt) = _decompose_and_clip(x, c)
    c = c[..., None]
    f = jnp.minimum(s, c)
    over = s > c
    si, sj, fi, fj = s[..., None], s[..., None, :], f[..., None], f[..., None, :]
    oi, oj = over[..., None], over[..., None, :]
    # Both above: 0; both below: 1; across the threshold the singular values differ.
    across = (fi - fj) / jnp.where(oi != oj, si - sj, 1)
    same = jnp.where(oi != oj, across, jnp.where(oi, 0, 1))
    total = si + sj
    opposite = jnp.where(total > 0, (fi + fj) / jnp.where(total > 0, total, 1), 1)
    ratio = jnp.where(over, f / jnp.where(over, s, 1), 1)
    tangent = spectral_tangent(dx, u, vt, same, opposite, ratio)
    by_c = jnp.matmul(u * (over * dc[..., None])[..., None, :], vt, precision=PRECISION)
    return value, tangent + by_c


def _decompose_and_clip(x: Array, c: Array) -> tuple[Array, ThinSVD]:
    scaled, scale = unit_scale(x)
    u, s, vt = thin_svd(scaled)
    s = keep_numerical_rank(s, max(x.shape[-2:]))
    s = s * jnp.where(jnp.isfinite(scale), scale, 0)[..., 0]
    c = c[..., None]
    product = jnp.matmul(u * jnp.minimum(s, c)[..., None, :], vt, precision=PRECISION)
    inside = jnp.max(s, -1, keepdims=True) <= c
    out = jnp.where(inside[..., None], x, product)
    out = jnp.where(jnp.isfinite(scale), out, jnp.nan)
    return out, ThinSVD(u, s, vt)
