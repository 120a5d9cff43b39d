"""Softmax collapse: learning that ends in rounding, and two ways around it.

Once the largest logit leads by more than the precision can add to it, the softmax is
exactly one, the cost exactly zero and the gradient on the correct class gone. More bits
postpone that, a cross-entropy that never adds the large term to the small ones removes
it with the same bits, and StableMax grows by a power of the logits instead of by their
exponential.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optax

from basinax.benchmarks import _modular, _parity
from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._claims_grokking_perp import at, record, when
from basinax.benchmarks._full_batch import Problem
from basinax.benchmarks._grokking import (
    COLLAPSE_FREE,
    STABLEMAX,
    Contestant,
    Looks,
    compete,
    softmax,
)
from basinax.benchmarks._table import Table, short, spread

# Adam's usual 1e-8 ends training as soon as gradients fall below it, with or without
# collapse; far below 1e-18 the squared gradient would underflow in float32.
EPS = 1e-18
HIDDEN_ZERO = 0.5  # share of examples with zero cost that counts as collapsed
MARGIN = 0.1  # in held-out accuracy, for one run to count as better than another
LOSS_MARGIN = 10.0  # factor between losses that counts as a difference


def _adam(rate: float, b2: float) -> optax.GradientTransformation:
    return optax.adamw(rate, b2=b2, eps=EPS, weight_decay=0.0)


def _answers(statements: dict[str, bool]) -> str:
    return ". ".join(
        f"{statement}: {'yes' if true else 'NO'}"
        for statement, true in statements.items()
    )


def _geometric(values: Sequence[float]) -> float:
    """Average losses that span orders of magnitude."""
    return float(np.exp(np.mean(np.log(np.maximum(values, 1e-38)))))


def _table(
    title: str, found: dict[str, Looks], runs: dict[str, Any], notes: tuple[str, ...]
) -> Table:
    return Table(
        title,
        ("loss", "95 % at", "test %", "true loss", "|W|", "zero cost", "absorbed"),
        tuple(
            (
                name,
                when(run["generalized_at"]),
                spread(run["test_accuracy"], 100.0),
                short(_geometric(found[name].train_loss[:, -1])),
                spread(run["weight_norm"]),
                f"{np.max(found[name].zero_loss):.0%}",
                f"{np.max(found[name].collapsed):.0%}",
            )
            for name, run in runs.items()
        ),
        (
            *notes,
            "True loss: geometric mean of the final training loss, evaluated without "
            "absorption. Zero cost, absorbed: largest share of training examples, at "
            "any look, whose cost was exactly zero, whose softmax sum was one term to "
            "rounding in the precision of the loss.",
        ),
    )


def quartet(
    say: Say = lambda _: None,
    *,
    p: int = 47,
    fraction: float = 0.8,
    width: int = 96,
    rate: float = 1e-3,
    steps: int = 4000,
    every: int = 100,
    seeds: Sequence[int] = (0, 1, 2),
) -> Finding:
    """Train one network with the softmax in three precisions, and collapse-free."""
    problem = _modular.problem(p, fraction, width)
    adam = _adam(rate, 0.99)
    found = compete(
        problem,
        {
            "float16": Contestant(adam, softmax("float16")),
            "float32": Contestant(adam, softmax("float32")),
            "float64": Contestant(adam, softmax("float64")),
            "collapse-free float32": Contestant(adam, COLLAPSE_FREE),
        },
        seeds=seeds,
        steps=steps,
        every=every,
        say=say,
    )
    runs = {name: record(looks) for name, looks in found.items()}
    half, single, double, free = found.values()

    def final(looks: Looks, key: str) -> np.ndarray:
        return np.asarray(getattr(looks, key)[:, -1], np.float64)

    def lower(a: Looks, b: Looks) -> bool:
        losses = final(a, "train_loss"), final(b, "train_loss")
        return bool(np.all(LOSS_MARGIN * losses[0] < losses[1]))

    statements = {
        "Costs become exactly zero in float16 and float32, not without absorption": (
            bool(np.all(np.max(half.zero_loss, axis=1) > HIDDEN_ZERO))
            and bool(np.all(np.max(single.zero_loss, axis=1) > HIDDEN_ZERO))
            and bool(np.max(free.zero_loss) == 0)
        ),
        "More bits, lower true loss": lower(double, single) and lower(single, half),
        "Same bits without absorption, lower true loss": lower(free, single),
        "More bits, more held-out accuracy": bool(
            np.all(final(double, "test_accuracy") > final(single, "test_accuracy"))
            and np.all(final(single, "test_accuracy") > final(half, "test_accuracy"))
        ),
        "Same bits without absorption, more held-out accuracy": bool(
            np.all(final(free, "test_accuracy") > final(single, "test_accuracy"))
        ),
    }
    answers = list(statements.values())
    accuracies = ", ".join(
        f"{name} {run['test_accuracy']['mean']:.1%}" for name, run in runs.items()
    )
    return Finding(
        claim="Once a network fits, rounding in the softmax and not the data ends its "
        "learning: the more bits, the later.",
        verdict="holds"
        if all(answers)
        else "mixed"
        if any(answers)
        else "does not hold",
        evidence=f"{problem.title}, {steps} steps, every seed: {_answers(statements)}. "
        f"Held-out accuracy: {accuracies}.",
        control="The collapse-free float32 loss differs from the float32 loss in its "
        "rounding alone. Accuracy by itself would not show the cause: losses, norms "
        "and zero costs are the sounder evidence, and the float64 runs of the "
        "StableMax experiments tell how much of a stall is rounding.",
        numbers={
            "problem": problem.title,
            "learning_rate": rate,
            "steps": steps,
            "seeds": list(seeds),
            "statements": statements,
            "runs": runs,
        },
        table=_table(
            f"Addition mod {p} after {steps} steps, the weights always in float32",
            found,
            runs,
            (f"{len(seeds)} seeds, AdamW without decay, learning rate {rate:g}.",),
        ),
    )


def stablemax(
    problem: Problem,
    say: Say = lambda _: None,
    *,
    rate: float = 1e-2,
    steps: int,
    every: int,
    seeds: Sequence[int],
) -> Finding:
    """Train with StableMax, and with the softmax in float32 and float64."""
    adam = _adam(rate, 0.999)
    found = compete(
        problem,
        {
            "StableMax": Contestant(adam, STABLEMAX),
            "softmax, float32": Contestant(adam),
            "softmax, float64": Contestant(adam, softmax("float64")),
        },
        seeds=seeds,
        steps=steps,
        every=every,
        say=say,
    )
    runs = {name: record(looks) for name, looks in found.items()}
    stable, single, double = (
        np.asarray(looks.test_accuracy[:, -1]) for looks in found.values()
    )
    first, rival, _ = (run["generalized_at"] for run in runs.values())
    arrived = sum(step is not None for step in first)
    passed = sum(step is not None for step in rival)
    alone = arrived == len(seeds) and passed == 0
    ahead = int(np.sum(stable > single))
    clearly = int(np.sum(stable > single + MARGIN))
    collapse = float(np.max(found["softmax, float32"].zero_loss, axis=1).mean())
    spared = float(np.max(found["softmax, float64"].zero_loss, axis=1).mean())
    helped = bool(np.all(double > single + MARGIN))
    reading = (
        "so rounding explains what holds the softmax back"
        if helped
        else "so over these steps rounding is not what holds the softmax back"
    )
    return Finding(
        claim="Without weight decay, StableMax generalizes where the softmax stalls.",
        verdict="holds"
        if alone
        else "mixed"
        if ahead == len(seeds)
        else "does not hold",
        evidence=f"{problem.title}, {steps} steps: StableMax has 95 % of the held-out "
        f"examples right on {arrived} of {len(seeds)} seeds ({at(first)}), the "
        f"float32 softmax on {passed} ({at(rival)}). StableMax ends ahead on {ahead} "
        f"seeds, by over {MARGIN:.0%} on {clearly}: {np.mean(stable):.1%} against "
        f"{np.mean(single):.1%}.",
        control=f"The softmax in float64, where at most {spared:.0%} of the costs "
        f"become zero instead of {collapse:.0%}, ends at {np.mean(double):.1%}, "
        f"{reading}.",
        numbers={
            "problem": problem.title,
            "learning_rate": rate,
            "steps": steps,
            "seeds": list(seeds),
            "float64_helps": helped,
            "runs": runs,
        },
        table=_table(
            f"{problem.title}, after {steps} steps",
            found,
            runs,
            (f"{len(seeds)} seeds, AdamW without decay, learning rate {rate:g}.",),
        ),
    )


def stablemax_parity(bits: int, examples: int, steps: int) -> Callable[[Say], Finding]:
    """Make the experiment on the parity of three bits among some."""

    def run(say: Say = lambda _: None, *, seeds: Sequence[int] = range(4)) -> Finding:
        problem = _parity.problem(bits, 3, examples, examples, 100)
        return stablemax(problem, say, steps=steps, every=20, seeds=seeds)

    return run


def stablemax_modular(
    p: int, fraction: float, width: int, steps: int, seeds: int
) -> Callable[[Say], Finding]:
    """Make the experiment on addition mod p, which takes tens of thousands of steps."""

    def run(say: Say = lambda _: None) -> Finding:
        problem = _modular.problem(p, fraction, width)
        return stablemax(
            problem, say, steps=steps, every=steps // 100, seeds=range(seeds)
        )

    return run
