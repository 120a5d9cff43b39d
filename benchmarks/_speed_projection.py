"""Micro-benchmark of ⊥Grad: what the projection adds to a step of AdamW.

Fifty matrices with ten million entries in all, updated by AdamW with and without the
projection in front, in turn. One inner pass is enough where gradient and weights are
far from parallel; near parallel, where a trained classifier ends up, a second one runs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._table import Table, short
from basinax.optimizers import perp_grad

LEAVES, SHAPE = 50, (400, 500)
COSINES = {"wide angle": 0.0, "near parallel": 0.95}
REFERENCE = "adamw"


def one_pass(updates: Any, params: Any) -> Any:
    """Project as the formula is written, in the dtype and at the scale given."""

    def one(g: jax.Array, w: jax.Array) -> jax.Array:
        c = jnp.sum(w * g) / jnp.sum(w * w)
        rest = g - c * w
        return rest * jnp.sqrt(jnp.sum(g * g) / (jnp.sum(g * g) - c * jnp.sum(w * g)))

    return jax.tree.map(one, updates, params)


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Return AdamW alone, with the bare formula and with `perp_grad` in front."""
    bare = optax.stateless(one_pass)
    return {
        REFERENCE: optax.adamw(1e-3),
        "formula + adamw": optax.chain(bare, optax.adamw(1e-3)),
        "perp_grad + adamw": optax.chain(perp_grad(), optax.adamw(1e-3)),
    }


def measure(
    leaves: int = LEAVES, shape: tuple[int, int] = SHAPE, rounds: int = 25
) -> list[dict[str, Any]]:
    """Time an update of every optimizer at both angles; one row each."""
    rng = np.random.default_rng(0)

    def draw() -> list[jax.Array]:
        draws = rng.standard_normal((leaves, *shape), np.float32)
        return [jnp.asarray(x) for x in draws]

    params, noise = draw(), draw()
    rows = []
    for angle, cosine in COSINES.items():
        sine = (1 - cosine**2) ** 0.5
        grads = [cosine * w + sine * x for w, x in zip(params, noise, strict=True)]
        calls: dict[str, Callable[[], Any]] = {}
        for name, tx in optimizers().items():
            calls[name] = partial(jax.jit(tx.update), grads, tx.init(params), params)
        times = interleaved_times(calls, rounds=rounds)
        for name, found in times.items():
            pairs = zip(found, times[REFERENCE], strict=True)
            rows.append(
                {
                    "angle": angle,
                    "optimizer": name,
                    "milliseconds": 1e3 * median(found),
                    "ratio": median([a / b for a, b in pairs]),
                    "fastest_ratio": min(found) / min(times[REFERENCE]),
                    "parameters": leaves * shape[0] * shape[1],
                }
            )
    return rows


def table(rows: list[dict[str, Any]], rounds: int) -> Table:
    """Tabulate time and its ratio to AdamW alone."""
    millions = rows[0]["parameters"] / 1e6
    return Table(
        f"One update of {millions:g} million float32 parameters",
        ("gradient and weights", "optimizer", "ms", "vs adamw", "fastest"),
        tuple(
            (
                row["angle"],
                row["optimizer"],
                short(row["milliseconds"]),
                f"{row['ratio']:.2f}×",
                f"{row['fastest_ratio']:.2f}×",
            )
            for row in rows
        ),
        (
            f"Medians of {rounds} interleaved rounds and the ratio of the fastest; "
            "smaller ratios are faster.",
        ),
    )
