"""Dynamic weight average: more weight to the tasks whose losses fall more slowly.

    r_t = mean of the last W losses of task t / mean of the W losses before,
    w = softmax(r / temperature)

Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention" (CVPR 2019,
arXiv:1803.10704).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from basinax.optimizers._weighting import (
    Weighting,
    check_count,
    needed,
    needed_num_tasks,
    unless_finite,
)


class DWAState(NamedTuple):
    """State of `dwa`.

    Attributes:
        count: number of losses seen, int32 scalar.
        history: the last 2W losses, oldest first, shape (2W, T); ones at the start.
        current: weights in use, shape (T,).
    """

    count: Int[Array, ""]
    history: Float[Array, "W2 T"]
    current: Float[Array, " T"]


def dwa(window: int = 25, temperature: Any = 2.0, *, sliding: bool = True) -> Weighting:
    """Weigh tasks by how slowly their losses fall.

    The ratio of averages does not change with the units of a loss, but it is noisy:
    choose the window long enough for averages over minibatches to be stable.

    Args:
        window: number of steps W in each average.
        temperature: larger values make the weights more equal.
        sliding: renew the weights at every step, from the window that ends there, as
            widespread implementations do; False renews them every `window` steps from
            the two windows that have ended, which is the paper's rule if a window is
            an epoch.  Weights are equal until the first renewal: step W+1, or 2W.

    Returns:
        A `Weighting` that needs `num_tasks` and `losses=`.  Its weights sum to one.
        Losses that are not finite give NaN weights and are not remembered.

    Raises:
        TypeError: `window` is not a compile-time int.
        ValueError: `window` is less than one.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.optimizers import aggregate, dwa
        >>> tx = optax.chain(aggregate(dwa(), num_tasks=2), optax.adam(1e-3))
        >>> grads, losses = jnp.ones((2, 5)), jnp.array([0.3, 2.0])
        >>> updates, _ = tx.update(grads, tx.init(jnp.zeros(5)), losses=losses)

    Reference:
        arXiv:1803.10704, equation 7; there the weights sum to T.
    """
    window = check_count(window, "window")

    def init(num_tasks: int | None) -> DWAState:
        tasks = needed_num_tasks(num_tasks, "dwa")
        return DWAState(
            jnp.zeros([], jnp.int32),
            jnp.ones((2 * window, tasks)),
            jnp.ones(tasks) / tasks,
        )

    def update(
        state: DWAState, *, gramian: Any = None, losses: Any = None, key: Any = None
    ) -> tuple[Array, DWAState]:
        del gramian, key
        losses = needed(losses, "losses", "dwa").astype(state.history.dtype)
        history = jnp.concatenate([state.history[1:], losses[None]])
        seen = history if sliding else state.history
        before, recent = jnp.mean(seen[:window], 0), jnp.mean(seen[window:], 0)
        ratio = jnp.where(before == 0, 1, recent / jnp.where(before == 0, 1, before))
        if sliding:
            due = state.count > window
        else:
            due = (state.count >= 2 * window) & (state.count % window == 0)
        weights = jnp.where(due, jax.nn.softmax(ratio / temperature), state.current)
        new = DWAState(state.count + 1, history, weights)
        return unless_finite(losses, weights, new, state)

    return Weighting(init, update)
