"""Micro-benchmark of `plane`: milliseconds per point of a loss surface.

The peer is what one would write by hand: two compiled functions, one that makes the
parameters of a point and one that evaluates the loss there, called in a double loop.
The other rows are what decides the default size of a chunk: points side by side by
`jax.vmap`, and all points inside one compiled loop (`jax.lax.map`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from basinax.benchmarks._digits import read_embedded
from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._speed_products import MODELS, initial
from basinax.benchmarks._table import Table, short
from basinax.landscape import plane, random_directions

PEER = "double loop, compiled"
SIDE = 51  # of the surface whose time is extrapolated
CHUNKS = {"cpu": (4,)}  # by backend; side by side, points cost far more there


def losses(model: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return the mean cross-entropy of a model."""

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        rows = optax.losses.softmax_cross_entropy_with_integer_labels
        return jnp.mean(rows(model(params, x), y))

    return loss


def _shift(params: Any, d1: Any, d2: Any, a: jax.Array, b: jax.Array) -> Any:
    return jax.tree.map(lambda w, u, v: w + a * u + b * v, params, d1, d2)


def contestants(
    loss: Callable[..., jax.Array], params: Any, args: tuple[Any, ...], side: int
) -> dict[str, Callable[[], Any]]:
    """Make every way to compute a surface of side x side points."""
    directions = random_directions(params, jax.random.key(0))
    grid = np.linspace(-1, 1, side, dtype=np.float32)
    evaluate, shift = jax.jit(loss), jax.jit(_shift)
    chunks = CHUNKS.get(jax.default_backend(), (1, 4, 64))

    def loop() -> np.ndarray:
        return np.array(
            [
                [float(evaluate(shift(params, *directions, a, b), *args)) for b in grid]
                for a in grid
            ]
        )

    @jax.jit
    def mapped(params: Any, directions: Any, args: Any) -> jax.Array:
        pairs = jnp.stack(jnp.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
        found = jax.lax.map(
            lambda ab: loss(_shift(params, *directions, *ab), *args), pairs
        )
        return found.reshape(side, side)

    def surface(chunk_size: int | None) -> jax.Array:
        options = {"x": grid, "chunk_size": chunk_size}
        return plane(loss, params, *directions, *args, **options).losses

    return {
        PEER: loop,
        "plane": partial(surface, None),
        **{f"plane, chunks of {n}": partial(surface, n) for n in chunks},
        "lax.map": lambda: mapped(params, directions, args),
    }


def measure(
    rounds: int = 15,
    side: int = 5,
    examples: int | None = None,
    networks: Sequence[str] = tuple(MODELS),
) -> list[dict[str, Any]]:
    """Time every contestant on every network; one row each.

    Args:
      rounds: interleaved timings.
      side: points along each axis of the surface that is timed.
      examples: digits to evaluate the loss on; None for all.
      networks: names of networks.
    """
    parts = read_embedded()
    inputs, labels = (
        np.concatenate(part)[:examples] for part in zip(*parts, strict=True)
    )
    args = (jnp.asarray(inputs), jnp.asarray(labels))
    rows = []
    for name in networks:
        calls = contestants(losses(MODELS[name]), initial(name), args, side)
        reference = calls[PEER]()
        times = interleaved_times(calls, rounds=rounds)
        for kind, found in times.items():
            pairs = [a / b for a, b in zip(found, times[PEER], strict=True)]
            rows.append(
                {
                    "network": name,
                    "examples": len(labels),
                    "way": kind,
                    "milliseconds_per_point": 1e3 * median(found) / side**2,
                    "ratio": median(pairs),
                    "fastest_ratio": min(found) / min(times[PEER]),
                    "seconds_in_all": median(found) / side**2 * SIDE**2,
                    "largest_difference": float(
                        np.abs(calls[kind]() / reference - 1).max()
                    ),
                }
            )
    return rows


def table(rows: list[dict[str, Any]], rounds: int) -> Table:
    """Tabulate the time of a point, and what a whole surface takes."""
    return Table(
        f"Loss surfaces of {rows[0]['examples']} digits, time per point",
        (
            "network",
            "way",
            "ms / point",
            "over loop",
            "fastest",
            f"s for {SIDE}x{SIDE}",
        ),
        tuple(
            (
                row["network"],
                row["way"],
                short(row["milliseconds_per_point"]),
                f"{row['ratio']:.2f}×",
                f"{row['fastest_ratio']:.2f}×",
                short(row["seconds_in_all"]),
            )
            for row in rows
        ),
        (
            f"Medians of {rounds} interleaved rounds and the ratio of the fastest; the "
            "last column is extrapolated from the first. The loop: two compiled "
            "functions, one for the point and one for the loss. lax.map: all points in "
            "one compiled loop, without progress.",
        ),
    )
