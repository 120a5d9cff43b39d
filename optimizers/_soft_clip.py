"""Soft spectral clipping, the matrix function at the heart of SPECTRA.

    H_c(X) = (I + X Xᵀ / c²)^(-1/2) X,       σ ↦ σ / sqrt(1 + σ² / c²)

Jiang, Semenov and Stich, "Enhancing LLM Training via Spectral Clipping" (ICML 2026,
arXiv:2603.14315).  Singular vectors stay, every singular value ends below c, small
ones are left alone.

Everything is computed from the normalised matrix X̂ = X / f, f = ‖X‖_F:

    H_c(X) = f sqrt(w) Z X̂,   Z = (w I + (1-w) G)^(-1/2),
    G = X̂ X̂ᵀ (short side),    w = 1 / (1 + (f/c)²) in [0, 1],

in which no square overflows, c = 0 gives 0 and c = ∞ gives X.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

from basinax.optimizers._checks import (
    check_choice,
    check_matrix_and_threshold,
    check_steps,
)
from basinax.optimizers._decompose import keep_numerical_rank, thin_svd
from basinax.optimizers._layout import on_wide_matrices, replicate_matrix
from basinax.optimizers._minimax import (
    OCTAVES,
    ROWS_PER_OCTAVE,
    inverse_sqrt_table,
)
from basinax.optimizers._scaling import unit_scale
from basinax.optimizers._spectral_derivative import PRECISION, spectral_tangent

Method = Literal["auto", "eigh", "polynomial", "newton_schulz", "svd"]

# The authors' default number of coupled Newton-Schulz iterations.
NEWTON_SCHULZ_STEPS = 10

# Up to this ‖X‖₂/c (as bounded at run time) the polynomials err by less than 1e-6.
KAPPA_SINGLE_PRECISION = 30


def soft_spectral_clip(
    x: Float[Array, "*batch m n"],
    threshold: Any,
    *,
    method: Method = "auto",
    steps: int = NEWTON_SCHULZ_STEPS,
    dtype: Any = None,
) -> Float[Array, "*batch m n"]:
    """Map each singular value s of x to s / sqrt(1 + s²/c²).

    Use it on a gradient or on an update direction to bound the spectral norm while
    leaving small directions alone; `spectral_clip` applies it to a whole tree.

    Differentiable in `x` and `threshold` whatever the method: the derivative is that
    of the exact map, finite also at repeated and zero singular values.

    Args:
        x: one matrix, or a stack of them on leading axes.
        threshold: c >= 0, in the units of `x`; a scalar or one value per matrix.
            0 returns zeros and ∞ returns x.
        method: how to form the inverse square root.
            "eigh": eigendecomposition of the short-side Gram matrix; error about
            eps·κ² on the smallest directions, κ = ‖X‖₂/c.
            "polynomial": three composed minimax polynomials, 12 products of the size
            of the short side; error at most 5e-4 up to κ = 64, and too small (never
            too large) on the smallest directions beyond that.
            "newton_schulz": the authors' coupled iteration, for comparison; on a stack
            it shares one spectral bound, as theirs does.
            "svd": singular value decomposition; slow, accurate at any κ.
            "auto": "polynomial" on accelerators; "eigh" for float64 and on CPU, where
            it gives way to the faster polynomials while κ, as bounded from the Gram
            matrix, is at most 30, because there they are exact to single precision.
        steps: iterations of "newton_schulz"; ignored by the others.
        dtype: compute in this type; default the type of `x`, at least float32.

    Returns:
        The clipped matrices, shape and dtype of `x`.  A matrix with a non-finite entry
        comes back as NaN in every entry.

    Raises:
        TypeError: if `x` is not real floating point, or `steps` is not an int.
        ValueError: if `x` has fewer than two axes, the threshold is a negative or NaN
            number or does not broadcast, or the method is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import soft_spectral_clip
        >>> x = jnp.diag(jnp.array([3.0, 4.0]))
        >>> soft_spectral_clip(x, 4.0).round(3)
        Array([[2.4  , 0.   ],
               [0.   , 2.828]], dtype=float32)

    Reference:
        arXiv:2603.14315, soft spectral clipping.
    """
    check_choice("method", method, get_args(Method))
    steps = check_steps(steps)
    x, threshold = check_matrix_and_threshold(x, threshold)
    return _soft_spectral_clip(x, threshold, method, steps, dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _soft_spectral_clip(
    x: Array, threshold: Array, method: Method, steps: int, dtype: Any
) -> Array:
    return on_wide_matrices(
        lambda x, c: clip_wide(x, c, method, steps, dtype), x, threshold
    )


def clip_wide(
    x: Array, threshold: Array, method: Method, steps: int, dtype: Any = None
) -> Array:
    """Clip matrices with at most as many rows as columns, without checks."""
    work = jnp.promote_types(x.dtype, jnp.float32) if dtype is None else dtype
    # Rounded to the working type once, as the authors do, then at least float32.
    y = x.astype(work).astype(jnp.promote_types(work, jnp.float32))
    c = jnp.broadcast_to(threshold.astype(y.dtype), y.shape[:-2])
    return _clip(method, steps, jnp.dtype(work), y, c).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _clip(method: Method, steps: int, work: np.dtype, x: Array, c: Array) -> Array:
    if method == "svd":
        return _clip_by_svd(x, c)
    axes = None if method == "newton_schulz" else (-2, -1)
    scaled, scale = unit_scale(x, axes)
    gram = replicate_matrix(jnp.matmul(scaled, scaled.mT, precision=PRECISION))
    # The norm from the trace: on a sharded long side this saves an all-reduce.
    norm2 = jnp.max(_trace(gram), axes, keepdims=True)
    norm2 = jnp.where(norm2 > 0, norm2, 1)
    w, restore = _weigh(x, c, scale, norm2)
    scaled, gram = scaled / jnp.sqrt(norm2), gram / norm2
    if method == "newton_schulz":
        z = _inverse_sqrt_by_newton_schulz(gram.astype(work), w.astype(work), steps)
        product = jnp.matmul(z, scaled.astype(work), precision=PRECISION)
        return restore(product.astype(x.dtype))
    if method == "eigh" or (method == "auto" and x.dtype == jnp.float64):
        z = jax.lax.platform_dependent(
            gram,
            w,
            # See `thin_svd`: under `jax.vmap`, batched routines can wait for ever.
            cpu=sequential_vmap(_inverse_sqrt_by_eigh),
            default=_inverse_sqrt_by_eigh,
        )
    elif method == "polynomial":
        z = _inverse_sqrt_by_polynomial(gram, w)
    else:
        z = jax.lax.platform_dependent(
            gram, w, cpu=_inverse_sqrt_on_cpu, default=_inverse_sqrt_by_polynomial
        )
    # Pinned at both ends, nothing between the Gram matrix and Z communicates.
    z = replicate_matrix(z)
    return restore(jnp.matmul(z, scaled, precision=PRECISION))


@_clip.defjvp
def _clip_jvp(
    method: Method, steps: int, work: np.dtype, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    (x, c), (dx, dc) = primals, tangents
    value = _clip(method, steps, work, x, c)
    u, s, vt = thin_svd(x)
    r = s / jnp.where(c > 0, c, 1)[..., None]  # c = 0 is masked below
    a = jnp.sqrt(1 + r**2)
    ai, aj, ri, rj = a[..., None], a[..., None, :], r[..., None], r[..., None, :]
    # Both quotients in the form without cancellation:
    # r_i a_j - r_j a_i = (r_i² - r_j²) / (r_i a_j + r_j a_i).
    both_zero = ri + rj == 0
    mixed = jnp.where(both_zero, 1, ri * aj + rj * ai)
    total = jnp.where(both_zero, 1, ri + rj)
    same, opposite = total / (ai * aj * mixed), mixed / (ai * aj * total)
    tangent = spectral_tangent(dx, u, vt, same, opposite, 1 / a)
    # The derivative in c maps each singular value to (clipped / c)³.
    scaled_u = u * ((r / a) ** 3 * dc[..., None])[..., None, :]
    by_c = jnp.matmul(scaled_u, vt, precision=PRECISION)
    tangent = jnp.where((c > 0)[..., None, None], tangent, 0) + by_c
    return value, tangent


def _inverse_sqrt_by_eigh(gram: Array, w: Array) -> Array:
    """Form Z from the eigendecomposition of the Gram matrix."""
    eigenvalues, q = jnp.linalg.eigh(gram)
    d = w[..., 0] + (1 - w[..., 0]) * jnp.maximum(eigenvalues, 0)
    # Eigenvalues carry an error of a few eps.  Below that floor a direction is rounding
    # noise, and dividing by it would push the result above the threshold.
    d = jnp.maximum(d, 8 * jnp.finfo(gram.dtype).eps)
    return jnp.matmul(q / jnp.sqrt(d)[..., None, :], q.mT, precision=PRECISION)


def _inverse_sqrt_by_polynomial(gram: Array, w: Array) -> Array:
    """Form Z by three composed polynomials of the Gram matrix in 12 products."""
    return _compose(gram, w, *_spectrum_end(gram, w))


@sequential_vmap
def _inverse_sqrt_on_cpu(gram: Array, w: Array) -> Array:
    """Use polynomials while they are exact to single precision, else decompose.

    One decision for a whole stack, and under `jax.vmap` one after the other: a branch
    for each matrix would run both.
    """
    end = _spectrum_end(gram, w)
    return jax.lax.cond(
        jnp.min(end[1]) >= 1 / (1 + KAPPA_SINGLE_PRECISION**2),
        lambda: _compose(gram, w, *end),
        lambda: _inverse_sqrt_by_eigh(gram, w),
    )


def _spectrum_end(gram: Array, w: Array) -> tuple[Array, Array, Array]:
    """Bound the spectrum of A = (w I + (1-w) G) / top to [alpha, 1]; also return G²."""
    gram2 = jnp.matmul(gram, gram, precision=PRECISION)
    # λ_max(G)² <= ‖G²‖_F; a little above against rounding, since the polynomials
    # grow fast outside their interval.
    bound = jnp.sqrt(jnp.sqrt(_sum_matrix(gram2**2)))
    bound = jnp.minimum(bound, 1) * (1 + 8 * jnp.finfo(gram.dtype).eps)
    top = w + (1 - w) * bound
    return top, w / top, gram2


def _compose(gram: Array, w: Array, top: Array, alpha: Array, gram2: Array) -> Array:
    mul = functools.partial(jnp.matmul, precision=PRECISION)
    eye = _eye_like(gram)
    beta = (1 - w) / top
    a = alpha * eye + beta * gram
    a2 = alpha**2 * eye + 2 * alpha * beta * gram + beta**2 * gram2
    q1, q2, q3 = jnp.moveaxis(_table_row(alpha[..., 0, 0]), -2, 0)

    def q(row: Array, r: Array, r2: Array) -> Array:
        c0, c1, c2, c3, c4 = jnp.moveaxis(row, -1, 0)[..., None, None]
        return c0 * eye + c1 * r + c2 * r2 + mul(r2, c3 * r + c4 * r2)

    # Three different polynomials, the first and the last cheaper than the middle one:
    # straight code, not an iteration.  Y ≈ A^(1/2), Z ≈ A^(-1/2), R = Z Y.
    z = q(q1, a, a2)
    y = mul(a, z)
    r = mul(z, y)
    factor = q(q2, r, mul(r, r))
    y, z = mul(y, factor), mul(factor, z)
    r = mul(z, y)
    return mul(q(q3, r, mul(r, r)), z) / jnp.sqrt(top)


def _table_row(low_squared: Array) -> Array:
    """Take the row with the largest lower end that is at most sqrt(low_squared)."""
    table = jnp.asarray(inverse_sqrt_table(), low_squared.dtype)
    # The largest finite logarithm stands in for l = 0.
    tiny = jnp.finfo(low_squared.dtype).tiny
    octaves = -jnp.log2(jnp.maximum(low_squared, tiny)) / 2
    row = jnp.ceil(ROWS_PER_OCTAVE * octaves)
    return table[jnp.clip(row, 0, ROWS_PER_OCTAVE * OCTAVES).astype(jnp.int32)]


def _inverse_sqrt_by_newton_schulz(gram: Array, w: Array, steps: int) -> Array:
    """Run the authors' coupled iteration; one spectral bound for the whole stack."""
    row_sums = jnp.max(jnp.sum(jnp.abs(gram), -1))
    bound = jnp.minimum(row_sums, jnp.max(jnp.sqrt(_sum_matrix(gram**2))))
    top = w + (1 - w) * bound
    eye = _eye_like(gram)
    a = w / top * eye + (1 - w) / top * gram
    mul = functools.partial(jnp.matmul, precision=PRECISION)

    def step(_: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        y, z = pair
        factor = 1.5 * eye - 0.5 * mul(z, y)
        return mul(y, factor), mul(factor, z)

    # a * 0 + I rather than I: the carry keeps its type under shard_map.
    _, z = jax.lax.fori_loop(0, steps, step, (a, a * 0 + eye))
    return z / jnp.sqrt(top)


def _clip_by_svd(x: Array, c: Array) -> Array:
    """Apply the scalar map to the singular values: Z X̂ = U diag(s / d) Vᵀ."""
    scaled, scale = unit_scale(x)
    u, s, vt = thin_svd(scaled)
    s = keep_numerical_rank(s, max(x.shape[-2:]))
    norm2 = jnp.sum(s**2, -1)[..., None, None]
    norm2 = jnp.where(norm2 > 0, norm2, 1)
    w, restore = _weigh(x, c, scale, norm2)
    s, w = s / jnp.sqrt(norm2[..., 0]), w[..., 0]
    d = jnp.sqrt(w + (1 - w) * s**2)
    s = s / jnp.where(d > 0, d, 1)
    return restore(jnp.matmul(u * s[..., None, :], vt, precision=PRECISION))


def _weigh(
    x: Array, c: Array, scale: Array, norm2: Array
) -> tuple[Array, Callable[[Array], Array]]:
    """Return w and the map Z X̂ ↦ f sqrt(w) Z X̂, with f² = scale² norm2."""
    c = c[..., None, None]
    r = jnp.where(scale > 0, scale / c * jnp.sqrt(norm2), 0)  # f / c, may be ∞
    w = 1 / (1 + r**2)

    def restore(product: Array) -> Array:
        # f sqrt(w) is c / sqrt(1 + 1/r²) for large r: each form where it is safe.
        small = scale * (jnp.sqrt(norm2 * w) * product)
        large = c / jnp.sqrt(1 + 1 / jnp.maximum(r, 1) ** 2) * product
        out = jnp.where(r < 1, small, large)
        # At w = 1 the map is the identity to rounding: return x itself, bit for bit.
        out = jnp.where(w == 1, x, out)
        # The scale tells whether the matrix was finite; no decomposition sees NaN.
        return jnp.where(jnp.isfinite(scale), out, jnp.nan)

    return w, restore


def _eye_like(matrix: Array) -> Array:
    return jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)


def _trace(matrix: Array) -> Array:
    return jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None]


def _sum_matrix(matrix: Array) -> Array:
    return jnp.sum(matrix, (-2, -1), keepdims=True)
