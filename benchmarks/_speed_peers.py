"""Micro-benchmark of the landscape instruments against PyTorch's curvature tools.

Same weights, same data, same threads, and every answer compared with float64, because
time means little without the error. Tasks are solved in turn by all contenders. What
counts most is processor time, which a busy machine disturbs least.

The peers are optional: what is missing is named, and the others are timed.
"""

import gc
import importlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from basinax.benchmarks._measure import median
from basinax.benchmarks._peers_problem import (
    TOP,
    Contender,
    Exact,
    Problem,
    Settings,
    exact,
    trained,
)
from basinax.benchmarks._table import Table, short
from basinax.landscape import eigenpairs, hessian, spectral_density, trace

NETWORKS = ("perceptron", "convolutional")
PACKAGES = {  # module: what to ask pip for
    "torch": "torch",
    "pyhessian": "pyhessian",
    "hessian_eigenthings": "hessian-eigenthings",
    "curvlinops": "curvlinops-for-pytorch",
}
TARGET = 0.01  # relative standard error of the trace
PRODUCTS = {"perceptron": 66, "convolutional": 28}  # of XTrace that reach the target
SPLIT = {"perceptron": 84, "convolutional": 48}  # of Hutch++ that reach it
PROBES = 40  # of Hutchinson's method that are timed; more cost in proportion
SPREAD_PROBES = 256  # from which the spread of Hutchinson's samples is known to 5 %
STEPS = 100  # of Lanczos per density
OURS = {  # what the others are measured against
    "gradient": "JAX",
    "product": "basinax, linearised",
    "top-5": "basinax",
    "trace": "basinax, XTrace",
    "density": "basinax",
}


class Lane(NamedTuple):
    """A contender with its first call's processor seconds, its answers and times."""

    contender: Contender
    first: float
    answers: list[Any]
    wall: list[float]
    processor: list[float]


def is_ours(contender: Contender) -> bool:
    """Tell basinax, and the gradient it is measured by, from the peers."""
    return contender.by.startswith(("basinax", "JAX"))


def usable_cores() -> int:
    """Count the cores this process may use, which is how many threads XLA starts."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def missing(packages: dict[str, str] | None = None) -> list[str]:
    """Say in one line per package how to get what is not installed."""
    return [
        f"{module} is not installed: pip install {name}"
        for module, name in (PACKAGES if packages is None else packages).items()
        if importlib.util.find_spec(module) is None
    ]


def contenders(problem: Problem, direction: np.ndarray) -> list[Contender]:
    """Make every task by basinax, each from new parameters: linearising included."""
    loss, params, x, y = problem.loss, problem.params, problem.x, problem.y
    flat, unravel = ravel_pytree(params)
    vector = unravel(jnp.asarray(direction, flat.dtype))
    gradient = jax.jit(jax.grad(loss))
    ravel = jax.jit(lambda tree: ravel_pytree(tree)[0])
    products = PRODUCTS[problem.name]
    fresh = partial(hessian, loss, params, x, y)
    kept = partial(fresh, linearize=True)
    held: list[Any] = []

    def multiply(seed: int) -> np.ndarray:
        del seed
        if not held:
            held.append(kept())
        return np.asarray(ravel(held[0](vector)))

    def top(seed: int) -> np.ndarray:
        found = eigenpairs(kept(), params, TOP, key=jax.random.key(seed))
        return np.asarray(found.values)

    def total(seed: int) -> np.ndarray:
        key = jax.random.key(seed)
        found = trace(kept(), params, key=key, num_probes=products, method="xtrace")
        return np.array([found.value, found.standard_error])

    def density(seed: int) -> np.ndarray:
        key = jax.random.key(seed)
        found = spectral_density(kept(), params, key=key, num_probes=1, num_steps=STEPS)
        return np.asarray(found.nodes[0][found.weights[0] > 0])  # less any padding

    return [
        Contender(
            "gradient",
            OURS["gradient"],
            lambda _: jax.block_until_ready(gradient(params, x, y)),
            repeats=10,
        ),
        Contender("product", OURS["product"], multiply, repeats=5),
        Contender(
            "product",
            "basinax, fresh",
            lambda _: np.asarray(ravel(fresh()(vector))),
            repeats=5,
        ),
        Contender("top-5", OURS["top-5"], top),
        Contender("trace", f"{OURS['trace']}, {products}", total),
        Contender("density", OURS["density"], density),
    ]


def relative_error(task: str, answer: Any, truth: Exact) -> float:
    """Return how far an answer is from the exact one, relative to it.

    The worst of the eigenvalues; for a density the same of its five largest nodes,
    which tells copies of one eigenvalue from several.
    """
    if task == "product":
        apart = np.linalg.norm(answer - truth.product)
        return float(apart / np.linalg.norm(truth.product))
    if task == "trace":
        return abs(float(answer[0]) / truth.trace - 1)
    if task in ("top-5", "density"):
        largest = np.sort(np.asarray(answer, np.float64))[::-1][:TOP]
        return float(np.max(np.abs(largest / truth.top - 1)))
    return 0.0


def needed_probes(problem: Problem, truth: Exact) -> int:
    """Return how many probes Hutchinson's method needs for the target."""
    operator = hessian(
        problem.loss, problem.params, problem.x, problem.y, linearize=True
    )
    key = jax.random.key(1)
    found = trace(operator, problem.params, key=key, num_probes=SPREAD_PROBES)
    variance = float(found.standard_error) ** 2 * SPREAD_PROBES
    return math.ceil(variance / (TARGET * truth.trace) ** 2)


