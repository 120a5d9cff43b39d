"""CAGrad: the mean gradient moved, within a ball around it, to help the worst task.

    max_d min_t ⟨g_t, d⟩  over  ‖d - g₀‖ ≤ c ‖g₀‖,     g₀ = Jᵀ1/T

is solved by d = g₀ + c‖g₀‖ g_w/‖g_w‖, where g_w = Jᵀw and w is the point of the simplex
that minimises ⟨g_w, g₀⟩ + c‖g₀‖ ‖g_w‖.  With ‖g_w‖ = min_τ (‖g_w‖²/τ + τ)/2 this is

    min_τ min_w ⟨g_w, g₀⟩ + c‖g₀‖ (‖g_w‖²/τ + τ)/2,

a quadratic program inside a convex problem of one variable, whose solution is the only
τ with ‖g_w(τ)‖ = τ.  While the same tasks have weight, g_w(τ) is affine: the line
through two solutions leads to τ, exactly once both have the tasks of the last one.
Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning" (NeurIPS 2021,
arXiv:2110.14048).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from basinax.optimizers._quadratic_program import minimise_on_simplex
from basinax.optimizers._unit_gramian import (
    check_gramian,
    check_number,
    rounding_of,
    unit_gramian,
    weigh,
)

STEPS = 30
SHRINK = 0.01
"""The least share of τ that a step keeps, where the solution may be τ = 0."""


class _Search(NamedTuple):
    w: Array
    length: Array
    last_length: Array
    low: Array
    high: Array
    steps: Array
    running: Array


def cagrad_weights(
    gramian: Float[Array, "T T"], c: Any = 0.4, *, rescale: int = 1
) -> Float[Array, " T"]:
    """Weigh tasks so that the update stays near the mean and helps the worst task.

    c = 0 is the mean gradient, and c ≥ 1 points ever more along that of `mgda_weights`;
    for c < 1 the mean loss still converges to a stationary point.  The weights do not
    depend on the scale of the gradients.

    Two to six quadratic programs as `mgda_weights` solves one; more at
    Pareto-stationary points with c ≥ 1, where the best update is zero.

    Args:
        gramian: inner products of the task gradients, (T, T).
        c: radius of the ball in lengths of the mean gradient, c ≥ 0.
        rescale: what divides the update: 1 for the authors' 1 + c², 2 for 1 + c, 0 for
            nothing.

    Returns:
        Weights ≥ 0 of the whole update, (1/T + c‖g₀‖/‖g_w‖ w) / (1 + c²), dtype of
        `gramian`; NaN if an entry is not finite.

    Raises:
        ValueError: if `gramian` is not a square matrix, c is negative or `rescale` is
            not 0, 1 or 2.
        TypeError: if `gramian` is not real floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import cagrad_weights
        >>> gradients = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
        >>> weights = cagrad_weights(gradients @ gradients.T, c=0.5, rescale=0)
        >>> [round(float(x), 3) for x in weights @ gradients]
        [0.25, 0.5]

    Reference:
        arXiv:2110.14048, algorithm 1.
    """
    if isinstance(rescale, bool) or rescale not in (0, 1, 2):
        raise ValueError(
            f"rescale must be 0 (none), 1 (divide by 1 + c²) or 2 (by 1 + c), got "
            f"{rescale!r}."
        )
    check_number("c", c, positive=False)
    return _cagrad_weights(check_gramian(gramian), c, rescale)


@functools.partial(jax.jit, static_argnums=2)
def _cagrad_weights(gramian: Array, c: Any, rescale: int) -> Array:
    return weigh(_combine, gramian, c, rounding_of(gramian), rescale)


def _combine(gramian: Array, c: Any, rounding: float, rescale: int) -> Array:
    c = jnp.asarray(c, gramian.dtype)
    w, radius, length = worst_case(gramian, c, rounding)
    pull = jnp.where(radius > 0, radius / jnp.where(length > 0, length, 1), 0)
    divisor = (1, 1 + c**2, 1 + c)[rescale]
    return (1 / len(gramian) + pull * w) / divisor


def worst_case(
    gramian: Float[Array, "T T"], c: Array, rounding: float, smoothing: float = 0.0
) -> tuple[Float[Array, " T"], Float[Array, ""], Float[Array, ""]]:
    """Minimise ⟨g_w, g₀⟩ + c‖g₀‖ ‖g_w‖ over the simplex.

    Args:
        gramian: finite Gram matrix.
        c: radius of the ball in lengths of g₀.
        rounding: relative error of the entries of the matrix.
        smoothing: ε in √(‖·‖² + ε) in place of both norms, in the units of `gramian`;
            the authors' 1e-8 decides where gradients are as short as 1e-4.

    Returns:
        The minimiser w, c‖g₀‖, and τ = ‖g_w‖.  Where both vanish the minimiser is the
        limit of those for τ → 0, and g_w/τ that of directions, of length at most one.
    """
    unit, scale = unit_gramian(gramian, rounding)
    added = smoothing / scale
    info = jnp.finfo(unit.dtype)
    norms = jnp.sqrt(jnp.diag(unit))
    slope = jnp.mean(unit, 1)
    mean_square = jnp.maximum(jnp.mean(slope), 0) + added
    radius = c * jnp.sqrt(mean_square)
    divisor = jnp.where(radius > 0, radius, 1)

    def square_of(w: Array, v: Array) -> Array:
        return jnp.dot(w, unit @ v)

    def length_of(w: Array) -> Array:
        return jnp.sqrt(jnp.maximum(square_of(w, w), 0) + added)

    def step(state: _Search) -> _Search:
        w = minimise_on_simplex(unit, state.length / divisor * slope)
        length = length_of(w)
        # ‖g_w(τ)‖ rises and ‖g_w(τ)‖/τ falls: the norm lies between τ and the solution.
        low = jnp.where(length > state.length, length, state.low)
        high = jnp.where(length > state.length, state.high, length)
        # The τ with ‖g_w + (τ - τ_k) q‖ = τ on the line through the last two solutions.
        change = state.length - state.last_length
        q = (w - state.w) / jnp.where(change == 0, 1, change)
        p = w - state.length * q
        qq, pq, pp = square_of(q, q), square_of(p, q), square_of(p, p) + added
        root = jnp.sqrt(jnp.maximum(pq**2 + (1 - qq) * pp, 0))
        ahead = jnp.where(qq < 1, (pq + root) / jnp.where(qq < 1, 1 - qq, 1), jnp.inf)
        ahead = jnp.where((state.steps > 0) & (change != 0), ahead, length)
        ahead = jnp.clip(ahead, jnp.maximum(low, SHRINK * high), high)
        # ‖g_w‖² is known to ε times the square of the triangle inequality.
        error = jnp.abs(length - state.length)
        known = state.length + jnp.dot(w, norms) ** 2 / state.length
        running = (error > 2 * float(info.eps) * known) & (length > info.eps)
        ahead = jnp.where(running, ahead, state.length)
        return _Search(w, ahead, state.length, low, high, state.steps + 1, running)

    w = jnp.full_like(slope, 1 / len(unit))
    start = _Search(
        w,
        length_of(w),
        jnp.zeros_like(divisor),
        jnp.zeros_like(divisor),
        2 * jnp.sqrt(1 + added),  # more than the longest gradient
        jnp.zeros((), jnp.int32),
        jnp.asarray(True),
    )
    found = jax.lax.while_loop(lambda s: s.running & (s.steps < STEPS), step, start)
    # Unless the search was cut short the two are equal, or the maximum is τ.
    length = jnp.maximum(found.length, length_of(found.w))
    return found.w, radius * jnp.sqrt(scale), length * jnp.sqrt(scale)
