"""⊥Grad: generalization with the fit instead of long after it.

A network without biases that fits its training pairs can lower its loss by scaling its
weights up, and the gradient points more and more that way. Without that part of the
gradient a step has to change predictions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

from basinax.benchmarks import _modular
from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._grokking import Contestant, Looks, compete, first_at
from basinax.benchmarks._results import plain, summary
from basinax.benchmarks._table import Table, spread
from basinax.optimizers import grokfast_ema, perp_adamw

FITTED, GENERALIZED, MEMORIZED = 0.99, 0.95, 0.05
RATE = 0.01  # the authors'
DECAY = 1.0  # of the AdamW that groks by weight decay


def span(steps: Sequence[int | None]) -> str:
    """Write the steps at which seeds got somewhere, as a range."""
    there = [step for step in steps if step is not None]
    if not there:
        return "never"
    first, last = min(there), max(there)
    return f"{first}" if first == last else f"{first} to {last}"


def at(steps: Sequence[int | None]) -> str:
    """Write the range for a sentence."""
    text = span(steps)
    return text if text == "never" else f"at step {text}"


def when(steps: Sequence[int | None]) -> str:
    """Write the range, and how many seeds got there if not all did."""
    there = sum(step is not None for step in steps)
    counted = 0 < there < len(steps)
    return span(steps) + (f" ({there}/{len(steps)})" if counted else "")


def record(looks: Looks) -> dict[str, Any]:
    """Sum up the runs of one contestant for the record, the table and the figure."""
    return {
        "fitted_at": first_at(looks, FITTED, "train_accuracy"),
        "generalized_at": first_at(looks, GENERALIZED),
        **{
            key: summary([float(run[-1]) for run in getattr(looks, key)])
            for key in looks._fields
            if key != "step"
        },
        "best_test_accuracy": summary([float(np.max(a)) for a in looks.test_accuracy]),
        "curves": plain(looks),
    }


def steps_table(
    title: str, runs: dict[str, dict[str, Any]], seeds: Sequence[int], every: int
) -> Table:
    """Tabulate when contestants fit and generalize, and where they end."""
    return Table(
        title,
        ("optimizer", "fits at", "95 % held out at", "test %", "|W|", "cosine"),
        tuple(
            (
                name,
                when(run["fitted_at"]),
                when(run["generalized_at"]),
                spread(run["test_accuracy"], 100.0),
                spread(run["weight_norm"]),
                spread(run["alignment"]),
            )
            for name, run in runs.items()
        ),
        (
            f"{len(seeds)} seeds, looked at every {every} steps; the last three "
            "columns are mean ± sd at the end.",
            "Fits: 99 % of the training pairs. |W|: norm of all weights. Cosine: "
            "between the weights and the descent direction of the raw gradient.",
        ),
    )


def orthogonal(
    say: Say = lambda _: None,
    *,
    p: int = 31,
    fraction: float = 0.7,
    width: int = 96,
    steps: int = 200,
    every: int = 10,
    seeds: Sequence[int] = (0, 1, 2, 3),
) -> Finding:
    """Train addition mod p with ⊥AdamW and with AdamW."""
    problem = _modular.problem(p, fraction, width)
    found = compete(
        problem,
        {
            "⊥AdamW": Contestant(perp_adamw(RATE)),
            "AdamW": Contestant(optax.adamw(RATE, weight_decay=0.0)),
        },
        seeds=seeds,
        steps=steps,
        every=every,
        say=say,
    )
    runs = {name: record(looks) for name, looks in found.items()}
    perp, plain_adamw = runs["⊥AdamW"], runs["AdamW"]
    reached = [step for step in perp["generalized_at"] if step is not None]
    # The control, at the very step at which its rival has generalized.
    control = [
        float(looked[steps_of == step][0])
        for step, looked, steps_of in zip(
            perp["generalized_at"],
            found["AdamW"].test_accuracy,
            found["AdamW"].step,
            strict=True,
        )
        if step is not None
    ]
    won = sum(accuracy < MEMORIZED for accuracy in control)
    then = f", {max(control):.1%} when ⊥AdamW has 95 %" if control else ""
    return Finding(
        claim="With gradients orthogonal to the weights AdamW generalizes about as "
        "soon as it fits, where AdamW itself only memorizes.",
        verdict="holds" if won == len(seeds) else "mixed" if won else "does not hold",
        evidence=f"{problem.title}: ⊥AdamW has 95 % of the held-out pairs right on "
        f"{len(reached)} of {len(seeds)} seeds ({at(perp['generalized_at'])}); it fits "
        f"99 % of the training pairs {at(perp['fitted_at'])}.",
        control="AdamW from the same weights on the same pairs fits "
        f"{at(plain_adamw['fitted_at'])}; it never has more than "
        f"{np.max(found['AdamW'].test_accuracy):.1%} of the held-out pairs right"
        f"{then}.",
        numbers={
            "problem": problem.title,
            "learning_rate": RATE,
            "steps": steps,
            "seeds": list(seeds),
            "control_at_the_same_step": control,
            "runs": runs,
        },
        table=steps_table(f"Addition mod {p} after {steps} steps", runs, seeds, every),
    )


def rivals(
    say: Say = lambda _: None,
    *,
    p: int = 59,
    fraction: float = 0.5,
    width: int = 128,
    steps: int = 1200,
    every: int = 20,
    seeds: Sequence[int] = (0, 1, 2),
) -> Finding:
    """Let ⊥Grad run against weight decay and against Grokfast."""
    problem = _modular.problem(p, fraction, width)
    plain_adamw = optax.adamw(RATE, weight_decay=0.0)
    decayed = optax.adamw(RATE, weight_decay=DECAY)
    boosted = grokfast_ema(alpha=0.98, lamb=2.0)
    contestants = {
        "⊥AdamW": perp_adamw(RATE),
        "AdamW": plain_adamw,
        "AdamW, decay 1": decayed,
        "Grokfast": optax.chain(boosted, plain_adamw),
        "Grokfast, decay 1": optax.chain(boosted, decayed),
    }
    found = compete(
        problem,
        {name: Contestant(tx) for name, tx in contestants.items()},
        seeds=seeds,
        steps=steps,
        every=every,
        say=say,
    )
    runs = {name: record(looks) for name, looks in found.items()}
    steps_of = {
        name: [np.inf if s is None else s for s in run["generalized_at"]]
        for name, run in runs.items()
    }
    others = [name for name in runs if name != "⊥AdamW"]
    reached = [name for name in others if np.isfinite(steps_of[name]).any()]
    perp = steps_of["⊥AdamW"]
    every_seed = all(max(perp) < min(steps_of[name]) for name in others)
    on_average = all(np.mean(perp) < np.mean(steps_of[name]) for name in reached)
    return Finding(
        claim="⊥Grad needs fewer steps to generalize than weight decay and than "
        "Grokfast, with no weight decay of its own.",
        verdict="holds"
        if every_seed and np.isfinite(perp).all()
        else "mixed"
        if on_average and np.isfinite(perp).any()
        else "does not hold",
        evidence=f"{problem.title}: steps to 95 % of the held-out pairs, "
        + "; ".join(
            f"{name}: {when(run['generalized_at'])}" for name, run in runs.items()
        )
        + ".",
        control=f"AdamW alone fits {at(runs['AdamW']['fitted_at'])} and "
        f"ends at {runs['AdamW']['test_accuracy']['mean']:.1%}. All share one untuned "
        f"learning rate, {RATE:g}; Grokfast was published for minibatches, smaller "
        "rates and weaker decay.",
        numbers={
            "problem": problem.title,
            "learning_rate": RATE,
            "steps": steps,
            "seeds": list(seeds),
            "runs": runs,
        },
        table=steps_table(f"Addition mod {p} after {steps} steps", runs, seeds, every),
    )
