"""Nexus for loops that hand over one micro-batch gradient per call.

The live parameters walk: after the k-th of K calls they are θ - γ acc_k, where the next
gradient is to be taken, and after the last one they are the outer optimizer's next θ.
θ itself and acc are in the state, so that no sum is ever recovered from rounded
parameters.  See `_nexus` for the equations and the paper.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from basinax.optimizers._nexus import (
    EPS,
    Normalize,
    Reduce,
    add_direction,
    check_options,
    check_params,
    check_rate,
    look_ahead,
    reduced,
    zero_accumulator,
)


class NexusMultiStepsState(NamedTuple):
    """State of `nexus_multi_steps`.

    Attributes:
        mini_step: position k in the walk, int32 scalar from 0 to K - 1.
        gradient_step: number of outer steps so far, int32 scalar.
        params: θ, the parameters that the walk started from.
        accumulator: acc, the sum of directions, in at least float32.
        inner_state: state of the outer optimizer.
    """

    mini_step: Int[Array, ""]
    gradient_step: Int[Array, ""]
    params: PyTree
    accumulator: PyTree
    inner_state: PyTree


def nexus_multi_steps(
    outer: optax.GradientTransformation,
    inner_learning_rate: optax.ScalarOrSchedule,
    every_k: int,
    *,
    normalize: Normalize = "global",
    reduce: Reduce = "mean",
    eps: float = EPS,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that every K-th call ends a Nexus step.

    For training loops that cannot be restructured, such as flax's `TrainState`; it
    computes what `nexus` does, to rounding, if call k hands over the gradient of
    micro-batch k at the current parameters.  Where the loop can hand over all
    micro-batches at once prefer `nexus`: here the state holds two more copies of the
    parameters, and between the K-th calls the live parameters are look-ahead points.
    Evaluate, average and save `nexus_params(state)` instead.

    The updates must be applied as they are, so nothing may follow in a chain; clipping
    and schedules belong into `outer`, which sees pseudo-gradients and counts outer
    steps.

    Args:
        outer: optimizer of the pseudo-gradient.
        inner_learning_rate: γ >= 0, a number or a schedule of the outer step.
        every_k: K >= 1, number of micro-batches per outer step.
        normalize: as in `nexus_value_and_grad`, like all that follows.
        reduce: "mean", "sum" or "displacement".
        eps: added to norms.
        accumulator_dtype: dtype of the sum of directions; at least float32 if None.

    Returns:
        A transformation with `NexusMultiStepsState` that needs `params`.  Extra
        arguments go to `outer`.

    Raises:
        TypeError: from `init`, a parameter is not real floating point.
        ValueError: `every_k` is not a positive int, or as `nexus_value_and_grad`; from
            `update`, if `params` is missing.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from basinax.optimizers import nexus_multi_steps, nexus_params
        >>> loss_fn = lambda w, centre: 0.5 * jnp.sum((w - centre) ** 2)
        >>> tx = nexus_multi_steps(optax.sgd(1.0), 0.1, every_k=2)
        >>> w = jnp.zeros(2)
        >>> state = tx.init(w)
        >>> for centre in jnp.array([[4.0, 0.0], [0.0, 3.0]]):
        ...     updates, state = tx.update(jax.grad(loss_fn)(w, centre), state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> [round(float(x), 3) for x in nexus_params(state)]
        [0.483, 0.5]

    Reference:
        arXiv:2604.09258.
    """
    if isinstance(every_k, bool) or not isinstance(every_k, int) or every_k < 1:
        raise ValueError(f"every_k must be a positive int, got {every_k!r}.")
    if not callable(inner_learning_rate):
        check_rate(inner_learning_rate)
    check_options(normalize, reduce, eps)
    outer = optax.with_extra_args_support(outer)

    def init_fn(params: optax.Params) -> NexusMultiStepsState:
        check_params(params)
        return NexusMultiStepsState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_step=jnp.zeros([], jnp.int32),
            params=jax.tree.map(_copy, params),
            accumulator=zero_accumulator(params, accumulator_dtype),
            inner_state=outer.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NexusMultiStepsState]:
        if params is None:
            raise ValueError(
                "nexus_multi_steps moves the params along its walk, but they are "
                "missing: call tx.update(grads, state, params)."
            )
        rate = inner_learning_rate
        gamma = jnp.asarray(rate(state.gradient_step) if callable(rate) else rate)
        acc = add_direction(state.accumulator, updates, normalize, eps)

        def walk_on() -> tuple[PyTree, NexusMultiStepsState]:
            ahead = optax.tree.cast_like(
                look_ahead(state.params, acc, gamma), state.params
            )
            step = optax.safe_increment(state.mini_step)
            return ahead, state._replace(mini_step=step, accumulator=acc)

        def outer_step() -> tuple[PyTree, NexusMultiStepsState]:
            gradient = jax.tree.map(
                lambda g, p: g.astype(p.dtype),
                reduced(acc, reduce, every_k, gamma),
                state.params,
            )
            change, inner_state = outer.update(
                gradient, state.inner_state, state.params, **extra_args
            )
            new = optax.apply_updates(state.params, change)
            return new, NexusMultiStepsState(
                mini_step=jnp.zeros_like(state.mini_step),
                gradient_step=jnp.asarray(optax.safe_increment(state.gradient_step)),
                params=new,
                accumulator=jax.tree.map(jnp.zeros_like, state.accumulator),
                inner_state=inner_state,
            )

        target, state = jax.lax.cond(
            state.mini_step == every_k - 1, outer_step, walk_on
        )
        # Against the parameters given, so that no rounding adds up over calls.
        return jax.tree.map(jnp.subtract, target, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _copy(leaf: Any) -> Any:
    """Copy, so that a step may donate parameters and state; shapes stay shapes."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf)


def nexus_params(state: optax.OptState) -> PyTree:
    """Return the parameters proper from the state of `nexus_multi_steps`.

    Between the K-th calls the loop holds look-ahead points; evaluate, average and save
    these instead.

    Args:
        state: a `NexusMultiStepsState`, or the state of an optimizer that contains one.

    Returns:
        θ, in the structure and dtypes of the parameters.

    Raises:
        ValueError: `state` holds none, or several.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.optimizers import nexus_multi_steps, nexus_params
        >>> tx = nexus_multi_steps(optax.sgd(1.0), 0.1, every_k=2)
        >>> nexus_params(tx.init(jnp.ones(2))).tolist()
        [1.0, 1.0]
    """
    is_ours = lambda x: isinstance(x, NexusMultiStepsState)  # noqa: E731
    found = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(
            f"state holds {len(found)} states of nexus_multi_steps, need exactly one."
        )
    return found[0].params
