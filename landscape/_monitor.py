"""Measure while training: an identity transformation that remembers numbers.

Every n-th step the chosen metrics are evaluated inside the compiled update, under
`jax.lax.cond`, so that the other steps pay nothing; results stay in the optimizer's
state. No host callback is involved, and the state can be scanned over, donated, sharded
and checkpointed like any other.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree


class Observation(NamedTuple):
    """What a metric may look at.

    Attributes:
        step: number of earlier updates.
        updates: what came into the monitor: the gradient if it is first in a chain.
        params: the parameters that the gradient belongs to, or None if `update` was
            called without.
        extra: further keyword arguments of `update`, such as `value_fn`.
    """

    step: Int[Array, ""]
    updates: PyTree
    params: PyTree | None
    extra: Mapping[str, Any]


class Metric(NamedTuple):
    """A number to monitor that needs a memory between its evaluations.

    Attributes:
        init: makes the memory from the parameters, a tree of strongly typed arrays. It
            must not look at values, only at shapes.
        evaluate: called as `evaluate(memory, observation)`; returns the new memory,
            of the same types, and the value, a real scalar.
    """

    init: Callable[[PyTree], PyTree]
    evaluate: Callable[[PyTree, Observation], tuple[PyTree, Float[Array, ""]]]


class MonitorState(NamedTuple):
    """State of `monitor`.

    Attributes:
        step: number of updates so far.
        values: the latest value of each metric, float32; zeros before the first update.
        memory: what each metric keeps, in the order of `values`.
    """

    step: Int[Array, ""]
    values: dict[str, Float[Array, ""]]
    memory: tuple[PyTree, ...]


def monitor(
    metrics: Mapping[str, Metric | Callable[[Observation], Float[Array, ""]]],
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Keep the latest values of some metrics in the optimizer's state.

    Updates pass through unchanged. `basinax.landscape.metrics` has metrics for the
    curvature, the edge of stability and the gradient; one without memory may be any
    function of an `Observation`. Those that look at curvature need the loss, which
    `update` takes as for optax's line searches:

        tx.update(grads, state, params, value_fn=lambda p: loss_fn(p, batch))

    Place it first in a chain to see the raw gradient, last to see the step. Read a
    value by `optax.tree.get(state, name)`; values are measured at steps 0, n, 2n, ...
    and stay in between. Under `optax.MultiSteps` a step is one emitted update. Under
    `optax.masked` and `optax.partition` the parameters that `value_fn` is given lack
    the other leaves, so place the monitor outside.

    Args:
        metrics: metrics by name. A name that is unique in the optimizer's state makes
            it easy to read.
        every: number n of steps between evaluations.

    Returns:
        A transformation with `MonitorState`. Unknown extra arguments are ignored.

    Raises:
        TypeError: if a metric is neither a `Metric` nor callable.
        ValueError: if `every` is not a positive int; from `update`, if a metric lacks
            `params` or `value_fn`, or does not return a real scalar.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from basinax.landscape import metrics, monitor
        >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([4.0, 1.0]) * w**2)
        >>> watch = monitor(
        ...     {"sharpness": metrics.lambda_max(), "size": metrics.parameter_norm()},
        ...     every=10,
        ... )
        >>> tx = optax.chain(watch, optax.sgd(0.1))
        >>> w = jnp.array([3.0, 4.0])
        >>> _, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> round(float(optax.tree.get(state, "sharpness")), 3)
        4.0
        >>> float(optax.tree.get(state, "size"))
        5.0
    """
    if isinstance(every, bool) or not isinstance(every, int | np.integer) or every < 1:
        raise ValueError(f"every must be a positive int, got {every!r}.")
    named = {name: _as_metric(name, metrics[name]) for name in sorted(metrics)}

    def init_fn(params: optax.Params) -> MonitorState:
        return MonitorState(
            step=jnp.zeros((), jnp.int32),
            values={name: jnp.zeros((), jnp.float32) for name in named},
            memory=tuple(metric.init(params) for metric in named.values()),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MonitorState]:
        seen = Observation(state.step, updates, params, extra_args)
        values, memory = state.values, state.memory
        if jax.tree.leaves(updates):  # there is nothing to measure on an empty tree
            values, memory = jax.lax.cond(
                state.step % every == 0,
                functools.partial(_measure, named, seen),
                lambda memory: (values, memory),
                memory,
            )
        step = jnp.asarray(optax.safe_increment(state.step))
        return updates, MonitorState(step, values, memory)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _measure(
    named: dict[str, Metric], seen: Observation, memory: tuple[PyTree, ...]
) -> tuple[dict[str, Array], tuple[PyTree, ...]]:
    values, kept = {}, []
    for (name, metric), old in zip(named.items(), memory, strict=True):
        new, value = metric.evaluate(old, seen)
        if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.number):
            raise ValueError(
                f"the metric {name!r} must return a real scalar, got "
                f"{jnp.result_type(value)} of shape {jnp.shape(value)}."
            )
        values[name] = jnp.asarray(value, jnp.float32)
        kept.append(new)
    return values, tuple(kept)


def _as_metric(name: str, metric: Any) -> Metric:
    if isinstance(metric, Metric):
        return metric
    if not callable(metric):
        raise TypeError(
            f"the metric {name!r} must be a Metric, such as metrics.lambda_max(), or a "
            f"function of an Observation; got {type(metric).__name__}."
        )
    function: Any = metric
    return Metric(lambda _: (), lambda memory, seen: (memory, function(seen)))
