"""SAM at the edge of its stability: full-batch training of small networks on digits.

Gradient descent of step size η sharpens up to λ = 2/η.  SAM of radius ρ is stable only
up to λ + ρ λ²/‖g‖ = 2/η, an edge that comes down with the gradient g.  Long and
Bartlett (JMLR 2024, arXiv:2309.12488).
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._claims_landscape_runs import (
    Loss,
    cross_entropy,
    descend,
    digits,
    squared_error,
    tanh_network,
)
from basinax.benchmarks._models import Functional
from basinax.benchmarks._table import Table, short
from basinax.landscape import eigenpairs, gradient_norm, hessian, sam_edge
from basinax.optimizers import sam

STEPS, EVERY = 2000, 100
FLATTER = 0.9  # of the eigenvalue that gradient descent ends with
LOW, HIGH = 0.9, 1.15  # of the edge, for the median over the last quarter of a run


class Setting(NamedTuple):
    """A loss, a network and a step size; the radii to compare."""

    cost: Callable[[Any], Loss]
    sizes: tuple[int, ...]
    examples: int
    rate: float
    radii: tuple[float, ...]
    """The first is zero: gradient descent."""


SETTINGS = {
    "squared error": Setting(
        squared_error, (64, 40, 40, 10), 400, 0.4, (0.0, 0.01, 0.03, 0.1, 0.3)
    ),
    # The loss and with it the curvature fall below all edges but those of large radii.
    "cross-entropy": Setting(
        cross_entropy, (64, 64, 10), 500, 0.2, (0.0, 0.1, 0.2, 1.0)
    ),
}


@cache
def _problem(name: str) -> tuple[Functional, Loss]:
    network = tanh_network(SETTINGS[name].sizes)
    return network, SETTINGS[name].cost(network.apply)


@cache
def _descent(rho: float, rate: float) -> optax.GradientTransformation:
    return optax.chain(sam(rho), optax.sgd(rate)) if rho else optax.sgd(rate)


def course(
    name: str, rho: float, seed: int, *, steps: int = STEPS, every: int = EVERY
) -> dict[str, np.ndarray]:
    """Train and look every few steps at loss, sharpness, gradient and edge."""
    if steps % every:
        raise ValueError(f"steps {steps} is not a multiple of every {every}")
    setting, (network, loss) = SETTINGS[name], _problem(name)
    batch = digits(setting.examples, centred=name == "squared error")
    params, tx = network.init(jax.random.key(seed)), _descent(rho, setting.rate)
    looks = []
    for step in range(every, steps + 1, every):
        # Neither method remembers anything from one stretch to the next.
        params = descend(loss, tx, params, batch, steps=every)
        curvature = hessian(loss, params, batch, linearize=True)
        top = eigenpairs(curvature, params, 1, key=jax.random.key(0))
        norm = gradient_norm(loss, params, batch)
        edge = sam_edge(norm, setting.rate, rho)
        looks.append((step, loss(params, batch), norm, top.values[0], edge))
    names = ("step", "loss", "gradient_norm", "lambda_max", "edge")
    values = np.asarray(jax.device_get(looks), np.float64).T
    return dict(zip(names, values, strict=True))


def late(seen: dict[str, np.ndarray]) -> dict[str, float]:
    """Take medians over the last quarter of a run."""
    quarter = max(1, len(seen["step"]) // 4)
    found = {name: float(np.median(seen[name][-quarter:])) for name in seen}
    ratio = seen["lambda_max"] / seen["edge"]
    return {**found, "over_edge": float(np.median(ratio[-quarter:]))}


def judge(flatter: Sequence[float], over_edge: Sequence[float]) -> str:
    """Decide from eigenvalues over those of gradient descent, and over the edge.

    Args:
      flatter: of the largest radius, one for each seed.
      over_edge: of all radii but zero, one for each radius and seed.
    """
    flat = all(x < FLATTER for x in flatter)
    near = all(LOW <= x <= HIGH for x in over_edge)
    return "holds" if flat and near else "mixed" if flat or near else "does not hold"


def edges(
    say: Say = lambda _: None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    settings: Sequence[str] = tuple(SETTINGS),
    steps: int = STEPS,
    every: int = EVERY,
) -> Finding:
    """Train with radii from zero on and hold the sharpness against SAM's edge.

    The first of the settings decides, the others are controls.
    """
    runs: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for name in settings:
        for rho in SETTINGS[name].radii:
            for seed in seeds:
                say(f"{name}, radius {rho:g}, seed {seed}")
                seen = course(name, rho, seed, steps=steps, every=every)
                each = runs.setdefault(name, {}).setdefault(rho, [])
                each.append({**late(seen), "course": seen})

    def values(name: str, rho: float, key: str) -> list[float]:
        return [run[key] for run in runs[name][rho]]

    def flatter(name: str) -> list[float]:
        pairs = zip(
            values(name, SETTINGS[name].radii[-1], "lambda_max"),
            values(name, 0.0, "lambda_max"),
            strict=True,
        )
        return [ours / theirs for ours, theirs in pairs]

    def over(name: str) -> dict[float, list[float]]:
        return {rho: values(name, rho, "over_edge") for rho in SETTINGS[name].radii}

    def told(name: str) -> str:
        radii = SETTINGS[name].radii
        return (
            f"{name}: eigenvalue at ρ = {radii[-1]:g} over that of gradient descent "
            f"{_list(flatter(name))}; over its edge "
            + ", ".join(f"{_list(x)} at {rho:g}" for rho, x in over(name).items())
        )

    main, *others = settings
    radii = SETTINGS[main].radii[1:]
    foreign = [
        x / 2 * SETTINGS[main].rate for x in values(main, radii[-1], "lambda_max")
    ]
    return Finding(
        claim="SAM ends where the largest eigenvalue is smaller, at the edge of its "
        "own stability.",
        verdict=judge(flatter(main), [x for rho in radii for x in over(main)[rho]]),
        evidence=f"Late in the run, one number per seed: {told(main)}.",
        control=f"Over the edge of gradient descent, 2/η, SAM at ρ = {radii[-1]:g} is "
        f"at {_list(foreign)}. "
        + " ".join(f"{told(name).capitalize()}." for name in others),
        numbers={
            "settings": {
                name: {k: v for k, v in SETTINGS[name]._asdict().items() if k != "cost"}
                for name in settings
            },
            "steps": steps,
            "seeds": list(seeds),
            "runs": runs,
        },
        table=Table(
            "Sharpness of SAM over its edge, full batch",
            ("loss function", "ρ", "loss", "‖gradient‖", "λmax", "edge", "λmax/edge"),
            tuple(
                (
                    name,
                    f"{rho:g}",
                    *(
                        short(float(np.mean(values(name, rho, key))))
                        for key in ("loss", "gradient_norm", "lambda_max", "edge")
                    ),
                    _list(over(name)[rho]),
                )
                for name in settings
                for rho in SETTINGS[name].radii
            ),
            (
                *(
                    f"{name.capitalize()}: {'-'.join(map(str, SETTINGS[name].sizes))} "
                    f"tanh, {SETTINGS[name].examples} digits, η = "
                    f"{SETTINGS[name].rate:g}."
                    for name in settings
                ),
                f"Medians over the last quarter of {steps} steps, means over "
                f"{len(seeds)} seeds, last column one number for each. Edge: root of "
                f"λ + ρλ²/‖g‖ = 2/η. At the edge: from {LOW:g} to {HIGH:g} of it.",
            ),
        ),
    )


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{x:.2f}" for x in values)
