"""Nexus and Reptile as links of an optax chain.

The link is handed the loss and all micro-batches of a step, walks over them and hands
on the pseudo-gradient.  See `_nexus` for the equations and the paper.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from basinax.optimizers._nexus import (
    EPS,
    Normalize,
    Reduce,
    check_options,
    check_rate,
    nexus_value_and_grad,
)


class NexusState(NamedTuple):
    """State of `nexus`.

    Attributes:
        count: number of updates so far, int32 scalar; the argument of the inner
            learning rate's schedule.
        value: mean of the losses along the last walk, float32; zero before the first.
    """

    count: Int[Array, ""]
    value: Float[Array, ""]


def nexus(
    inner_learning_rate: optax.ScalarOrSchedule,
    *,
    normalize: Normalize = "global",
    reduce: Reduce = "mean",
    eps: float = EPS,
    accumulator_dtype: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    unroll: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient by that of a walk over the step's micro-batches.

    Put it first in a chain, and hand it the loss and the micro-batches:

        tx = optax.chain(nexus(0.05), optax.adamw(1e-3))
        updates, state = tx.update(
            params, state, params, value_fn=loss_fn, microbatches=microbatches
        )

    Of the incoming gradients only structure and dtypes are used, so the parameters may
    stand in for them.  Updates are bit for bit those of the same optimizer on
    `nexus_value_and_grad`, which has a form for auxiliary outputs; see there for what
    the options mean and what to watch.

    Args:
        inner_learning_rate: γ >= 0, a number or a schedule of the step.
        normalize: "global", "per_leaf", None or a function of the gradients.
        reduce: "mean", "sum" or "displacement".
        eps: added to norms.
        accumulator_dtype: dtype of the sum of directions; at least float32 if None.
        axis_name: axis over which inner gradients are averaged.
        unroll: as in `jax.lax.scan`.

    Returns:
        A transformation with `NexusState` that needs `params`, `value_fn(params,
        microbatch)` and `microbatches`, whose leaves have a leading axis K; with `key`,
        `value_fn(params, microbatch, key)`.  Updates have the dtypes of the incoming
        ones.

    Raises:
        TypeError: in `update`, a parameter is not real floating point.
        ValueError: as `nexus_value_and_grad`; in `update`, if `params`, `value_fn` or
            `microbatches` is missing.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.optimizers import nexus
        >>> loss_fn = lambda w, centre: 0.5 * jnp.sum((w - centre) ** 2)
        >>> centres, w = jnp.array([[4.0, 0.0], [0.0, 3.0]]), jnp.zeros(2)
        >>> tx = optax.chain(nexus(0.1), optax.sgd(1.0))
        >>> updates, _ = tx.update(
        ...     w, tx.init(w), w, value_fn=loss_fn, microbatches=centres
        ... )
        >>> [round(float(u), 3) for u in updates]
        [0.483, 0.5]

    Reference:
        arXiv:2604.09258.
    """
    if not callable(inner_learning_rate):
        check_rate(inner_learning_rate)
    check_options(normalize, reduce, eps)

    def init_fn(params: optax.Params) -> NexusState:
        del params
        return NexusState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value_fn: Any = None,
        microbatches: Any = None,
        key: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NexusState]:
        del extra_args
        needed = {"params": params, "value_fn": value_fn, "microbatches": microbatches}
        missing = [name for name, given in needed.items() if given is None]
        if missing:
            raise ValueError(
                f"nexus walks from the params over the micro-batches, but "
                f"{' and '.join(missing)} is missing: call tx.update(params, state, "
                "params, value_fn=loss_fn, microbatches=microbatches)."
            )
        rate = inner_learning_rate
        walk = nexus_value_and_grad(
            value_fn,
            rate(state.count) if callable(rate) else rate,
            normalize=normalize,
            reduce=reduce,
            eps=eps,
            accumulator_dtype=accumulator_dtype,
            axis_name=axis_name,
            unroll=unroll,
        )
        value, gradient = walk(params, microbatches, key=key)
        gradient = jax.tree.map(lambda u, g: g.astype(u.dtype), updates, gradient)
        count = jnp.asarray(optax.safe_increment(state.count))
        return gradient, NexusState(count, value.astype(jnp.float32))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def reptile(
    inner_learning_rate: optax.ScalarOrSchedule,
    interpolation: optax.ScalarOrSchedule = 1.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Walk over the micro-batches by raw gradients, then go a share of the way.

    θ <- θ + α (θ_K - θ), where θ_K is reached by K steps of gradient descent, one per
    micro-batch: `nexus` without normalisation, whose pseudo-gradient is the way walked,
    before `optax.sgd(α)`.  With a micro-batch per domain it is Fish with plain inner
    steps.

    Args:
        inner_learning_rate: γ >= 0 of the inner steps, a number or a schedule.
        interpolation: α, a number or a schedule; 1 ends at θ_K.
        **options: those of `nexus` other than `normalize` and `reduce`.

    Returns:
        The optimizer; `update` as for `nexus`.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import reptile
        >>> loss_fn = lambda w, centre: 0.5 * jnp.sum((w - centre) ** 2)
        >>> w, tx = jnp.zeros(1), reptile(0.5)
        >>> centres = jnp.array([[4.0], [8.0]])
        >>> tx.update(w, tx.init(w), w, value_fn=loss_fn, microbatches=centres)[0]
        Array([5.], dtype=float32)

    Reference:
        arXiv:1803.02999, algorithm 1; Shi et al., *Gradient Matching for Domain
        Generalization*, arXiv:2104.09937, algorithm 2.
    """
    walk = nexus(inner_learning_rate, normalize=None, reduce="displacement", **options)
    return optax.chain(walk, optax.sgd(interpolation))
