"""Micro-benchmark of the task weightings: milliseconds for a T x T Gram matrix.

Each compiled weighting, in turn with the others, on the gradients of eight and forty
tasks: random ones, ones that span a low-dimensional space (more tasks than that are
Pareto stationary, the slowest case) and ones whose singular values span six decades.
The yardstick is one Cholesky factorization of the same matrix, of which the iterative
weightings need some ten to fifty.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from basinax import optimizers
from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._table import Table, short

TASKS = (8, 40)
PROBLEMS = ("random", "dependent", "skewed")
REFERENCE = "cholesky"


def gradients(problem: str, tasks: int, seed: int = 0) -> np.ndarray:
    """Return task gradients, one in each row."""
    rng = np.random.default_rng(seed)
    if problem == "dependent":
        return rng.standard_normal((tasks, max(2, tasks // 4)))
    if problem == "skewed":
        decades = 10.0 ** -np.linspace(0, 6, tasks)
        left, right = rng.standard_normal((2, tasks, tasks))
        return left * decades @ right
    return rng.standard_normal((tasks, 100))


def weightings() -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Return every weighting as a function of the Gram matrix alone."""
    key = jax.random.key(0)
    functions: dict[str, Callable[[jax.Array], jax.Array]] = {
        REFERENCE: jnp.linalg.cholesky,
        "mean": optimizers.mean_weights,
        "mgda": optimizers.mgda_weights,
        "pcgrad": partial(optimizers.pcgrad_weights, key=key),
        "cagrad": optimizers.cagrad_weights,
        "imtl_g": optimizers.imtl_g_weights,
        "nash": optimizers.nash_weights,
        "fairgrad": optimizers.fairgrad_weights,
        "upgrad": optimizers.upgrad_weights,
        "aligned_mtl": optimizers.aligned_mtl_weights,
    }
    return {name: jax.jit(function) for name, function in functions.items()}


def measure(
    tasks: tuple[int, ...] = TASKS,
    problems: tuple[str, ...] = PROBLEMS,
    rounds: int = 25,
) -> list[dict[str, Any]]:
    """Time every weighting on every problem; one row each."""
    rows = []
    functions = weightings()
    for count in tasks:
        for problem in problems:
            jacobian = gradients(problem, count)
            gram = jnp.asarray(jacobian @ jacobian.T, jnp.float32)
            # A dependent matrix cannot be factorized as it is; the time is the same.
            calls = {name: partial(f, gram) for name, f in functions.items()}
            eye = jnp.eye(count, dtype=gram.dtype)
            calls[REFERENCE] = partial(functions[REFERENCE], gram + jnp.max(gram) * eye)
            times = interleaved_times(calls, rounds=rounds)
            rows += [
                {
                    "tasks": count,
                    "problem": problem,
                    "weighting": name,
                    "milliseconds": 1e3 * median(found),
                    "ratio": median(found) / median(times[REFERENCE]),
                }
                for name, found in times.items()
            ]
    return rows


def table(rows: list[dict[str, Any]], rounds: int) -> Table:
    """Tabulate the time per call."""
    columns = list(dict.fromkeys((row["tasks"], row["problem"]) for row in rows))
    cells = {
        (row["weighting"], row["tasks"], row["problem"]): row["milliseconds"]
        for row in rows
    }
    names = list(dict.fromkeys(row["weighting"] for row in rows))
    return Table(
        "Task weightings of a float32 Gram matrix, ms",
        ("weighting", *(f"{problem} {count}" for count, problem in columns)),
        tuple(
            (name, *(short(cells[(name, *column)]) for column in columns))
            for name in names
        ),
        (
            f"Medians of {rounds} interleaved rounds, compiled. Columns: gradients and "
            "number of tasks; dependent in a fourth as many dimensions, skewed with "
            "singular values over six decades.",
        ),
    )
