"""The comparison: tune every optimizer alike, then report on unseen data.

1. Search: every point of the learning-rate grid, one seed that is never reported,
   the same steps for all. The best final *validation* loss wins.
2. Report: fresh seeds at that rate; the *test* split is looked at only here.
3. Step times of all optimizers, interleaved, in the same process.

``results.json`` is rewritten after every optimizer, so an interruption loses at most
the optimizer in progress.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from optax.contrib import MuonDimensionNumbers
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from basinax.benchmarks import _tasks
from basinax.benchmarks._measure import curvature, interleaved_times, median
from basinax.benchmarks._optimizers import (
    BASELINE,
    OPTIMIZERS,
    WEIGHT_DECAY,
    Entry,
    choose,
    narrow,
    warmup_steps,
)
from basinax.benchmarks._results import (
    SCHEMA,
    environment,
    plain,
    summary,
    write_json,
)
from basinax.benchmarks._surroundings import surroundings
from basinax.benchmarks._tasks import Options, Task, Usage
from basinax.benchmarks._train import (
    Plan,
    Trained,
    make_timed_step,
    make_trainer,
    train,
)

SEARCH_SEED = 10_000  # reporting seeds count from 0
TIMING_ROUNDS, TIMING_SECONDS = 31, 20.0
REPORTED = (
    "train_loss",
    "validation_loss",
    "test_loss",
    "test_accuracy",
    "max_update_norm",
    "max_weight_norm",
    "lambda_max",
    "trace",
    "trace_standard_error",
)


class Settings(NamedTuple):
    """What the user asked for; None means the task's default."""

    task: str = "digits"
    optimizers: tuple[str, ...] | None = None
    seeds: int | None = None
    steps: int | None = None
    grid: int | None = None
    threshold: float | None = None
    target: float | None = None
    surface: int | None = None
    options: Options = Options()
    command: str = "python -m basinax.benchmarks compare"


class Study(NamedTuple):
    """A comparison made concrete."""

    task: Task
    plan: Plan
    entries: dict[str, Entry]
    seeds: tuple[int, ...]
    grid: int
    target: float
    surface: int
    """Grid points along each axis of the loss surfaces; 0 leaves them out."""


def prepare(settings: Settings) -> Study:
    """Check the settings and load the data.

    Raises:
      Usage: a name or a number makes no sense.
    """
    entries = choose(settings.optimizers)
    task = _tasks.load(settings.task, settings.options)
    defaults = task.defaults
    steps = defaults.steps if settings.steps is None else settings.steps
    seeds = defaults.seeds if settings.seeds is None else settings.seeds
    grid = defaults.grid if settings.grid is None else settings.grid
    threshold = settings.threshold or defaults.threshold  # checked to be positive
    surface = defaults.surface if settings.surface is None else settings.surface
    for name, number, least in (("steps", steps, 2), ("seeds", seeds, 1)):
        if number < least:
            raise Usage(f"--{name} {number}: needs at least {least}")
    if surface and surface < 3:
        raise Usage(f"--surface {surface}: needs at least 3, or 0 for none")
    for entry in entries.values():
        narrow(entry.grid, grid)
    plan = Plan.of(steps, threshold)
    target = settings.target or task.target
    return Study(task, plan, entries, tuple(range(seeds)), grid, target, surface)


def header(study: Study, settings: Settings) -> dict[str, Any]:
    """Return the part of the results that is known before any training."""
    task, plan = study.task, study.plan
    return {
        "schema": SCHEMA,
        "kind": "compare",
        "complete": False,
        "command": settings.command,
        "environment": environment(),
        "task": {
            "name": task.name,
            "title": task.title,
            "source": task.source,
            "chance_loss": task.chance,
            **task.details,
        },
        "settings": {
            "steps": plan.steps,
            "look_every": plan.every,
            "warmup_steps": warmup_steps(plan.steps),
            "schedule": "linear warm-up, cosine to 1 % of the peak",
            "weight_decay": WEIGHT_DECAY,
            "threshold": plan.threshold,
            "step_norm_ceiling": step_ceiling(task, plan.threshold),
            "target_validation_loss": study.target,
            "grid_points": study.grid,
            "surface_points": study.surface,
            "seeds": study.seeds,
            "search_seed": SEARCH_SEED,
        },
        "optimizers": {},
        "timing": None,
        "paired": {},
        "seconds": 0.0,
    }


