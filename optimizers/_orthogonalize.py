"""Approximate orthogonalisation by a quintic Newton-Schulz iteration.

    X ← a X + (b A + c A²) X,   A = X Xᵀ (short side)

with (a, b, c) = (3.4445, -4.775, 2.0315), from X / (‖X‖_F + 1e-7).  The coefficients
trade convergence for slope at zero: singular values do not go to 1, they end between
about 0.7 and 1.2 after five steps, which is all an optimizer needs.  Source: Jordan et
al., "Muon" (2024); SPECTRA's code uses it as its "normalize" mode (arXiv:2603.14315).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from basinax.optimizers._checks import check_matrix_and_threshold, check_steps
from basinax.optimizers._layout import on_wide_matrices, replicate_matrix
from basinax.optimizers._scaling import unit_scale
from basinax.optimizers._spectral_derivative import PRECISION

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7
STEPS = 5


def orthogonalize(
    x: Float[Array, "*batch m n"], *, steps: int = STEPS
) -> Float[Array, "*batch m n"]:
    """Move every singular value of x near 1 and keep its singular vectors.

    Use it for Muon-like updates, whose size does not depend on the gradient's.

    Args:
        x: one matrix, or a stack of them on leading axes.
        steps: iterations; a compile-time int.

    Returns:
        The orthogonalised matrices, shape and dtype of `x`; zero for a zero matrix and
        NaN for one with a non-finite entry.

    Raises:
        TypeError: if `x` is not real floating point, or `steps` is not an int.
        ValueError: if `x` has fewer than two axes, or `steps` < 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import orthogonalize
        >>> s = jnp.linalg.svd(orthogonalize(jnp.eye(3)), compute_uv=False)
        >>> bool((0.6 < s.min()) & (s.max() < 1.3))
        True

    Reference:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    steps = check_steps(steps)
    x, _ = check_matrix_and_threshold(x, 0.0)
    return _orthogonalize(x, steps)


@functools.partial(jax.jit, static_argnums=1)
def _orthogonalize(x: Array, steps: int) -> Array:
    return on_wide_matrices(lambda x: orthogonalize_wide(x, steps), x)


def orthogonalize_wide(x: Array, steps: int) -> Array:
    """Orthogonalise matrices with at most as many rows as columns, without checks."""
    a, b, c = COEFFICIENTS
    mul = functools.partial(jnp.matmul, precision=PRECISION)
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scaled, scale = unit_scale(y)
    divisor = jnp.where(scale > 0, scale, 1)
    norm = jnp.sqrt(jnp.sum(scaled**2, (-2, -1), keepdims=True))
    y = scaled / (norm + EPS / divisor)

    def step(_: Array, y: Array) -> Array:
        gram = replicate_matrix(mul(y, y.mT))
        return a * y + mul(b * gram + c * mul(gram, gram), y)

    y = jax.lax.fori_loop(0, steps, step, y)
    return jnp.where(jnp.isfinite(scale), y, jnp.nan).astype(x.dtype)
