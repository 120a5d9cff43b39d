"""What a picture of a loss surface shows depends on its axes.

Along a unit eigenvector of the Hessian the loss curves by the eigenvalue. Along a
random unit vector it curves by tr(H) / P on average, P the number of parameters, and
the directions of most pictures are random, scaled filter by filter (Li et al. 2018,
arXiv:1712.09913). Curvatures are symmetric second differences of the loss itself,

    (L(w + t u) - 2 L(w) + L(w - t u)) / t²,

so they test directions and surfaces against the exact spectrum, which is found by other
means.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes

from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._claims_landscape_runs import (
    Loss,
    cross_entropy,
    descend,
    digits,
    tanh_network,
)
from basinax.benchmarks._figures import tidy
from basinax.benchmarks._table import Table, short
from basinax.benchmarks._tasks import Batch, Params
from basinax.landscape import (
    Plane,
    dense,
    eigen_directions,
    hessian,
    line,
    normalize_direction,
    plane,
    plots,
    random_directions,
)

RATE = 3e-3
CLOSE = 0.01  # relative error of a second difference that counts as agreement
FEWER = 10.0  # how many times smaller than the largest eigenvalue counts as flat
DEVIATIONS = 3.0  # standard errors that a mean may be off
STEEP_STEP, FLAT_STEP = 0.02, 0.1  # t: small for curvature to be local, or rounding
REACH = 3.0  # of the surfaces, as distance between parameters
AXES = {"hessian": "Hessian axes", "filter": "Random axes"}


def curvature(
    loss: Loss, params: Params, direction: Params, batch: Batch, step: float
) -> float:
    """Return the second difference of the loss along a direction."""
    found = line(loss, params, direction, batch, steps=[-step, 0.0, step])
    left, middle, right = np.asarray(found.losses, np.float64)
    return float((left - 2 * middle + right) / step**2)


def _unit(direction: Params, params: Params) -> Params:
    return normalize_direction(direction, params, None)


def _measure(
    *,
    seed: int,
    examples: int,
    width: int,
    steps: int,
    top: int,
    draws: int,
    side: int,
    trained: bool = True,
) -> dict[str, Any]:
    """Train one network; measure it along all kinds of axes."""
    batch = digits(examples)
    network = tanh_network((batch[0].shape[1], width, 10))
    loss = cross_entropy(network.apply)
    params = network.init(jax.random.key(seed))
    if trained:
        params = descend(loss, optax.adam(RATE), params, batch, steps=steps)
    operator = hessian(loss, params, batch, linearize=True)
    matrix = np.asarray(dense(operator, params), np.float64)
    spectrum = np.linalg.eigvalsh(0.5 * (matrix + matrix.T))[::-1]
    keys = jax.random.split(jax.random.key(seed), 3)
    steepest = eigen_directions(operator, params, top, key=keys[0])
    random = {
        "unit": random_directions(params, keys[1], None, num=draws),
        "filter": [
            _unit(d, params) for d in random_directions(params, keys[2], num=draws)
        ],
    }
    along = {
        name: [curvature(loss, params, d, batch, FLAT_STEP) for d in directions]
        for name, directions in random.items()
    }
    grid = np.linspace(-REACH, REACH, side)
    surfaces = {
        name: plane(loss, params, *axes[:2], batch, x=grid).losses
        for name, axes in (("hessian", steepest), ("filter", random["filter"]))
        if side
    }
    return {
        "train_loss": float(loss(params, batch)),
        "eigenvalues": spectrum[:top],
        "second_differences": [
            curvature(loss, params, d, batch, STEEP_STEP) for d in steepest
        ],
        "trace_over_parameters": float(spectrum.mean()),
        **{name: float(np.mean(found)) for name, found in along.items()},
        "unit_error": float(np.std(along["unit"], ddof=1) / draws**0.5),
        "grid": grid,
        "surfaces": {name: np.asarray(found) for name, found in surfaces.items()},
    }


def _judge(run: dict[str, Any]) -> dict[str, Any]:
    """Add what decides."""
    eigenvalues = np.asarray(run["eigenvalues"])
    errors = np.abs(np.asarray(run["second_differences"]) / eigenvalues - 1)
    off = abs(run["unit"] - run["trace_over_parameters"]) / run["unit_error"]
    ratio = float(eigenvalues[0] / max(run["filter"], 1e-12))
    return {
        **run,
        "largest_error": float(errors.max()),
        "deviations": float(off),
        "ratio": ratio,
        "holds": [
            bool(errors.max() <= CLOSE),
            bool(off <= DEVIATIONS),
            bool(ratio >= FEWER),
        ],
    }


def verdict(runs: Sequence[dict[str, Any]]) -> str:
    """Return "holds" if all three statements do in every run."""
    answers = [answer for run in runs for answer in run["holds"]]
    return "holds" if all(answers) else "mixed" if any(answers) else "does not hold"


def axes(
    say: Say = lambda _: None,
    *,
    examples: int = 600,
    width: int = 32,
    steps: int = 150,
    top: int = 5,
    draws: int = 100,
    side: int = 25,
    seeds: Sequence[int] = (0, 1, 2),
) -> Finding:
    """Compare curvature along eigenvectors, random and filter-normalised directions."""
    size: dict[str, Any] = {
        "examples": examples,
        "width": width,
        "steps": steps,
        "top": top,
    }
    runs = []
    for seed in seeds:
        say(f"seed {seed}")
        runs.append(
            _judge(
                _measure(
                    seed=seed,
                    draws=draws,
                    side=side if seed == seeds[0] else 0,
                    **size,
                )
            )
        )
    start = _judge(_measure(seed=seeds[0], draws=draws, side=0, trained=False, **size))
    first = runs[0]
    rises = {
        name: float(np.max(found) - first["train_loss"])
        for name, found in first["surfaces"].items()
    }
    ratios = [run["ratio"] for run in runs]
    errors = [run["largest_error"] for run in runs]
    return Finding(
        claim="Along Hessian axes the loss curves by the eigenvalues; along random "
        "ones by tr(H) / P, so that the usual pictures show a much flatter surface.",
        verdict=verdict(runs),
        evidence=f"Second differences along the {top} steepest directions are within "
        f"{max(errors):.2%} of the eigenvalues. Along {draws} random unit vectors "
        f"their mean is {short(first['unit'])} where tr(H) / P is "
        f"{short(first['trace_over_parameters'])}; it is off by at most "
        f"{max(run['deviations'] for run in runs):.1f} standard errors. Along "
        f"filter-normalised directions of unit length the mean is at least "
        f"{min(ratios):.0f} times smaller than the largest eigenvalue.",
        control=f"Within a distance of {REACH:g} the loss rises by at most "
        f"{short(rises['hessian'])} in the plane of the two steepest directions, and "
        f"by {short(rises['filter'])} in that of two filter-normalised random ones. "
        f"Before training the eigenvalue is {start['ratio']:.0f} times the mean.",
        numbers={"learning_rate": RATE, "reach": REACH, "runs": runs, "start": start},
        table=Table(
            "Curvature of the training loss by axis",
            (
                "seed",
                "λ₁",
                "2nd difference",
                "tr/P",
                "random unit",
                "by filter",
                "λ₁ over",
            ),
            tuple(
                (
                    str(seed),
                    short(run["eigenvalues"][0]),
                    short(run["second_differences"][0]),
                    short(run["trace_over_parameters"]),
                    f"{short(run['unit'])} ± {short(run['unit_error'], 1)}",
                    short(run["filter"]),
                    f"{run['ratio']:.0f}×",
                )
                for seed, run in zip(seeds, runs, strict=True)
            ),
            (
                f"{examples} digits, 64-{width}-10 tanh, Adam at {RATE:g} for {steps} "
                f"steps on all examples. Means over {draws} directions of unit length; "
                "λ₁ over: the largest eigenvalue over that mean by filter.",
            ),
        ),
    )


def draw(axis: Axes, finding: Finding) -> None:
    """Draw both surfaces side by side, on one scale of loss and of distance."""
    run = finding.numbers["runs"][0]
    every = np.stack([np.asarray(z) for z in run["surfaces"].values()])
    figure, spec = axis.figure, axis.get_subplotspec()
    axis.set_axis_off()
    if spec is None:
        raise ValueError("the panel needs an axis of a grid.")
    cells = spec.subgridspec(1, 2, wspace=0.08)
    for column, (name, title) in enumerate(AXES.items()):
        panel = figure.add_subplot(cells[column])
        grid = jnp.asarray(run["grid"])
        plots.surface(
            Plane(grid, grid, run["surfaces"][name]),
            ax=panel,
            vmin=float(every.min()),
            vmax=float(every.max()),
            scale="log",
            colorbar=column == 1,
        )
        across = "" if column else "along the second"
        tidy(panel, title, "distance along the first", across)
        panel.grid(visible=False)
        panel.tick_params(labelleft=column == 0)
