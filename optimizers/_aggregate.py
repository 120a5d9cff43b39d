"""From the gradients of T tasks to one update: u = Jᵀ w(J Jᵀ).

Row t of J is the gradient of task t.  What the weights depend on, and what they are
good for, is the business of the weighting.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from basinax.optimizers._checks import check_choice
from basinax.optimizers._keys import as_key, next_key
from basinax.optimizers._stacked import (
    check_task_losses,
    combine,
    count_tasks,
    take_apart,
)
from basinax.optimizers._task_gramian import TaskGramian, task_gramian
from basinax.optimizers._weighting import (
    Weighting,
    WeightingFunction,
    as_weighting,
    check_count,
    needed,
)

Normalization = Literal["l2", "loss", "loss+"]


class AggregateState(NamedTuple):
    """State of `aggregate`.

    Attributes:
        weights: the last update's weights w, float32 (T,); None without `num_tasks`.
        cosines: cosines between the last gradients, float32 (T, T); None likewise.
        weighting: state of the weighting.
        key: random key of the next update, or None.
    """

    weights: Any
    cosines: Any
    weighting: Any
    key: Any


def aggregate(
    weighting: Weighting | WeightingFunction,
    *,
    num_tasks: int | None = None,
    normalize: Normalization | None = None,
    mask: Any = None,
    key: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Combine the gradients of several tasks.

    Put it first in a chain, and hand the stacked gradients to `update`:

        tx = optax.chain(
            aggregate(mgda_weights), optax.clip_by_global_norm(1.0), optax.adamw(1e-3)
        )
        losses, grads = task_gradients(losses_fn)(params, batch)
        updates, state = tx.update(grads, state, params, losses=losses)

    `grads` are a tree like the parameters with a further leading axis T on every leaf,
    or `TaskGrads`: then the shared leaves are combined, and the head of a task follows
    its own gradient with weight one.

    Weights and cosines are kept for logging, `optax.tree.get(state, "weights")`, if the
    number of tasks is known beforehand.

    Weightings see the Gram matrix in at least float32.  If the largest gradient entry
    is beyond 1e±12 they see a multiple of it, whose entries do not overflow or vanish;
    for all that do not depend on the scale of G that makes no difference.

    One weighting for each group of leaves, say for each encoder: every `aggregate` in
    a chain combines the leaves of its own `mask` and hands on the others as they are.

        optax.chain(
            aggregate(mgda_weights, mask={"text": True, "image": False}),
            aggregate(mgda_weights, mask={"text": False, "image": True}),
            optax.adamw(1e-3),
        )

    `optax.masked` and `optax.partition` do the same for stacked trees, but know nothing
    of `TaskGrads`.  `optax.MultiSteps` accumulates in the shape of the parameters, so
    it cannot contain an aggregation: accumulate the task gradients, or combine first,
    `optax.chain(aggregate(w), optax.MultiSteps(tail, k).gradient_transformation())`,
    which averages combined gradients.  `aggregate` also serves as the aggregator of
    `optax.experimental.aggregating.process`.  Under `optax.inject_hyperparams` all
    arguments are static_args.

    Args:
        weighting: function of the T×T Gram matrix that returns T weights, such as
            `mgda_weights` or `functools.partial(cagrad_weights, c=0.4)`, which may name
            `losses` or `key` as further parameters; or a `Weighting`, such as `famo()`.
        num_tasks: T.  Needed by weightings with a state, and to keep weights and
            cosines.
        normalize: divide each gradient beforehand by its norm ("l2"), by its loss
            ("loss"), or by both ("loss+"); a divisor of zero is ignored.  The update
            combines the scaled gradients; the weights in the state are those of the
            gradients as they came.
        mask: tree (prefix) of booleans, or callable of the parameters returning one;
            leaves marked False do not enter the Gram matrix and pass unchanged.
        key: random key, or int as its seed, for weightings that draw: kept in the state
            and renewed at each update.

    Returns:
        A transformation with `AggregateState`.  Extra arguments of its `update`:
        `losses`, shape (T,), and `key`, which replaces that of the state for one call.
        Updates are shaped like the parameters, in the dtype of the gradients.  A NaN in
        the gradient of one task makes the combined update NaN in that entry at least,
        and everywhere for weightings that look at the Gram matrix.

    Raises:
        TypeError: `weighting` is neither a function nor a `Weighting`; `num_tasks` is
            no int.
        ValueError: `num_tasks` is missing or below one, `normalize` is unknown; in
            `update`, the leaves do not stack the same number of tasks, `losses` or
            weights are not (T,), or `losses` or `key` is missing.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.optimizers import aggregate
        >>> equal = lambda gramian: jnp.full(2, 0.5)
        >>> tx = aggregate(equal, num_tasks=2)
        >>> grads = jnp.array([[1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
        >>> updates, state = tx.update(grads, tx.init(jnp.zeros(3)))
        >>> updates.tolist()
        [0.0, 0.5, 0.5]
        >>> optax.tree.get(state, "cosines")[0, 1].round(3)  # a conflict
        Array(-0.5, dtype=float32)

    Reference:
        Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization" (NeurIPS
        2018, arXiv:1810.04650), for the view and the normalizations.
    """
    pair = as_weighting(weighting)
    if num_tasks is not None:
        num_tasks = check_count(num_tasks, "num_tasks")
    if normalize is not None:
        check_choice("normalize", normalize, get_args(Normalization))
    as_key(key)  # its errors belong here

    def init_fn(params: optax.Params) -> AggregateState:
        del params
        t = num_tasks
        return AggregateState(
            weights=None if t is None else jnp.zeros(t, jnp.float32),
            cosines=None if t is None else jnp.zeros((t, t), jnp.float32),
            weighting=pair.init(t),
            key=as_key(key),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        losses: Any = None,
        key: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AggregateState]:
        del extra_args
        parts = take_apart(updates, mask, params)
        if not jax.tree.leaves(parts.tasks):
            return parts.merge(parts.tasks), state
        tasks = count_tasks(parts.tasks, params, num_tasks)
        losses = check_task_losses(losses, tasks)
        now, later = next_key(key, state.key)

        measured = task_gramian(parts.tasks)
        seen, factors = _normalized(measured, normalize, losses)
        weights, inner = pair.update(
            state.weighting, gramian=seen.matrix, losses=losses, key=now
        )
        weights = _checked(weights, measured) * factors
        combined = parts.merge(combine(weights, parts.tasks))

        def kept(value: Array) -> Any:
            return None if num_tasks is None else value.astype(jnp.float32)

        return combined, AggregateState(
            weights=kept(weights),
            cosines=kept(measured.cosines),
            weighting=inner,
            key=later,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _normalized(
    measured: TaskGramian, normalize: Normalization | None, losses: Array | None
) -> tuple[TaskGramian, Array]:
    """Return the Gram matrix of the scaled gradients, and the scale factors."""
    factors = jnp.ones_like(measured.scale)
    if normalize in ("l2", "loss+"):
        factors = _inverse(measured.norms)
        measured = TaskGramian(measured.cosines, jnp.ones_like(factors))
    if normalize in ("loss", "loss+"):
        given = needed(losses, "losses", f'normalize="{normalize}"')
        by_loss = _inverse(given.astype(factors.dtype))
        factors *= by_loss
        measured = TaskGramian(measured.unit, measured.scale * by_loss)
    return measured, factors


def _inverse(x: Array) -> Array:
    return 1 / jnp.where(x == 0, 1, x)


def _checked(weights: Any, measured: TaskGramian) -> Array:
    if jnp.shape(weights) != measured.scale.shape:
        raise ValueError(
            f"the weighting returned shape {jnp.shape(weights)}; need one weight for "
            f"each task, {measured.scale.shape}."
        )
    return jnp.asarray(weights).astype(measured.scale.dtype)
