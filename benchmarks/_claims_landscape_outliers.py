"""As many large Hessian eigenvalues as classes, less one.

Near a minimum of a classifier most eigenvalues of the Hessian of its training loss are
close to zero, and a few stand apart. Sagun et al. (2017, arXiv:1706.04454) count about
as many of those as there are classes; Papyan (2020, arXiv:2008.11865) explains them by
the class means. Where they end is read off the largest ratio of neighbours.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._claims_landscape_runs import (
    cross_entropy,
    descend,
    digits,
    tanh_network,
)
from basinax.benchmarks._models import count
from basinax.benchmarks._table import Table, short
from basinax.landscape import dense, eigenpairs, hessian

RATE = 3e-3
FEW = 4  # classes below which C - 1 is too small a number to tell apart
CANDIDATES = 20  # outliers to look for at most
BULK = 0.01  # of the largest eigenvalue


def gaps(values: np.ndarray) -> np.ndarray:
    """Return λ_k / λ_{k+1} for k = 1, 2, ... while both are positive.

    Args:
      values: eigenvalues, largest first.
    """
    values = np.asarray(values, np.float64)
    positive = values[values > 0][: CANDIDATES + 1]
    return positive[:-1] / positive[1:]


def count_outliers(values: np.ndarray) -> int:
    """Return the k of the largest ratio λ_k / λ_{k+1}, 0 if there is none."""
    ratios = gaps(values)
    return int(np.argmax(ratios)) + 1 if len(ratios) else 0


def top(operator: Any, like: Any, key: jax.Array) -> np.ndarray:
    """Return the largest eigenvalues, enough of them to see the largest gap."""
    wanted = min(CANDIDATES + 1, count(like))
    found = eigenpairs(operator, like, wanted, key=key, max_matvecs=400)
    return np.asarray(found.values, np.float64)


def _measure(
    classes: int, *, examples: int, width: int, steps: int, seeds: Sequence[int]
) -> dict[str, Any]:
    """Train on some classes; exact spectrum of one seed, the top of the others."""
    batch = digits(examples, classes)
    network = tanh_network((batch[0].shape[1], width, classes))
    loss = cross_entropy(network.apply)
    counted, untrained, losses = [], [], []
    spectrum = np.empty(0)
    for seed in seeds:
        start = network.init(jax.random.key(seed))
        params = descend(loss, optax.adam(RATE), start, batch, steps=steps)
        losses.append(float(loss(params, batch)))
        operator = hessian(loss, params, batch, linearize=True)
        key = jax.random.key(seed)
        if seed == seeds[0]:
            matrix = np.asarray(dense(operator, params), np.float64)
            spectrum = np.linalg.eigvalsh(0.5 * (matrix + matrix.T))[::-1]
            values = spectrum
        else:
            values = top(operator, params, key)
        counted.append(count_outliers(values))
        before = hessian(loss, start, batch, linearize=True)
        untrained.append(count_outliers(top(before, start, key)))
    ratios = gaps(spectrum)
    at = counted[0] - 1
    return {
        "classes": classes,
        "parameters": len(spectrum),
        "train_loss": losses,
        "outliers": counted,
        "outliers_untrained": untrained,
        "gap": float(ratios[at]),
        "gap_after_classes_less_one": float(ratios[classes - 2]),
        "next_gap": float(np.max(np.delete(ratios, at))),
        "small_share": float(np.mean(np.abs(spectrum) < BULK * spectrum[0])),
        "largest": spectrum[: CANDIDATES + 1],
        "smallest": float(spectrum[-1]),
    }


def outliers(
    say: Say = lambda _: None,
    *,
    classes: Sequence[int] = (2, 3, 5, 8, 10),
    examples: int = 600,
    width: int = 32,
    steps: int = 150,
    seeds: Sequence[int] = (0, 1, 2),
) -> Finding:
    """Count the outliers of the Hessian for different numbers of classes."""
    runs = {}
    for number in classes:
        say(f"{number} classes")
        runs[str(number)] = _measure(
            number, examples=examples, width=width, steps=steps, seeds=seeds
        )

    def right(run: dict[str, Any], key: str = "outliers") -> list[bool]:
        return [found == run["classes"] - 1 for found in run[key]]

    many = [run for run in runs.values() if run["classes"] >= FEW]
    few = [run for run in runs.values() if run["classes"] < FEW]
    hits = [hit for run in many for hit in right(run)]
    untrained = [hit for run in many for hit in right(run, "outliers_untrained")]

    def listed(chosen: Sequence[dict[str, Any]]) -> str:
        return "; ".join(
            f"{run['classes']} classes: {', '.join(map(str, run['outliers']))}"
            for run in chosen
        )

    shares = [run["small_share"] for run in runs.values()]
    return Finding(
        claim="A trained classifier has one Hessian outlier less than it has classes, "
        "and a bulk near zero.",
        verdict="holds"
        if hits and all(hits)
        else "mixed"
        if any(hits)
        else "does not hold",
        evidence=f"Outliers by the largest gap, one number per seed: {listed(many)}. "
        f"{min(shares):.0%} to {max(shares):.0%} of all eigenvalues are below "
        f"{BULK:.0%} of the largest in size."
        + (f" Not counted, as the gaps are less clear: {listed(few)}." if few else ""),
        control=f"Before training the same count is right {sum(untrained)} of "
        f"{len(untrained)} times; after, {sum(hits)} of {len(hits)}.",
        numbers={"learning_rate": RATE, "steps": steps, "runs": runs},
        table=Table(
            "Outliers of the Hessian of the training loss",
            ("classes", "parameters", "outliers", "gap", "next gap", "untrained"),
            tuple(
                (
                    name,
                    f"{run['parameters']:,}",
                    ", ".join(map(str, run["outliers"])),
                    short(run["gap"]),
                    short(run["next_gap"]),
                    ", ".join(map(str, run["outliers_untrained"])),
                )
                for name, run in runs.items()
            ),
            (
                f"{examples} digits, 64-{width}-C tanh, Adam at {RATE:g} for {steps} "
                "steps on all examples; one count per seed.",
                "Gap: largest ratio of neighbouring eigenvalues among the first "
                f"{CANDIDATES}, of the exact spectrum of the first seed.",
            ),
        ),
    )
