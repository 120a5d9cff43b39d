"""Micro-benchmark of the losses that do not collapse.

Every loss is timed as it is used, value and gradient of the mean over a batch, in turn
with optax's softmax cross-entropy. Beside the time stands what it buys: the error of
the gradient on a target that is far ahead of the other classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._table import Table, short
from basinax.optimizers import (
    collapse_free_cross_entropy_with_integer_labels,
    stablemax_cross_entropy_with_integer_labels,
    symlog,
)

SHAPE = (1024, 32000)  # samples × classes: the head of a small language model
LEAD = 30.0  # beyond ln((C - 1) / eps), where float32 sums absorb the other classes
REFERENCE = "softmax (optax)"

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def by_formula(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute StableMax cross-entropy as it is written down."""
    log_p = jax.nn.log_softmax(symlog(logits))
    return -jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]


LOSSES: dict[str, tuple[Loss, bool]] = {  # and whether it is StableMax
    REFERENCE: (optax.losses.softmax_cross_entropy_with_integer_labels, False),
    "softmax, collapse-free": (collapse_free_cross_entropy_with_integer_labels, False),
    "StableMax": (stablemax_cross_entropy_with_integer_labels, True),
    "log_softmax of symlog": (by_formula, True),
}


def confident_gradient(classes: int, stable: bool) -> float:
    """Return the target's gradient when it leads zeros by LEAD, in float64."""
    odds = (classes - 1) * (1 / (1 + LEAD) if stable else np.exp(-LEAD))
    return -odds / (1 + odds) / (1 + LEAD if stable else 1)


def measure(
    shape: tuple[int, int] = SHAPE, rounds: int = 9, seed: int = 0
) -> list[dict[str, Any]]:
    """Time every loss on Gaussian float32 logits; one row per loss.

    Args:
      shape: samples and classes.
      rounds: interleaved timings per loss.
      seed: of logits and labels.
    """
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.standard_normal(shape, np.float32))
    labels = jnp.asarray(rng.integers(0, shape[1], shape[0]).astype(np.int32))
    ahead = jnp.zeros((1, shape[1])).at[0, 0].set(LEAD)
    calls, errors = {}, {}
    for name, (loss, stable) in LOSSES.items():

        def mean(x: jax.Array, t: jax.Array, loss: Loss = loss) -> jax.Array:
            return jnp.mean(loss(x, t))

        call = jax.jit(jax.value_and_grad(mean))
        calls[name] = lambda call=call: call(logits, labels)
        gradient = float(call(ahead, jnp.zeros(1, jnp.int32))[1][0, 0])
        exact = confident_gradient(shape[1], stable)
        errors[name] = abs(gradient / exact - 1) if exact else 0.0
    times = interleaved_times(calls, rounds=rounds)
    pairs = {
        name: [a / b for a, b in zip(found, times[REFERENCE], strict=True)]
        for name, found in times.items()
    }
    return [
        {
            "shape": list(shape),
            "loss": name,
            "milliseconds": 1e3 * median(times[name]),
            "ratio": median(pairs[name]),
            "fastest_ratio": min(times[name]) / min(times[REFERENCE]),
            "gradient_error": errors[name],
        }
        for name in LOSSES
    ]


def table(rows: list[dict[str, Any]], rounds: int) -> Table:
    """Tabulate time against optax and the error of a confident gradient."""
    samples, classes = rows[0]["shape"]
    return Table(
        f"Losses and their gradients, {samples}x{classes} float32 logits",
        ("loss", "ms", "vs optax", "fastest", "gradient error"),
        tuple(
            (
                row["loss"],
                short(row["milliseconds"]),
                f"{row['ratio']:.2f}×",
                f"{row['fastest_ratio']:.2f}×",
                f"{row['gradient_error']:.1e}",
            )
            for row in rows
        ),
        (
            f"Value and gradient of the mean; medians of {rounds} interleaved rounds "
            "and the ratio of the fastest; smaller ratios are faster. Gradient error: "
            f"relative, on a target {LEAD:g} ahead of all other classes.",
        ),
    )
