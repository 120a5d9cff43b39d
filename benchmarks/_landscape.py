"""A curvature report of one model: the ``landscape`` command.

Trains the task's model briefly with AdamW, or loads one, and measures the Hessian of
its training loss: extreme eigenvalues, trace, spectral density, sharpness.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from basinax.benchmarks import _tasks
from basinax.benchmarks._checkpoint import check_name, load, save
from basinax.benchmarks._landscape_page import draw_all, write_report
from basinax.benchmarks._landscape_report import LABELS, tables
from basinax.benchmarks._landscape_views import views
from basinax.benchmarks._models import count
from basinax.benchmarks._optimizers import OPTIMIZERS
from basinax.benchmarks._results import SCHEMA, environment, plain, write_json
from basinax.benchmarks._table import show
from basinax.benchmarks._tasks import Options, Params, Task, evaluate
from basinax.benchmarks._train import Plan, make_trainer
from basinax.landscape import (
    Density,
    Eigenpairs,
    Estimate,
    adam_diagonal,
    average_sharpness,
    edge_of_stability,
    eigenpairs,
    epsilon_sharpness,
    extreme_ratio,
    gradient_norm,
    hessian,
    moments,
    pac_bayes_sharpness,
    preconditioned,
    sam_sharpness,
    spectral_density,
    spectral_mean,
    worst_case_sharpness,
)

OPTIMIZER, B1 = "adamw", 0.9
SMALL = 1e-3  # of the largest eigenvalue: what counts as zero
DAMPING = 1e-2  # of the largest eigenvalue, in the effective dimension
RHO, ADAPTIVE_RHO, NOISE = 0.05, 0.5, 0.01


class Settings(NamedTuple):
    """What the user asked for; None is the default of the task."""

    task: str = "digits"
    options: Options = Options()
    steps: int | None = None
    rate: float | None = None
    seed: int = 0
    eigenvalues: int = 10
    probes: int = 8
    lanczos_steps: int = 60
    surface: int | None = None
    checkpoint: Path | None = None
    save: Path | None = None
    command: str = ""


class Model(NamedTuple):
    """A model with, if it was trained here, the last state of its optimizer."""

    params: Params
    origin: str
    rate: float | None = None
    divisor: Any = None
    """√v̂ + ε of the next Adam step."""
    path: tuple[Params, ...] = ()
    """Parameters during training, on the host, the last being ``params``."""


def obtain(
    task: Task, settings: Settings, on_steps: Callable[[int, int], None]
) -> Model:
    """Load the model, or train it with AdamW.

    Args:
      task: the task.
      settings: checkpoint, or steps, rate and seed of the training.
      on_steps: called with the steps done and their total.
    """
    if settings.checkpoint is not None:
        like = jax.eval_shape(task.init, jax.random.key(0))
        params = load(settings.checkpoint, like)
        return Model(params, f"checkpoint {settings.checkpoint}")
    entry = OPTIMIZERS[OPTIMIZER]
    rate = settings.rate or entry.grid[len(entry.grid) // 2]
    plan = Plan.of(settings.steps or task.defaults.steps, task.defaults.threshold)
    trainer = make_trainer(task, entry, plan)
    carry = trainer.start(jax.random.key(settings.seed), jnp.float32(rate))
    path = [jax.device_get(carry.params)]
    for first in range(0, plan.steps, plan.every):
        carry, _ = trainer.advance(
            carry, task.data, task.splits.validation, jnp.int32(first)
        )
        path.append(jax.device_get(carry.params))
        on_steps(first + plan.every, plan.steps)
    grads = jax.jit(jax.grad(task.loss))(carry.params, task.curvature)
    return Model(
        carry.params,
        f"{plan.steps} steps of AdamW, peak rate {rate:g}, seed {settings.seed}",
        rate,
        adam_diagonal(carry.state, grads),
        tuple(path),
    )


class Step(NamedTuple):
    """One entry of the report: what the progress bar says and what to compute."""

    name: str
    measure: Callable[[], Any]


def _estimate(found: Estimate, scale: float = 1.0) -> dict[str, float]:
    return {
        "value": scale * float(found.value),
        "standard_error": scale * float(found.standard_error),
    }


def _spectrum(
    density: Density, largest: float, smallest: float, size: int
) -> dict[str, Any]:
    """Sum the density up; nothing is multiplied for it."""
    floor = SMALL * largest
    # Away from the pole at minus the damping.
    damping = max(DAMPING * largest, -2 * smallest)
    dimension = spectral_mean(lambda t: t / (t + damping), density)
    return {
        "effective_dimension": {"damping": damping, **_estimate(dimension, size)},
        "floor": floor,
        "negative_share": _estimate(spectral_mean(lambda t: t < -floor, density)),
        "small_share": _estimate(spectral_mean(lambda t: np.abs(t) <= floor, density)),
        "extreme_ratio": _estimate(extreme_ratio(density)),
    }


def _edge(model: Model, operator: Any, largest: float, key: jax.Array) -> Any:
    """Relate the sharpness to step sizes: gradient descent's and Adam's own."""
    stable = 2.0 / largest if largest > 0 else np.inf
    found: dict[str, Any] = {"gradient_descent_largest_stable_rate": stable}
    if model.rate is not None:
        scaled = preconditioned(operator, model.divisor)
        top = eigenpairs(scaled, model.params, 1, key=key, tol=1e-2)
        ratio = edge_of_stability(top.values[0], model.rate, B1, ema=True)
        found |= {
            "adam_lambda_max": float(top.values[0]),
            "adam_ratio_at_peak_rate": float(ratio),
        }
    return found


def inspect(
    task: Task,
    model: Model,
    settings: Settings,
    on_step: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[dict[str, Any], Density]:
    """Measure the curvature of the training loss at the model.

    Args:
      task: gives the loss and the batch that it is looked at on.
      model: from ``obtain``.
      settings: how much to spend.
      on_step: called with what comes next, its index and the number of steps.

    Returns:
      Everything measured, and the spectral density for the figure.
    """
    params, batch, loss = model.params, task.curvature, task.loss
    size = count(params)
    operator = hessian(loss, params, batch, linearize=True)
    keys = jax.random.split(jax.random.key(settings.seed), 5)
    wanted = min(settings.eigenvalues, size)
    found: dict[str, Any] = {}
    kept: dict[str, Eigenpairs] = {}

    def pairs(which: Any, k: int, key: jax.Array) -> dict[str, Any]:
        got = kept[which] = eigenpairs(operator, params, k, key=key, which=which)
        return {
            "values": np.asarray(got.values).tolist(),
            "residuals": np.asarray(got.residuals).tolist(),
            "converged": np.asarray(got.converged).tolist(),
            "matvecs": got.matvecs,
        }

    def sums() -> dict[str, Any]:
        got = moments(operator, params, key=keys[2], num_probes=4 * settings.probes)
        return {
            "trace": _estimate(got.trace),
            "frobenius_norm": _estimate(got.frobenius_norm),
        }

    def ascent() -> dict[str, Any]:
        def worst(rho: float, **ball: Any) -> float:
            return float(worst_case_sharpness(loss, params, batch, rho=rho, **ball))

        return {
            "loss": float(jax.jit(loss)(params, batch)),
            "gradient norm": float(gradient_norm(loss, params, batch)),
            "weight norm": float(optax.tree.norm(params)),
            f"SAM, one step of {RHO:g}": float(
                sam_sharpness(loss, params, batch, rho=RHO)
            ),
            f"worst case, radius {RHO:g}": worst(RHO),
            f"worst case, adaptive, radius {ADAPTIVE_RHO:g}": worst(
                ADAPTIVE_RHO, adaptive=True
            ),
            "Keskar's ε-sharpness, 0.001 (%)": float(
                epsilon_sharpness(loss, params, batch).value
            ),
        }

    def noise() -> dict[str, Any]:
        draws = {"key": keys[3], "num_draws": 2 * settings.probes}
        adaptive = {**draws, "rho": 10 * NOISE, "adaptive": True}
        tolerated = pac_bayes_sharpness(loss, params, batch, **draws)
        return {
            f"average case, noise {NOISE:g}": _estimate(
                average_sharpness(loss, params, batch, rho=NOISE, **draws)
            ),
            f"average case, adaptive, noise {10 * NOISE:g}": _estimate(
                average_sharpness(loss, params, batch, **adaptive)
            ),
            "PAC-Bayes: noise that adds 0.1 to the loss": {
                "value": float(tolerated.sigma),
                "standard_error": float(tolerated.standard_error),
            },
        }

    densities: list[Density] = []

    def spectrum() -> dict[str, Any]:
        density = spectral_density(
            operator,
            params,
            key=keys[4],
            num_probes=settings.probes,
            num_steps=min(settings.lanczos_steps, size),
        )
        densities.append(density)
        first, last = found["largest"]["values"][0], found["smallest"]["values"][0]
        return _spectrum(density, first, last, size)

    points = task.defaults.surface if settings.surface is None else settings.surface

    def planes() -> dict[str, Any]:
        return views(
            task,
            params,
            kept["LA"],
            model.path,
            points=points,
            key=jax.random.fold_in(keys[4], 1),
        )

    steps = [
        Step("largest", lambda: pairs("LA", wanted, keys[0])),
        Step("smallest", lambda: pairs("SA", 1, keys[1])),
        Step("sums", sums),
        Step("spectrum", spectrum),
        Step("ascent", ascent),
        Step("noise", noise),
        Step(
            "edge",
            lambda: _edge(model, operator, found["largest"]["values"][0], keys[0]),
        ),
    ]
    if points:
        steps.append(Step("planes", planes))
    for index, step in enumerate(steps):
        on_step(step.name, index, len(steps))
        found[step.name] = step.measure()
    on_step("done", len(steps), len(steps))
    return {"parameters": size, **found}, densities[0]


def prepare(settings: Settings) -> Task:
    """Build the task and find mistakes before anything is trained."""
    task = _tasks.load(settings.task, settings.options)
    if settings.save is not None:
        check_name(settings.save)
    if settings.checkpoint is not None:
        load(settings.checkpoint, jax.eval_shape(task.init, jax.random.key(0)))
    return task


def run(task: Task, settings: Settings, out: Path, console: Console) -> dict[str, Any]:
    """Train or load, measure, print and write numbers, figures and a page."""
    began = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("training", total=None)

        def on_steps(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        def on_step(name: str, index: int, total: int) -> None:
            progress.update(bar, description=LABELS[name], completed=index, total=total)

        model = obtain(task, settings, on_steps)
        if settings.save is not None:
            save(settings.save, model.params)
        found, density = inspect(task, model, settings, on_step)
    metrics = evaluate(task, model.params, task.splits.test)
    results = {
        "schema": SCHEMA,
        "kind": "landscape",
        "command": settings.command,
        "environment": environment(),
        "seconds": time.perf_counter() - began,
        "task": {"name": task.name, "title": task.title, **task.details},
        "model": model.origin,
        "test_loss": float(metrics.loss),
        "test_accuracy": float(metrics.accuracy),
        **found,
        "density": density._asdict(),
    }
    write_json(out / "landscape.json", results)
    results = plain(results)
    figures = draw_all(results, density, out)
    report = write_report(results, figures, out)
    console.print(f"[bold]{task.title}[/]; {model.origin}")
    console.print(
        f"Test loss {results['test_loss']:.4f}, accuracy "
        f"{100 * results['test_accuracy']:.1f} %",
        highlight=False,
    )
    console.print()
    for table in tables(results):
        show(table, console)
    console.print(
        f"Measured in {results['seconds']:.0f} s. Report: {report} (also "
        f"landscape.json and {len(figures)} figures)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return results
