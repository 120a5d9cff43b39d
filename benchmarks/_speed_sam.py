"""Micro-benchmark of SAM: one descent step with and without the ascent.

A multilayer perceptron on random inputs, trained by SGD alone, by SGD behind `sam` in
its chain, on SAM's gradient from `sam_value_and_grad`, and by optax's own SAM in the
mode that makes one whole step per update. The floor is two gradients: a factor of two.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._table import Table, short
from basinax.optimizers import sam, sam_value_and_grad

SIZES, BATCHES = (784, 512, 512, 10), (128, 1024)
REFERENCE = "sgd"
RATE, RHO = 0.1, 0.05
Batch = tuple[jax.Array, jax.Array]
Step = Callable[[Any, Any, Batch], tuple[Any, Any]]


def loss_fn(params: Any, batch: Batch) -> jax.Array:
    """Return the mean cross-entropy of a perceptron with tanh layers."""
    x, labels = batch
    *hidden, last = params
    for layer in hidden:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    logits = x @ last["w"] + last["b"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def steps() -> dict[str, tuple[optax.GradientTransformationExtraArgs, Step]]:
    """Return each optimizer with its whole step, gradient to new parameters."""
    sgd = optax.with_extra_args_support(optax.sgd(RATE))
    chained = optax.chain(sam(RHO), sgd)
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    theirs = optax.contrib.sam(optax.sgd(RATE), ascent, opaque_mode=True)
    oracles = {"grad": jax.value_and_grad(loss_fn)}
    oracles["sam"] = sam_value_and_grad(loss_fn, rho=RHO)

    def step(
        tx: optax.GradientTransformationExtraArgs,
        oracle: Callable[..., Any],
        extra: Callable[[Batch], dict[str, Any]],
        params: Any,
        state: Any,
        batch: Batch,
    ) -> tuple[Any, Any]:
        _, gradient = oracle(params, batch)
        updates, state = tx.update(gradient, state, params, **extra(batch))
        return optax.apply_updates(params, updates), state

    none = lambda _: {}  # noqa: E731
    value_fn = lambda batch: {"value_fn": lambda p: loss_fn(p, batch)}  # noqa: E731
    grad_fn = lambda batch: {"grad_fn": lambda p, _: jax.grad(loss_fn)(p, batch)}  # noqa: E731
    return {
        REFERENCE: (sgd, partial(step, sgd, oracles["grad"], none)),
        "sam + sgd": (chained, partial(step, chained, oracles["grad"], value_fn)),
        "sam_value_and_grad": (sgd, partial(step, sgd, oracles["sam"], none)),
        "optax.contrib.sam": (theirs, partial(step, theirs, oracles["grad"], grad_fn)),
    }


def measure(
    sizes: Sequence[int] = SIZES, batches: Sequence[int] = BATCHES, rounds: int = 25
) -> list[dict[str, Any]]:
    """Time a step of every optimizer at every batch size; one row each."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) / shape[0] ** 0.5)

    params = [
        {"w": draw(m, n), "b": jnp.zeros(n)} for m, n in itertools.pairwise(sizes)
    ]
    rows = []
    for size in batches:
        labels = jnp.asarray(rng.integers(0, sizes[-1], size))
        batch = (draw(size, sizes[0]), labels)
        calls: dict[str, Callable[[], Any]] = {}
        for name, (tx, step) in steps().items():
            calls[name] = partial(jax.jit(step), params, tx.init(params), batch)
        times = interleaved_times(calls, rounds=rounds)
        for name, found in times.items():
            pairs = zip(found, times[REFERENCE], strict=True)
            rows.append(
                {
                    "batch": size,
                    "optimizer": name,
                    "milliseconds": 1e3 * median(found),
                    "ratio": median([a / b for a, b in pairs]),
                    "fastest_ratio": min(found) / min(times[REFERENCE]),
                    "sizes": list(sizes),
                }
            )
    return rows


def table(rows: list[dict[str, Any]], rounds: int) -> Table:
    """Tabulate time and its ratio to SGD alone."""
    return Table(
        f"One step of a perceptron of widths {'-'.join(map(str, rows[0]['sizes']))}",
        ("batch", "optimizer", "ms", "vs sgd", "fastest"),
        tuple(
            (
                str(row["batch"]),
                row["optimizer"],
                short(row["milliseconds"]),
                f"{row['ratio']:.2f}×",
                f"{row['fastest_ratio']:.2f}×",
            )
            for row in rows
        ),
        (
            f"Medians of {rounds} interleaved rounds and the ratio of the fastest; two "
            "gradients are 2×.",
        ),
    )
