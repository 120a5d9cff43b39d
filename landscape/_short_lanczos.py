"""A few Lanczos steps inside a compiled program, for monitors.

Steps as in `eigenpairs`, but in one `lax` loop, with the projected matrix T solved in
the graph. The basis is so small that, once the component along the last vector is out,
one pass over all of it, vacant slots being zero, costs less than finding out what can
be left out. A monitor calls this inside a jitted and perhaps vmapped training step,
where a LAPACK routine may deadlock on CPU; products of small matrices cannot. So the
wanted eigenvector of T is read off a high power of the shifted and scaled matrix

    S = (T - low I) / tr(T - low I),   S^(2^24) -> s sᵀ,

by repeated squaring, which separates eigenvalues down to the rounding of float32.
Whatever s is, θ = sᵀ T s and u = V s satisfy

    ‖A u - θ u‖² = ‖T s - θ s‖² + (β_m s_m)²,

so the residual is honest about the power as well.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from basinax.landscape._lanczos import (
    BREAKDOWN,
    combine,
    components,
    rounding_unit,
    take,
)
from basinax.landscape._vectors import (
    check_same,
    check_vector,
    inner,
    norm,
    size,
    widen,
)

_HIGHEST = jax.lax.Precision.HIGHEST
_SQUARINGS = 24


class ShortLanczos(NamedTuple):
    """An approximate eigenpair.

    Attributes:
        value: Ritz value θ.
        vector: unit Ritz vector, in at least float32; a good start for the next call.
        residual: ‖A u - θ u‖; some eigenvalue lies within that distance of θ.
    """

    value: Float[Array, ""]
    vector: PyTree
    residual: Float[Array, ""]


def _top(
    projected: Float[Array, "m m"], live: Bool[Array, "m"]
) -> tuple[Float[Array, ""], Float[Array, "m"], Float[Array, ""]]:
    """Find θ, s and ‖T s - θ s‖ for the largest eigenvalue of the live part of T."""
    peak = jnp.max(jnp.abs(projected))
    unit = jnp.where(peak > 0, peak, 1)
    matrix = projected / unit
    # A lower bound of all eigenvalues (Gershgorin, rows of at most three entries), kept
    # apart from them so that a multiple of the identity does not become zero.
    shifted = matrix + 4 * jnp.eye(len(matrix))
    power = jnp.where(live[:, None] & live[None], shifted, 0)

    def square(_: Array, power: Array) -> Array:
        power = power / jnp.trace(power)
        return jnp.matmul(power, power, precision=_HIGHEST)

    power = jax.lax.fori_loop(0, _SQUARINGS, square, power)
    best = jnp.argmax(jnp.diagonal(power))
    s = jax.lax.dynamic_index_in_dim(power, best, 1, keepdims=False)
    s = s / jnp.max(jnp.abs(s))
    s = s / jnp.sqrt(jnp.sum(s**2))
    image = jnp.matmul(matrix, s, precision=_HIGHEST)
    value = jnp.sum(s * image)
    rest = jnp.sqrt(jnp.sum((image - value * s) ** 2))
    return value * unit, s, rest * unit


def _write(
    basis: PyTree, vector: PyTree, length: Float[Array, ""], index: Array | int
) -> PyTree:
    """Write the unit vector to a slot, or zero where the length is zero."""
    divisor = jnp.where(length > 0, length, 1)

    def write(rows: Array, x: Array) -> Array:
        unit = jnp.where(length > 0, x / divisor.astype(x.dtype), 0)
        return jax.lax.dynamic_update_index_in_dim(rows, unit, index, 0)

    return jax.tree.map(write, basis, vector)


def _orthogonal(basis: PyTree, vector: PyTree) -> tuple[PyTree, Float[Array, "slots"]]:
    """Subtract V (Vᵀ w); return what is left and Vᵀ w."""
    found = components(basis, vector)
    rest = jax.tree.map(
        lambda rows, x: (
            x - jnp.tensordot(found.astype(x.dtype), rows, 1, precision=_HIGHEST)
        ),
        basis,
        vector,
    )
    return rest, found


def short_lanczos(
    operator: Callable[[PyTree], PyTree],
    start: PyTree,
    num_steps: int,
    *,
    which: Literal["LA", "SA", "LM"] = "LA",
) -> ShortLanczos:
    """Approximate one extreme eigenpair by a fixed number of Lanczos steps.

    Works under `jax.jit`, `jax.vmap` and inside `lax.cond`. With the last Ritz vector
    as start, three to five steps follow the largest eigenvalue through training; from a
    random start take ten or more. A start that is exactly an eigenvector stays one, so
    mix in a little noise where another eigenvalue may overtake.

    Args:
        operator: symmetric linear function on trees shaped like `start`.
        start: non-zero tree; its dtypes are those of the parameters.
        num_steps: number of products, static; `num_steps + 1` vectors are held.
        which: "LA" for the largest, "SA" for the smallest eigenvalue, "LM" for the one
            of largest magnitude.

    Returns:
        The Ritz pair and its residual. After an early breakdown, as for the identity
        or zero, the pair is exact. NaN in the operator, and a zero start, give NaN.

    Raises:
        ValueError: for an unknown `which`, fewer than one step, or a start that is
            empty or not real floating point.
    """
    if which not in ("LA", "SA", "LM"):
        raise ValueError(f"which must be one of ('LA', 'SA', 'LM'), got {which!r}.")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    check_vector(start, "start")
    steps = min(num_steps, size(start))
    wide = widen(start)
    length = norm(wide)
    empty = jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x)] * (steps + 1)), wide)
    basis = _write(empty, wide, length, 0)
    coefficients = jnp.zeros((steps, 2), length.dtype)

    def step(index: Array, state: tuple) -> tuple:
        basis, scale, coefficients = state
        vector = take(basis, index)
        product = operator(optax.tree.cast_like(vector, start))
        check_same(product, start, "the operator's result")
        alpha = inner(vector, product)
        rest = jax.tree.map(
            lambda w, v: w - alpha.astype(w.dtype) * v, widen(product), vector
        )
        rest, found = _orthogonal(basis, rest)
        beta, alpha = norm(rest), alpha + found[index]
        scale = jnp.max(jnp.stack([scale, jnp.abs(alpha), beta]))
        # Compared before anything is divided; NaN compares false and is passed on.
        beta = jnp.where(beta <= BREAKDOWN * rounding_unit(basis) * scale, 0, beta)
        coefficients = coefficients.at[index].set(jnp.stack([alpha, beta]))
        return _write(basis, rest, beta, index + 1), scale, coefficients

    state = (basis, jnp.zeros_like(length), coefficients)
    basis, _, coefficients = jax.lax.fori_loop(0, steps, step, state)
    alphas, betas = coefficients.T
    # Slot j is live while no earlier β vanished; NaN counts as live and is passed on.
    alive = jnp.cumprod(jnp.where(betas[:-1] == 0, 0, 1))
    live = jnp.concatenate([jnp.ones(1, bool), alive.astype(bool)])
    projected = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)

    def extreme(sign: int) -> tuple[Array, Array, Array]:
        value, s, rest = _top(sign * projected, live)
        return sign * value, s, rest

    if which == "LM":
        top, bottom = extreme(1), extreme(-1)
        larger = jnp.abs(top[0]) >= jnp.abs(bottom[0])
        value, s, rest = jax.tree.map(lambda a, b: jnp.where(larger, a, b), top, bottom)
    else:
        value, s, rest = extreme(1 if which == "LA" else -1)
    residual = jnp.hypot(rest, betas[-1] * s[-1])
    nan = jnp.where(length > 0, 0, jnp.nan)
    weights = jnp.concatenate([s + nan, jnp.zeros(1, s.dtype)])
    vector = jax.tree.map(lambda x: x[0], combine(basis, weights[:, None]))
    return ShortLanczos(value + nan, vector, residual + nan)
