"""MARS: Adam on variance-reduced gradients, a base direction for SPECTRA.

    C = g_k + γ β₁/(1-β₁) (g_k - g_{k-1}),    C ← C / max(1, ‖C‖_F)  for each tensor,

then Adam's moments of C.  The previous gradient stands for the previous parameters'
gradient on the new batch, the "approximate" variant, so a step costs one gradient.
Yuan et al., "MARS: Unleashing the Power of Variance Reduction for Training Large
Models" (2024, arXiv:2411.10438).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from basinax.optimizers._scaling import unit_scale


class VarianceReductionState(NamedTuple):
    """State of the correction.

    Attributes:
        previous: last gradient, shapes and dtypes of the parameters.
    """

    previous: optax.Updates


def scale_by_mars(
    b1: Any = 0.95,
    b2: Any = 0.99,
    gamma: Any = 0.025,
    eps: Any = 1e-8,
    *,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale variance-reduced gradients by Adam's rule.

    The authors use it for matrices and AdamW, at a third of the learning rate, for the
    rest; combine the two with `optax.partition`.

    Args:
        b1: decay of the first moment, below 1.
        b2: decay of the second moment.
        gamma: weight of the correction; 0 leaves Adam on norm-clipped gradients.
        eps: added to the root of the second moment.
        mu_dtype: dtype of the first moment; default that of the parameters.

    Returns:
        A transformation that returns an ascent direction.

    Example:
        >>> from basinax.optimizers import scale_by_mars, spectra
        >>> tx = spectra(scale_by_mars(), 3e-3, threshold=10.0, weight_decay=0.1)

    Reference:
        arXiv:2411.10438, MARS-AdamW, approximate.
    """

    def init_fn(params: optax.Params) -> VarianceReductionState:
        return VarianceReductionState(optax.tree.zeros_like(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, VarianceReductionState]:
        del params, extra_args
        weight = gamma * b1 / (1 - b1)

        def correct(g: jax.Array, before: jax.Array) -> jax.Array:
            if g.size == 0:
                return g
            work = jnp.promote_types(g.dtype, jnp.float32)
            c = g.astype(work) + weight * (g.astype(work) - before.astype(work))
            scaled, scale = unit_scale(c, None)
            root = jnp.sqrt(jnp.sum(jnp.abs(scaled) ** 2))
            root = jnp.where(root > 0, root, 1)
            scale = scale.reshape(())
            # Also when the norm overflows; non-finite entries pass through as they are.
            outside = (scale * root > 1) & jnp.isfinite(scale)
            return jnp.where(outside, scaled / root, c).astype(g.dtype)

        corrected = jax.tree.map(correct, updates, state.previous)
        previous = optax.tree.cast_like(updates, state.previous)
        return corrected, VarianceReductionState(previous)

    correction = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return optax.chain(correction, optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype))
