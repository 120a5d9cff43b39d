"""SPECTRA: spectral clipping of the update around any base direction.

    X ← (1 - λ η_k) X - α η_k C_{c_k}(U_k)

with U_k the direction of a base optimizer without learning rate and weight decay,
C_c the soft spectral clip and α = sqrt(max(1, fan_out/fan_in)).  Weight decay is
decoupled and never clipped.  The weights then stay in a spectral-norm ball:
‖X_k‖₂ <= Π(1 - λη_i) ‖X_0‖₂ + (1 - Π(1 - λη_i)) α c / λ.

Jiang, Semenov and Stich, "Enhancing LLM Training via Spectral Clipping" (ICML 2026,
arXiv:2603.14315).
"""

from typing import Any

import optax

from basinax.optimizers._options import takes_options_of
from basinax.optimizers._spectral_clip import spectral_clip
from basinax.optimizers._thresholds import check_step_count, coupled_threshold


@takes_options_of(spectral_clip)
def spectra(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    threshold: optax.ScalarOrSchedule,
    *,
    weight_decay: Any = 0.0,
    weight_decay_mask: Any = None,
    warmup_steps: int = 0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Wrap a base direction in spectral clipping, weight decay and learning rate.

    Use it to train with a larger learning rate and smaller weights than the base
    optimizer alone.  The authors take c = 10 for widths from 768; the natural unit is
    the norm of a random sign matrix, sqrt(m) + sqrt(n), of which 10 is about 0.13.

    Args:
        direction: transformation that returns an ascent direction, without learning
            rate and without weight decay, for instance `optax.scale_by_adam()`.
        learning_rate: η_k, a number or a schedule.
        threshold: c, a number or a schedule, in the units of the direction.
        weight_decay: λ, decoupled and multiplied by the learning rate.
        weight_decay_mask: tree of bools, or a callable of params, of leaves to decay.
        warmup_steps: while the step is below it, c_k = c η_base / η_k with η_base the
            largest learning rate of the warm-up, see `coupled_threshold`.
        **options: keyword arguments of `spectral_clip`.

    Returns:
        `optax.chain(direction, spectral_clip, add_decayed_weights,
        scale_by_learning_rate)`.

    Raises:
        TypeError: as `spectral_clip` and `coupled_threshold`.
        ValueError: as `spectral_clip` and `coupled_threshold`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.optimizers import spectra
        >>> tx = spectra(optax.scale_by_rms(), 1e-2, threshold=1.0, weight_decay=0.1)
        >>> params = {"w": jnp.ones((4, 4))}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> bool(jnp.linalg.norm(updates["w"] + 1e-3 * params["w"], 2) < 1e-2)
        True

    Reference:
        arXiv:2603.14315, post-clipping.
    """
    check_step_count("warmup_steps", warmup_steps)
    if warmup_steps:
        threshold = coupled_threshold(threshold, learning_rate, warmup_steps)
    return optax.chain(
        direction,
        spectral_clip(threshold, **options),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@takes_options_of(spectral_clip)
def spectra_adamw(
    learning_rate: optax.ScalarOrSchedule,
    threshold: optax.ScalarOrSchedule,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    mu_dtype: Any = None,
    weight_decay: Any = 0.1,
    weight_decay_mask: Any = None,
    warmup_steps: int = 0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Clip AdamW's direction spectrally; see `spectra`.

    Args:
        learning_rate: η_k.
        threshold: c; Adam's direction has entries of order 1.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        mu_dtype: dtype of the first moment; default that of the parameters.
        weight_decay: λ.
        weight_decay_mask: leaves to decay.
        warmup_steps: as in `spectra`.
        **options: keyword arguments of `spectral_clip`.

    Returns:
        The transformation.

    Example:
        >>> import optax
        >>> from basinax.optimizers import spectra_adamw
        >>> eta = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 1000)
        >>> tx = spectra_adamw(eta, threshold=10.0, warmup_steps=100)
    """
    return spectra(
        optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype),
        learning_rate,
        threshold,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        warmup_steps=warmup_steps,
        **options,
    )


@takes_options_of(spectral_clip)
def spectra_signum(
    learning_rate: optax.ScalarOrSchedule,
    threshold: optax.ScalarOrSchedule,
    *,
    beta: Any = 0.95,
    nesterov: bool = True,
    accumulator_dtype: Any = None,
    weight_decay: Any = 0.1,
    weight_decay_mask: Any = None,
    warmup_steps: int = 0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Clip the sign of the momentum spectrally; see `spectra`.

    The buffer is M ← β M + G and the direction sign(G + β M) with Nesterov, sign(M)
    without.  M starts at zero; the authors' code starts it at the parameters.

    Args:
        learning_rate: η_k.
        threshold: c; a sign matrix has spectral norm sqrt(m) + sqrt(n) when random, at
            least sqrt(max(m, n)) always.
        beta: decay of the momentum.
        nesterov: look ahead by one momentum step.
        accumulator_dtype: dtype of the momentum; default that of the parameters.
        weight_decay: λ.
        weight_decay_mask: leaves to decay.
        warmup_steps: as in `spectra`.
        **options: keyword arguments of `spectral_clip`.

    Returns:
        The transformation.

    Example:
        >>> from basinax.optimizers import spectra_signum
        >>> tx = spectra_signum(1e-3, threshold=10.0)
    """
    return spectra(
        optax.chain(
            optax.trace(beta, nesterov, accumulator_dtype), optax.scale_by_sign()
        ),
        learning_rate,
        threshold,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        warmup_steps=warmup_steps,
        **options,
    )


@takes_options_of(spectral_clip)
def spectra_ademamix(
    learning_rate: optax.ScalarOrSchedule,
    threshold: optax.ScalarOrSchedule,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    b3: optax.ScalarOrSchedule = 0.999,
    alpha: optax.ScalarOrSchedule = 8.0,
    eps: Any = 1e-8,
    mu_dtype: Any = None,
    weight_decay: Any = 0.1,
    weight_decay_mask: Any = None,
    warmup_steps: int = 0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Clip AdEMAMix's direction spectrally; see `spectra`.

    Args:
        learning_rate: η_k.
        threshold: c.
        b1: decay of the fast first moment.
        b2: decay of the second moment.
        b3: decay of the slow first moment, a number or a schedule.
        alpha: weight of the slow moment, a number or a schedule.
        eps: added to the root of the second moment.
        mu_dtype: dtype of the first moments; default that of the parameters.
        weight_decay: λ.
        weight_decay_mask: leaves to decay.
        warmup_steps: as in `spectra`.
        **options: keyword arguments of `spectral_clip`.

    Returns:
        The transformation.

    Example:
        >>> import optax
        >>> from basinax.optimizers import spectra_ademamix
        >>> alpha = optax.linear_schedule(0.0, 8.0, 1000)
        >>> tx = spectra_ademamix(1e-3, threshold=10.0, alpha=alpha)
    """
    return spectra(
        optax.contrib.scale_by_ademamix(b1, b2, b3, alpha, eps, mu_dtype=mu_dtype),
        learning_rate,
        threshold,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        warmup_steps=warmup_steps,
        **options,
    )
