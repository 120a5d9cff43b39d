"""How sharp the places are that optimizers come through, at equal training loss.

End points cannot be compared as they are: with cross-entropy the curvature falls with
the loss, so whoever trains further looks flatter. Here every run is stopped the first
time its training loss is at or below a level, and the sharpness is measured there.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from scipy.stats import t as student

from basinax.benchmarks import _tasks
from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._optimizers import OPTIMIZERS
from basinax.benchmarks._results import summary
from basinax.benchmarks._table import Table, spread
from basinax.benchmarks._tasks import Options, Params, Task
from basinax.benchmarks._train import Plan, transformation
from basinax.landscape import eigenpairs, hessian
from basinax.optimizers import sam

LEVELS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


class Contestant(NamedTuple):
    """An optimizer of the comparison at one peak learning rate."""

    label: str
    entry: str
    """Its name in ``OPTIMIZERS``."""
    rate: float
    role: str
    """"base", "claim" (said to be flatter than the base) or "control"."""
    rho: float = 0.0
    """Radius of sharpness-aware minimization in front of the optimizer."""


# The rates that the comparison on digits found best; the control takes the base's
# tripled, to tell a larger step from another direction.
CONTESTANTS = (
    Contestant("adamw", "adamw", 3e-3, "base"),
    Contestant("spectra_adamw", "spectra_adamw", 1e-2, "claim"),
    Contestant("adamw, 3× rate", "adamw", 1e-2, "control"),
)


class Passing(NamedTuple):
    """What a run was like when it first reached a level of the training loss."""

    step: int
    loss: float
    sharpness: float


def follow(
    task: Task,
    contestant: Contestant,
    *,
    steps: int,
    levels: Sequence[float],
    seeds: Sequence[int],
    say: Say = lambda _: None,
) -> list[list[Passing | None]]:
    """Train on every seed; return a passing, or None, per seed and level."""
    plan = Plan.of(steps, task.defaults.threshold)
    tx = transformation(task, OPTIMIZERS[contestant.entry], plan, contestant.rate)
    if contestant.rho:
        tx = optax.chain(sam(contestant.rho), tx)
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def start(key: jax.Array) -> tuple[Params, Any]:
        params = task.init(key)
        return params, tx.init(params)

    @partial(jax.jit, donate_argnums=1)
    def step(
        params: Params, state: Any, data: Any, whole: Any, key: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        batch = task.batch(data, key)
        grads = jax.grad(task.loss)(params, batch)
        updates, state = tx.update(
            grads, state, params, value_fn=lambda p: task.loss(p, batch)
        )
        params = optax.apply_updates(params, updates)
        return params, state, task.loss(params, whole)

    found = []
    for seed in seeds:
        say(f"{contestant.label}, seed {seed}")
        init_key, data_key, eigen_key = jax.random.split(jax.random.key(seed), 3)
        params, state = start(init_key)
        passings: list[Passing | None] = [None] * len(levels)
        for index in range(steps):
            key = jax.random.fold_in(data_key, index)
            params, state, loss = step(params, state, task.data, task.curvature, key)
            reached = float(loss)
            below = [
                level
                for level, limit in enumerate(levels)
                if passings[level] is None and reached <= limit
            ]
            if below:
                operator = hessian(task.loss, params, task.curvature, linearize=True)
                top = eigenpairs(operator, params, 1, key=eigen_key, tol=1e-2)
                seen = Passing(index + 1, reached, float(top.values[0]))
                for level in below:
                    passings[level] = seen
            if passings[-1] is not None:
                break
        found.append(passings)
    return found


def by_level(runs: list[list[Passing | None]]) -> list[tuple[Passing | None, ...]]:
    """Turn seeds of levels into levels of seeds."""
    return list(zip(*runs, strict=True))


def ratios(
    runs: list[list[Passing | None]], base: list[list[Passing | None]]
) -> list[dict[str, Any]]:
    """Compare the sharpness with that of the base, paired by seed, at every level.

    Returns:
      Per level the geometric mean of the ratio over the seeds that both reached it
      on, its 95 % interval by Student's t on the logarithm, and their number.
    """
    levels = []
    for ours, theirs in zip(by_level(runs), by_level(base), strict=True):
        logs = [
            math.log(a.sharpness / b.sharpness)
            for a, b in zip(ours, theirs, strict=True)
            if a is not None and b is not None and min(a.sharpness, b.sharpness) > 0
        ]
        mean = float(np.mean(logs)) if logs else math.nan
        half = math.inf
        if len(logs) > 1:
            error = float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
            half = float(student.ppf(0.975, len(logs) - 1)) * error
        levels.append(
            {
                "ratio": math.exp(mean),
                "low": math.exp(mean - half),
                "high": math.exp(mean + half) if half < math.inf else math.inf,
                "seeds": len(logs),
            }
        )
    return levels


def _write(level: dict[str, Any]) -> str:
    if not level["seeds"]:
        return "–"
    if not math.isfinite(level["high"]):
        return f"{level['ratio']:.2f}"
    return f"{level['ratio']:.2f} ({level['low']:.2f} to {level['high']:.2f})"


def _verdict(
    over_base: Sequence[dict[str, Any]],
    over_controls: Sequence[Sequence[dict[str, Any]]],
) -> str:
    """Hold only if flatter than the base everywhere and nowhere beaten by a control."""
    reached = [level for level in over_base if level["seeds"] > 1]
    flatter = [level["high"] < 1 for level in reached]
    beaten = any(
        level["low"] > 1
        for levels in over_controls
        for level in levels
        if level["seeds"] > 1
    )
    if reached and all(flatter) and not beaten:
        return "holds"
    return "mixed" if any(flatter) else "does not hold"


def equal_loss(
    say: Say = lambda _: None,
    *,
    contestants: Sequence[Contestant] = CONTESTANTS,
    method: str = "spectral clipping",
    options: Options | None = None,
    steps: int = 300,
    levels: Sequence[float] = LEVELS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
) -> Finding:
    """Compare the sharpness of optimizers where they first reach a training loss."""
    task = _tasks.load("digits", options or Options())
    found = {
        contestant.label: follow(
            task, contestant, steps=steps, levels=levels, seeds=seeds, say=say
        )
        for contestant in contestants
    }
    (base,) = (c for c in contestants if c.role == "base")
    compared = {
        c.label: ratios(found[c.label], found[base.label])
        for c in contestants
        if c.role != "base"
    }
    claimed = [c.label for c in contestants if c.role == "claim"]
    controls = [c.label for c in contestants if c.role == "control"]
    verdicts = {
        _verdict(
            compared[label],
            [ratios(found[label], found[control]) for control in controls],
        )
        for label in claimed
    }
    runs = {
        c.label: {
            "optimizer": c.entry,
            "learning_rate": c.rate,
            "role": c.role,
            "rho": c.rho,
            "sharpness": [
                summary([p.sharpness for p in at if p is not None]) for at in column
            ],
            "step": [summary([p.step for p in at if p is not None]) for at in column],
            "loss": [summary([p.loss for p in at if p is not None]) for at in column],
            "ratio": compared.get(c.label),
            "passings": found[c.label],
        }
        for c in contestants
        for column in [by_level(found[c.label])]
    }

    def told(label: str) -> str:
        pairs = zip(levels, compared[label], strict=True)
        parts = [f"{_write(ratio)} at {level:g}" for level, ratio in pairs]
        return f"{label} over {base.label}: " + ", ".join(parts)

    return Finding(
        claim=f"At equal training loss {method} is at a flatter place than its base, "
        "AdamW.",
        verdict=verdicts.pop() if len(verdicts) == 1 else "mixed",
        evidence="Ratio of the largest Hessian eigenvalues (95 % interval) where the "
        f"training loss is first reached: {'; '.join(map(told, claimed))}.",
        control="The base with larger steps: "
        + "; ".join(map(told, controls))
        + ". Where that is flatter still, the step size explains what it finds."
        if controls
        else "None among these contestants.",
        numbers={
            "task": task.title,
            "steps": steps,
            "levels": list(levels),
            "seeds": list(seeds),
            "base": base.label,
            "runs": runs,
        },
        table=Table(
            "Largest Hessian eigenvalue at the first step with a given training loss",
            ("training loss", *(c.label for c in contestants)),
            tuple(
                (
                    f"{level:g}",
                    *(_cell(runs[c.label], index) for c in contestants),
                )
                for index, level in enumerate(levels)
            ),
            (
                f"{task.title}; mean ± sd over {len(seeds)} seeds, in brackets the "
                "mean step; peak learning rates "
                + ", ".join(f"{c.rate:g}" for c in contestants)
                + ".",
            ),
        ),
    )


def _cell(run: dict[str, Any], level: int) -> str:
    if run["sharpness"][level]["mean"] is None:
        return "not reached"
    return f"{spread(run['sharpness'][level])} [{run['step'][level]['mean']:.0f}]"
