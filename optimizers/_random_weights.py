"""Random loss weighting: new random weights at every step.

    w = softmax(z),    z_t ~ N(0, 1)

In expectation a training run with equal weights, with more noise; the baseline that any
weighting scheme should beat.  Lin, Ye, Zhang and Tsang, "Reasonable Effectiveness of
Random Weighting" (TMLR 2022, arXiv:2111.10603).
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from basinax.optimizers._weighting import Weighting, needed, no_state


def random_weights(
    draw: Callable[..., Array] = jax.random.normal,
) -> Weighting:
    """Weigh tasks at random, afresh at each step.

    Use it as a control: what it gains over equal weights comes from noise.

    Args:
        draw: `draw(key, shape)` returns the numbers whose softmax are the weights, for
            instance `jax.random.uniform`.

    Returns:
        A `Weighting` that needs `key=`, has no state and does without `num_tasks`.
        Its weights are positive and sum to one.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import aggregate, random_weights
        >>> tx = aggregate(random_weights(), key=0)
        >>> grads = jnp.array([[1.0, 5.0], [1.0, 5.0]])  # two tasks, two parameters
        >>> updates, _ = tx.update(grads, tx.init(jnp.zeros(2)))
        >>> updates.round(3)
        Array([1., 5.], dtype=float32)

    Reference:
        arXiv:2111.10603, RLW with normal weights.
    """

    def update(
        state: Any, *, gramian: Any, losses: Any = None, key: Any = None
    ) -> tuple[Array, Any]:
        tasks = (losses if gramian is None else gramian).shape[0]
        key = needed(key, "key", "random_weights")
        return jax.nn.softmax(draw(key, (tasks,))), state

    return Weighting(no_state, update)
