"""Schedules of the clipping threshold c_k.

During warm-up SPECTRA keeps the product of threshold and learning rate constant,

    c_k = c η_base / max(η_k, 1e-10)    for k < warmup_steps,    c_k = c afterwards,

so the largest step is the same from the start and early updates are hardly clipped.
Optionally c decays over the last d = int(fraction · total_steps) steps.  Both from the
code of Jiang, Semenov and Stich, "Enhancing LLM Training via Spectral Clipping" (ICML
2026, arXiv:2603.14315).
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from basinax.optimizers._checks import check_choice, check_threshold

Shape = Literal["linear", "sqrt", "cosine", "square", "exp"]

# The authors' floor under a learning rate of zero at the first step.
MIN_LEARNING_RATE = 1e-10


def coupled_threshold(
    threshold: optax.ScalarOrSchedule,
    learning_rate: optax.ScalarOrSchedule,
    warmup_steps: int,
    *,
    peak_learning_rate: Any = None,
) -> optax.Schedule:
    """Couple the threshold to the learning rate during warm-up.

    Args:
        threshold: c after warm-up, a number or a schedule.
        learning_rate: η_k; a number leaves the threshold as it is, and so does a
            schedule that `optax.inject_hyperparams` has already turned into one.
        warmup_steps: length of the warm-up in steps; 0 switches the coupling off.
        peak_learning_rate: η_base; default the largest η_k for k <= warmup_steps.

    Returns:
        Schedule of c_k.

    Raises:
        TypeError: if the threshold is no number or schedule, or `warmup_steps` no int.
        ValueError: if the threshold is negative or NaN, or `warmup_steps` negative.

    Example:
        >>> import optax
        >>> from basinax.optimizers import coupled_threshold
        >>> eta = optax.linear_schedule(1e-5, 1e-3, 100)
        >>> c = coupled_threshold(10.0, eta, 100)
        >>> [round(float(c(k) * eta(k)), 6) for k in (0, 50, 100)]
        [0.01, 0.01, 0.01]
    """
    check_step_count("warmup_steps", warmup_steps)
    base = _as_schedule(threshold)
    if not callable(learning_rate) or warmup_steps == 0:
        return base
    if peak_learning_rate is None:
        # Evaluated once, also when this is built inside a traced function.
        with jax.ensure_compile_time_eval():
            rates = jax.vmap(learning_rate)(jnp.arange(warmup_steps + 1))
            peak_learning_rate = jnp.max(rates)

    def schedule(count: Any) -> ArrayLike:
        rate = jnp.maximum(learning_rate(count), MIN_LEARNING_RATE)
        ratio = jnp.where(count < warmup_steps, peak_learning_rate / rate, 1)
        return base(count) * ratio

    return schedule


def decayed_threshold(
    threshold: optax.ScalarOrSchedule,
    total_steps: int,
    fraction: float,
    *,
    shape: Shape = "linear",
    final_scale: float = 0.0,
) -> optax.Schedule:
    """Let the threshold decay over the last steps of training.

    Args:
        threshold: c before the decay, a number or a schedule, for instance one from
            `coupled_threshold`.
        total_steps: length of training in steps.
        fraction: share of the steps, at the end, over which c decays; in [0, 1].
        shape: with p the progress in [0, 1] and f the final scale,
            "linear" f + (1-f)(1-p), "sqrt" f + (1-f)(1-√p),
            "cosine" f + (1-f)(1+cos πp)/2, "square" f + (1-f)(1-p²),
            "exp" f^p, which is linear for f = 0.
        final_scale: f, the factor on c at the last step.

    Returns:
        Schedule of c_k.

    Raises:
        TypeError: if the threshold is no number or schedule, or `total_steps` no int.
        ValueError: if the threshold is negative or NaN, the shape unknown, or another
            argument out of range.

    Example:
        >>> from basinax.optimizers import decayed_threshold
        >>> c = decayed_threshold(10.0, 100, 0.2, shape="sqrt")
        >>> [float(c(k)) for k in (0, 80, 85, 100)]
        [10.0, 10.0, 5.0, 0.0]
    """
    check_choice("shape", shape, get_args(Shape))
    check_step_count("total_steps", total_steps)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}.")
    if not final_scale >= 0:
        raise ValueError(f"final_scale must be >= 0, got {final_scale}.")
    base = _as_schedule(threshold)
    decay_steps = int(fraction * total_steps)

    def falling(p: Array) -> Array:
        """Go from 1 at p = 0 to 0 at p = 1."""
        if shape == "sqrt":
            return 1 - jnp.sqrt(p)
        if shape == "cosine":
            return (1 + jnp.cos(jnp.pi * p)) / 2
        return 1 - p**2 if shape == "square" else 1 - p

    def schedule(count: Any) -> ArrayLike:
        steps_in = count - (total_steps - decay_steps)
        p = jnp.clip(steps_in / max(decay_steps, 1), 0, 1 if decay_steps else 0)
        if shape == "exp" and final_scale > 0:
            return base(count) * final_scale**p
        return base(count) * (final_scale + (1 - final_scale) * falling(p))

    return schedule


def _as_schedule(threshold: optax.ScalarOrSchedule) -> optax.Schedule:
    if callable(threshold):
        return threshold
    check_threshold(threshold)
    return lambda _: jnp.asarray(threshold)


def check_step_count(name: str, value: Any) -> None:
    """Refuse a number of steps that is not a static int, or negative."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"{name} must be an int, got {type(value).__name__}; under "
            "optax.inject_hyperparams list it in static_args."
        )
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}.")
