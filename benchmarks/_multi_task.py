"""What a multi-task benchmark problem is: one trunk, T heads, T losses.

A problem is a NamedTuple of pure functions over a plain tree of parameters, like a
task, with a vector of losses in place of one.  Every task here is a classification, a
label of two values being one with two classes, so one network serves them all.  The
mean of the losses makes it an ordinary task of the comparison.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from basinax.benchmarks._models import MLP, count, functional
from basinax.benchmarks._tasks import (
    Batch,
    Defaults,
    Metrics,
    Options,
    Params,
    Splits,
    Task,
    Usage,
    dimension_numbers,
    uniform_loss,
)

SHARED = -1


class Examples(NamedTuple):
    """Inputs of shape (examples, features), labels of shape (examples, tasks)."""

    inputs: np.ndarray
    labels: np.ndarray


class Deal(NamedTuple):
    """What one seed deals out; the shapes are the same for every seed."""

    train: Examples
    validation: Examples
    test: Examples


class MultiTask(NamedTuple):
    """T problems with one input; every function of parameters is pure and jit-safe."""

    name: str
    title: str
    source: str
    tasks: tuple[str, ...]
    """Names of the T tasks."""
    classes: int
    batch_size: int
    deal: Callable[[int], Deal]
    init: Callable[[jax.Array], Params]
    losses: Callable[[Params, Batch], jax.Array]
    """Mean cross-entropy of each task, shape (T,)."""
    accuracies: Callable[[Params, Batch], jax.Array]
    """Share of right answers of each task, shape (T,)."""

    def mean_loss(self, params: Params, batch: Batch) -> jax.Array:
        """Return the loss with equal weights."""
        return jnp.mean(self.losses(params, batch))


class Heads(nnx.Module):
    """A trunk that all tasks share, and a linear head for each."""

    def __init__(
        self, sizes: Sequence[int], tasks: int, classes: int, *, rngs: nnx.Rngs
    ) -> None:
        self.trunk = MLP(sizes, rngs=rngs)
        heads = [nnx.Linear(sizes[-1], classes, rngs=rngs) for _ in range(tasks)]
        self.heads = nnx.List(heads)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map inputs of shape (..., sizes[0]) to logits (tasks, ..., classes)."""
        h = jax.nn.gelu(self.trunk(x))
        return jnp.stack([head(h) for head in self.heads])


def owner(params: Params) -> Any:
    """Say which task owns each leaf of the parameters of `Heads`."""

    def one(path: tuple[Any, ...], _: Any) -> int:
        return int(path[1].key) if path[0].key == "heads" else SHARED

    return jax.tree_util.tree_map_with_path(one, params)


def multi_task(
    name: str,
    title: str,
    source: str,
    *,
    tasks: Sequence[str],
    classes: int,
    sizes: Sequence[int],
    batch_size: int,
    deal: Callable[[int], Deal],
) -> MultiTask:
    """Put a network with one head per task before a deal of examples.

    Args:
      name: name in the registry.
      title: one line.
      source: where the examples come from.
      tasks: names of the tasks.
      classes: values a label can take, the same for all tasks.
      sizes: widths of input and shared layers.
      batch_size: examples per step.
      deal: makes the examples from a seed.
    """
    network = functional(lambda rngs: Heads(sizes, len(tasks), classes, rngs=rngs))

    def losses(params: Params, batch: Batch) -> jax.Array:
        logits, labels = network.apply(params, batch[0]), batch[1]
        cost = optax.losses.softmax_cross_entropy_with_integer_labels
        return jnp.stack(
            [jnp.mean(cost(logits[t], labels[:, t])) for t in range(len(tasks))]
        )

    def accuracies(params: Params, batch: Batch) -> jax.Array:
        hit = jnp.argmax(network.apply(params, batch[0]), axis=-1) == batch[1].T
        return jnp.mean(hit.astype(jnp.float32), axis=1)

    return MultiTask(
        name,
        title,
        source,
        tuple(tasks),
        classes,
        batch_size,
        deal,
        network.init,
        losses,
        accuracies,
    )


def on_device(examples: Examples) -> Batch:
    """Hand examples to the device, labels as int32."""
    return jnp.asarray(examples.inputs), jnp.asarray(examples.labels, jnp.int32)


def minibatch(data: Batch, key: jax.Array, size: int) -> Batch:
    """Draw examples with replacement."""
    rows = jax.random.randint(key, (size,), 0, data[1].shape[0])
    return data[0][rows], data[1][rows]


def delta_m(
    values: Sequence[float],
    reference: Sequence[float],
    higher_is_better: Sequence[bool] | None = None,
) -> float:
    """Return the mean relative loss against single-task training, in percent.

    Δm = 100/S Σ ±(M_i − R_i)/R_i with + where lower is better.  Negative is better.

    Args:
      values: the S measures M of a method.
      reference: the same of networks trained on one task each.
      higher_is_better: for each measure; None for all, such as accuracies.
    """
    m, r = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    higher = True if higher_is_better is None else np.asarray(higher_is_better)
    return float(100 * np.mean(np.where(higher, -1.0, 1.0) * (m - r) / r))


def as_task(problem: MultiTask, options: Options, defaults: Defaults) -> Task:
    """Turn a multi-task problem into a task of the comparison: its mean loss."""
    if options.data_dir is not None and not problem.source.endswith("--data-dir"):
        raise Usage(f"--data-dir: the task {problem.name} has its own data")
    deal = problem.deal(0)
    train, *held = (on_device(part) for part in deal)

    def metrics(params: Params, batch: Batch) -> Metrics:
        accuracy = jnp.mean(problem.accuracies(params, batch))
        return Metrics(problem.mean_loss(params, batch), accuracy)

    def whole(batch: Batch) -> Batch:
        return batch[0][None], batch[1][None]

    return Task(
        name=problem.name,
        title=f"{problem.title}, batch {problem.batch_size}",
        source=problem.source,
        chance=uniform_loss(problem.classes),
        target=0.5 * uniform_loss(problem.classes),
        data=train,
        splits=Splits(whole(train), *map(whole, held)),
        curvature=train,
        init=problem.init,
        loss=problem.mean_loss,
        metrics=metrics,
        batch=lambda data, key: minibatch(data, key, problem.batch_size),
        dimension_numbers=dimension_numbers,
        defaults=defaults,
        details={
            "tasks": len(problem.tasks),
            "train examples": len(deal.train.labels),
            "validation examples": len(deal.validation.labels),
            "test examples": len(deal.test.labels),
            "parameters": count(jax.eval_shape(problem.init, jax.random.key(0))),
            "batch size": problem.batch_size,
            "curvature": f"training loss on {len(deal.train.labels)} examples",
        },
    )
