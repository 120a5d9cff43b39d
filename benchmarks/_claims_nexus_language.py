"""Nexus on a language model of several sources, at a size that fits a laptop.

The paper (arXiv:2604.09258) reports lower losses on what was not trained on, at equal
training loss, as the minima of the sources come closer.  Everything is read off where
the training loss is equal, and against two controls: accumulation of gradients, and of
unit gradients without walking, which by itself weighs sources differently.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.axes import Axes

from basinax.benchmarks import _multi_source
from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._figures import INK, tidy
from basinax.benchmarks._models import count
from basinax.benchmarks._multi_source import MultiSource
from basinax.benchmarks._multi_source_train import (
    Course,
    Problem,
    Setting,
    Way,
    at_level,
    make_trainer,
    nearest,
    pose,
    train,
)
from basinax.benchmarks._table import Table, short
from basinax.landscape import closeness

# In the middle that of an independent replication.
GAMMAS = (0.015, 0.05, 0.15)
LEVEL = 0.8  # share of its steps after which accumulation gives the level of the loss
SEEDS = (0, 1, 2, 3, 4)
LARGE = Setting(
    width=256, depth=4, length=256, size=16, steps=4000, every=200, rate=1e-3
)
# Of the way that one source alone pulls the model.
DESCENT, DESCENT_STEPS = optax.sgd(0.1), 20

PLAIN = Way("accumulation", normalize=False)
UNIT, UNIT_MIXED = Way("unit"), Way("mixed, unit", mixed=True)


def ways(gammas: Sequence[float]) -> tuple[Way, ...]:
    """List the ways to train, accumulation first.

    It is one way for both kinds of micro-batches, as the mean gradient of equal
    windows does not depend on how they are dealt.
    """
    return (
        PLAIN,
        UNIT,
        *(Way(f"Nexus {gamma:g}", gamma=gamma) for gamma in gammas),
        UNIT_MIXED,
        *(Way(f"mixed, Nexus {g:g}", gamma=g, mixed=True) for g in gammas),
    )


# What is compared at equal training loss, and the sign of what is better.
MEASURES = {
    "unseen": -1,
    "held_out": -1,
    "cosine": 1,
    "norm": -1,
    "variance": -1,
    "distance": -1,
}


def measure(problem: Problem, course: Course, level: float) -> dict[str, Any]:
    """Read a run off at a training loss; NaN where it does not get there."""
    seen = at_level(course, level)
    numbers: dict[str, Any] = {
        "final_train": float(course.look.train[-1]),
        "final_held_out": float(np.mean(course.look.held_out[-1])),
        "final_unseen": float(course.look.unseen[-1]),
        "course": {"step": course.step, **course.look._asdict()},
    }
    if seen is None:
        each = [math.nan] * len(problem.sources.names)
        return {**numbers, **dict.fromkeys(MEASURES, math.nan), "each": each}
    index = nearest(course, level)
    found = closeness(
        problem.loss,
        course.params[index],
        (problem.train,),
        method="descent",
        optimizer=DESCENT,
        steps=DESCENT_STEPS,
    )
    return {
        **numbers,
        "step": int(course.step[index]),
        "unseen": float(seen.unseen),
        "held_out": float(np.mean(seen.held_out)),
        "each": [float(x) for x in seen.held_out],
        "cosine": float(seen.cosine),
        "norm": float(seen.norm),
        "variance": float(seen.variance),
        "distance": float(found.mean_squared_distance) ** 0.5,
        "descended": float(np.mean(found.losses - found.losses_reached)),
    }


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the mean difference over seeds and its standard error.

    Both are NaN if a run did not get to the level, the error also for a single seed.
    """
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    mean, number = float(np.mean(differences)), len(differences)
    if number < 2 or not math.isfinite(mean):
        return {"mean": mean, "error": math.nan}
    return {"mean": mean, "error": float(np.std(differences, ddof=1)) / number**0.5}


def clear(difference: dict[str, float], sign: int) -> bool:
    """Say whether a difference is in a direction by more than two standard errors."""
    return sign * difference["mean"] > 2 * difference["error"]


def judge(answers: Sequence[bool]) -> str:
    """Hold if the loss is lower than that of both controls for every γ."""
    return "holds" if all(answers) else "mixed" if any(answers) else "does not hold"


