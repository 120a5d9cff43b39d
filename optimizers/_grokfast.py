"""Grokfast: amplify the slow part of the gradient.

    μ_t = α μ_{t-1} + (1-α) g_t,    ĝ_t = g_t + λ μ_t

The weights that generalise move slowly, so a low-pass filter finds their gradient.  A
gradient of angular frequency ω is multiplied by 1 + λ (1-α) / (1 - α e^{-iω}): by 1 + λ
if it is constant, by 1 + λ (1-α) / (1+α), next to nothing more, if it alternates.
Lee, Kang, Kim and Lee, "Grokfast: Accelerated Grokking by Amplifying Slow Gradients"
(2024, arXiv:2405.20233).
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Int

from basinax.optimizers._checks import check_choice


class GrokfastState(NamedTuple):
    """State of `grokfast_ema`.

    Attributes:
        count: number of updates so far, int32 scalar.
        ema: the average μ, in at least float32; zeros before the first update.
    """

    count: Int[Array, ""]
    ema: optax.Updates


def grokfast_ema(
    alpha: Any = 0.98, lamb: Any = 2.0, *, init: Literal["first", "zeros"] = "first"
) -> optax.GradientTransformationExtraArgs:
    """Add an amplified exponential moving average of the gradients to the gradient.

    Place it before the optimizer, for models that fit long before they generalise.  A
    constant gradient grows by 1 + λ: under Adam that changes little, under SGD it is a
    larger learning rate.  Weight decay should be decoupled, or it is amplified too.
    Before `perp_grad`, so that what it adds is projected as well.

    The average is accumulated in at least float32: in bfloat16 its increments of
    (1-α) would be lost to rounding.  A NaN stays in it; guard the whole chain by
    `optax.apply_if_finite` if gradients may hold one.

    Args:
        alpha: decay α of the average, 0 <= α < 1; the authors use 0.8 to 0.99.
        lamb: amplification λ of the slow part; 0 leaves gradients as they are.
        init: "first" starts the average at the first gradient, as the authors' code,
            so that the first output is (1 + λ) g_1; "zeros" starts it at zero, so that
            it builds up over 1/(1-α) steps.

    Returns:
        A transformation with `GrokfastState`.

    Raises:
        ValueError: alpha is known now to lie outside [0, 1), or `init` is unknown.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.optimizers import grokfast_ema
        >>> tx = optax.chain(grokfast_ema(0.98, 2.0), optax.adamw(1e-3))
        >>> boost = grokfast_ema()
        >>> grads = jnp.array([1.0, -2.0])
        >>> boost.update(grads, boost.init(grads))[0]
        Array([ 3., -6.], dtype=float32)

    Reference:
        arXiv:2405.20233, Grokfast-EMA.
    """
    check_choice("init", init, ("first", "zeros"))
    if not isinstance(alpha, Tracer | jax.Array) and not 0 <= alpha < 1:
        raise ValueError(f"alpha must be at least 0 and below 1, got {alpha}.")

    def init_fn(params: optax.Params) -> GrokfastState:
        zeros = lambda p: jnp.zeros_like(p, _wide(p))  # noqa: E731
        return GrokfastState(jnp.zeros([], jnp.int32), jax.tree.map(zeros, params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GrokfastState]:
        del params, extra_args
        decay = jnp.where(state.count > 0, alpha, 0) if init == "first" else alpha

        def average(g: jax.Array, mu: jax.Array) -> jax.Array:
            a = jnp.asarray(decay, mu.dtype)
            return a * mu + (1 - a) * g.astype(mu.dtype)

        def amplify(g: jax.Array, mu: jax.Array) -> jax.Array:
            slow = jnp.asarray(lamb, mu.dtype) * mu
            return (g.astype(mu.dtype) + slow).astype(g.dtype)

        ema = jax.tree.map(average, updates, state.ema)
        amplified = jax.tree.map(amplify, updates, ema)
        count = jnp.asarray(optax.safe_increment(state.count))
        return amplified, GrokfastState(count, ema)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _wide(leaf: Any) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)
