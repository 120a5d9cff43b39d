"""Training in compiled chunks of steps, with a look at the run after each.

Seed and peak learning rate are traced, so an optimizer is compiled once for its whole
learning-rate grid and all its seeds. Runs follow one another rather than being
vmapped: a vmapped run is not the program a user would run (branches turn into both
branches, matrix functions into batched ones), and small models gain little from it.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from basinax.benchmarks._measure import max_spectral_norm
from basinax.benchmarks._optimizers import (
    WEIGHT_DECAY,
    Entry,
    Recipe,
    schedule,
    warmup_steps,
)
from basinax.benchmarks._tasks import Metrics, Params, Task, evaluate, matrices

EVALUATIONS = 40  # how often a run is looked at, about


class Plan(NamedTuple):
    """How long to train and how often to look."""

    steps: int
    every: int
    threshold: float

    @classmethod
    def of(cls, steps: int, threshold: float) -> "Plan":
        """Choose the divisor of ``steps`` nearest to one look in forty."""
        wanted = max(1.0, steps / EVALUATIONS)
        divisors = [d for d in range(1, steps + 1) if steps % d == 0]
        every = min(divisors, key=lambda d: max(d / wanted, wanted / d))
        return cls(steps, every, threshold)


class Carry(NamedTuple):
    """State of a run between chunks."""

    params: Params
    state: Any
    key: jax.Array
    rate: jax.Array


class Record(NamedTuple):
    """One look at a run."""

    step: jax.Array
    train_loss: jax.Array
    """Mean minibatch loss since the last look."""
    validation_loss: jax.Array
    validation_accuracy: jax.Array
    update_norm: jax.Array
    """Largest ``rate * ||direction||_2`` over the matrices, over the peak rate."""
    weight_norm: jax.Array
    """Largest spectral norm over the matrices."""


class Final(NamedTuple):
    """Metrics on whole splits at the end of a run."""

    train: Metrics
    validation: Metrics
    test: Metrics


class Trained(NamedTuple):
    """A finished run; the leaves of ``records`` have one entry per look."""

    params: Params
    records: Record
    final: Final


def transformation(
    task: Task, entry: Entry, plan: Plan, rate: jax.typing.ArrayLike
) -> optax.GradientTransformation:
    """Build the optimizer of one run; ``rate`` is the peak and may be traced."""
    return entry.make(
        Recipe(
            schedule=schedule(rate, plan.steps),
            steps=plan.steps,
            warmup_steps=warmup_steps(plan.steps),
            weight_decay=WEIGHT_DECAY,
            decay_mask=matrices,
            threshold=plan.threshold,
            dimension_numbers=task.dimension_numbers,
        )
    )


def _step(
    task: Task,
    tx: optax.GradientTransformation,
    data: Any,
    params: Params,
    state: Any,
    key: jax.Array,
) -> tuple[Params, Any, jax.Array, Any]:
    loss, grads = jax.value_and_grad(task.loss)(params, task.batch(data, key))
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss, updates


class Trainer(NamedTuple):
    """Compiled functions of one optimizer on one task."""

    start: Callable[[jax.Array, jax.Array], Carry]
    advance: Callable[..., tuple[Carry, Record]]
    finish: Callable[..., Final]


def make_trainer(task: Task, entry: Entry, plan: Plan) -> Trainer:
    """Compile one optimizer on one task for any learning rate and any seed."""

    def start(key: jax.Array, rate: jax.Array) -> Carry:
        init_key, data_key = jax.random.split(key)
        params = task.init(init_key)
        state = transformation(task, entry, plan, rate).init(params)
        return Carry(params, state, data_key, rate)

    def advance(
        carry: Carry, data: Any, validation: Any, first: jax.Array
    ) -> tuple[Carry, Record]:
        tx = transformation(task, entry, plan, carry.rate)

        def body(loop: tuple[Any, ...], step: jax.Array) -> tuple[Any, jax.Array]:
            params, state, _ = loop
            key = jax.random.fold_in(carry.key, step)
            after, state, loss, updates = _step(task, tx, data, params, state, key)
            # The direction alone: decoupled decay is added back to the update.
            rate = schedule(carry.rate, plan.steps)(step)
            direction = jax.tree.map(
                lambda u, w, decayed: u + rate * WEIGHT_DECAY * w if decayed else u,
                updates,
                params,
                matrices(params),
            )
            return (after, state, direction), loss

        zeros = jax.tree.map(jnp.zeros_like, carry.params)
        (params, state, direction), losses = jax.lax.scan(
            body, (carry.params, carry.state, zeros), first + jnp.arange(plan.every)
        )
        seen = evaluate(task, params, validation)
        record = Record(
            first + plan.every,
            jnp.mean(losses),
            seen.loss,
            seen.accuracy,
            max_spectral_norm(direction) / carry.rate,
            max_spectral_norm(params),
        )
        return Carry(params, state, carry.key, carry.rate), record

    def finish(params: Params, splits: Any) -> Final:
        return Final(*(evaluate(task, params, split) for split in splits))

    return Trainer(jax.jit(start), jax.jit(advance, donate_argnums=0), jax.jit(finish))


def train(
    task: Task,
    trainer: Trainer,
    plan: Plan,
    seed: int,
    rate: float,
    on_steps: Callable[[int], None] = lambda _: None,
) -> Trained:
    """Train once.

    Args:
      task: what to train on.
      trainer: compiled functions from ``make_trainer`` for the same task and plan.
      plan: steps and looks.
      seed: fixes the starting weights and the order of the data.
      rate: peak learning rate.
      on_steps: called after each chunk with its number of steps.

    Returns:
      Parameters on the device, looks and final metrics on the host.
    """
    carry = trainer.start(jax.random.key(seed), jnp.float32(rate))
    looks = []
    for first in range(0, plan.steps, plan.every):
        carry, record = trainer.advance(
            carry, task.data, task.splits.validation, jnp.int32(first)
        )
        looks.append(jax.device_get(record))
        on_steps(plan.every)
    final = jax.device_get(trainer.finish(carry.params, task.splits))
    records = jax.tree.map(lambda *leaves: np.stack(leaves), *looks)
    return Trained(carry.params, records, final)


def make_timed_step(
    task: Task, entry: Entry, plan: Plan, rate: float
) -> Callable[[], Any]:
    """Return a call that runs one compiled training step of a single run."""
    tx = transformation(task, entry, plan, rate)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Params, state: Any, data: Any, index: jax.Array
    ) -> tuple[Params, Any]:
        key = jax.random.fold_in(jax.random.key(0), index)
        params, state, _, _ = _step(task, tx, data, params, state, key)
        return params, state

    params = jax.jit(task.init)(jax.random.key(0))
    held = [params, jax.jit(tx.init)(params)]
    count = itertools.count()

    def call() -> Any:
        held[:] = step(held[0], held[1], task.data, jnp.int32(next(count)))
        return held[0]

    return call
