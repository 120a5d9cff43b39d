"""Micro-benchmark of Nexus: what the walk adds to accumulating gradients.

A perceptron on micro-batches of random inputs: the gradient of a step by accumulation
in a loop, and by `nexus_value_and_grad` over the same micro-batches, in turn; with the
temporary memory that XLA plans for either.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._table import Table, short
from basinax.optimizers import nexus_value_and_grad

WIDTHS = (256, 1024, 1024, 10)
BATCH_SIZES = (32, 256, 1024)
MICROBATCHES = 8
REFERENCE = "accumulation"


def loss(params: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Compute the mean cross-entropy of a tanh perceptron."""
    x, labels = batch
    for kernel in params[:-1]:
        x = jnp.tanh(x @ kernel)
    per_example = optax.losses.softmax_cross_entropy_with_integer_labels(
        x @ params[-1], labels
    )
    return jnp.mean(per_example)


def accumulate(params: Any, microbatches: Any) -> tuple[jax.Array, Any]:
    """Take the mean loss and gradient over micro-batches, one at a time."""

    def step(acc: Any, batch: Any) -> tuple[Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        return jax.tree.map(jnp.add, acc, gradient), value

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, values = jax.lax.scan(step, zeros, microbatches)
    count = len(values)
    return jnp.mean(values), jax.tree.map(lambda g: g / count, total)


def contestants() -> dict[str, Callable[[Any, Any], Any]]:
    """Return the ways to take the gradient of a step."""
    make = functools.partial(nexus_value_and_grad, loss, 0.05)
    return {
        REFERENCE: accumulate,
        "raw": make(normalize=None),
        "global": make(normalize="global"),
        "per_leaf": make(normalize="per_leaf"),
    }


def measure(
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    widths: tuple[int, ...] = WIDTHS,
    microbatches: int = MICROBATCHES,
    rounds: int = 9,
) -> list[dict[str, Any]]:
    """Time every way at every size of a micro-batch; one row each."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    params = [draw(n, m) / n**0.5 for n, m in itertools.pairwise(widths)]
    size = sum(kernel.nbytes for kernel in params)
    rows = []
    for batch_size in batch_sizes:
        labels = rng.integers(0, widths[-1], (microbatches, batch_size))
        data = draw(microbatches, batch_size, widths[0]), jnp.asarray(labels)
        compiled = {
            name: jax.jit(fn).lower(params, data).compile()
            for name, fn in contestants().items()
        }
        memory: dict[str, Any] = {k: c.memory_analysis() for k, c in compiled.items()}
        calls = {
            name: functools.partial(step, params, data)
            for name, step in compiled.items()
        }
        times = interleaved_times(calls, rounds=rounds)
        for name, seconds in times.items():
            pairs = zip(seconds, times[REFERENCE], strict=True)
            rows.append(
                {
                    "batch_size": batch_size,
                    "gradient": name,
                    "milliseconds": 1e3 * median(seconds),
                    "ratio": median([a / b for a, b in pairs]),
                    "fastest_ratio": min(seconds) / min(times[REFERENCE]),
                    "copies": memory[name].temp_size_in_bytes / size,
                }
            )
    return rows


def table(rows: list[dict[str, Any]], rounds: int) -> Table:
    """Tabulate time and memory."""
    return Table(
        f"Gradient over {MICROBATCHES} micro-batches, perceptron "
        + "-".join(map(str, WIDTHS)),
        ("micro-batch", "gradient", "ms", "ratio", "fastest", "temporaries"),
        tuple(
            (
                str(row["batch_size"]),
                row["gradient"],
                short(row["milliseconds"]),
                f"{row['ratio']:.2f}×",
                f"{row['fastest_ratio']:.2f}×",
                f"{row['copies']:.2f}",
            )
            for row in rows
        ),
        (
            f"Medians of {rounds} interleaved rounds and the ratio of the fastest, "
            "over accumulation; temporary memory in copies of the parameters.",
        ),
    )
