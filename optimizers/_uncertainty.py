"""Uncertainty weighting: learn the scale of each task's noise along with the task.

    minimise  Σ_t ½ (e^{-s_t} L_t + s_t),    so    w_t = ½ e^{-s_t},
    s ← s - η ½ (1 - e^{-s} L)

with s_t the log variance of task t; at rest e^{s_t} = L_t and every weighted loss is
one half.  Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh
Losses for Scene Geometry and Semantics" (CVPR 2018, arXiv:1705.07115).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from basinax.optimizers._weighting import (
    Weighting,
    needed,
    needed_num_tasks,
    unless_finite,
)


class UncertaintyState(NamedTuple):
    """State of `uncertainty`.

    Attributes:
        log_variances: s, shape (T,); zeros at the start.
        optimizer: state of their optimizer.
    """

    log_variances: Float[Array, " T"]
    optimizer: Any


def uncertainty(optimizer: optax.GradientTransformation | None = None) -> Weighting:
    """Weigh tasks by learned variances.

    Weights act on s as it was before the call, so that s and the model descend on one
    objective at one point.  Where the task losses are at hand, one may just as well
    keep s among the parameters and differentiate the objective above.

    Args:
        optimizer: of s; default `optax.adam(1e-3)`.

    Returns:
        A `Weighting` that needs `num_tasks` and `losses=`.  Its weights are positive
        and sum to T/2 at the start.  Losses that are not finite give NaN weights and
        leave no trace in the state.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.optimizers import aggregate, uncertainty
        >>> tx = aggregate(uncertainty(optax.sgd(1.0)), num_tasks=2)
        >>> grads, losses = jnp.eye(2), jnp.array([1.0, 3.0])
        >>> _, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
        >>> optax.tree.get(state, "log_variances")
        Array([0., 1.], dtype=float32)

    Reference:
        arXiv:1705.07115, equation 7 with s = log σ².
    """
    descent = optax.adam(1e-3) if optimizer is None else optimizer

    def init(num_tasks: int | None) -> UncertaintyState:
        s = jnp.zeros(needed_num_tasks(num_tasks, "uncertainty"))
        return UncertaintyState(s, descent.init(s))

    def update(
        state: UncertaintyState,
        *,
        gramian: Any = None,
        losses: Any = None,
        key: Any = None,
    ) -> tuple[Array, UncertaintyState]:
        del gramian, key
        s = state.log_variances
        losses = needed(losses, "losses", "uncertainty").astype(s.dtype)
        gradient = 0.5 * (1 - jnp.exp(-s) * losses)
        moved: Any = descent.update(gradient, state.optimizer, s)
        new = UncertaintyState(s + moved[0], moved[1])
        return unless_finite(losses, 0.5 * jnp.exp(-s), new, state)

    return Weighting(init, update)
