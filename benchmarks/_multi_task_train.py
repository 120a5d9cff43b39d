"""Training on many tasks at once, and what the minimum that it ends in is like.

One compiled scan of steps serves all radii and all seeds of a method; seeds follow one
another, as in the comparison, so that the step that is timed is the one that was run.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._multi_task import MultiTask, minibatch, on_device, owner
from basinax.benchmarks._multi_task_methods import METHODS, Method, single
from basinax.benchmarks._tasks import Batch, Params
from basinax.landscape import eigenpairs, hessian, sam_sharpness
from basinax.optimizers import FlatTaskGrads, aggregate, mean_weights, task_gradients

CHUNK = 50  # steps compiled into one program
SHARPNESS_RHO = 0.1
BASELINE = "equal weights"


class Plan(NamedTuple):
    """How long to train and how fast."""

    steps: int = 1500
    rate: float = 1e-3


PLAN = Plan()


class Measured(NamedTuple):
    """What one trained network is like; one number per task, or one in all."""

    accuracy: np.ndarray
    """Share of right answers on the test examples, shape (T,)."""
    validation: np.ndarray
    """The same on the validation examples."""
    loss: np.ndarray
    """Mean loss on the training examples, like all that follows."""
    cosine: float
    """Cosine between the shared gradients of two tasks, mean over the pairs."""
    sharpness: np.ndarray
    """How far each loss rises at distance 0.1 along its gradient."""
    lambda_max: np.ndarray
    """Largest Hessian eigenvalue of each loss."""


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3,))
def _advance(
    problem: MultiTask,
    method: Method,
    plan: Plan,
    carry: tuple[Params, Any],
    data: Batch,
    rho: jax.Array,
    key: jax.Array,
    first: jax.Array,
) -> tuple[Params, Any]:
    gradient, adam = method.oracle(problem), optax.adam(plan.rate)
    combine = None if method.weighting is None else aggregate(method.weighting)

    def direction(params: Params, batch: Batch, key: jax.Array) -> Any:
        inner, outer = jax.random.split(key)
        grads = gradient(params, batch, rho, inner)
        if combine is None:
            return grads
        # The two parts of F-MTL are combined one by one and added.
        parts = grads if isinstance(grads, FlatTaskGrads) else (grads,)
        state = combine.init(params)
        found = [combine.update(part, state, params, key=outer)[0] for part in parts]
        return jax.tree.map(lambda *leaves: sum(leaves), *found)

    def step(carry: tuple[Params, Any], index: jax.Array) -> tuple[Any, None]:
        params, state = carry
        batch_key, method_key = jax.random.split(jax.random.fold_in(key, index))
        batch = minibatch(data, batch_key, problem.batch_size)
        grads = direction(params, batch, method_key)
        updates, state = adam.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, first + jnp.arange(min(CHUNK, plan.steps)))[0]


@partial(jax.jit, static_argnums=(0, 1))
def _start(problem: MultiTask, plan: Plan, key: jax.Array) -> tuple[Params, Any]:
    params = problem.init(key)
    return params, optax.adam(plan.rate).init(params)


def train(
    problem: MultiTask,
    method: Method,
    data: Batch,
    *,
    seed: int,
    rho: float = 0.0,
    plan: Plan = PLAN,
) -> Params:
    """Train once with Adam.

    Args:
      problem: what to train on.
      method: how a step is made.
      data: training examples.
      seed: fixes start and minibatches, alike for all methods.
      rho: radius, where the method has one.
      plan: steps, a multiple of the chunk or less than one, and learning rate.
    """
    if plan.steps > CHUNK and plan.steps % CHUNK:
        raise ValueError(f"steps {plan.steps} is not a multiple of {CHUNK}")
    init_key, key = jax.random.split(jax.random.key(seed))
    carry, radius = _start(problem, plan, init_key), jnp.float32(rho)
    for first in range(0, plan.steps, CHUNK):
        carry = _advance(
            problem, method, plan, carry, data, radius, key, jnp.int32(first)
        )
    return carry[0]


@functools.cache
def loss_of_task(problem: MultiTask) -> Callable[..., jax.Array]:
    """Return `loss(params, batch, task)`, the same function at every call."""

    def loss(params: Params, batch: Batch, task: jax.Array) -> jax.Array:
        return problem.losses(params, batch)[task]

    return loss


@partial(jax.jit, static_argnums=0)
def _look(
    problem: MultiTask, params: Params, train: Batch, validation: Batch, test: Batch
) -> tuple[jax.Array, ...]:
    number = len(problem.tasks)
    losses, grads = task_gradients(problem.losses, owner=owner)(params, train)
    tx = aggregate(mean_weights, num_tasks=number)
    _, state = tx.update(grads, tx.init(params), params)
    cosines: Any = optax.tree.get(state, "cosines")
    pairs = jnp.sum(cosines) - jnp.trace(cosines)
    loss = loss_of_task(problem)
    rises = jax.lax.map(
        lambda task: sam_sharpness(loss, params, train, task, rho=SHARPNESS_RHO),
        jnp.arange(number),
    )
    cosine = pairs / max(1, number * (number - 1))
    right = (problem.accuracies(params, part) for part in (test, validation))
    return *right, losses, cosine, rises


def measure(
    problem: MultiTask, params: Params, train: Batch, validation: Batch, test: Batch
) -> Measured:
    """Measure a trained network, see `Measured`."""
    seen = jax.device_get(_look(problem, params, train, validation, test))
    accuracy, held, losses, cosine, rises = seen
    eigenvalues = []
    for task in range(len(problem.tasks)):
        curvature = hessian(
            loss_of_task(problem), params, train, jnp.int32(task), linearize=True
        )
        key = jax.random.key(task)
        eigenvalues.append(eigenpairs(curvature, params, 1, key=key, tol=1e-2).values)
    lambda_max = np.concatenate(jax.device_get(eigenvalues))
    return Measured(accuracy, held, losses, float(cosine), rises, lambda_max)


@functools.cache
def outcome(
    problem: MultiTask, method: Method, rho: float, seed: int, plan: Plan
) -> Measured:
    """Train and measure once; the same again costs nothing."""
    splits = tuple(map(on_device, problem.deal(seed)))
    params = train(problem, method, splits[0], seed=seed, rho=rho, plan=plan)
    return measure(problem, params, *splits)


def singles(problem: MultiTask, seed: int, plan: Plan) -> np.ndarray:
    """Return the test accuracies of networks trained on one task each, shape (T,)."""
    return np.array(
        [
            outcome(problem, single(task), 0.0, seed, plan).accuracy[task]
            for task in range(len(problem.tasks))
        ]
    )


def step_ratios(
    problem: MultiTask,
    names: Sequence[str],
    plan: Plan,
    methods: Mapping[str, Method] = METHODS,
    rounds: int = 9,
) -> dict[str, float]:
    """Time the steps of methods, in units of those with equal weights."""
    data, key = on_device(problem.deal(0).train), jax.random.key(0)

    def call(method: Method) -> Callable[[], Any]:
        held = [_start(problem, plan, key)]

        def advance() -> Any:
            held[0] = _advance(
                problem,
                method,
                plan,
                held[0],
                data,
                jnp.float32(0.1),
                key,
                jnp.int32(0),
            )
            return held[0]

        return advance

    calls = {name: call(methods[name]) for name in dict.fromkeys((BASELINE, *names))}
    times = interleaved_times(calls, rounds=rounds)
    return {
        name: median([a / b for a, b in zip(times[name], times[BASELINE], strict=True)])
        for name in names
    }
