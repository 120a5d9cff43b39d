"""Sharpness against the generalization gap, over a grid of small models.

That flat minima generalize better is an old idea with many measures of flatness.
Whether a measure orders models as their gap does is asked with Kendall's tau, as by
Jiang et al. (2020, arXiv:1912.02178), also between models that differ in one setting
only; Andriushchenko et al. (2023, arXiv:2302.07011) find that the answer depends on the
setting. All models train to the same loss, so that the loss cannot stand in for them.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import kendalltau

from basinax.benchmarks import _tasks
from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._claims_landscape_runs import (
    Loss,
    cross_entropy,
    tanh_network,
)
from basinax.benchmarks._models import Functional
from basinax.benchmarks._results import summary
from basinax.benchmarks._table import Table, spread
from basinax.benchmarks._tasks import Batch, Params
from basinax.landscape import (
    average_sharpness,
    eigenpairs,
    fisher_rao_norm,
    gauss_newton,
    gradient_norm,
    hessian,
    relative_flatness,
    sam_sharpness,
    trace,
    worst_case_sharpness,
)

TARGET = 0.03  # training loss at which every model stops
FITTED = 0.99  # share of the training digits that it has to have right
CHUNK = 5  # steps between looks at the training loss
RESAMPLES = 2000
RHO, ADAPTIVE_RHO, NOISE = 0.1, 0.5, 0.05
SHARPNESS = (
    "λmax",
    "trace",
    "SAM, one step",
    "worst case, adaptive",
    "average case, adaptive",
    "Fisher-Rao norm",
    "relative flatness",
    "gradient norm",
)
OTHERS = ("weight norm", "steps to fit")


class Setting(NamedTuple):
    """How one model is trained."""

    rate: float
    batch_size: int
    width: int
    weight_decay: float


class Grid(NamedTuple):
    """Settings to combine with one another."""

    rates: tuple[float, ...] = (2e-3, 5e-3, 1.5e-2)
    batch_sizes: tuple[int, ...] = (16, 64, 256)
    widths: tuple[int, ...] = (32, 128)
    weight_decays: tuple[float, ...] = (0.0, 0.1)


def train(
    network: Functional,
    loss: Loss,
    settings: Sequence[Setting],
    data: Batch,
    *,
    steps: int,
    seed: int,
    target: float = TARGET,
) -> tuple[Params, np.ndarray, np.ndarray]:
    """Train models that differ in rate and decay only, until each reaches the target.

    Returns:
      Parameters with a leading axis of models, their training losses, and the steps
      they took.
    """
    (size,) = {setting.batch_size for setting in settings}
    start = network.init(jax.random.key(seed))

    def run(rate: jax.Array, decay: jax.Array, data: Batch) -> tuple[Any, ...]:
        tx = optax.adamw(rate, weight_decay=decay)

        def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            rows = jax.random.randint(key, (size,), 0, len(data[1]))
            grads = jax.grad(loss)(params, (data[0][rows], data[1][rows]))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def chunk(carry: tuple[Any, ...], keys: jax.Array) -> tuple[Any, None]:
            pair, reached, count = carry
            moved, _ = jax.lax.scan(step, pair, keys)
            done = reached <= target
            pair = jax.tree.map(lambda old, new: jnp.where(done, old, new), pair, moved)
            return (pair, loss(pair[0], data), count + jnp.where(done, 0, CHUNK)), None

        keys = jax.random.split(jax.random.key(seed), (steps // CHUNK, CHUNK))
        carry = (start, tx.init(start)), loss(start, data), 0
        (pair, reached, count), _ = jax.lax.scan(chunk, carry, keys)
        return pair[0], reached, count

    rates = jnp.array([setting.rate for setting in settings])
    decays = jnp.array([setting.weight_decay for setting in settings])
    params, reached, count = jax.jit(jax.vmap(run, (0, 0, None)))(rates, decays, data)
    return params, *jax.device_get((reached, count))


def measure(
    network: Functional, loss: Loss, params: Params, data: Batch
) -> dict[str, float]:
    """Take every measure of one model on its training data."""
    operator = hessian(loss, params, data, linearize=True)
    key = jax.random.key(0)
    square = gauss_newton(network.apply, "cross_entropy", params, data[0])

    def last(params: Params) -> jax.Array:
        return params[-1]["kernel"]

    found = {
        "λmax": eigenpairs(operator, params, 1, key=key, tol=1e-2).values[0],
        "trace": trace(operator, params, key=key, num_probes=60, method="xtrace").value,
        "SAM, one step": sam_sharpness(loss, params, data, rho=RHO),
        "worst case, adaptive": worst_case_sharpness(
            loss, params, data, rho=ADAPTIVE_RHO, adaptive=True
        ),
        "average case, adaptive": average_sharpness(
            loss, params, data, rho=NOISE, key=key, num_draws=20, adaptive=True
        ).value,
        "Fisher-Rao norm": fisher_rao_norm(square, params),
        "relative flatness": relative_flatness(
            operator, params, last, num_probes=60, key=key
        ).value,
        "gradient norm": gradient_norm(loss, params, data),
        "weight norm": optax.tree.norm(params),
    }
    return {name: float(value) for name, value in found.items()}


def tau_interval(
    x: np.ndarray, y: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, float]:
    """Return Kendall's tau-b, its p-value and a 95 % bootstrap interval over models."""
    found: Any = kendalltau(x, y)
    tau, p = found.statistic, found.pvalue
    rows = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    a, b = (
        np.sign(drawn[:, :, None] - drawn[:, None, :]) for drawn in (x[rows], y[rows])
    )
    scale = np.sqrt(np.sum(a**2, axis=(1, 2)) * np.sum(b**2, axis=(1, 2)))
    # A sample of equal values orders nothing.
    taus = np.sum(a * b, axis=(1, 2)) / np.where(scale > 0, scale, 1.0)
    low, high = np.percentile(taus, [2.5, 97.5])
    return {"tau": float(tau), "p": float(p), "low": float(low), "high": float(high)}


