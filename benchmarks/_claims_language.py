"""The language-model claim of SPECTRA (arXiv:2603.14315), at a size that fits a laptop.

The paper reports a lower held-out loss over the base optimizer, a larger usable
learning rate and smaller weights.  Each of the three is answered by itself, whichever
way it comes out.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from basinax.benchmarks import _tasks
from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._optimizers import OPTIMIZERS
from basinax.benchmarks._results import summary
from basinax.benchmarks._table import Table, spread
from basinax.benchmarks._tasks import Options
from basinax.benchmarks._train import Plan, make_trainer, train

LANGUAGE_MODEL_RATES = {
    "adamw": (3e-4, 1e-3, 3e-3),
    "spectra_adamw": (3e-3, 1e-2, 3e-2),
    "signum": (3e-4, 1e-3, 3e-3),
    "spectra_signum": (3e-3, 1e-2, 3e-2),
}


def _improves(
    numbers: dict[str, dict[str, Any]], key: str, sign: int
) -> dict[str, bool]:
    """Say for each base whether SPECTRA moves a number in the claimed direction."""

    def mean(name: str) -> float:
        value = numbers[name][key]
        return value["mean"] if isinstance(value, dict) else value

    return {
        base: sign * (mean(f"spectra_{base}") - mean(base)) > 0
        for base in ("adamw", "signum")
    }


def language_model(
    say: Say = lambda _: None,
    *,
    steps: int = 250,
    seeds: Sequence[int] = (0, 1),
    options: Options | None = None,
) -> Finding:
    """Train a small byte-level model with and without SPECTRA at three rates each."""
    if options is None:
        options = Options(width=128, depth=2, sequence=64, batch_size=16)
    task = _tasks.load("bytes", options)
    plan = Plan.of(steps, task.defaults.threshold)
    numbers: dict[str, Any] = {}
    for name, rates in LANGUAGE_MODEL_RATES.items():
        trainer = make_trainer(task, OPTIMIZERS[name], plan)
        by_rate = []
        for rate in rates:
            say(f"{name} at {rate:g}")
            runs = [train(task, trainer, plan, seed, rate) for seed in seeds]
            squares = [
                sum(float(jnp.sum(w**2)) for w in jax.tree.leaves(run.params))
                for run in runs
            ]
            by_rate.append(
                {
                    "learning_rate": rate,
                    "validation_loss": summary(
                        [float(r.final.validation.loss) for r in runs]
                    ),
                    "test_loss": summary([float(r.final.test.loss) for r in runs]),
                    "weight_norm": summary([square**0.5 for square in squares]),
                    "max_weight_norm": summary(
                        [float(np.max(r.records.weight_norm)) for r in runs]
                    ),
                    "max_step_norm": summary(
                        [float(np.max(r.records.update_norm)) for r in runs]
                    ),
                }
            )
        index = min(
            range(len(rates)),
            key=lambda i: by_rate[i]["validation_loss"]["mean"] or np.inf,
        )
        numbers[name] = {
            **by_rate[index],
            "at_grid_end": index in (0, len(rates) - 1),
            "rates": by_rate,
        }
    gains = {
        base: numbers[base]["test_loss"]["mean"]
        - numbers[f"spectra_{base}"]["test_loss"]["mean"]
        for base in ("adamw", "signum")
    }
    statements = {
        "lower test loss": _improves(numbers, "test_loss", -1),
        "larger learning rate": _improves(numbers, "learning_rate", 1),
        "smaller total weight norm": _improves(numbers, "weight_norm", -1),
        "smaller largest weight matrix": _improves(numbers, "max_weight_norm", -1),
    }
    answers = [a for found in statements.values() for a in found.values()]
    rows = tuple(
        (
            name,
            f"{n['learning_rate']:g}" + ("†" if n["at_grid_end"] else ""),
            spread(n["test_loss"]),
            spread(n["weight_norm"]),
            spread(n["max_weight_norm"]),
            spread(n["max_step_norm"]),
        )
        for name, n in numbers.items()
    )
    return Finding(
        claim="SPECTRA lowers the held-out loss of a language model over its base "
        "optimizer, with a larger learning rate and smaller weights.",
        verdict="holds"
        if all(answers)
        else "mixed"
        if any(answers)
        else "does not hold",
        evidence="Test loss gained: "
        + ", ".join(f"{base} {gain:+.3f} nats" for base, gain in gains.items())
        + ". "
        + ". ".join(
            f"{statement.capitalize()}: "
            + ", ".join(f"{base} {'yes' if a else 'NO'}" for base, a in found.items())
            for statement, found in statements.items()
        )
        + f". {len(seeds)} seeds, {steps} steps, {task.details['parameters']:,} "
        "parameters, far below the scale of the paper.",
        control="The base optimizers, same budget and same number of learning rates.",
        numbers={
            "steps": steps,
            "seeds": list(seeds),
            "runs": numbers,
            "gains": gains,
            "statements": statements,
        },
        table=Table(
            "Byte-level language model at the best of three learning rates",
            ("optimizer", "lr", "test loss", "|W| total", "max |W|2", "max step"),
            rows,
            (
                "Mean ± sd over seeds; |W| total is the Frobenius norm of all "
                "parameters at the end; † best rate at an end of its grid.",
            ),
        ),
    )
