"""Two overlaid digits with noisy labels: does perturbing help, and does its sign?

Radii are chosen on validation examples and judged on test examples.  All comparisons
are paired by seed: same examples, same noise, same start, same minibatches.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from basinax.benchmarks import _two_digits
from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._multi_task import MultiTask, delta_m
from basinax.benchmarks._multi_task_methods import METHODS, WEIGHTINGS
from basinax.benchmarks._multi_task_train import (
    BASELINE,
    PLAN,
    SHARPNESS_RHO,
    Measured,
    Plan,
    outcome,
    singles,
    step_ratios,
)
from basinax.benchmarks._results import summary
from basinax.benchmarks._table import Table, spread

# What a reproduction has to show: points of accuracy, share of the largest eigenvalue
# that is left, rise of the cosine between the gradients of the tasks.
GAIN, FLATTER, ALIGNED = 2.0, 0.5, 0.1
RADII = (0.05, 0.2, 0.5, 1.0)
RADIUS = 0.2
PERTURBED = ("SAM", "SAMO", "SAMO, coin")

noisy = cache(_two_digits.problem)
clean = cache(partial(_two_digits.problem, noise=0.0))


class Row(NamedTuple):
    """One line of a table: a method at a radius."""

    method: str
    rho: float = 0.0

    @property
    def label(self) -> str:
        """The method, with its radius if it has one."""
        return f"{self.method}, ρ {self.rho:.3g}" if self.rho else self.method


class Study(NamedTuple):
    """All rows on all seeds."""

    problem: MultiTask
    plan: Plan
    seeds: tuple[int, ...]
    rows: dict[str, Row]
    runs: dict[str, list[Measured]]
    """By label, one per seed."""
    singles: np.ndarray
    """Accuracies of single-task training, (seeds, T)."""
    time: dict[str, float]
    """Time of a step by method, in units of equal weights; empty if not taken."""


def study(
    problem: MultiTask,
    rows: Sequence[Row],
    *,
    seeds: Sequence[int],
    plan: Plan,
    say: Say,
    timed: bool = False,
) -> Study:
    """Train every row on every seed, and networks on each task alone."""
    alone = []
    for seed in seeds:
        say(f"single tasks, seed {seed}")
        alone.append(singles(problem, seed, plan))
    runs: dict[str, list[Measured]] = {}
    for row in rows:
        for seed in seeds:
            say(f"{row.label}, seed {seed}")
            found = outcome(problem, METHODS[row.method], row.rho, seed, plan)
            runs.setdefault(row.label, []).append(found)
    names = [row.method for row in rows]
    say("step times")
    return Study(
        problem,
        plan,
        tuple(seeds),
        {row.label: row for row in rows},
        runs,
        np.stack(alone),
        step_ratios(problem, names, plan) if timed else {},
    )


class Paired(NamedTuple):
    """Mean of differences paired by seed, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> "Paired":
        """Take Student's t interval, infinite for a single difference."""
        x = np.asarray(differences, np.float64)
        half = math.inf
        if len(x) > 1:
            error = float(x.std(ddof=1)) / math.sqrt(len(x))
            half = float(student.ppf(0.975, len(x) - 1)) * error
        return cls(float(x.mean()), float(x.mean() - half), float(x.mean() + half))

    def __str__(self) -> str:
        """Write the mean and the interval."""
        if not math.isfinite(self.high):
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


class Effect(NamedTuple):
    """What a method changes with respect to equal weights, paired by seed."""

    gain: Paired
    """Points of mean test accuracy."""
    flatter: float
    """Geometric mean ratio of the largest eigenvalues."""
    aligned: float
    """Rise of the cosine between the gradients of the tasks."""


def effect(ours: Sequence[Measured], base: Sequence[Measured]) -> Effect:
    """Compare runs on the same seeds."""
    pairs = list(zip(ours, base, strict=True))
    logs = [np.mean(np.log(a.lambda_max / b.lambda_max)) for a, b in pairs]
    return Effect(
        gains(ours, base),
        math.exp(float(np.mean(logs))),
        float(np.mean([a.cosine - b.cosine for a, b in pairs])),
    )


def gains(ours: Sequence[Measured], base: Sequence[Measured]) -> Paired:
    """Compare mean test accuracies, in points."""
    return Paired.of(
        [
            100 * float(np.mean(a.accuracy) - np.mean(b.accuracy))
            for a, b in zip(ours, base, strict=True)
        ]
    )


def judge_effect(seen: Effect) -> str:
    """Hold if accuracy, curvature and conflict all change as said."""
    answers = (
        seen.gain.mean > GAIN and seen.gain.low > 0,
        seen.flatter < FLATTER,
        seen.aligned > ALIGNED,
    )
    return "holds" if all(answers) else "mixed" if any(answers) else "does not hold"