def one_setting_tau(
    settings: Sequence[Setting], x: np.ndarray, y: np.ndarray
) -> float | None:
    """Average the agreement of pairs of models that differ in one setting only.

    The mean is over pairs for each setting, then over the settings that vary: what is
    left when a measure merely recognises, say, the width.
    """
    agreement: dict[int, list[float]] = {}
    for i, j in itertools.combinations(range(len(settings)), 2):
        pairs = zip(settings[i], settings[j], strict=True)
        differ = [axis for axis, (a, b) in enumerate(pairs) if a != b]
        if len(differ) == 1:
            agree = float(np.sign((x[i] - x[j]) * (y[i] - y[j])))
            agreement.setdefault(differ[0], []).append(agree)
    if not agreement:
        return None
    return float(np.mean([np.mean(found) for found in agreement.values()]))


def judge(taus: Sequence[dict[str, Any]]) -> str:
    """Hold if every interval is above zero, not at all if none is."""
    above = [found["low"] > 0 for found in taus]
    return "holds" if all(above) else "mixed" if any(above) else "does not hold"


def collect(
    grid: Grid, *, steps: int, examples: int | None, say: Say
) -> tuple[list[Setting], list[dict[str, float]], int]:
    """Train and measure the grid; return what fitted, and how many did not."""
    task = _tasks.load("digits")
    train_data = task.data[0][:examples], task.data[1][:examples]
    held = [split for split in (task.splits.validation, task.splits.test)]

    def joined(part: int) -> jax.Array:
        rows = [split[part].reshape(-1, *split[part].shape[2:]) for split in held]
        return jnp.concatenate(rows)

    held_data = joined(0), joined(1)
    settings, rows, missed = [], [], 0
    for width in grid.widths:
        network = tanh_network((train_data[0].shape[1], width, width, 10))
        loss = cross_entropy(network.apply)

        @jax.jit
        def accuracy(params: Params, data: Batch, network: Functional = network) -> Any:
            hits = jnp.argmax(network.apply(params, data[0]), axis=1) == data[1]
            return jnp.mean(hits.astype(jnp.float32))

        for size in grid.batch_sizes:
            say(f"width {width}, batch {size}")
            cell = [
                Setting(rate, size, width, decay)
                for rate, decay in itertools.product(grid.rates, grid.weight_decays)
            ]
            stacked, losses, count = train(
                network, loss, cell, train_data, steps=steps, seed=0
            )
            for index, setting in enumerate(cell):
                params = jax.tree.map(lambda leaf, i=index: leaf[i], stacked)
                fitted = float(accuracy(params, train_data))
                reached = float(losses[index])
                if not (fitted >= FITTED and reached <= TARGET):
                    missed += 1
                    continue
                settings.append(setting)
                rows.append(
                    {
                        **measure(network, loss, params, train_data),
                        "steps to fit": float(count[index]),
                        "train_loss": reached,
                        "train_accuracy": fitted,
                        "loss_gap": float(loss(params, held_data)) - reached,
                        "error_gap": fitted - float(accuracy(params, held_data)),
                    }
                )
    return settings, rows, missed


