"""SAMO and an aggregation of task gradients as one link of an optax chain.

The gradient that comes in is that of the mean loss; the link perturbs the parameters
for every task, differentiates its loss there and combines the T gradients.  See `_samo`
for equations and paper, and `_aggregate` for the combination.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from basinax.optimizers._aggregate import AggregateState, Normalization, aggregate
from basinax.optimizers._ascent import check_radius
from basinax.optimizers._keys import next_key
from basinax.optimizers._samo import samo_value_and_grad
from basinax.optimizers._task_loop import Axis
from basinax.optimizers._weighting import Weighting, WeightingFunction, needed


class SAMOState(NamedTuple):
    """State of `samo`.

    Attributes:
        count: number of updates so far, int32 scalar; the argument of the radius's
            schedule.
        losses: task losses at the last update's parameters, float32 (T,); None without
            `num_tasks`.
        sharpness: how far the losses rose along the perturbations, float32 (T,); None
            likewise.
        aggregation: weights, cosines of the perturbed gradients, state of the weighting
            and random key.
    """

    count: Int[Array, ""]
    losses: Any
    sharpness: Any
    aggregation: AggregateState


def samo(
    weighting: Weighting | WeightingFunction,
    *,
    rho: optax.ScalarOrSchedule,
    num_tasks: int | None = None,
    normalize: Normalization | None = None,
    key: Any = None,
    alpha: Any = 0.5,
    local: Literal["spsa", "exact", "none"] = "spsa",
    mu: Any = 1e-3,
    num_samples: int = 1,
    layerwise: bool = True,
    owner: Any = None,
    perturb_private: bool | Literal["raw"] = True,
    adaptive: bool = False,
    axis: Axis = "map",
) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient by a combination of sharpness-aware task gradients.

    Put it first in a chain, and hand the T losses to `update` as a function:

        tx = optax.chain(samo(mgda_weights, rho=0.05, key=0), optax.adam(1e-3))
        mean_loss = lambda p: jnp.mean(losses_fn(p, batch))
        grads = jax.grad(mean_loss)(params)
        updates, state = tx.update(
            grads, state, params, value_fn=lambda p: losses_fn(p, batch)
        )

    The incoming gradient is reused as the common part of all perturbations, and for
    those of the heads, so that no backward pass is made twice.  It only steers: what
    clips or averages it in front does not bound what comes out.  Updates are bit for
    bit those of the same optimizer behind `samo_value_and_grad` and `aggregate`, which
    suit auxiliary outputs, microbatches and several devices better.

    With `num_tasks` the state keeps what is worth logging: `optax.tree.get(state,
    "sharpness")`, and likewise "losses", "weights" and "cosines".

    `optax.MultiSteps` around it accumulates the common gradient and takes the task
    losses of the last call.  Under `optax.masked` and `optax.partition`, `value_fn` is
    called with `optax.MaskedNode` in place of the hidden parameters; put `samo` in
    front of them.  For `optax.inject_hyperparams`, numbers but `num_tasks`, `key` and
    `num_samples` can be injected; those and callables are static_args.

    Args:
        weighting: how to combine the gradients of shared leaves, as in `aggregate`; it
            gets the clean losses.
        rho: radius ρ of the perturbations; a number or a schedule of the step.
        num_tasks: T.  Needed by weightings with a state, and to keep what is logged.
        normalize: scaling of the task gradients, as in `aggregate`.
        key: random key, or int as its seed: kept in the state and renewed at each
            update, where it is split in two, for directions and for the weighting.
        alpha: weight of the common part, as in `samo_value_and_grad` like all below.
        local: how a task's own direction is found.
        mu: distance per coordinate of its differences.
        num_samples: directions per task.
        layerwise: whether to give the local part the norms of the common one.
        owner: which task owns each leaf; private leaves follow their own gradient.
        perturb_private: whether private leaves move too.
        adaptive: whether lengths are relative to |w|.
        axis: how to go through the tasks.

    Returns:
        A transformation with `SAMOState` that needs `params` and the extra argument
        `value_fn`, a function of the parameters that returns losses of shape (T,).
        Further ones: `key`, which replaces that of the state for one call;
        `directions`, which replace drawing; `spsa_value_fn`, the losses to be
        differenced, for a model in evaluation mode.  Updates keep the dtype of the
        incoming gradients.  Where those are zero, only local parts perturb; where they
        are not finite, updates are NaN.

    Raises:
        TypeError: as in `aggregate`, `samo_value_and_grad`.
        ValueError: in `update`, `params`, `value_fn` or a random key is missing, or the
            losses are not (T,); otherwise as in `aggregate`, `samo_value_and_grad`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from basinax.optimizers import samo
        >>> losses_fn = lambda w: jnp.stack([jnp.sum(w**2), jnp.sum((w - 1) ** 2)])
        >>> params = jnp.array([3.0, 4.0])
        >>> equal = lambda gramian: jnp.full(2, 0.5)
        >>> tx = samo(equal, rho=0.1, num_tasks=2, key=0)
        >>> grads = jax.grad(lambda w: jnp.mean(losses_fn(w)))(params)
        >>> updates, state = tx.update(
        ...     grads, tx.init(params), params, value_fn=losses_fn
        ... )
        >>> optax.tree.get(state, "losses")
        Array([25., 13.], dtype=float32)

    Reference:
        "SAMO: A Lightweight Sharpness-Aware Approach for Multi-Task Optimization with
        Joint Global-Local Perturbation" (ICCV 2025, arXiv:2507.07883).
    """
    oracle = functools.partial(
        samo_value_and_grad,
        alpha=alpha,
        local=local,
        mu=mu,
        num_samples=num_samples,
        layerwise=layerwise,
        owner=owner,
        perturb_private=perturb_private,
        adaptive=adaptive,
        axis=axis,
        diagnostics=True,
    )
    # What is wrong with the options is said here rather than in the first update.
    oracle(lambda params: params, rho=0.0)
    if not callable(rho):
        check_radius(rho)
    combine = aggregate(weighting, num_tasks=num_tasks, normalize=normalize, key=key)

    def init_fn(params: optax.Params) -> SAMOState:
        def nothing() -> Any:
            return None if num_tasks is None else jnp.zeros(num_tasks, jnp.float32)

        aggregation: Any = combine.init(params)
        return SAMOState(jnp.zeros([], jnp.int32), nothing(), nothing(), aggregation)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value_fn: Any = None,
        key: Any = None,
        directions: Any = None,
        spsa_value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SAMOState]:
        del extra_args
        if params is None or value_fn is None:
            missing = "params" if params is None else "value_fn"
            raise ValueError(
                f"samo differentiates the task losses near the params, but {missing} "
                "is missing: call tx.update(grads, state, params, value_fn=lambda p: "
                "losses_fn(p, batch)) with losses of shape (T,)."
            )
        now, later = next_key(key, state.aggregation.key)
        perturb, weigh = (None, None) if now is None else jax.random.split(now)
        if local == "spsa" and directions is None:
            needed(perturb, "key", "samo")
        else:
            perturb = None
        value_and_grad = oracle(
            value_fn,
            rho=rho(state.count) if callable(rho) else rho,
            spsa_losses_fn=spsa_value_fn,
        )
        losses, grads, seen = value_and_grad(
            params, key=perturb, directions=directions, mean_gradient=updates
        )
        aggregated: Any = combine.update(
            grads, state.aggregation, params, losses=losses, key=weigh
        )
        combined, aggregation = aggregated

        def kept(value: Array) -> Any:
            return None if num_tasks is None else value.astype(jnp.float32)

        return optax.tree.cast_like(combined, updates), SAMOState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            losses=kept(losses),
            sharpness=kept(seen.sharpness),
            aggregation=aggregation._replace(key=later),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
