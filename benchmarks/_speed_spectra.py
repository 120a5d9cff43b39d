"""Micro-benchmark of the spectral instruments, in units of a gradient.

A product with the Hessian costs about two gradients, so what an instrument costs is
told by how many gradients fit in its place. The loss is that of a perceptron on all
digits, and gradients are timed in turn with the tasks.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._table import Table, short
from basinax.landscape import eigenpairs, hessian, spectral_density, trace

WIDTHS = (64, 256, 256, 10)
GRADIENT = "gradient"
KEY = 0
TRAINING_STEPS = 60  # of Adam, so that outliers stand out as they do in practice


def loss(params: list[Any], x: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the mean cross-entropy of a tanh perceptron."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"][None]
    per_example = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(per_example)


def problem(seed: int = 0) -> tuple[list[Any], jax.Array, jax.Array]:
    """Return parameters that were trained a little, and all digits."""
    rng = np.random.default_rng(seed)
    params: list[Any] = [
        {
            "kernel": jnp.asarray(
                rng.standard_normal((n, m), np.float32) / np.float32(np.sqrt(n))
            ),
            "bias": jnp.zeros(m),
        }
        for n, m in itertools.pairwise(WIDTHS)
    ]
    digits: Any = load_digits()
    x = jnp.asarray(digits.data / 16, jnp.float32)
    labels = jnp.asarray(digits.target, jnp.int32)
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, x, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(TRAINING_STEPS):
        params, state = step(params, state)
    return params, x, labels


def measure(rounds: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Time every task; one row per task.

    Args:
      rounds: interleaved timings per task.
      seed: of the parameters.
    """
    params, x, labels = problem(seed)
    gradient = jax.jit(jax.grad(loss))
    key = jax.random.key(KEY)
    fresh = hessian(loss, params, x, labels)
    kept = hessian(loss, params, x, labels, linearize=True)
    chain = {"key": key, "num_probes": 1, "num_steps": 100}
    # Linearising is part of each task, since each has its own parameters in practice.
    make = functools.partial(hessian, loss, params, x, labels, linearize=True)

    def hundred() -> list[Any]:
        operator = make()
        return [operator(params) for _ in range(100)]

    calls: dict[str, Any] = {
        GRADIENT: lambda: [gradient(params, x, labels) for _ in range(20)],
        "Hessian product": lambda: [fresh(params) for _ in range(10)],
        "Hessian product, linearised": lambda: [kept(params) for _ in range(10)],
        "top-5 eigenpairs": lambda: eigenpairs(make(), params, 5, key=key),
        "trace, 100 probes": lambda: trace(make(), params, key=key, num_probes=100),
        "trace, 99 products, Hutch++": lambda: trace(
            make(), params, key=key, num_probes=99, method="hutch++"
        ),
        "trace, 100 products, XTrace": lambda: trace(
            make(), params, key=key, num_probes=100, method="xtrace"
        ),
        "density, 100 steps": lambda: spectral_density(make(), params, **chain),
        "100 products": lambda: (
            [make()(params) for _ in range(1)] + [kept(params) for _ in range(99)]
        ),
    }
    repeats = {
        GRADIENT: 20,
        "Hessian product": 10,
        "Hessian product, linearised": 10,
    }
    times = interleaved_times(calls, rounds=rounds)
    base = [seconds / repeats[GRADIENT] for seconds in times[GRADIENT]]
    rows = []
    for name, found in times.items():
        seconds = [one / repeats.get(name, 1) for one in found]
        ratios = [a / b for a, b in zip(seconds, base, strict=True)]
        rows.append(
            {
                "task": name,
                "milliseconds": 1e3 * median(seconds),
                "gradients": median(ratios),
                "fastest_gradients": min(seconds) / min(base),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], rounds: int) -> Table:
    """Tabulate what each task costs."""
    shape = "-".join(map(str, WIDTHS))
    return Table(
        f"Curvature of a {shape} perceptron on 1797 digits",
        ("task", "ms", "in gradients", "fastest"),
        tuple(
            (
                row["task"],
                short(row["milliseconds"]),
                short(row["gradients"]),
                short(row["fastest_gradients"]),
            )
            for row in rows
        ),
        (
            f"Medians of {rounds} interleaved rounds and the ratio of the fastest; "
            "float32. Eigenpairs to a relative residual of 1e-3; the density from one "
            "probe, fully reorthogonalised, so its cost above that of 100 products is "
            "what orthogonality takes.",
        ),
    )