def generalization(
    say: Say = lambda _: None,
    *,
    grid: Grid | None = None,
    steps: int = 600,
    examples: int | None = None,
) -> Finding:
    """Correlate sharpness measures with the generalization gap."""
    settings, rows, missed = collect(
        grid or Grid(), steps=steps, examples=examples, say=say
    )
    if len(rows) < 3:
        raise ValueError(f"{len(rows)} of {len(rows) + missed} models fitted: too few")
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    gap = columns["loss_gap"]
    found: dict[str, dict[str, Any]] = {}
    for name in (*SHARPNESS, *OTHERS):
        found[name] = {
            **tau_interval(columns[name], gap),
            "one_setting": one_setting_tau(settings, columns[name], gap),
            "error_gap": tau_interval(columns[name], columns["error_gap"]),
        }

    def told(names: Sequence[str]) -> str:
        return ", ".join(
            f"{n} {found[n]['tau']:+.2f} ({found[n]['low']:+.2f} to "
            f"{found[n]['high']:+.2f})"
            for n in names
        )

    return Finding(
        claim="The flatter a model that fits its training data, the smaller its "
        "generalization gap, whichever measure of sharpness is taken.",
        verdict=judge([found[name] for name in SHARPNESS]),
        evidence=f"Kendall's tau with the gap of the loss over {len(rows)} models (95 "
        f"% bootstrap interval): {told(SHARPNESS)}.",
        control=f"What is no measure of sharpness: {told(OTHERS)}.",
        numbers={
            "taus": found,
            "settings": [setting._asdict() for setting in settings],
            "models": rows,
            "not_fitted": missed,
        },
        table=_table(found, rows, columns, missed),
    )


def _table(
    found: dict[str, dict[str, Any]],
    rows: Sequence[dict[str, float]],
    columns: dict[str, np.ndarray],
    missed: int,
) -> Table:
    def cells(name: str) -> tuple[str, ...]:
        tau, error = found[name], found[name]["error_gap"]
        single = tau["one_setting"]
        return (
            name,
            spread(summary(columns[name].tolist())),
            f"{tau['tau']:+.2f}",
            f"{tau['low']:+.2f} to {tau['high']:+.2f}",
            f"{tau['p']:.1g}",
            "–" if single is None else f"{single:+.2f}",
            f"{error['tau']:+.2f}",
        )

    losses = [row["train_loss"] for row in rows]
    return Table(
        "Agreement with the generalization gap over models",
        (
            "measure",
            "values",
            "tau",
            "95 % interval",
            "p",
            "one setting",
            "errors",
        ),
        tuple(cells(name) for name in found),
        (
            f"{len(rows)} digits models, 64-w-w-10 tanh by AdamW: learning rate × "
            "batch size × width × weight decay; trained to a loss of "
            f"{TARGET:g} (reached {min(losses):.3f} to {max(losses):.3f})"
            + (f", {missed} more did not fit." if missed else "."),
            "Values: mean ± sd over the models. Tau with held-out minus training loss, "
            f"which is {spread(summary(columns['loss_gap'].tolist()))}.",
            "One setting: agreement between models that differ in one setting only. "
            "Errors: tau with the gap in accuracy.",
        ),
    )
