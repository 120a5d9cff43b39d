"""Micro-benchmark of the sharpness monitor: what it costs, and whether it keeps up.

The digits task trained by AdamW with a monitor of the largest Hessian eigenvalue every
hundred steps, against the same training without. Products are taken on the batch of the
step, whose Hessian has other leading eigenvectors than the batch of the measurement
before; each measurement is held against `eigenpairs` on the same batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from basinax.benchmarks import _tasks
from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._table import Table, short
from basinax.landscape import eigenpairs, hessian, metrics, monitor

BATCH_SIZES = (64, 256, 968)
EVERY = 100
WITHIN = 0.05
NAME = "sharpness"


def trainer(
    task: Any, watch: optax.GradientTransformation | None
) -> tuple[Callable[[Any, jax.Array], Any], Any]:
    """Return a compiled run over keys of batches, and what it starts from."""
    links = (watch,) if watch else ()
    tx = optax.with_extra_args_support(optax.chain(*links, optax.adamw(1e-3)))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        batch = task.batch(task.data, key)
        grads = jax.grad(task.loss)(params, batch)
        updates, state = tx.update(
            grads, state, params, value_fn=lambda p: task.loss(p, batch)
        )
        return (optax.apply_updates(params, updates), state), None

    params = jax.jit(task.init)(jax.random.key(0))
    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    return run, (params, tx.init(params))


def errors(task: Any, measurements: int) -> list[float]:
    """Return the relative error of every measurement along a training run."""
    run, carry = trainer(task, monitor({NAME: metrics.lambda_max()}, EVERY))
    keys = jax.random.split(jax.random.key(1), measurements * EVERY)
    found = []
    for first in range(0, len(keys), EVERY):
        params, batch = carry[0], task.batch(task.data, keys[first])
        operator = hessian(task.loss, params, batch)
        exact = eigenpairs(operator, params, 1, key=jax.random.key(2)).values[0]
        carry = run(carry, keys[first : first + EVERY])
        found.append(float(optax.tree.get(carry[1], NAME) / exact - 1))
    return found


def measure(
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    rounds: int = 9,
    steps: int = 1000,
    measurements: int = 30,
) -> list[dict[str, Any]]:
    """Time training and compare its measurements; one row per batch size.

    Args:
      batch_sizes: examples per step.
      rounds: interleaved timings.
      steps: training steps per timing; as many come before, so that it starts warm.
      measurements: how many are compared.
    """
    rows = []
    for batch_size in batch_sizes:
        task = _tasks.load("digits", _tasks.Options(batch_size=batch_size))
        keys = jax.random.split(jax.random.key(1), steps)
        calls = {}
        for name in ("plain", NAME):
            watch = monitor({NAME: metrics.lambda_max()}, EVERY)
            run, carry = trainer(task, watch if name == NAME else None)
            warm = jax.block_until_ready(run(carry, keys))
            calls[name] = functools.partial(run, warm, keys)
        times = interleaved_times(calls, rounds=rounds)
        pairs = zip(times[NAME], times["plain"], strict=True)
        off = np.abs(errors(task, measurements))
        rows.append(
            {
                "batch_size": batch_size,
                "milliseconds_per_step": 1e3 * median(times["plain"]) / steps,
                "cost": median([a / b for a, b in pairs]) - 1,
                "median_error": float(np.median(off)),
                "largest_error": float(off.max()),
                "within": int((off <= WITHIN).sum()),
                "measurements": measurements,
            }
        )
    return rows


def table(rows: list[dict[str, Any]], rounds: int) -> Table:
    """Tabulate cost and error."""
    return Table(
        f"Monitor of the largest Hessian eigenvalue every {EVERY} steps, digits MLP",
        ("batch", "ms / step", "cost", "median error", "largest", "within 5 %"),
        tuple(
            (
                str(row["batch_size"]),
                short(row["milliseconds_per_step"]),
                f"{row['cost']:.1%}",
                f"{row['median_error']:.2%}",
                f"{row['largest_error']:.1%}",
                f"{row['within']} of {row['measurements']}",
            )
            for row in rows
        ),
        (
            f"Cost: median over {rounds} rounds of training time with the monitor over "
            "that without, less one, from a warm state.",
            "Error: relative to eigenpairs on the same batch, from the first step on.",
        ),
    )
