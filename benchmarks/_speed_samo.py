"""Micro-benchmark of multi-task gradients: time against the passes they are made of.

A two-layer network with one linear head per task.  One forward and one backward pass
are timed alone, for the mean loss of all tasks and for one task by itself, and the
time of each method is divided by that of its passes.  What is left above one is the
random directions, norms and moved weights, and rows written to memory.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._table import Table, short
from basinax.optimizers import (
    f_mtl_value_and_grad,
    sam_value_and_grad,
    samo_value_and_grad,
    task_gradients,
)

TASKS = (2, 4, 16, 40)
ROWS, WIDTH = 2048, 128
UNROLLED = 4
"""Largest number of tasks that is also measured unrolled; the programs grow long."""


class Passes(NamedTuple):
    """Passes per step: over all heads, and per task over at least one."""

    forward: int
    backward: int
    forward_per_task: int
    backward_per_task: int

    def total(self, tasks: int) -> tuple[int, int]:
        """Return the numbers of forward and backward passes."""
        return (
            self.forward + tasks * self.forward_per_task,
            self.backward + tasks * self.backward_per_task,
        )


PASSES = {
    "sam": Passes(2, 2, 0, 0),
    "task_gradients": Passes(1, 0, 0, 1),
    "samo, none": Passes(2, 1, 0, 1),
    "samo, spsa": Passes(1, 1, 3, 1),
    "samo, exact": Passes(1, 1, 1, 2),
    "f_mtl": Passes(1, 0, 1, 2),
}


def losses_fn(params: Any, x: jax.Array) -> jax.Array:
    """Return the loss of every head."""
    h = jnp.tanh(x @ params["body"][0])
    h = jnp.tanh(h @ params["body"][1])
    return jnp.stack([jnp.mean((h @ head - 1) ** 2) for head in params["heads"]])


def mean_loss(params: Any, x: jax.Array) -> jax.Array:
    """Return the mean loss."""
    return jnp.mean(losses_fn(params, x))


def methods(tasks: int, axis: Any) -> dict[str, Callable[..., Any]]:
    """Return functions of parameters and data, named as in `PASSES`."""
    owner = {"body": -1, "heads": list(range(tasks))}
    options: dict[str, Any] = {"owner": owner, "axis": axis}
    key = jax.random.key(0)

    def samo(local: Any) -> Callable[..., Any]:
        return partial(
            samo_value_and_grad(losses_fn, rho=0.05, local=local, **options), key=key
        )

    return {
        "sam": sam_value_and_grad(mean_loss, rho=0.05),
        "task_gradients": task_gradients(losses_fn, **options),
        "samo, none": samo("none"),
        "samo, spsa": samo("spsa"),
        "samo, exact": samo("exact"),
        "f_mtl": f_mtl_value_and_grad(losses_fn, rho=0.05, **options),
    }


def measure(
    rounds: int = 25,
    tasks: Sequence[int] = TASKS,
    rows: int = ROWS,
    width: int = WIDTH,
) -> list[dict[str, Any]]:
    """Time every method for every number of tasks; one row each."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        values = rng.standard_normal(shape) / shape[0] ** 0.5
        return jnp.asarray(values, jnp.float32)

    x, found = draw(rows, width), []
    body = [draw(width, width), draw(width, width)]
    for count in tasks:
        params = {"body": body, "heads": [draw(width) for _ in range(count)]}
        one = params | {"heads": params["heads"][:1]}
        calls: dict[Any, Callable[[], Any]] = {
            "forward": partial(jax.jit(mean_loss), params, x),
            "both": partial(jax.jit(jax.value_and_grad(mean_loss)), params, x),
            "one forward": partial(jax.jit(mean_loss), one, x),
            "one both": partial(jax.jit(jax.value_and_grad(mean_loss)), one, x),
        }
        axes = ("unroll", "map") if count <= UNROLLED else ("map",)
        for axis in axes:
            for name, fn in methods(count, axis).items():
                calls[axis, name] = partial(jax.jit(fn), params, x)
        times = interleaved_times(calls, rounds=rounds)
        for axis in axes:
            # A loop runs through all heads, unrolled tasks through one.
            prefix = "one " if axis == "unroll" else ""
            for name, passes in PASSES.items():
                row = {"tasks": count, "axis": axis, "method": name}
                found.append(row | _compare(times, (axis, name), prefix, passes, count))
    return found


def _compare(
    times: dict[Any, list[float]], name: Any, prefix: str, passes: Passes, tasks: int
) -> dict[str, Any]:
    def cost(forward: int, backward: int, prefix: str) -> float:
        ahead, both = (median(times[prefix + name]) for name in ("forward", "both"))
        return forward * ahead + backward * max(both - ahead, 0.0)

    forward, backward = passes.total(tasks)
    predicted = cost(passes.forward, passes.backward, "")
    predicted += tasks * cost(passes.forward_per_task, passes.backward_per_task, prefix)
    pairs = zip(times[name], times["both"], strict=True)
    return {
        "forward": forward,
        "backward": backward,
        "milliseconds": 1e3 * median(times[name]),
        "gradients": median([a / b for a, b in pairs]),
        "ratio": median(times[name]) / predicted,
    }


def table(rows: list[dict[str, Any]], rounds: int) -> Table:
    """Tabulate passes, time in gradients of the mean loss, and time over passes."""
    return Table(
        f"Gradients of several tasks: a network of width {WIDTH}, {ROWS} examples",
        ("tasks", "axis", "method", "forward", "backward", "ms", "gradients", "ratio"),
        tuple(
            (
                str(row["tasks"]),
                row["axis"],
                row["method"],
                str(row["forward"]),
                str(row["backward"]),
                short(row["milliseconds"]),
                f"{row['gradients']:.1f}×",
                f"{row['ratio']:.2f}",
            )
            for row in rows
        ),
        (
            "gradients: time over that of one gradient of the mean loss, median of "
            f"{rounds} interleaved rounds.",
            "ratio: median time over that of the passes, each timed alone.",
        ),
    )