def compare(
    ways: Sequence[Way], runs: dict[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Compare every walk with its two controls in every measure, paired by seed.

    Returns:
      By way and control, the differences in every measure; by way, under "better",
      whether each measure is clearly better than that of both controls.
    """
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        if not way.gamma:
            continue
        rivals = PLAIN.name, (UNIT_MIXED if way.mixed else UNIT).name
        differences = {
            rival: {
                key: paired([r[key] for r in runs[way.name]], [r[key] for r in against])
                for key in MEASURES
            }
            for rival in rivals
            for against in (runs[rival],)
        }
        better = {
            key: all(clear(d[key], sign) for d in differences.values())
            for key, sign in MEASURES.items()
        }
        found[way.name] = {"against": differences, "better": better}
    return found


def language_model(
    say: Say = lambda _: None,
    *,
    sources: MultiSource | None = None,
    setting: Setting | None = None,
    gammas: Sequence[float] = GAMMAS,
    seeds: Sequence[int] = SEEDS,
) -> Finding:
    """Train in every way with every seed and compare at equal training loss.

    On an accelerator the model, its batches and the run are larger by default.
    """
    if sources is None:
        sources = _multi_source.load()
    if setting is None:
        setting = Setting() if jax.default_backend() == "cpu" else LARGE
    problem, chosen = pose(sources, setting), ways(gammas)
    trainer = make_trainer(problem)
    runs: dict[str, list[dict[str, Any]]] = {way.name: [] for way in chosen}
    levels = []
    for seed in seeds:
        for way in chosen:
            say(f"seed {seed}, {way.name}")
            course = train(problem, trainer, way, seed)
            if way == PLAIN:
                after = round(LEVEL * len(course.step)) - 1
                levels.append(float(course.look.train[after]))
            runs[way.name].append(measure(problem, course, levels[-1]))
    compared = compare(chosen, runs)
    pure = [way.name for way in chosen if way.gamma and not way.mixed]
    mixed = [way.name for way in chosen if way.gamma and way.mixed]
    parameters = count(jax.eval_shape(problem.init, jax.random.key(0)))
    return Finding(
        claim="At equal training loss a walk over micro-batches of one source each "
        "gives a lower loss on a source not trained on than accumulation of gradients "
        "and of unit gradients.",
        verdict=judge([compared[name]["better"]["unseen"] for name in pure]),
        evidence=f"Loss on {sources.unseen_name}, {_told(compared, pure)}. "
        f"{_counted(compared, pure)}.",
        control=f"Micro-batches of all sources mixed: {_told(compared, mixed)}. "
        f"{_counted(compared, mixed)}. {_control(runs)}.",
        numbers={
            "seeds": list(seeds),
            "setting": setting,
            "gammas": list(gammas),
            "parameters": parameters,
            "levels": levels,
            "unseen": sources.unseen_name,
            "digest": sources.digest,
            "runs": runs,
            "compared": compared,
        },
        table=_table(problem, runs, compared, levels, parameters),
    )


def _difference(difference: dict[str, float], scale: float = 1, digits: int = 3) -> str:
    if not math.isfinite(difference["mean"]):
        return "–"
    text = f"{scale * difference['mean']:+.{digits}f}"
    if not math.isfinite(difference["error"]):
        return text
    return f"{text} ± {scale * difference['error']:.{digits}f}"


_thousandths = partial(_difference, scale=1e3, digits=0)


def _told(compared: dict[str, Any], names: Sequence[str]) -> str:
    """Tell the differences in the loss on the unseen source."""
    parts = []
    for name in names:
        against = compared[name]["against"].values()
        first, second = (_difference(d["unseen"]) for d in against)
        parts.append(f"{name.removeprefix('mixed, ')} {first} and {second}")
    return "less that of accumulation and of unit gradients: " + ", ".join(parts)


def _counted(compared: dict[str, Any], names: Sequence[str]) -> str:
    """Count for each measure how often it is clearly better than both controls."""
    words = {
        "unseen": "unseen loss",
        "held_out": "held-out loss",
        "cosine": "cosine of gradients",
        "norm": "gradient norm of a source",
        "variance": "variance across sources",
        "distance": "distance to a source's own descent",
    }
    counts = (
        f"{words[key]} {sum(compared[name]['better'][key] for name in names)}"
        for key in MEASURES
    )
    return f"Better than both by two standard errors, of {len(names)} γ: " + ", ".join(
        counts
    )


def _control(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Tell what unit gradients alone change."""

    def change(way: Way) -> str:
        both = ([run["unseen"] for run in runs[w.name]] for w in (way, PLAIN))
        return _difference(paired(*both))

    return (
        f"Unit gradients without walking, less accumulation: {change(UNIT)}, with "
        f"mixed micro-batches {change(UNIT_MIXED)}"
    )


def _table(
    problem: Problem,
    runs: dict[str, list[dict[str, Any]]],
    compared: dict[str, Any],
    levels: Sequence[float],
    parameters: int,
) -> Table:
    setting, sources = problem.setting, problem.sources

    def mean(name: str, key: str) -> float:
        return float(np.mean([run[key] for run in runs[name]]))

    def row(name: str) -> tuple[str, ...]:
        against = compared[name]["against"].values() if name in compared else ()
        return (
            name,
            f"{mean(name, 'final_train'):.3f}",
            *(short(mean(name, key), 4) for key in ("held_out", "unseen")),
            *([_thousandths(d["unseen"]) for d in against] or ["–", "–"]),
            *(short(mean(name, key), 3) for key in ("cosine", "norm", "distance")),
        )

    def gained(name: str) -> str:
        both = (
            paired(*([run[key] for run in runs[way]] for way in (name, PLAIN.name)))
            for key in ("final_train", "final_unseen")
        )
        return f"{name} {', '.join(map(_thousandths, both))}"

    each = "; ".join(
        f"{name} "
        + ", ".join(f"{x:.3f}" for x in np.mean([r["each"] for r in found], axis=0))
        for name, found in runs.items()
        if not name.startswith("mixed")
    )
    return Table(
        "Language model of several sources, read off at equal training loss",
        (
            "gradient",
            "final",
            "held-out",
            "unseen",
            "- accum.",
            "- unit",
            "cosine",
            "norm",
            "way",
        ),
        tuple(row(name) for name in runs),
        (
            f"{sources.origin[:1].upper()}{sources.origin[1:]}: "
            f"{', '.join(sources.names)}; unseen: {sources.unseen_name}; digest "
            f"{sources.digest}.",
            f"{parameters:,} parameters, {len(sources.names)} micro-batches of "
            f"{setting.size} x {setting.length} bytes, {setting.steps} steps of AdamW "
            f"at {setting.rate:g}, {len(levels)} seeds. Read off at the training loss "
            f"that accumulation has after {LEVEL:.0%} of its steps, "
            f"{min(levels):.3f} to {max(levels):.3f}; – where a seed ends above it.",
            "Unit: accumulation of unit gradients. Mixed: micro-batches of all "
            "sources, otherwise of one each.",
            "Final: training loss at the end. - accum., - unit: unseen loss less that "
            "of the controls in thousandths, ± standard error, paired by seed. Norm: "
            f"of a source's gradient. Way: how far {DESCENT_STEPS} steps of descent on "
            "one source go.",
            "At the end, training and unseen loss less those of accumulation, in "
            f"thousandths: {'; '.join(gained(n) for n in runs if n != PLAIN.name)}.",
            f"Held-out loss of {', '.join(sources.names)}: {each}.",
        ),
    )


def draw_differences(axis: Axes, finding: Finding) -> None:
    """Draw differences of the unseen loss with two standard errors."""
    compared = finding.numbers["compared"]
    colours, names = ("#0072B2", "#D55E00"), list(compared)
    for row, name in enumerate(names):
        against = compared[name]["against"].values()
        for place, (difference, colour) in enumerate(
            zip(against, colours, strict=True)
        ):
            found = difference["unseen"]
            axis.errorbar(
                found["mean"],
                row + 0.14 * (2 * place - 1),
                xerr=2 * np.nan_to_num(found["error"]),
                fmt="os"[place],
                color=colour,
                capsize=2,
                markersize=5,
                label=("less accumulation", "less unit gradients")[place]
                if row == 0
                else None,
            )
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(0.0, color=INK, linewidth=0.9)
    tidy(
        axis,
        f"Loss on unseen {finding.numbers['unseen']}",
        "difference at equal training loss, ± 2 s.e.",
        "",
    )
    axis.tick_params(axis="y", length=0)
    axis.legend(frameon=False, fontsize=8)
