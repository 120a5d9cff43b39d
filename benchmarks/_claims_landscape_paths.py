"""Two minima, a hill on the straight line between them, and a bend around it.

Networks that were trained from different starts are separated by a barrier on the
straight line, yet curves of low loss join them (Garipov et al. 2018, arXiv:1802.10026;
Draxler et al. 2018, arXiv:1803.00885). A curve is found on training batches with one
control point; test loss along it is measured only afterwards.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._claims_landscape_runs import (
    Loss,
    cross_entropy,
    tanh_network,
)
from basinax.benchmarks._digits import read_embedded
from basinax.benchmarks._figures import tidy
from basinax.benchmarks._models import Functional
from basinax.benchmarks._table import Table, short
from basinax.benchmarks._tasks import Batch, Params
from basinax.landscape import barrier, bezier_path, cka, linear_path

RATE, BATCH = 3e-3, 64
LOW = 0.1  # of the barrier on the straight line
SPLITS = ("train", "test")
KINDS = {"straight line": None, "Bezier curve": "bezier", "polygon": "polygon"}
STRAIGHT, CURVE = "straight line", "Bezier curve"
# Okabe and Ito's colours.
COLOURS = {STRAIGHT: "#D55E00", CURVE: "#0072B2", "polygon": "#009E73"}
INK = "#333333"


def data() -> dict[str, Batch]:
    """Return digits of the training and test writers, scaled by the former."""
    train, _, test = read_embedded()
    mean, scale = train.inputs.mean(), train.inputs.std()
    return {
        name: (jnp.asarray((part.inputs - mean) / scale), jnp.asarray(part.labels))
        for name, part in zip(SPLITS, (train, test), strict=True)
    }


def batches(batch: Batch) -> list[Batch]:
    """Cut examples into full batches."""
    inputs, labels = batch
    ends = range(BATCH, len(labels) + 1, BATCH)
    return [(inputs[end - BATCH : end], labels[end - BATCH : end]) for end in ends]


@partial(jax.jit, static_argnums=0)
def _fit(loss: Loss, params: Params, order: jax.Array, batch: Batch) -> Params:
    steps = len(order)
    tx = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def step(carry: tuple[Any, Any], rows: jax.Array) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[rows], batch))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), order)[0][0]


def fit(loss: Loss, params: Params, seed: int, batch: Batch, steps: int) -> Params:
    """Train with Adam on shuffled batches, the order of which the seed decides."""
    rng = np.random.default_rng(seed)
    examples, full = len(batch[1]), len(batch[1]) // BATCH
    epochs = [
        rng.permutation(examples)[: full * BATCH].reshape(full, BATCH)
        for _ in range(-(-steps // full))
    ]
    return _fit(loss, params, jnp.asarray(np.concatenate(epochs)[:steps]), batch)


def hidden(network: Functional, params: Params, inputs: jax.Array) -> jax.Array:
    """Return what the last hidden layer of a tanh network says."""
    return jnp.tanh(network.apply(params[:-1], inputs))


def measure(
    seed: int, *, width: int, steps: int, search: int, positions: int
) -> dict[str, Any]:
    """Train two networks and follow three paths from one to the other."""
    sets = data()
    network = tanh_network((sets["train"][0].shape[1], width, width, 10))
    loss = cross_entropy(network.apply)
    starts = [network.init(jax.random.key(2 * seed + side)) for side in (0, 1)]
    train = partial(fit, loss, batch=sets["train"], steps=steps)
    a, b = (train(start, 2 * seed + i) for i, start in enumerate(starts))
    sibling = train(starts[0], 2 * seed + 1)

    t = np.linspace(0, 1, positions)
    paths: dict[str, dict[str, Any]] = {}
    for name, kind in KINDS.items():
        along: Any = partial(linear_path, loss, a, b, positions=t)
        if kind is not None:
            found = bezier_path(
                lambda params, *batch: loss(params, batch),
                a,
                b,
                key=jax.random.key(seed),
                kind=kind,
                num_steps=search,
                batches=batches(sets["train"]),
                positions=t[:1],
            )
            along = partial(
                bezier_path,
                loss,
                a,
                b,
                positions=t,
                kind=kind,
                control=found.control,
                num_steps=0,
            )
        paths[name] = {}
        for split, batch in sets.items():
            path = along(batch)
            paths[name][split] = {
                "losses": np.asarray(path.losses),
                **{key: float(x) for key, x in barrier(path)._asdict().items()},
            }
    same = barrier(linear_path(loss, a, sibling, sets["train"], positions=t))
    inputs = sets["test"][0]

    def alike(one: Params, other: Params) -> float:
        x, y = (hidden(network, params, inputs) for params in (one, other))
        return float(cka(x, y, unbiased=True))

    return {
        "positions": t,
        "paths": paths,
        "same_start": float(same.height),
        "cka": alike(a, b),
        "cka_untrained": alike(*starts),
    }


def low(run: dict[str, Any], path: str, split: str) -> bool:
    """Tell whether a path's barrier is below `LOW` of the straight line's."""
    return (
        run["paths"][path][split]["height"]
        < LOW * run["paths"][STRAIGHT][split]["height"]
    )


def judge(runs: Sequence[dict[str, Any]]) -> str:
    """Return the verdict: low on both splits, on some of them, or on none."""
    hits = [low(run, CURVE, split) for run in runs for split in SPLITS]
    return "holds" if all(hits) else "mixed" if any(hits) else "does not hold"


def paths(
    say: Say = lambda _: None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    width: int = 64,
    steps: int = 450,
    search: int = 1000,
    positions: int = 41,
) -> Finding:
    """Compare straight and curved paths between pairs of minima."""
    runs = []
    for seed in seeds:
        say(f"pair {seed + 1}")
        runs.append(
            measure(seed, width=width, steps=steps, search=search, positions=positions)
        )

    def listed(path: str, split: str, key: str = "height") -> str:
        return ", ".join(short(run["paths"][path][split][key]) for run in runs)

    def each(key: str) -> str:
        return ", ".join(short(run[key]) for run in runs)

    return Finding(
        claim="Minima that a barrier separates on the straight line are joined by a "
        "curve with less than a tenth of it.",
        verdict=judge(runs),
        evidence=f"Barrier of the training loss, one number per pair of minima: "
        f"{listed(STRAIGHT, 'train')} nats on the straight line, "
        f"{listed(CURVE, 'train')} on the Bezier curve, {listed('polygon', 'train')} "
        f"on the polygon; of the test loss {listed(STRAIGHT, 'test')}, "
        f"{listed(CURVE, 'test')} and {listed('polygon', 'test')}. No hidden units "
        "were permuted.",
        control="Minima from the same start, with other orders of batches, have "
        f"straight barriers of {each('same_start')}. The barrier does not mean other "
        f"features: unbiased CKA of the last hidden layers is {each('cka')} for the "
        f"pairs, and {each('cka_untrained')} before training.",
        numbers={
            "learning_rate": RATE,
            "batch_size": BATCH,
            "steps": steps,
            "search_steps": search,
            "width": width,
            "runs": runs,
        },
        table=Table(
            "Barriers between minima, nats",
            ("path", "train", "test", "mc train", "mc test"),
            tuple(
                (
                    name,
                    *(listed(name, split) for split in SPLITS),
                    *(listed(name, split, "mode_connectivity") for split in SPLITS),
                )
                for name in KINDS
            ),
            (
                f"Digits, 64-{width}-{width}-10 tanh, Adam at {RATE:g}, {steps} steps "
                f"of {BATCH}; curves found in {search} steps on training batches.",
                "A barrier of 0: nowhere above the interpolated losses of the ends.",
                "mc: mean loss of both ends less the loss where it differs most from "
                "it; negative for a barrier.",
            ),
        ),
    )


def draw(axis: Axes, finding: Finding) -> None:
    """Draw the losses along all paths; the first pair full, others thin."""
    for index, run in enumerate(finding.numbers["runs"]):
        t = np.asarray(run["positions"], np.float64)
        for name, colour in COLOURS.items():
            for split, dash in zip(SPLITS, ("-", (0, (4, 1.5))), strict=True):
                axis.plot(
                    t,
                    np.asarray(run["paths"][name][split]["losses"], np.float64),
                    color=colour,
                    linestyle=dash,
                    linewidth=0.7 if index else 1.6,
                    alpha=0.4 if index else 1.0,
                )
        if not index:
            for split in SPLITS:
                ends = np.asarray(run["paths"][STRAIGHT][split]["losses"])[[0, -1]]
                axis.plot([0, 1], ends, "o", color=INK, markersize=5, zorder=3)
    axis.set_yscale("log")
    tidy(axis, "Between two minima", "position on the path", "loss (nats)")
    keys = [Line2D([], [], color=c, label=name) for name, c in COLOURS.items()]
    keys.append(Line2D([], [], color=INK, label="train"))
    keys.append(Line2D([], [], color=INK, linestyle=(0, (4, 1.5)), label="test"))
    axis.legend(handles=keys, frameon=False, fontsize=8, ncols=2, loc="upper center")
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top * 8)  # room for the legend
