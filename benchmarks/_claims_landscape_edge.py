"""The edge of stability: training sharpens until its step size just holds.

Full-batch gradient descent with step size η first raises the largest Hessian eigenvalue
λ (progressive sharpening), then keeps it at 2/η, where a quadratic would start to
diverge. Cohen et al. (2021, arXiv:2103.00065); with momentum b the edge is (2 + 2b)/η,
for Adam, of the preconditioned Hessian, (2 + 2b)/((1 - b) η) (arXiv:2207.14484).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._claims_landscape_runs import (
    Course,
    cross_entropy,
    digits,
    follow,
    squared_error,
    tanh_network,
)
from basinax.benchmarks._table import Table, short
from basinax.landscape import adam_diagonal, edge_of_stability
from basinax.landscape.metrics import Preconditioner

SIZES = (64, 40, 40, 10)
EXAMPLES = 400
LOW, HIGH = 0.95, 1.1  # of the edge, for the median after the crossing
EVERY, PRODUCTS = 50, 8
# Of the first three starts the one that sharpens fastest: at the rate 0.2 it takes 2450
# steps to the edge, the others 5850 and more than 12,000. All count in the longer part.
SEED = 1


class Walker(NamedTuple):
    """A full-batch method and where its edge is."""

    name: str
    tx: optax.GradientTransformation
    rate: float
    steps: int
    momentum: float = 0.0
    ema: bool = False
    loss: str = "squared error"
    preconditioner: Preconditioner | None = None
    control: bool = False
    """Whether the edge is not expected to hold it."""

    @property
    def threshold(self) -> float:
        """The largest stable sharpness."""
        one = edge_of_stability(1.0, self.rate, self.momentum, ema=self.ema)
        return 1.0 / float(one)


def _descent(rate: float, steps: int) -> Walker:
    return Walker(f"GD {rate:g}", optax.sgd(rate), rate, steps)


def walkers(length: int = 1) -> tuple[Walker, ...]:
    """List the methods; the slowest to sharpen walk ``length`` times as far."""
    b = 0.9

    def divisor(seen: Any) -> Any:
        return adam_diagonal(seen.extra["opt_state"], seen.updates)

    return (
        _descent(0.4, 3000),
        _descent(0.2, 6000 * length),
        _descent(0.1, 6000 * length),
        Walker("momentum 0.6", optax.sgd(0.6, b), 0.6, 2000, b),
        Walker(
            "Adam 0.002",
            optax.adam(2e-3, b1=b),
            2e-3,
            3000,
            b,
            ema=True,
            preconditioner=divisor,
        ),
        Walker(
            "GD 0.4, cross-entropy",
            optax.sgd(0.4),
            0.4,
            3000,
            loss="cross-entropy",
            control=True,
        ),
    )


def assess(course: Course, threshold: float) -> dict[str, Any]:
    """Say when a run crosses the edge and where it stays from then on.

    Returns:
      ``crossed_at``: first looked-at step on or above the edge, or None;
      ``median``, ``low``, ``high``: of λ over the edge in the last quarter of the run,
      or in what follows the crossing if that is shorter;
      ``rising``: whether the last quarter is sharper than the one before.
    """
    ratio = np.asarray(course.sharpness, np.float64) / threshold
    quarter = max(1, len(ratio) // 4)
    above = np.flatnonzero(ratio >= 1.0)
    crossed = int(above[0]) if len(above) else None
    after = ratio[max(len(ratio) - quarter, crossed or 0) :]
    return {
        "threshold": threshold,
        "start": float(ratio[0]),
        "crossed_at": None if crossed is None else int(course.step[crossed]),
        "median": float(np.median(after)),
        "low": float(np.min(after)),
        "high": float(np.max(after)),
        "rising": bool(
            np.median(ratio[-quarter:]) > np.median(ratio[-2 * quarter : -quarter])
        ),
        "final_loss": float(course.loss[-1]),
        "course": course._asdict(),
    }


def on_edge(run: dict[str, Any]) -> bool | None:
    """Say whether a run stays on the edge; None if it is still on its way there."""
    if run["crossed_at"] is None and run["rising"] and run["median"] < 1:
        return None
    return run["crossed_at"] is not None and LOW <= run["median"] <= HIGH


def _where(run: dict[str, Any]) -> str:
    return f"{run['median']:.3f} ({run['low']:.3f} to {run['high']:.3f})"


def edges(
    say: Say = lambda _: None,
    *,
    contestants: Sequence[Walker] | None = None,
    seeds: Sequence[int] = (SEED,),
    every: int = EVERY,
) -> Finding:
    """Train with full-batch methods and hold their sharpness against their edges."""
    contestants = walkers() if contestants is None else contestants
    batch = digits(EXAMPLES, centred=True)
    network = tanh_network(SIZES)
    losses = {
        "squared error": squared_error(network.apply),
        "cross-entropy": cross_entropy(network.apply),
    }
    runs: dict[str, Any] = {}
    for walker in contestants:
        seen = []
        for seed in seeds:
            say(f"{walker.name}, seed {seed}")
            course = follow(
                losses[walker.loss],
                walker.tx,
                network.init(jax.random.key(seed)),
                batch,
                steps=walker.steps,
                every=every,
                products=PRODUCTS,
                preconditioner=walker.preconditioner,
            )
            seen.append(assess(course, walker.threshold))
        runs[walker.name] = {"control": walker.control, "seeds": seen}

    tested = {n: r["seeds"] for n, r in runs.items() if not r["control"]}
    controls = {n: r["seeds"] for n, r in runs.items() if r["control"]}
    answers = [on_edge(run) for each in tested.values() for run in each]
    decided = [answer for answer in answers if answer is not None]

    def told(each: Sequence[dict[str, Any]]) -> str:
        return ", ".join(
            _where(run) + ("" if on_edge(run) is not None else " and rising")
            for run in each
        )

    return Finding(
        claim="Full-batch training on squared error sharpens up to the edge of "
        "stability of its step size and stays there.",
        verdict="holds"
        if decided and all(decided)
        else "mixed"
        if any(decided)
        else "does not hold",
        evidence="Median (range) of the sharpness over its edge, late in the run: "
        + "; ".join(f"{name}: {told(each)}" for name, each in tested.items())
        + "."
        + (
            f" Still on the way and not counted: {len(answers) - len(decided)} of "
            f"{len(answers)} runs."
            if len(decided) < len(answers)
            else ""
        ),
        control="; ".join(f"{name}: {told(each)}" for name, each in controls.items())
        + ". With cross-entropy the curvature falls with the loss, so a late look "
        "shows nothing of the edge.",
        numbers={"every": every, "seeds": list(seeds), "runs": runs},
        table=Table(
            f"Sharpness over its edge, 64-40-40-10 tanh, {EXAMPLES} digits, all at "
            "once",
            ("method", "seed", "edge", "start", "crosses at", "late median", "range"),
            tuple(
                (
                    name,
                    str(seed),
                    short(found["threshold"]),
                    f"{found['start']:.2f}",
                    "–" if found["crossed_at"] is None else str(found["crossed_at"]),
                    f"{found['median']:.3f}" + ("↑" if on_edge(found) is None else ""),
                    f"{found['low']:.3f} to {found['high']:.3f}",
                )
                for name, run in runs.items()
                for seed, found in zip(seeds, run["seeds"], strict=True)
            ),
            (
                "Edge: largest stable eigenvalue, 2/η for gradient descent, (2 + 2b)/η "
                "with momentum b = 0.9,",
                "(2 + 2b)/((1 - b) η) of the preconditioned Hessian for Adam. Start "
                "and late median are in units of it.",
                f"Late: the last quarter of the run. Looked at every {every} steps; "
                f"{PRODUCTS} products each. ↑ still rising.",
            ),
        ),
    )