def step_ceiling(task: Task, threshold: float) -> float:
    """Return what SPECTRA bounds every step's spectral norm by: c times aspect scale.

    In units of the peak learning rate; the aspect scale is sqrt(fan-out / fan-in)
    where that exceeds one.
    """
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    numbers = task.dimension_numbers(shapes)
    scales = [1.0]
    for path, axes in jax.tree_util.tree_leaves_with_path(
        numbers, is_leaf=lambda node: isinstance(node, MuonDimensionNumbers)
    ):
        leaf = shapes
        for part in path:
            leaf = leaf[part.key]
        scales.append(leaf.shape[axes.output_axis] / leaf.shape[axes.reduction_axis])
    return threshold * max(1.0, *scales) ** 0.5


def first_at(values: Any, steps: Any, target: float) -> int | None:
    """Return the first looked-at step with a value at or below the target."""
    reached = np.flatnonzero(np.asarray(values) <= target)
    return int(steps[reached[0]]) if reached.size else None


def pick(losses: Sequence[float]) -> int:
    """Return the index of the lowest finite loss, 0 if none is finite."""
    return int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))


def report_seed(study: Study, trained: Trained, seed: int) -> dict[str, Any]:
    """Collect everything known about one reported run, curvature included."""
    task, records = study.task, trained.records
    final = jax.tree.map(float, trained.final)
    numbers: dict[str, Any] = {
        "seed": seed,
        "train_loss": final.train.loss,
        "validation_loss": final.validation.loss,
        "test_loss": final.test.loss,
        "test_accuracy": final.test.accuracy,
        "steps_to_target": first_at(
            records.validation_loss, records.step, study.target
        ),
        # np.max, not nanmax: a run that blew up has no meaningful largest norm.
        "max_update_norm": float(np.max(records.update_norm)),
        "max_weight_norm": float(np.max(records.weight_norm)),
    }
    if math.isfinite(final.train.loss):
        found = curvature(
            task,
            trained.params,
            jax.random.key(seed),
            probes=task.defaults.probes,
            max_matvecs=task.defaults.max_matvecs,
        )
        numbers.update(found._asdict())
    numbers["curves"] = plain(records)
    return numbers


def run_optimizer(
    study: Study, name: str, on_phase: Callable[[str], None], on_steps: Any
) -> dict[str, Any]:
    """Search the grid, train the reported seeds, measure; one optimizer."""
    began = time.perf_counter()
    task, entry, plan = study.task, study.entries[name], study.plan
    grid = narrow(entry.grid, study.grid)
    trainer = make_trainer(task, entry, plan)
    losses = []
    for index, rate in enumerate(grid, 1):
        on_phase(f"learning rate {index} of {len(grid)}")
        searched = train(task, trainer, plan, SEARCH_SEED, rate, on_steps)
        losses.append(float(searched.final.validation.loss))
    best = pick(losses)
    seeds, around = [], None
    for index, seed in enumerate(study.seeds, 1):
        on_phase(f"seed {index} of {len(study.seeds)}")
        trained = train(task, trainer, plan, seed, grid[best], on_steps)
        seeds.append(report_seed(study, trained, seed))
        if index == 1 and study.surface and math.isfinite(seeds[0]["train_loss"]):
            on_phase("loss surface")
            around = surroundings(
                task,
                trained.params,
                points=study.surface,
                max_matvecs=task.defaults.max_matvecs,
            )
    reached = [seed["steps_to_target"] for seed in seeds]
    return {
        "note": entry.note,
        "base": entry.base,
        "learning_rate": grid[best],
        "at_grid_end": len(grid) > 1 and best in (0, len(grid) - 1),
        "grid": [
            {"learning_rate": rate, "validation_loss": loss}
            for rate, loss in zip(grid, losses, strict=True)
        ],
        "seeds": seeds,
        "surroundings": around,
        "summary": {
            **{key: summary([s.get(key) for s in seeds]) for key in REPORTED},
            "steps_to_target": summary(reached),
            "lambda_converged": sum(bool(s.get("converged")) for s in seeds),
        },
        "seconds": time.perf_counter() - began,
    }


