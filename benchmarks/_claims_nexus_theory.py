"""What the walk over micro-batches adds to first order, and where it ends without it.

With raw steps, averaged over the orders of K micro-batches (g_k and u_k at the start),

    E G = mean_k g_k - γ (K-1)/4 ∇ mean_{i≠j} <g_i, g_j> + O(γ²),

and with steps along u_k = g_k / ‖g_k‖, whose Jacobian J_k is not symmetric,

    E G = mean_k u_k - γ/(2K) Σ_{i≠j} J_i u_j + O(γ²).

Nexus (arXiv:2604.09258) is described as descending the cosines of gradients, whose
gradient has the transposed J_i in place of J_i.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._table import Table
from basinax.optimizers import nexus_value_and_grad

SOURCES, SIZE = 3, 6
GAMMAS = (1e-1, 1e-2, 1e-3, 1e-4)
SECOND_ORDER = 1.8  # least exponent of γ in a residual that is to count as O(γ²)
CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 5.0))

Vector = jax.Array


def losses(seed: int) -> list[Callable[[Vector], jax.Array]]:
    """Draw smooth losses that are not quadratics; call it with 64-bit types."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(SOURCES):
        matrix = jnp.asarray(rng.standard_normal((SIZE, SIZE)) / SIZE**0.5)
        centre = jnp.asarray(rng.standard_normal(SIZE))
        found.append(
            lambda x, m=matrix, c=centre: (
                0.5 * jnp.sum(jnp.square(m @ (x - c))) + jnp.sum(jnp.sin(x) ** 3)
            )
        )
    return found


def average_over_orders(
    sources: Sequence[Callable[[Vector], jax.Array]],
    point: Vector,
    normalize: Any,
) -> Callable[[jax.Array], Vector]:
    """Return the function from γ to the mean pseudo-gradient over all K! orders."""
    orders = jnp.array(list(itertools.permutations(range(len(sources)))))

    def loss(x: Vector, index: jax.Array) -> jax.Array:
        return jax.lax.switch(index, list(sources), x)

    def average(gamma: jax.Array) -> Vector:
        fn: Any = nexus_value_and_grad(loss, gamma, normalize=normalize)
        return jnp.mean(jax.lax.map(lambda order: fn(point, order)[1], orders), axis=0)

    return average


def _unit(g: Vector) -> Vector:
    return g / jnp.linalg.norm(g)


def first_order(
    sources: Sequence[Callable[[Vector], jax.Array]], point: Vector
) -> dict[str, tuple[Vector, Vector]]:
    """Compute G at γ = 0 and the factor of -γ, by automatic differentiation.

    Returns:
      By name: "raw", as derived; "twice", with (K-1)/2; "normalised", as derived;
      "cosine", with the gradient of the cosines.
    """
    count = len(sources)
    raw = [jax.grad(loss) for loss in sources]
    unit = [lambda x, g=g: _unit(g(x)) for g in raw]
    pairs = list(itertools.permutations(range(count), 2))

    def mean_product(fields: Sequence[Callable[[Vector], Vector]]) -> Vector:
        def value(x: Vector) -> jax.Array:
            products = [jnp.vdot(fields[i](x), fields[j](x)) for i, j in pairs]
            return jnp.mean(jnp.stack(products))

        return jax.grad(value)(point)

    def mean(fields: Sequence[Callable[[Vector], Vector]]) -> Vector:
        return jnp.mean(jnp.stack([field(point) for field in fields]), axis=0)

    directional = [jax.jvp(unit[i], (point,), (unit[j](point),))[1] for i, j in pairs]
    turning = jnp.sum(jnp.stack(directional), axis=0)
    at_rest, at_rest_unit = mean(raw), mean(unit)
    products = mean_product(raw)
    return {
        "raw": (at_rest, (count - 1) / 4 * products),
        "twice": (at_rest, (count - 1) / 2 * products),
        "normalised": (at_rest_unit, turning / (2 * count)),
        "cosine": (at_rest_unit, (count - 1) / 4 * mean_product(unit)),
    }


@functools.cache
def residuals(seed: int = 0, gammas: Sequence[float] = GAMMAS) -> dict[str, list]:
    """Measure what every form leaves unexplained, for every γ."""
    with jax.enable_x64(True):
        point = jnp.asarray(np.random.default_rng(seed + 1).standard_normal(SIZE))
        sources = losses(seed)
        forms = jax.jit(lambda: first_order(sources, point))()
        averages = {
            kind: jax.jit(average_over_orders(sources, point, kind))
            for kind in (None, "global")
        }
        found: dict[str, list] = {name: [] for name in forms}
        for gamma in gammas:
            walked = {k: average(jnp.asarray(gamma)) for k, average in averages.items()}
            for name, (at_rest, slope) in forms.items():
                average = walked[None if name in ("raw", "twice") else "global"]
                left = jnp.linalg.norm(average - (at_rest - gamma * slope))
                found[name].append(float(left))
    return found


def order(gammas: Sequence[float], left: Sequence[float]) -> float:
    """Fit the exponent of γ."""
    return float(np.polyfit(np.log(gammas), np.log(left), 1)[0])


def judge(exponent: float) -> str:
    """Hold if what is left is of second order."""
    return "holds" if exponent >= SECOND_ORDER else "does not hold"


