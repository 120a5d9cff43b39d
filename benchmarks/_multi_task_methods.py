"""Ways from T losses to one update, each as an oracle and a weighting.

    params, batch → gradients of the tasks, perturbed or not → weights → Adam

An oracle without a weighting returns one gradient.  One with a weighting returns the
gradient of every task, and of each head its own.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from basinax.benchmarks._multi_task import MultiTask, owner
from basinax.benchmarks._tasks import Batch, Params
from basinax.optimizers import (
    aligned_mtl_weights,
    cagrad_weights,
    f_mtl_value_and_grad,
    fairgrad_weights,
    imtl_g_weights,
    mean_weights,
    mgda_weights,
    nash_weights,
    pcgrad_weights,
    sam_value_and_grad,
    samo_value_and_grad,
    task_gradients,
    upgrad_weights,
)

Gradient = Callable[[Params, Batch, jax.Array, jax.Array], Any]
"""``gradient(params, batch, rho, key)``"""


class Method(NamedTuple):
    """How a step is made; hashable, so that what was compiled for it is found again."""

    oracle: Callable[[MultiTask], Gradient]
    weighting: Any = None


def _axis(problem: MultiTask) -> Any:
    # Unrolled, a task runs through its own head only; compiling takes longer.
    return "unroll" if len(problem.tasks) <= 3 else "map"


def _of_mean(problem: MultiTask) -> Gradient:
    return lambda params, batch, *_: jax.grad(problem.mean_loss)(params, batch)


def _of_one(task: int) -> Callable[[MultiTask], Gradient]:
    def oracle(problem: MultiTask) -> Gradient:
        def loss(params: Params, batch: Batch) -> jax.Array:
            return problem.losses(params, batch)[task]

        return lambda params, batch, *_: jax.grad(loss)(params, batch)

    return oracle


def _sam(problem: MultiTask) -> Gradient:
    fn = sam_value_and_grad(problem.mean_loss, rho=0.0)
    return lambda params, batch, rho, _: fn(params, batch, rho=rho)[1]


def _each(problem: MultiTask) -> Gradient:
    fn = task_gradients(problem.losses, owner=owner, axis=_axis(problem))
    return lambda params, batch, *_: fn(params, batch)[1]


def _f_mtl(problem: MultiTask) -> Gradient:
    def gradient(params: Params, batch: Batch, rho: jax.Array, _: jax.Array) -> Any:
        fn = f_mtl_value_and_grad(
            problem.losses, rho=rho, owner=owner, axis=_axis(problem)
        )
        return fn(params, batch)[1]

    return gradient


def samo_oracle(**options: Any) -> Callable[[MultiTask], Gradient]:
    """Return the oracle of SAMO with other than its default options."""

    def oracle(problem: MultiTask) -> Gradient:
        def gradient(params: Params, batch: Batch, rho: Any, key: jax.Array) -> Any:
            fn = samo_value_and_grad(
                problem.losses, rho=rho, owner=owner, axis=_axis(problem), **options
            )
            return fn(params, batch, key=key)[1]

        return gradient

    return oracle


def coin(params: Params, tasks: int) -> jax.Array:
    """Return T losses to difference that have nothing to do with the task.

    Of a difference p_t only the sign survives.  Here it is that of 1·z, which falls
    like a coin and knows nothing of the losses.
    """
    return jnp.full(tasks, sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)))


def _coin(problem: MultiTask) -> Gradient:
    unrelated = lambda params, _: coin(params, len(problem.tasks))  # noqa: E731
    return samo_oracle(spsa_losses_fn=unrelated)(problem)


@functools.cache
def single(task: int) -> Method:
    """Train on one task alone; the other heads stay as they are."""
    return Method(_of_one(task))


WEIGHTINGS: dict[str, Any] = {
    "MGDA": mgda_weights,
    "PCGrad": pcgrad_weights,
    "CAGrad": partial(cagrad_weights, c=0.4),
    "IMTL-G": imtl_g_weights,
    "Nash": nash_weights,
    "FairGrad": fairgrad_weights,
    "UPGrad": upgrad_weights,
    "Aligned-MTL": aligned_mtl_weights,
}

_samo = samo_oracle()

METHODS: dict[str, Method] = {
    "equal weights": Method(_of_mean),
    "SAM": Method(_sam),
    "SAMO": Method(_samo, mean_weights),
    "SAMO, coin": Method(_coin, mean_weights),
    "SAMO, no local part": Method(samo_oracle(local="none"), mean_weights),
    "SAMO, exact": Method(samo_oracle(local="exact"), mean_weights),
    "SAMO, 8 samples": Method(samo_oracle(num_samples=8), mean_weights),
    "SAMO, 64 samples": Method(samo_oracle(num_samples=64), mean_weights),
    "SAM per task": Method(
        samo_oracle(local="exact", alpha=0.0, layerwise=False), mean_weights
    ),
    **{name: Method(_each, weighting) for name, weighting in WEIGHTINGS.items()},
    **{f"SAMO + {name}": Method(_samo, w) for name, w in WEIGHTINGS.items()},
    **{f"F-MTL + {name}": Method(_f_mtl, w) for name, w in WEIGHTINGS.items()},
}