def pair(results: dict[str, Any]) -> dict[str, Any]:
    """Compare each SPECTRA entry with its base, seed by seed.

    Both saw the same starting weights and the same minibatches for a given seed, so
    the spread of the difference is what matters, not the spread of either.
    """
    done = results["optimizers"]
    pairs = {}
    for name, numbers in done.items():
        base = done.get(numbers["base"])
        if base is None:
            continue
        differences = [
            new["test_loss"] - old["test_loss"]
            for new, old in zip(numbers["seeds"], base["seeds"], strict=True)
        ]
        better = sum(difference < 0 for difference in differences)
        pairs[name] = {
            "base": numbers["base"],
            **summary(differences),
            "better": better,
        }
    return pairs


def measure_times(study: Study, results: dict[str, Any]) -> dict[str, Any]:
    """Time one training step of every finished optimizer, interleaved."""
    rates = {n: o["learning_rate"] for n, o in results["optimizers"].items()}
    # The reference is timed even when it was not asked for.
    rates.setdefault(BASELINE, OPTIMIZERS[BASELINE].grid[0])
    calls = {
        name: make_timed_step(study.task, OPTIMIZERS[name], study.plan, rate)
        for name, rate in rates.items()
    }
    probe = interleaved_times(calls, rounds=2)
    one_round = sum(min(times) for times in probe.values())
    repeats = max(1, int(0.01 / min(min(times) for times in probe.values())))
    rounds = int(min(TIMING_ROUNDS, max(5, TIMING_SECONDS / (one_round * repeats))))
    times = interleaved_times(calls, rounds=rounds, repeats=repeats)
    medians = {name: median(values) for name, values in times.items()}
    return {
        "baseline": BASELINE,
        "rounds": rounds,
        "steps_per_round": repeats,
        "step_seconds": medians,
        "ratio": {
            # Ratio per round, then the median: slow moments cancel.
            name: median([a / b for a, b in zip(values, times[BASELINE], strict=True)])
            for name, values in times.items()
        },
    }


def compare(
    study: Study, settings: Settings, out: Path, console: Console
) -> dict[str, Any]:
    """Run the comparison, keeping ``out/results.json`` up to date.

    Args:
      study: from ``prepare``.
      settings: from the command line, for the record.
      out: folder of the results.
      console: where progress goes.

    Returns:
      The results; ``"complete"`` is False if the user interrupted.
    """
    began = time.perf_counter()
    results = header(study, settings)
    path = out / "results.json"

    def save() -> None:
        results["paired"] = pair(results)
        results["seconds"] = time.perf_counter() - began
        write_json(path, results)

    run_steps = study.plan.steps * (study.grid + len(study.seeds))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("[dim]{task.fields[phase]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            overall = progress.add_task(
                "[bold]all optimizers", total=run_steps * len(study.entries), phase=""
            )
            for name in study.entries:
                bar = progress.add_task(f"  {name}", total=run_steps, phase="")

                def on_steps(steps: int, bar: Any = bar) -> None:
                    progress.advance(bar, steps)
                    progress.advance(overall, steps)

                def on_phase(phase: str, bar: Any = bar) -> None:
                    progress.update(bar, phase=phase)

                numbers = run_optimizer(study, name, on_phase, on_steps)
                results["optimizers"][name] = numbers
                save()
                progress.remove_task(bar)
                console.print(done_line(name, numbers), highlight=False)
            progress.update(overall, phase="step times")
            results["timing"] = measure_times(study, results)
        results["complete"] = True
    except KeyboardInterrupt:
        results["complete"] = False
    save()
    return plain(results)


def done_line(name: str, numbers: dict[str, Any]) -> str:
    """Say in one line what an optimizer reached."""
    loss = numbers["summary"]["test_loss"]
    mean = "diverged" if loss["mean"] is None else f"test loss {loss['mean']:.4f}"
    return (
        f"  [green]done[/] {name:<17} {mean}, "
        f"learning rate {numbers['learning_rate']:g}, {numbers['seconds']:.0f} s"
    )