def _table(found: dict[str, list], names: dict[str, str]) -> Table:
    return Table(
        "What the first-order form leaves of the walk",
        ("form", *(f"γ = {gamma:g}" for gamma in GAMMAS), "exponent"),
        tuple(
            (
                label,
                *(f"{value:.1e}" for value in found[name]),
                f"{order(GAMMAS, found[name]):.2f}",
            )
            for name, label in names.items()
        ),
        (
            f"Norm of the residual; {SOURCES} random smooth losses of {SIZE} "
            "variables, mean over all orders, float64.",
        ),
    )


def raw_expansion(say: Say = lambda _: None) -> Finding:
    """Compare the walk with raw steps to its expansion."""
    say("walking")
    found = residuals()
    exponent = {name: order(GAMMAS, left) for name, left in found.items()}
    constants = [r / g**2 for r, g in zip(found["raw"], GAMMAS, strict=True)]
    return Finding(
        claim="With raw steps the walk adds -γ (K-1)/4 times the gradient of the mean "
        "inner product of two gradients, to first order in γ.",
        verdict=judge(exponent["raw"]),
        evidence=f"What is left is of order γ^{exponent['raw']:.2f}; over γ² it is "
        f"{', '.join(f'{c:.3g}' for c in constants)} for γ = "
        f"{', '.join(f'{g:g}' for g in GAMMAS)}.",
        control=f"With (K-1)/2 in its place it is of order γ^{exponent['twice']:.2f}.",
        numbers={"gammas": GAMMAS, "residuals": found, "exponents": exponent},
        table=_table(found, {"raw": "(K-1)/4", "twice": "(K-1)/2"}),
    )


def cosine_expansion(say: Say = lambda _: None) -> Finding:
    """Compare the walk with unit steps to the published form and to the derived one."""
    say("walking")
    found = residuals()
    exponent = {name: order(GAMMAS, left) for name, left in found.items()}
    over = {
        name: ", ".join(
            f"{r / g**power:.3g}" for r, g in zip(found[name], GAMMAS, strict=True)
        )
        for name, power in (("normalised", 2), ("cosine", 1))
    }
    return Finding(
        claim="With unit steps the walk adds a multiple of the gradient of the cosines "
        "of two gradients, to first order in γ, as published.",
        verdict=judge(exponent["cosine"]),
        evidence=f"What is left is of order γ^{exponent['cosine']:.2f}; over γ it is "
        f"{over['cosine']}. With the directional derivatives J_i u_j of the unit "
        f"gradients it is of order γ^{exponent['normalised']:.2f}, over γ² "
        f"{over['normalised']}.",
        control="The two forms are equal where every Hessian is a multiple of the "
        "identity; the gradient of the cosine has the transposed J_i.",
        numbers={"gammas": GAMMAS, "residuals": found, "exponents": exponent},
        table=_table(
            found, {"cosine": "gradient of the cosine", "normalised": "J_i u_j"}
        ),
    )


def geometric_median(points: np.ndarray, steps: int = 10_000) -> np.ndarray:
    """Find the point with the least sum of distances, by Weiszfeld's iteration."""
    x = points.mean(axis=0)
    for _ in range(steps):
        weights = 1 / np.linalg.norm(points - x, axis=1)
        x = weights @ points / weights.sum()
    return x


def fixed_points(steps: int = 4000) -> dict[str, np.ndarray]:
    """Descend ½ ‖θ - p_k‖² at γ = 0, by raw and by unit gradients."""
    with jax.enable_x64(True):
        corners = jnp.array(CORNERS)
        rates = 0.5 / (1 + 0.01 * jnp.arange(steps))

        def end(normalize: Any) -> Vector:
            fn: Any = nexus_value_and_grad(
                lambda x, p: 0.5 * jnp.sum(jnp.square(x - p)), 0.0, normalize=normalize
            )

            def step(x: Vector, rate: jax.Array) -> tuple[Vector, None]:
                return x - rate * fn(x, corners)[1], None

            # Not from the mean, where one of the two would not have to move.
            return jax.lax.scan(step, jnp.array([2.0, 1.0]), rates)[0]

        return {
            name: np.asarray(jax.jit(end, static_argnums=0)(normalize))
            for name, normalize in (("raw", None), ("normalised", "global"))
        }


def median(say: Say = lambda _: None) -> Finding:
    """Ask where accumulation of unit gradients ends."""
    say("descending")
    corners = np.array(CORNERS)
    targets = {"mean": corners.mean(axis=0), "median": geometric_median(corners)}
    ends = fixed_points()
    away = {
        name: {t: float(np.linalg.norm(end - p)) for t, p in targets.items()}
        for name, end in ends.items()
    }

    def place(x: np.ndarray) -> str:
        return f"({x[0]:.3f}, {x[1]:.3f})"

    ours = away["normalised"]
    return Finding(
        claim="Without walking, unit gradients do not end at the minimum of the mean "
        "loss but weigh sources by 1/‖g‖: on equal quadratics, at the geometric median "
        "of their minima.",
        verdict="holds"
        if ours["median"] < 1e-3 * ours["mean"]
        else "mixed"
        if ours["median"] < ours["mean"]
        else "does not hold",
        evidence=f"They end at {place(ends['normalised'])}, {ours['median']:.1e} from "
        f"the median and {ours['mean']:.2f} from the mean {place(targets['mean'])}.",
        control=f"Raw gradients end at {place(ends['raw'])}, {away['raw']['mean']:.1e} "
        "from the mean. Hence unit gradients without walking are the control that any "
        "gain of the walk has to beat.",
        numbers={"ends": ends, "targets": targets, "distances": away},
    )
