"""FairGrad and Nash-MTL: weights that equal a power of the rates they bring about.

    (G w)_t = w_t^(-1/α)

is where ½ wᵀGw - Σ_t w_t^p/p, p = 1 - 1/α, is least over w > 0, a convex function (with
log w_t in place of w_t^p/p for p = 0).  (G w)_t is the rate at which the update lowers
loss t; α = 1 is the Nash bargaining solution, and larger α favour the slowest task.
Navon et al., "Multi-Task Learning as a Bargaining Game" (ICML 2022, arXiv:2202.01017);
Ban and Ji, "Fair Resource Allocation in Multi-Task Learning" (ICML 2024,
arXiv:2402.15638).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from basinax.optimizers._unit_gramian import (
    check_gramian,
    check_number,
    cosine_gramian,
    rounding_of,
    weigh,
)

STEPS = 100
LENGTHS = 2.0 ** -np.arange(10)
"""Steps that the line search tries."""
FLATTER = 0.3
"""The share of its first slope to which a step may let the slope rise."""


def nash_weights(gramian: Float[Array, "T T"]) -> Float[Array, " T"]:
    """Weigh tasks by the Nash bargaining solution, the root of G w = 1/w.

    The update maximises the product of the rates at which the losses fall, among those
    of a given length.  It does not change when a loss changes its unit, which makes it
    the choice for losses that are not comparable.  Its squared length is T whatever the
    gradients: set the learning rate or normalise accordingly.

    A handful of Newton steps, each a factorization of a T x T matrix.

    Args:
        gramian: inner products of the task gradients, (T, T).

    Returns:
        Weights ≥ 0, dtype of `gramian`.  A task whose gradient is zero has nothing to
        bargain for and gets weight zero.  At Pareto-stationary points, where there is
        no solution, the weights are large and the update they combine to is small.
        NaN if an entry is not finite.

    Raises:
        ValueError: if `gramian` is not a square matrix.
        TypeError: if it is not real floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import nash_weights
        >>> gradients = jnp.array([[4.0, 0.0], [0.0, 1.0]])
        >>> weights = nash_weights(gradients @ gradients.T)
        >>> [round(float(w), 3) for w in weights]
        [0.25, 1.0]

    Reference:
        arXiv:2202.01017, claim 3.1.
    """
    return _fairgrad_weights(check_gramian(gramian), 1.0)


def fairgrad_weights(
    gramian: Float[Array, "T T"], alpha: Any = 2.0
) -> Float[Array, " T"]:
    """Weigh tasks by α-fairness of their rates, the root of (G w)_t = w_t^(-1/α).

    Small α maximises the sum of the rates at which the losses fall, α = 1 their product
    (`nash_weights`), large α the least of them.  With G multiplied by s the weights are
    multiplied by s^(-α/(1+α)).

    A handful of Newton steps, each a factorization of a T x T matrix.  From α = 10 and
    with gradients that differ in length by decades a hundred may not be enough; the
    direction is then near that of `mgda_weights`, the limit.

    Args:
        gramian: inner products of the task gradients, (T, T).
        alpha: fairness α > 0, the authors' default 2.

    Returns:
        Weights ≥ 0, dtype of `gramian`.  A task whose gradient is zero gets weight
        zero.  At Pareto-stationary points, where there is no solution, the weights are
        large and the update they combine to is small.  NaN if an entry is not finite.

    Raises:
        ValueError: if `gramian` is not a square matrix, or alpha is not positive.
        TypeError: if `gramian` is not real floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import fairgrad_weights
        >>> gradients = jnp.array([[8.0, 0.0], [0.0, 1.0]])
        >>> weights = fairgrad_weights(gradients @ gradients.T, alpha=2.0)
        >>> [round(float(w), 4) for w in weights]
        [0.0625, 1.0]

    Reference:
        arXiv:2402.15638, equation 8.
    """
    check_number("alpha", alpha, positive=True)
    return _fairgrad_weights(check_gramian(gramian), alpha)


@jax.jit
def _fairgrad_weights(gramian: Array, alpha: Any) -> Array:
    return weigh(_fair, gramian, alpha, rounding_of(gramian))


def _fair(gramian: Array, alpha: Any, rounding: float) -> Array:
    dtype = gramian.dtype
    alpha = jnp.asarray(alpha, dtype)
    cosines, norms = cosine_gramian(gramian, rounding)
    alive = norms > 0
    largest = jnp.max(norms)
    largest = jnp.where(largest > 0, largest, 1)
    relative = jnp.where(alive, norms, largest) / largest
    # With y = ‖g‖ w it reads C y = y₀ (y/y₀)^(-1/α), where y₀ is the root for C = I.
    unit = relative ** ((1 - alpha) / (1 + alpha))
    y = _newton(cosines, unit, alpha)
    scale = largest ** ((1 - alpha) / (1 + alpha))
    return jnp.where(alive, y * scale / jnp.where(alive, norms, 1), 0)


def _newton(cosines: Array, unit: Array, alpha: Array) -> Array:
    """Solve C y = y₀ (y/y₀)^(-1/α) for y > 0 by damped Newton steps."""
    identity = jnp.eye(len(unit), dtype=unit.dtype)
    tolerance = 16 * float(jnp.finfo(unit.dtype).eps)
    lengths = jnp.asarray(LENGTHS, unit.dtype)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        y, steps, _ = state
        rates = cosines @ y
        slope = rates - unit * (y / unit) ** (-1 / alpha)
        # C + diag(h), scaled to a matrix that cannot become singular.
        s = jnp.sqrt(alpha * (y / unit) ** (1 + 1 / alpha))
        factor = jnp.linalg.cholesky(identity + s[:, None] * cosines * s[None, :])
        dy = -s * jax.scipy.linalg.cho_solve((factor, True), s * slope)
        change = jnp.max(jnp.abs(dy / y))
        # The first of 1, ½, ¼... that stays positive and does not climb again.
        inside = 0.99 / jnp.maximum(jnp.max(-dy / y), 0.99)
        tried = (inside * lengths)[:, None]
        ahead = y[None, :] + tried * dy[None, :]
        rise = rates[None, :] + tried * (cosines @ dy)[None, :]
        rise = rise - unit[None, :] * (ahead / unit[None, :]) ** (-1 / alpha)
        flat = jnp.sum(rise * dy[None, :], 1) <= FLATTER * jnp.abs(jnp.dot(slope, dy))
        chosen = jnp.where(jnp.any(flat), jnp.argmax(flat), len(lengths) - 1)
        sane = jnp.all(jnp.isfinite(ahead[chosen]) & (ahead[chosen] > 0))
        running = sane & (change > tolerance)
        return jnp.where(sane, ahead[chosen], y), steps + 1, running

    start = (unit, jnp.zeros((), jnp.int32), jnp.asarray(True))
    return jax.lax.while_loop(lambda s: s[2] & (s[1] < STEPS), step, start)[0]
