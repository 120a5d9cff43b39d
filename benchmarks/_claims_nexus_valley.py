"""A valley of equal training loss, along which the minima of the sources come together.

    L_k(x, φ) = ½ ‖x - a_k sin φ‖² + ½ cos² φ,   a_1 + a_2 + a_3 = 0, ‖a_k‖ = 1

The mean is ½ ‖x‖² + ½ whatever φ, so no gradient of it tells one φ from another; but
the minima of the sources are |sin φ| apart from x = 0 and meet where that vanishes.
Two sources that are not trained on, with other a, are best served there.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes

from basinax.benchmarks._claims import Finding, Say
from basinax.benchmarks._figures import INK, tidy
from basinax.benchmarks._table import Table
from basinax.optimizers import nexus_value_and_grad

SOURCES = tuple(
    (float(np.cos(angle)), float(np.sin(angle)))
    for angle in 2 * np.pi * np.arange(3) / 3
)
HELD_OUT = ((2.0, 0.0), (0.0, -2.0))
START = (0.3, -0.2, 1.2)  # x and φ
STEPS, GAMMA = 3000, 0.1
LOWEST = 0.5  # mean loss on the floor of the valley
SLACK = 3e-3  # above it; unit steps do not shrink, and end within about γ of the floor
OUTER = {"SGD 0.1": optax.sgd(0.1), "AdamW 0.01": optax.adamw(0.01, weight_decay=0.0)}
INNER = {"raw": None, "normalised": "global"}


class Path(NamedTuple):
    """Where runs went, one row per seed: x and φ before every step and at the end."""

    points: np.ndarray

    @property
    def train(self) -> np.ndarray:
        """Mean training loss at the end."""
        return mean_loss(self.points[:, -1], SOURCES)

    @property
    def held_out(self) -> np.ndarray:
        """Mean loss at the end on the sources not trained on."""
        return mean_loss(self.points[:, -1], HELD_OUT)

    @property
    def distance(self) -> np.ndarray:
        """How far the minima of the sources are from x = 0, |sin φ|."""
        return np.abs(np.sin(self.points[:, -1, 2]))


def loss(point: jax.Array, a: jax.Array) -> jax.Array:
    """Compute L at (x, φ) for one source."""
    x, phi = point[:2], point[2]
    miss = jnp.sum(jnp.square(x - a * jnp.sin(phi)))
    return 0.5 * miss + 0.5 * jnp.square(jnp.cos(phi))


def mean_loss(points: np.ndarray, sources: Sequence[Sequence[float]]) -> np.ndarray:
    """Average L over sources, at points of shape (..., 3), in float64."""
    points = np.asarray(points, np.float64)[..., None, :]
    x, phi = points[..., :2], points[..., 2]
    miss = np.sum((x - np.array(sources) * np.sin(phi)[..., None]) ** 2, axis=-1)
    return np.mean(miss / 2 + np.cos(phi) ** 2 / 2, axis=-1)


@partial(jax.jit, static_argnums=(0, 1))
def _walk(
    outer: str, inner: str, gammas: jax.Array, orders: jax.Array
) -> tuple[jax.Array, jax.Array]:
    tx, sources = OUTER[outer], jnp.array(SOURCES)

    def run(gamma: jax.Array, orders: jax.Array) -> tuple[jax.Array, jax.Array]:
        fn: Any = nexus_value_and_grad(loss, gamma, normalize=INNER[inner])

        def step(carry: tuple[Any, Any], order: jax.Array) -> tuple[Any, jax.Array]:
            point, state = carry
            _, gradient = fn(point, sources[order])
            updates, state = tx.update(gradient, state, point)
            return (optax.apply_updates(point, updates), state), point

        start = jnp.array(START)
        (end, _), points = jax.lax.scan(step, (start, tx.init(start)), orders)
        return points, end

    return jax.vmap(jax.vmap(run, (None, 0)), (0, None))(gammas, orders)


def walk(
    outer: str, inner: str, *, seeds: Sequence[int], steps: int = STEPS
) -> tuple[Path, Path]:
    """Run without and with a walk over the sources, in a new order every step."""
    orders = [
        np.random.default_rng(seed).permuted(np.tile(np.arange(3), (steps, 1)), axis=1)
        for seed in seeds
    ]
    # In float32 Adam would make steps of the rounding errors on the floor.
    with jax.enable_x64(True):
        gammas = jnp.array([0.0, GAMMA])
        points, ends = _walk(outer, inner, gammas, jnp.asarray(np.stack(orders)))
    both = np.concatenate([points, np.asarray(ends)[:, :, None]], axis=2)
    return Path(both[0]), Path(both[1])


def judge(runs: dict[str, dict[str, Any]]) -> str:
    """Hold if all walks end on the floor, below what any gradient at rest ends at."""
    rest = {
        outer: min(
            float(np.min(run["held_out"]))
            for run in runs.values()
            if run["outer"] == outer and not run["gamma"]
        )
        for outer in OUTER
    }
    answers = [
        np.max(run["train"]) <= LOWEST + SLACK
        and np.max(run["held_out"]) < rest[run["outer"]]
        for run in runs.values()
        if run["gamma"]
    ]
    return "holds" if all(answers) else "mixed" if any(answers) else "does not hold"


def valley(
    say: Say = lambda _: None,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    steps: int = STEPS,
) -> Finding:
    """Descend into the valley with and without a walk over the sources."""
    runs: dict[str, dict[str, Any]] = {}
    for outer in OUTER:
        for inner in INNER:
            say(f"{outer}, {inner}")
            for gamma, path in zip(
                (0.0, GAMMA),
                walk(outer, inner, seeds=seeds, steps=steps),
                strict=True,
            ):
                runs[f"{outer}, {inner}, γ = {gamma:g}"] = {
                    "outer": outer,
                    "inner": inner,
                    "gamma": gamma,
                    "train": path.train,
                    "held_out": path.held_out,
                    "distance": path.distance,
                    "path": path.points[0],
                }

    def told(gamma: float) -> str:
        chosen = [run for run in runs.values() if run["gamma"] == gamma]
        columns = (
            (f"{np.mean(run[key]):.3f}" for run in chosen)
            for key in ("train", "held_out", "distance")
        )
        train, held_out, distance = map(", ".join, columns)
        return f"training loss {train}; held-out {held_out}; |sin φ| {distance}"

    rows = tuple(
        (
            run["outer"],
            f"{run['inner']}, γ = {run['gamma']:g}",
            f"{np.mean(run['train']):.5f}",
            f"{np.mean(run['held_out']):.4f} ± {np.std(run['held_out'], ddof=1):.4f}",
            f"{np.mean(run['distance']):.4f} ± {np.std(run['distance'], ddof=1):.4f}",
        )
        for run in runs.values()
    )
    return Finding(
        claim="Among points of equal training loss, the walk over the sources goes to "
        "where their minima meet, and sources not trained on gain.",
        verdict=judge(runs),
        evidence=f"γ = {GAMMA:g}, {' and '.join(OUTER)} outer, each with raw and with "
        f"normalised steps: {told(GAMMA)}.",
        control=f"γ = 0, accumulation of the same gradients: {told(0.0)}.",
        numbers={"seeds": list(seeds), "steps": steps, "runs": runs},
        table=Table(
            "Where descent into the valley ends",
            ("outer", "inner", "training loss", "held-out loss", "|sin φ|"),
            rows,
            (
                f"{steps} steps, new order of the three sources in each; mean ± sd "
                f"over {len(seeds)} seeds of the orders.",
            ),
        ),
    )


def draw_paths(axis: Axes, finding: Finding) -> None:
    """Draw the runs with SGD over the losses, in the plane of x₁ and φ."""
    phi = np.linspace(-0.3, 1.5, 145)
    x = np.linspace(-0.12, 0.36, 97)
    grid = np.stack(np.broadcast_arrays(x[:, None], 0.0, phi[None, :]), axis=-1)
    shades = axis.contourf(
        phi, x, mean_loss(grid, HELD_OUT), levels=12, cmap="Greys", alpha=0.55
    )
    bar = axis.figure.colorbar(shades, ax=axis, shrink=0.9)
    bar.set_label("held-out loss (shade)", color=INK)
    bar.ax.tick_params(colors=INK, labelsize=8.5)
    train = axis.contour(
        phi,
        x[x >= 0],
        mean_loss(grid[x >= 0], SOURCES),
        levels=LOWEST + np.array([0.002, 0.01, 0.03]),
        colors=INK,
        linewidths=0.8,
        linestyles=":",
    )
    places = [(0.93, height) for height in (0.063, 0.141, 0.245)]
    axis.clabel(train, fmt="training loss %.3f", fontsize=7, manual=places)
    styles = {
        ("raw", 0.0): ("#0072B2", "-", "accumulation"),
        ("normalised", 0.0): ("#56B4E9", "--", "accumulation of unit gradients"),
        ("raw", GAMMA): ("#E69F00", "--", "walk by raw gradients"),
        ("normalised", GAMMA): ("#D55E00", "-", "walk by unit gradients (Nexus)"),
    }
    for run in finding.numbers["runs"].values():
        if not run["outer"].startswith("SGD"):
            continue
        colour, dash, label = styles[run["inner"], run["gamma"]]
        path, end = np.asarray(run["path"])[:DRAWN], np.asarray(run["path"])[-1]
        axis.plot(
            path[:, 2], path[:, 0], color=colour, ls=dash, linewidth=1.5, label=label
        )
        axis.plot(
            end[2], end[0], "o", color=colour, markersize=7, mec="white", zorder=5
        )
    axis.plot(START[2], START[0], "x", color=INK, markersize=7)
    axis.annotate("start", (START[2], START[0]), xytext=(8, -3), **_SMALL)
    axis.annotate(
        "the sources' minima\nmeet here", (0, 0), xytext=(0, -46), ha="center", **_SMALL
    )
    tidy(axis, "Paths in the valley (dots: ends)", "φ", "x₁ (losses at x₂ = 0)")
    axis.grid(visible=False)
    axis.legend(frameon=True, framealpha=0.85, fontsize=8, loc="upper left")


DRAWN = 400  # steps of a path; afterwards it trembles about its end
_SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": INK}


def draw_losses(axis: Axes, finding: Finding) -> None:
    """Draw training loss (dotted) and held-out loss along the runs with SGD."""
    styles = {
        ("raw", 0.0): ("#0072B2", "accumulation"),
        ("normalised", GAMMA): ("#D55E00", "Nexus"),
    }
    for run in finding.numbers["runs"].values():
        which = run["inner"], run["gamma"]
        if which not in styles or not run["outer"].startswith("SGD"):
            continue
        colour, label = styles[which]
        path = np.asarray(run["path"])
        for sources, dash, what in (
            (HELD_OUT, "-", "held out"),
            (SOURCES, ":", "training"),
        ):
            axis.plot(
                1 + np.arange(len(path)),
                mean_loss(path, sources),
                color=colour,
                linestyle=dash,
                linewidth=1.8,
                label=f"{label}, {what}",
            )
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    tidy(axis, "Losses along the paths", "step", "mean loss")
    axis.legend(frameon=False, fontsize=8)
