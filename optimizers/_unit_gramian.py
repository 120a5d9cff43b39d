"""What every weighting does with a Gram matrix before and after its own mathematics.

G = J Jᵀ holds the inner products of the T task gradients, the rows of J.  It is known
to its rounding error at best, so that weightings that invert it see G + T ε diag(G),
ε the machine epsilon of its dtype: rows that agree to rounding then count as equal,
problems with many solutions get one, and a solution exists also where the tasks have
no common descent direction.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float


def check_gramian(gramian: Any) -> Array:
    """Refuse what is not one square matrix of real floating point."""
    gramian = jnp.asarray(gramian)
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not gramian.size:
        raise ValueError(
            f"need the (T, T) Gram matrix of T task gradients, got shape "
            f"{gramian.shape}; build it as J @ J.T, and use jax.vmap for batches."
        )
    if not jnp.issubdtype(gramian.dtype, jnp.floating):
        raise TypeError(
            f"the Gram matrix must be real floating point, got {gramian.dtype}."
        )
    return gramian


def check_number(name: str, value: Any, positive: bool) -> None:
    """Refuse a number that is known now to be out of range."""
    if isinstance(value, Tracer):
        return
    number = np.asarray(value)
    if number.ndim or not jnp.issubdtype(number.dtype, np.number):
        raise TypeError(f"{name} must be one number, got {value!r}.")
    low = number > 0 if positive else number >= 0
    if not (low and np.isfinite(float(number))):
        bound = "> 0" if positive else ">= 0"
        raise ValueError(f"{name} must be finite and {bound}, got {value}.")


def weigh(solve: Callable[..., Array], gramian: Array, *args: Any) -> Array:
    """Run a solver on a finite matrix of at least float32 and restore the dtype.

    A non-finite entry anywhere makes every weight NaN; a weight too large for the dtype
    becomes its largest number.
    """
    work = jnp.promote_types(gramian.dtype, jnp.float32)
    finite = jnp.all(jnp.isfinite(gramian))
    # Accelerators round the operands of a product to fewer bits unless told otherwise.
    with jax.default_matmul_precision("highest"):
        weights = solve(jnp.where(finite, gramian.astype(work), 0), *args)
    largest = float(jnp.finfo(gramian.dtype).max)
    weights = jnp.where(finite, jnp.clip(weights, -largest, largest), jnp.nan)
    return weights.astype(gramian.dtype)


def unit_gramian(
    gramian: Float[Array, "T T"], rounding: float
) -> tuple[Float[Array, "T T"], Float[Array, ""]]:
    """Divide by the largest squared norm and add the rounding error to the diagonal.

    Args:
        gramian: finite Gram matrix.
        rounding: relative error of its entries.

    Returns:
        The matrix, zero where the Gram matrix is, and the divisor.
    """
    scale = jnp.max(jnp.abs(gramian))
    scale = jnp.where(scale > 0, scale, 1)
    unit = gramian / scale
    ridge = len(gramian) * rounding * jnp.diag(jnp.abs(jnp.diag(unit)))
    return unit + ridge, scale


def cosine_gramian(
    gramian: Float[Array, "T T"], rounding: float
) -> tuple[Float[Array, "T T"], Float[Array, " T"]]:
    """Return the cosines of the rows and their norms: G = D C D.

    A row of norm zero counts as orthogonal to all others.

    Args:
        gramian: finite Gram matrix.
        rounding: relative error of its entries, added to the diagonal T times.

    Returns:
        The matrix C and the diagonal of D.
    """
    norms = jnp.sqrt(jnp.maximum(jnp.diag(gramian), 0))
    divisor = jnp.where(norms > 0, norms, 1)
    cosines = jnp.clip(gramian / divisor[:, None] / divisor[None, :], -1, 1)
    outer = (norms[:, None] > 0) & (norms[None, :] > 0)
    eye = jnp.eye(len(gramian), dtype=bool)
    cosines = jnp.where(outer & ~eye, cosines, 0)
    return jnp.where(eye, 1 + len(gramian) * rounding, cosines), norms


def rounding_of(gramian: Array) -> float:
    """Return the machine epsilon of the dtype the matrix came in."""
    return float(jnp.finfo(gramian.dtype).eps)
