"""FAMO: let all task losses fall at the same relative rate, from the losses alone.

    w = softmax(ξ - log D),    D = L - L_min + 1e-8

is the direction in which every log D_t falls by amounts proportional to softmax(ξ)_t.
After the step the logits follow what was seen to happen:

    ξ ← Adam(ξ, J_softmax(ξ)ᵀ (log D_before - log D_after) + decay·ξ).

Liu, Feng, Stone and Liu, "FAMO: Fast Adaptive Multitask Optimization" (NeurIPS 2023,
arXiv:2306.03792).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from basinax.optimizers._weighting import (
    Weighting,
    needed,
    needed_num_tasks,
    unless_finite,
)

_EPSILON = 1e-8  # the authors'


class FAMOState(NamedTuple):
    """State of `famo`.

    Attributes:
        logits: ξ, shape (T,).
        log_gaps: log D of the previous call, shape (T,).
        started: whether there was a previous call.
        optimizer: state of the logits' optimizer.
    """

    logits: Float[Array, " T"]
    log_gaps: Float[Array, " T"]
    started: Bool[Array, ""]
    optimizer: Any


def famo(
    learning_rate: Any = 0.025, decay: Any = 0.01, *, lowest: Any = 0.0
) -> Weighting:
    """Weigh tasks so that their log losses fall together.

    It needs no Gram matrix, so that one gradient of the weighted loss would do, and no
    second evaluation of the losses: those of the next call show what the step did.
    They come from the next minibatch, where the authors evaluate the same one again;
    call with losses of a fixed batch to remove that noise.

    Args:
        learning_rate: of the logits.
        decay: of the logits, pulls the weights of log losses towards equality.
        lowest: L_min, what the losses cannot go below, scalar or shape (T,).

    Returns:
        A `Weighting` that needs `num_tasks` and `losses=`.  Its weights sum to one.
        Losses that are not finite, or below `lowest`, give NaN weights and leave no
        trace in the state.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import aggregate, famo
        >>> tx = aggregate(famo(), num_tasks=2)
        >>> grads, losses = jnp.eye(2), jnp.array([1.0, 3.0])
        >>> updates, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
        >>> [round(update, 3) for update in updates.tolist()]
        [0.75, 0.25]

    Reference:
        arXiv:2306.03792, algorithm 1.
    """
    adam = optax.chain(optax.add_decayed_weights(decay), optax.adam(learning_rate))

    def init(num_tasks: int | None) -> FAMOState:
        tasks = needed_num_tasks(num_tasks, "famo")
        logits = jnp.zeros(tasks)
        return FAMOState(logits, jnp.zeros(tasks), jnp.array(False), adam.init(logits))

    def update(
        state: FAMOState, *, gramian: Any = None, losses: Any = None, key: Any = None
    ) -> tuple[Array, FAMOState]:
        del gramian, key
        losses = needed(losses, "losses", "famo").astype(state.logits.dtype)
        log_gaps = jnp.log(losses - lowest + _EPSILON)

        shares = jax.nn.softmax(state.logits)
        fall = state.log_gaps - log_gaps
        gradient = shares * (fall - jnp.dot(shares, fall))
        moved: Any = adam.update(gradient, state.optimizer, state.logits)
        after = (state.logits + moved[0], moved[1])
        before = (state.logits, state.optimizer)
        logits, optimizer = jax.tree.map(
            lambda a, b: jnp.where(state.started, a, b), after, before
        )

        weights = jax.nn.softmax(logits - log_gaps)
        new = FAMOState(logits, log_gaps, jnp.array(True), optimizer)
        return unless_finite(log_gaps, weights, new, state)

    return Weighting(init, update)