def timed(contender: Contender, seed: int) -> tuple[float, float, Any]:
    """Return wall seconds, processor seconds of all threads, and the answer."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(contender.repeats):
        answer = contender.call(seed)
    unit = contender.scale / contender.repeats
    return (
        unit * (time.perf_counter() - wall),
        unit * (time.process_time() - processor),
        answer,
    )


def first_calls(
    entrants: Sequence[Contender], say: Callable[[str], None]
) -> tuple[list[tuple[Contender, float, Any]], list[str]]:
    """Call everyone once, basinax with nothing compiled.

    Returns:
      Who is able, with processor seconds and answer, and a line per peer that fails.
    """
    able, failures = [], []
    for contender in entrants:
        say(f"first {contender.task} by {contender.by}")
        if is_ours(contender):
            jax.clear_caches()
        try:
            _, processor, answer = timed(contender._replace(repeats=1, scale=1.0), 0)
        except Exception as error:  # whatever a peer of another time may raise
            if is_ours(contender):
                raise
            line = str(error).partition("\n")[0]
            failures.append(f"{contender.by} failed at {contender.task}: {line}")
        else:
            able.append((contender, processor, answer))
    return able, failures


def race(
    entrants: Sequence[Contender],
    truth: Exact,
    rounds: int,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time all contenders in turn; one row each, and a line per failure."""
    able, failures = first_calls(entrants, say)
    lanes = [Lane(*one[:2], [one[2]], [], []) for one in able]
    for lane in lanes:  # emptying the caches took from some what others compiled
        if is_ours(lane.contender):
            lane.contender.call(0)
    for turn in range(1, rounds + 1):
        gc.collect()  # graphs that peers leave in cycles
        for lane in lanes:
            say(f"round {turn} of {rounds}: {lane.contender.task}")
            wall, processor, answer = timed(lane.contender, turn)
            lane.wall.append(wall)
            lane.processor.append(processor)
            lane.answers.append(answer)
    return [row(lane, lanes, truth) for lane in lanes], failures


def row(lane: Lane, lanes: Sequence[Lane], truth: Exact) -> dict[str, Any]:
    """Sum up what one contender did."""
    task, by, _, scale, _ = lane.contender

    def find(task: str, by: str) -> Lane:
        return next(
            other
            for other in lanes
            if other.contender.task == task and other.contender.by.startswith(by)
        )

    unit = find("gradient", "JAX" if is_ours(lane.contender) else "torch")
    rival = find(task, OURS[task])
    errors = [relative_error(task, answer, truth) for answer in lane.answers]
    # Where fewer probes were drawn than were charged the error is that much larger.
    error = float(np.sqrt(np.mean(np.square(errors)) / scale))
    found: dict[str, Any] = {
        "task": task,
        "by": by,
        "first": lane.first + (1 - 1 / scale) * median(lane.processor),
        "gradients": median(lane.processor) / median(unit.processor),
        "error": error,
    }
    if task == "trace" and scale == 1:
        reported = [float(answer[1]) / truth.trace for answer in lane.answers]
        found["reported_error"] = float(np.sqrt(np.mean(np.square(reported))))
    for clock in ("wall", "processor"):
        own, reference = getattr(lane, clock), getattr(rival, clock)
        pairs = [a / b for a, b in zip(own, reference, strict=True)]
        found |= {
            clock: median(own),
            f"fastest_{clock}": min(own),
            f"{clock}_ratio": median(pairs),
            f"fastest_{clock}_ratio": min(own) / min(reference),
        }
    return found


