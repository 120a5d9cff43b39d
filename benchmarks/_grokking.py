"""Full-batch training, compiled as one program, with a look at the run every n steps.

A look tells when a network fits, when it generalizes and what stands in between: how
far the gradient merely scales the weights (naive loss minimization), and for how many
examples the softmax has lost all but its largest term to rounding (softmax collapse).
Prieto et al., "Grokking at the Edge of Numerical Stability" (ICLR 2025,
arXiv:2501.04697).
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from basinax.benchmarks._full_batch import Problem, on_device
from basinax.benchmarks._tasks import Batch, Params
from basinax.landscape import nlm_alignment, softmax_collapse
from basinax.optimizers import (
    collapse_free_cross_entropy_with_integer_labels,
    stablemax_cross_entropy_with_integer_labels,
    symlog,
)

Say = Callable[[str], None]


class Objective(NamedTuple):
    """How logits and integer labels become one cost per example."""

    cost: Callable[[jax.Array, jax.Array], jax.Array]
    """What is trained on."""
    exact: Callable[[jax.Array, jax.Array], jax.Array]
    """The same function free of absorption, which is what looks report."""
    phi: Callable[[jax.Array], jax.Array] | None = None
    """The prediction is the softmax of ``phi(logits)``; None is the identity."""
    dtype: str = "float32"
    """Precision in which that softmax is taken; the weights are always float32."""


def softmax(dtype: str = "float32") -> Objective:
    """Cross-entropy of the softmax, the logits cast to ``dtype`` first."""

    def cost(logits: jax.Array, labels: jax.Array) -> jax.Array:
        logits = logits.astype(dtype)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)

    return Objective(cost, collapse_free_cross_entropy_with_integer_labels, None, dtype)


COLLAPSE_FREE = Objective(
    collapse_free_cross_entropy_with_integer_labels,
    collapse_free_cross_entropy_with_integer_labels,
)
STABLEMAX = Objective(
    stablemax_cross_entropy_with_integer_labels,
    stablemax_cross_entropy_with_integer_labels,
    symlog,
)


class Contestant(NamedTuple):
    """An optimizer with an objective."""

    tx: optax.GradientTransformation
    objective: Objective = softmax()


class Looks(NamedTuple):
    """What was seen of runs; every leaf has the shape (seeds, looks)."""

    step: Any
    train_loss: Any
    """Of the exact cost, whatever was trained on."""
    train_accuracy: Any
    test_loss: Any
    test_accuracy: Any
    weight_norm: Any
    """Euclidean norm of all parameters."""
    alignment: Any
    """Cosine between the weights and the descent direction of the training loss."""
    collapsed: Any
    """Share of the training examples whose softmax sum is one term, to rounding."""
    zero_loss: Any
    """Share of the training examples whose cost is exactly zero."""


def make_run(
    problem: Problem, contestant: Contestant, *, steps: int, every: int
) -> Callable[[Params, Batch, Batch], tuple[Params, Looks]]:
    """Compile a whole run, for any start and split.

    Args:
      problem: gives the network.
      contestant: optimizer and objective.
      steps: training steps, a multiple of ``every``.
      every: steps between looks.

    Returns:
      ``run(start, train, test) -> (params, looks)``, the looks without a seed axis.
    """
    if steps % every:
        raise ValueError(f"steps {steps} is not a multiple of every {every}")
    tx, (cost, exact, phi, dtype) = contestant

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, tuple[Any, Any]]:
        logits = problem.apply(params, batch[0])
        costs = cost(logits, batch[1])
        wide = jnp.promote_types(costs.dtype, jnp.float32)
        return jnp.mean(costs.astype(wide)), (logits, costs)

    def quality(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        hit = jnp.argmax(logits, axis=1) == labels
        return jnp.mean(exact(logits, labels)), jnp.mean(hit.astype(jnp.float32))

    def run(start: Params, train: Batch, test: Batch) -> tuple[Params, Looks]:
        def step(carry: tuple[Any, Any], _: None) -> tuple[Any, None]:
            params, state = carry
            grads, _ = jax.grad(loss, has_aux=True)(params, train)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def chunk(carry: tuple[Any, Any], index: jax.Array) -> tuple[Any, Looks]:
            carry, _ = jax.lax.scan(step, carry, length=every)
            return carry, look(carry[0], (index + 1) * every)

        def look(params: Params, index: jax.Array) -> Looks:
            grads, (logits, costs) = jax.grad(loss, has_aux=True)(params, train)
            train_loss, train_accuracy = quality(logits, train[1])
            test_loss, test_accuracy = quality(problem.apply(params, test[0]), test[1])
            return Looks(
                step=index,
                train_loss=train_loss,
                train_accuracy=train_accuracy,
                test_loss=test_loss,
                test_accuracy=test_accuracy,
                weight_norm=optax.tree.norm(params),
                alignment=nlm_alignment(params, grads).global_cosine,
                collapsed=softmax_collapse(logits, dtype=dtype, phi=phi).absorbed,
                zero_loss=jnp.mean((costs == 0).astype(jnp.float32)),
            )

        (params, _), looks = jax.lax.scan(
            chunk, (start, tx.init(start)), jnp.arange(steps // every)
        )
        return params, looks

    return jax.jit(run)


def compete(
    problem: Problem,
    contestants: dict[str, Contestant],
    *,
    seeds: Sequence[int],
    steps: int,
    every: int,
    say: Say,
) -> dict[str, Looks]:
    """Train every contestant on every seed.

    A seed fixes the split and the first weights, so contestants meet on equal terms.

    Args:
      problem: what to train on.
      contestants: optimizers with objectives by name.
      seeds: one run each.
      steps: training steps, a multiple of ``every``.
      every: steps between looks.
      say: called with the progress.

    Returns:
      Looks by name, on the host.
    """
    init, starts = jax.jit(problem.init), []
    for seed in seeds:
        train, test = (on_device(part) for part in problem.deal(seed))
        starts.append((init(jax.random.key(seed)), train, test))
    found = {}
    for name, contestant in contestants.items():
        double = contestant.objective.dtype == "float64"
        run = make_run(problem, contestant, steps=steps, every=every)
        looks = []
        for index, start in enumerate(starts, 1):
            say(f"{name}, seed {index} of {len(seeds)}")
            # Only the softmax is in float64: everything it meets has its own type.
            with jax.enable_x64(True) if double else contextlib.nullcontext():
                looks.append(jax.device_get(run(*start)[1]))
        found[name] = jax.tree.map(lambda *leaves: np.stack(leaves), *looks)
    return found


def first_at(
    looks: Looks, level: float, curve: str = "test_accuracy"
) -> list[int | None]:
    """Return the first looked-at step at or above a level for each seed, if any."""
    return [
        int(steps[reached.argmax()]) if reached.any() else None
        for steps, reached in zip(
            looks.step, getattr(looks, curve) >= level, strict=True
        )
    ]
