"""Two losses of two variables with a sharp valley and a far minimum, from five starts.

The toy problem of CAGrad (Liu et al. 2021, arXiv:2110.14048) with the starts of
Nash-MTL (Navon et al. 2022, arXiv:2202.01017).  Above v = 0 each loss has a logarithmic
valley, below it a bowl whose minimum is at the other loss' side:

    L± = tanh⁺(v/2) (log max(|(u ± 7)/2 ∓ tanh v|, 5e-6) + 6)
       + tanh⁺(-v/2) (((u ∓ 7)² + (v + 8)²/10)/10 - 20)
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._table import Table
from basinax.optimizers import (
    aggregate,
    mean_weights,
    mgda_weights,
    samo_value_and_grad,
    task_gradients,
)

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
STEPS, RATE = 30_000, 2e-3
FAR = -14.0  # mean loss of a run that got near the balanced minimum, of -15.09
RADII = (0.1, 0.5, 1.0)


def losses(x: jax.Array) -> jax.Array:
    """Return both losses at (u, v)."""
    u, v = x
    sign = jnp.array([1.0, -1.0])
    valley = jnp.abs(0.5 * (u + 7 * sign) - sign * jnp.tanh(v))
    upper = jnp.log(jnp.maximum(valley, 5e-6)) + 6
    lower = (jnp.square(u - 7 * sign) + 0.1 * jnp.square(v + 8)) / 10 - 20
    above = jnp.maximum(jnp.tanh(0.5 * v), 0)
    below = jnp.maximum(jnp.tanh(-0.5 * v), 0)
    return above * upper + below * lower


PERTURBATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "SAM": {"local": "none"},
    "SAMO": {},
    "SAMO, exact": {"local": "exact"},
    # Of the differences only the sign matters; that of a·z, with a drawn anew at every
    # step, is a fair coin whatever z.
    "SAMO, coin": {"spsa_losses_fn": lambda x, a: jnp.full(2, a @ x)},
}
WEIGHTINGS = {"mean": mean_weights, "MGDA": mgda_weights}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _descend(
    perturbation: str,
    weighting: str,
    steps: int,
    start: jax.Array,
    rho: jax.Array,
    keys: jax.Array,
) -> jax.Array:
    """Return the mean loss at the end for every key."""
    tx = optax.chain(aggregate(WEIGHTINGS[weighting]), optax.adam(RATE))
    options = PERTURBATIONS[perturbation]

    def gradient(x: jax.Array, key: jax.Array) -> Any:
        if options is None:
            return task_gradients(losses, axis="vmap")(x)[1]
        fn = samo_value_and_grad(
            lambda x, _: losses(x), rho=rho, axis="vmap", **options
        )
        coin_key, key = jax.random.split(key)
        return fn(x, jax.random.normal(coin_key, (2,)), key=key)[1]

    def run(start: jax.Array, key: jax.Array) -> jax.Array:
        def step(carry: tuple[Any, Any], index: jax.Array) -> tuple[Any, None]:
            x, state = carry
            grads = gradient(x, jax.random.fold_in(key, index))
            updates, state = tx.update(grads, state, x)
            return (optax.apply_updates(x, updates), state), None

        (x, _), _ = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps))
        return jnp.mean(losses(x))

    return jax.vmap(run)(start, keys)


def descend(
    perturbation: str,
    weighting: str,
    rho: float,
    *,
    seeds: Sequence[int],
    steps: int = STEPS,
) -> np.ndarray:
    """Run from every start with every seed; return mean losses, (starts, seeds)."""
    number = len(seeds)
    starts = jnp.repeat(jnp.array(STARTS), number, axis=0)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    keys = jnp.tile(keys, len(STARTS))
    ends = _descend(perturbation, weighting, steps, starts, jnp.float32(rho), keys)
    return np.asarray(ends).reshape(len(STARTS), number)


def judge(shares: Mapping[str, Sequence[float]]) -> str:
    """Decide from the shares of successes with MGDA, one for each radius.

    Args:
      shares: for "none" (one number), "SAM", "SAMO" and "SAMO, coin".
    """
    ours, coin = shares["SAMO"], shares["SAMO, coin"]
    if max(ours) <= max(*shares["none"], *shares["SAM"]):
        return "does not hold"
    better = [x > y for x, y in zip(ours, coin, strict=True)]
    return "holds" if all(better) else "mixed"


def toy(
    say: Say = lambda _: None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    radii: Sequence[float] = RADII,
    steps: int = STEPS,
) -> Finding:
    """Count from how many starts each method gets to the balanced minimum."""
    runs: dict[str, Any] = {}
    for weighting in WEIGHTINGS:
        for perturbation in PERTURBATIONS:
            name = f"{weighting}, {perturbation}"
            for rho in radii if perturbation != "none" else (0.0,):
                say(f"{name}, radius {rho:g}")
                ends = descend(perturbation, weighting, rho, seeds=seeds, steps=steps)
                runs.setdefault(name, {})[f"{rho:g}"] = {
                    "ends": ends,
                    "share": float(np.mean(ends < FAR)),
                }

    shares = {
        weighting: {
            name: [run["share"] for run in runs[f"{weighting}, {name}"].values()]
            for name in PERTURBATIONS
        }
        for weighting in WEIGHTINGS
    }

    def told(weighting: str, names: Sequence[str]) -> str:
        parts = [
            f"{name} {', '.join(f'{share:.0%}' for share in shares[weighting][name])}"
            for name in names
        ]
        return f"{weighting}: {'; '.join(parts)}"

    compared = ("none", "SAM", "SAMO", "SAMO, exact")
    rows = tuple(
        (
            name,
            rho,
            f"{run['share']:.0%}",
            *(_ends(end) for end in run["ends"]),
        )
        for name, of_rho in runs.items()
        for rho, run in of_rho.items()
    )
    return Finding(
        claim="With MGDA, perturbing each task by a mix of the common direction and "
        "its own reaches the balanced minimum from starts where plain SAM does not.",
        verdict=judge(shares["MGDA"]),
        evidence="Share of the runs that end near it, at radius "
        f"{', '.join(f'{rho:g}' for rho in radii)}: {told('MGDA', compared)}. "
        f"{told('mean', compared)}.",
        control="The sign of a coin in place of the estimate: "
        + ". ".join(told(w, ("SAMO, coin",)) for w in reversed(WEIGHTINGS))
        + ". Where that does as well, noise is what helps, not knowledge of the task.",
        numbers={"seeds": list(seeds), "steps": steps, "runs": runs, "shares": shares},
        table=Table(
            "Mean loss where five starts end; -15.09 is the balanced minimum",
            ("weights, perturbation", "ρ", "near", *map(_place, STARTS)),
            rows,
            (
                f"Adam at {RATE:g}, {steps} steps; near: below {FAR:g}. Range over "
                f"{len(seeds)} seeds of the random directions.",
            ),
        ),
    )


def _place(start: tuple[float, float]) -> str:
    return f"{start[0]:g}, {start[1]:g}"


def _ends(values: np.ndarray) -> str:
    low, high = (f"{value:.1f}" for value in (values.min(), values.max()))
    return low if low == high else f"{low}…{high}"