def judge_sign(over_coin: Paired, over_smaller: Paired) -> str:
    """Hold if better than the coin and than SAM at the radius that is left of it."""
    answers = [over_coin.low > 0, over_smaller.low > 0]
    return "holds" if all(answers) else "mixed" if any(answers) else "does not hold"


def best(found: Study, method: str) -> str:
    """Choose the label of a method with the highest validation accuracy."""
    labels = [label for label, row in found.rows.items() if row.method == method]
    held = {x: np.mean([run.validation for run in found.runs[x]]) for x in labels}
    return max(labels, key=held.__getitem__)


def table(found: Study, title: str) -> Table:
    """Tabulate a study: accuracies of two tasks or their mean, the rest as means."""
    tasks = len(found.problem.tasks)

    def accuracies(values: Sequence[np.ndarray]) -> tuple[str, ...]:
        x = np.asarray(values, np.float64)
        x = x if tasks == 2 else x.mean(axis=1, keepdims=True)
        return tuple(spread(summary(list(column)), 100.0) for column in x.T)

    def line(label: str) -> tuple[str, ...]:
        row, runs = found.rows[label], found.runs[label]
        deltas = [
            delta_m(run.accuracy.tolist(), alone.tolist())
            for run, alone in zip(runs, found.singles, strict=True)
        ]
        return (
            row.method,
            f"{row.rho:.3g}" if row.rho else "–",
            *accuracies([run.accuracy for run in runs]),
            spread(summary(deltas)).replace("-", "−"),
            f"{np.mean([run.cosine for run in runs]):.2f}",
            f"{np.mean([run.sharpness for run in runs]):.3f}",
            f"{np.mean([run.lambda_max for run in runs]):.1f}",
            *((f"{found.time[row.method]:.2f}×",) if found.time else ()),
        )

    shares = ("% task 1", "% task 2") if tasks == 2 else ("% mean",)
    last = ("step",) if found.time else ()
    blank = ("–",) * (3 + len(last))
    return Table(
        title,
        ("method", "ρ", *shares, "Δm %", "cosine", "sharpness", "λmax", *last),
        (
            ("one task alone", "–", *accuracies(list(found.singles)), "0", *blank),
            *map(line, found.runs),
        ),
        (
            f"{found.problem.title}; Adam {found.plan.rate:g}, batch "
            f"{found.problem.batch_size}, {found.plan.steps} steps; mean ± sd over "
            f"{len(found.seeds)} seeds.",
            "%: test accuracy. Δm: mean relative loss of accuracy against one task "
            "alone, negative is better. Cosine: between the tasks' gradients. "
            f"Sharpness: rise of a task's loss at {SHARPNESS_RHO:g} along its "
            "gradient. λmax: of its Hessian. These three on the training set.",
            *(("Step: time over that with equal weights.",) if found.time else ()),
        ),
    )


def numbers(found: Study) -> dict[str, Any]:
    """Collect everything measured, for the record."""
    return {
        "problem": found.problem.title,
        "plan": found.plan,
        "seeds": list(found.seeds),
        "single_task_accuracy": found.singles,
        "step_time_ratio": found.time,
        "runs": {
            label: {
                "method": row.method,
                "rho": row.rho,
                **{
                    name: [getattr(run, name) for run in found.runs[label]]
                    for name in Measured._fields
                },
            }
            for label, row in found.rows.items()
        },
    }


def sweep(
    say: Say = lambda _: None,
    *,
    problem: Callable[[], MultiTask] = noisy,
    where: str = "With noisy labels",
    seeds: Sequence[int] = (0, 1, 2),
    radii: Sequence[float] = RADII,
    plan: Plan = PLAN,
) -> Finding:
    """Sweep the radius of SAM, of SAMO and of SAMO with a coin."""
    rows = [Row(BASELINE), *(Row(name, rho) for name in PERTURBED for rho in radii)]
    found = study(problem(), rows, seeds=seeds, plan=plan, say=say)
    chosen = {method: best(found, method) for method in PERTURBED}
    base = found.runs[BASELINE]
    effects = {m: effect(found.runs[label], base) for m, label in chosen.items()}
    over_sam = gains(found.runs[chosen["SAMO"]], found.runs[chosen["SAM"]])

    def told(method: str) -> str:
        seen = effects[method]
        return (
            f"{chosen[method]}: accuracy {seen.gain} points, eigenvalue × "
            f"{seen.flatter:.2f}, cosine {seen.aligned:+.2f}"
        )

    return Finding(
        claim=f"{where} SAMO generalizes better than equal weights, at a flatter "
        "minimum where the tasks conflict less.",
        verdict=judge_effect(effects["SAMO"]),
        evidence="Against equal weights, radius chosen on validation examples (95 % "
        f"interval): {told('SAMO')}. Asked for: more than {GAIN:g} points, a factor "
        f"below {FLATTER:g}, a rise above {ALIGNED:g}.",
        control=f"{told('SAM')}. {told('SAMO, coin')}. SAMO over SAM: {over_sam} "
        "points.",
        numbers={
            **numbers(found),
            "radii": list(radii),
            "chosen": chosen,
            "effects": effects,
            "over_sam": over_sam,
        },
        table=table(found, f"{where}: radii"),
    )