def measure(
    rounds: int = 5,
    problems: Sequence[Problem] | None = None,
    packages: dict[str, str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time every task by everyone who is installed; one row per contender.

    Args:
      rounds: interleaved timings per contender.
      problems: what to solve; by default both networks, trained.
      packages: modules to use and their names on the index; by default all.
      say: told what happens, for a progress display.

    Returns:
      Rows with numbers, and rows with a "note" on what is missing.
    """
    packages = PACKAGES if packages is None else packages
    notes = missing(packages)
    installed = [m for m in packages if importlib.util.find_spec(m)]
    versions = {packages[m]: importlib.metadata.version(packages[m]) for m in installed}
    rows: list[dict[str, Any]] = []
    for problem in problems or map(trained, NETWORKS):
        say(f"{problem.name}: exact answers")
        truth = exact(problem)
        probes = needed_probes(problem, truth)
        entrants = contenders(problem, truth.direction)
        threads = usable_cores()
        if "torch" in installed:
            peers: Any = importlib.import_module("basinax.benchmarks._peers_torch")
            settings = Settings(PROBES, probes / PROBES, SPLIT[problem.name], STEPS)
            made, failures = peers.contenders(
                problem, truth.direction, installed, settings, threads
            )
            entrants += made
            notes += failures
        found, failures = race(entrants, truth, rounds, say)
        notes += failures
        shared = {
            "network": problem.name,
            "examples": len(problem.x),
            "parameters": len(truth.direction),
            "hutchinson_probes": probes,
            "threads": threads,
            "versions": versions,
        }
        rows += [shared | row for row in found]
    return rows + [{"note": line} for line in dict.fromkeys(notes)]


def _digit(value: float) -> str:
    """Write an error with one digit: 8e-3."""
    return f"{value:.0e}".replace("e-0", "e-")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    error = "–" if row["task"] == "gradient" else _digit(row["error"])
    if not math.isnan(row.get("reported_error", math.nan)):
        error += f" ({_digit(row['reported_error'])})"
    ratios = ("processor_ratio", "fastest_processor_ratio", "wall_ratio")
    return (
        f"{row['task']}, {row['by']}",
        short(row["processor"]),
        short(row["first"]),
        short(row["gradients"]),
        error,
        *(f"{short(row[key])}×" for key in ratios),
    )


def table(rows: list[dict[str, Any]], rounds: int) -> Table:
    """Tabulate cost, error and ratio to basinax of every contender."""
    columns = ("task", "CPU s", "first", "grads", "error")
    columns += ("CPU", "least", "wall")
    measured = [row for row in rows if "note" not in row]
    notes = [row["note"] for row in rows if "note" in row]
    lines: list[tuple[str, ...]] = []
    networks: list[str] = []
    for name, group in itertools.groupby(measured, lambda row: row["network"]):
        found = list(group)
        lines.append((name, *("" for _ in columns[1:])))
        lines += map(_cells, found)
        networks.append(
            f"{name.capitalize()}: {found[0]['parameters']} parameters, "
            f"{found[0]['examples']} digits; Hutchinson's method takes "
            f"{found[0]['hutchinson_probes']} probes."
        )
    threads = measured[0]["threads"]
    versions = ", ".join(f"{n} {v}" for n, v in measured[0]["versions"].items())
    return Table(
        "Landscape instruments and PyTorch's curvature tools",
        columns,
        tuple(lines),
        (
            f"float32, {threads} thread{'s' * (threads > 1)} for everyone; medians of "
            f"{rounds} interleaved rounds. First: processor seconds of the first call, "
            "compilation included. Grads: processor time in gradients of the same "
            "framework. Last columns: medians of processor time, least processor time "
            "and medians of wall time over those of basinax; larger is slower.",
            "Error: relative to float64, root mean square over the calls; of the five "
            "largest eigenvalues or nodes the worst. Traces are taken to a standard "
            f"error of {TARGET:.0%}, in parentheses the one reported. Of Hutchinson's "
            f"method {PROBES} probes were timed; time and error are scaled to all.",
            "What the peers do for the top-5 was chosen knowing the answer, as little "
            "as reaches 1e-3; basinax stops by its own bound.",
            *networks,
            *([versions] if versions else []),
            *notes,
        ),
    )
