"""What a benchmark task is, and the registry of tasks.

A task is a NamedTuple of pure functions over a plain tree of parameters, so the
trainer, the instruments and the report know nothing about images or text. A new task
is one file with a ``make(options) -> Task`` and one line in ``TASKS``.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

Params = Any
Batch = tuple[jax.Array, jax.Array]


class Usage(Exception):
    """A mistake in what the user asked for; shown in one line, without a traceback."""


class Options(NamedTuple):
    """What a user may change about a task; None keeps the task's own default."""

    data_dir: Path | None = None
    width: int | None = None
    depth: int | None = None
    sequence: int | None = None
    batch_size: int | None = None
    modulus: int | None = None
    fraction: float | None = None
    """Share of the examples to train on, where a task makes its own."""


class Metrics(NamedTuple):
    """Mean loss in nats and mean accuracy over a batch."""

    loss: jax.Array
    accuracy: jax.Array


class Splits(NamedTuple):
    """Fixed evaluation batches; each leaf has a leading axis over batches."""

    train: Batch
    validation: Batch
    test: Batch


class Defaults(NamedTuple):
    """Settings of a comparison on this task unless the user gives others."""

    steps: int
    seeds: int
    grid: int
    threshold: float
    """Spectral clipping threshold c, for the SPECTRA entries."""
    probes: int
    """Hutchinson probes per Hessian trace."""
    max_matvecs: int
    """Most Hessian-vector products spent on the largest eigenvalue."""
    surface: int = 21
    """Grid points along each axis of a loss surface."""


class Task(NamedTuple):
    """One training problem; every function is pure and jit-safe."""

    name: str
    title: str
    source: str
    chance: float
    """Loss of the uniform prediction, in nats."""
    target: float
    """Validation loss that counts as reached for steps-to-target."""
    data: Any
    """Training arrays, handed to ``batch`` as an argument, never baked into a jit."""
    splits: Splits
    curvature: Batch
    """The batch whose training loss the curvature instruments look at."""
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch], jax.Array]
    metrics: Callable[[Params, Batch], Metrics]
    batch: Callable[[Any, jax.Array], Batch]
    """``batch(data, key)`` draws one training minibatch on the device."""
    dimension_numbers: Callable[[Params], Any]
    defaults: Defaults
    details: dict[str, Any]
    """Sizes worth printing: examples per split, parameters, batch size."""


class Classification(NamedTuple):
    """Loss and metrics of integer-label classification for a logits function."""

    loss: Callable[[Params, Batch], jax.Array]
    metrics: Callable[[Params, Batch], Metrics]


def classification(apply: Callable[[Params, jax.Array], jax.Array]) -> Classification:
    """Build cross-entropy loss and accuracy from ``apply(params, inputs) -> logits``.

    Works for one label per example and for one label per position alike.
    """

    def loss(params: Params, batch: Batch) -> jax.Array:
        inputs, labels = batch
        logits = apply(params, inputs)
        cost = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(cost)

    def metrics(params: Params, batch: Batch) -> Metrics:
        inputs, labels = batch
        logits = apply(params, inputs)
        cost = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        hit = jnp.argmax(logits, axis=-1) == labels
        return Metrics(jnp.mean(cost), jnp.mean(hit.astype(jnp.float32)))

    return Classification(loss, metrics)


def matrices(params: Params) -> Any:
    """Mark the leaves that weight decay and spectral methods treat as matrices."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def dimension_numbers(params: Params, transposed: Sequence[str] = ()) -> Any:
    """Say which axis of each matrix is fan-in; None for vectors.

    Args:
      params: parameters as a nested dict.
      transposed: names of leaves stored as (out, in), such as embedding tables.
    """

    def one(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
        if leaf.ndim < 2:
            return None
        if getattr(path[-1], "key", None) in transposed:
            return MuonDimensionNumbers(reduction_axis=1, output_axis=0)
        return MuonDimensionNumbers(reduction_axis=0, output_axis=1)

    return jax.tree_util.tree_map_with_path(one, params)


def evaluate(task: Task, params: Params, batches: Batch) -> Metrics:
    """Average the metrics over the leading axis of ``batches``."""
    each = jax.lax.map(lambda batch: task.metrics(params, batch), batches)
    return jax.tree.map(jnp.mean, each)


# Module and one-line description; modules load on demand so that one task never needs
# another task's dependencies.
TASKS: dict[str, tuple[str, str]] = {
    "digits": (
        "basinax.benchmarks._digits",
        "8x8 handwritten digits, multilayer perceptron",
    ),
    "bytes": (
        "basinax.benchmarks._bytes",
        "byte-level language model of the Python standard library, transformer",
    ),
    "modular": (
        "basinax.benchmarks._modular",
        "addition modulo a prime, network without biases, full batch",
    ),
    "parity": (
        "basinax.benchmarks._parity",
        "parity of 3 among 20 bits, multilayer perceptron, full batch",
    ),
    "two-digits": (
        "basinax.benchmarks._two_digits",
        "two overlaid digits with noisy labels, mean loss of two heads",
    ),
    "multi-fashion": (
        "basinax.benchmarks._multi_fashion",
        "two overlaid pieces of clothing, mean loss of two heads; needs its data",
    ),
    "yeast": (
        "basinax.benchmarks._yeast",
        "fourteen functions of yeast genes, mean loss of the heads; needs its data",
    ),
}


def load(name: str, options: Options | None = None) -> Task:
    """Build the named task.

    Raises:
      Usage: the name is unknown, or the data that the options point at are not there.
    """
    if name not in TASKS:
        raise Usage(f"unknown task {name!r}; valid names: {', '.join(TASKS)}")
    module = importlib.import_module(TASKS[name][0])
    return module.make(options or Options())


def uniform_loss(classes: int) -> float:
    """Return the cross-entropy of the uniform prediction, in nats."""
    return math.log(classes)