def sign(
    say: Say = lambda _: None,
    *,
    problem: Callable[[], MultiTask] = noisy,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    rho: float = RADIUS,
    plan: Plan = PLAN,
    others: Sequence[str] = ("SAMO, 8 samples", "SAMO, exact"),
) -> Finding:
    """Replace what SAMO learns about each task by a coin, by nothing, by more."""
    # Two orthogonal parts of equal norm, mixed half and half: the common part of the
    # perturbation is as long as all of SAM's at a radius smaller by √2.
    smaller = Row("SAMO, no local part", rho / math.sqrt(2))
    rows = [
        *(Row(name, rho) for name in ("SAMO", "SAMO, coin")),
        smaller,
        *(Row(name, rho) for name in others),
    ]
    found = study(problem(), rows, seeds=seeds, plan=plan, say=say)
    ours = found.runs[rows[0].label]
    coin, less = (gains(ours, found.runs[row.label]) for row in rows[1:3])
    more = {
        row.method: gains(found.runs[row.label], found.runs[rows[1].label])
        for row in rows[3:]
    }
    return Finding(
        claim="The local part of SAMO's perturbation, from two forward passes for each "
        "task, is worth more than noise.",
        verdict=judge_sign(coin, less),
        evidence=f"Points of accuracy by which SAMO at ρ = {rho:g} is better (95 % "
        f"interval): than with a coin for its sign {coin}; than without a local part "
        f"at ρ/√2 {less}.",
        control="Over the same coin: "
        + "; ".join(f"{name} {gain}" for name, gain in more.items())
        + ". A local part that knows its task also points uphill, so that more of the "
        "radius does.",
        numbers={**numbers(found), "coin": coin, "smaller": less, "more": more},
        table=table(found, "What the local part knows"),
    )


def combiners(
    say: Say = lambda _: None,
    *,
    problem: Callable[[], MultiTask] = noisy,
    seeds: Sequence[int] = (0, 1, 2),
    rho: float = RADIUS,
    plan: Plan = PLAN,
    weightings: Sequence[str] = tuple(WEIGHTINGS),
) -> Finding:
    """Train with task weightings, alone and on perturbed gradients."""
    families = [
        (Row(name), Row(f"SAMO + {name}", rho), Row(f"F-MTL + {name}", rho))
        for name in weightings
    ]
    rows = [Row(BASELINE), Row("SAM", rho), *(row for rows in families for row in rows)]
    found = study(problem(), rows, seeds=seeds, plan=plan, say=say, timed=True)
    effects = {
        name: tuple(
            effect(found.runs[row.label], found.runs[family[0].label])
            for row in family[1:]
        )
        for name, family in zip(weightings, families, strict=True)
    }
    verdicts = {judge_effect(ours) for ours, _ in effects.values()}
    alone = {
        name: gains(found.runs[family[0].label], found.runs[BASELINE])
        for name, family in zip(weightings, families, strict=True)
    }
    sam = effect(found.runs[rows[1].label], found.runs[BASELINE])
    return Finding(
        claim="SAMO improves task weightings: better, flatter, less conflict.",
        verdict=verdicts.pop() if len(verdicts) == 1 else "mixed",
        evidence=f"Points of accuracy that ρ = {rho:g} adds to the weighting, and the "
        "factor of its largest eigenvalue: "
        + "; ".join(
            f"{name} {ours.gain} × {ours.flatter:.2f}"
            for name, (ours, _) in effects.items()
        )
        + ".",
        control="The same by F-MTL, at twice the backward passes: "
        + "; ".join(
            f"{name} {theirs.gain} × {theirs.flatter:.2f}"
            for name, (_, theirs) in effects.items()
        )
        + f". SAM on equal weights: {sam.gain} × {sam.flatter:.2f}. Weightings without "
        "perturbation over equal weights: "
        + "; ".join(f"{name} {gain}" for name, gain in alone.items())
        + ".",
        numbers={**numbers(found), "effects": effects, "alone": alone},
        table=table(found, "Task weightings"),
    )
