"""The claims of SPECTRA (arXiv:2603.14315), each beside its control.

With base direction U_k, step size eta and decoupled weight decay lambda, the update

    X <- (1 - lambda eta) X - alpha eta C_c(U_k)

keeps every step at spectral norm alpha c eta, keeps the weights in a spectral-norm ball
of radius alpha c / lambda, and with the hard clip is exactly composite Frank-Wolfe on
that ball.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from basinax.benchmarks import _tasks
from basinax.benchmarks._claims import Finding, Part, Say
from basinax.benchmarks._claims_language import language_model
from basinax.benchmarks._claims_spikes import spikes
from basinax.benchmarks._figures import new_figure, reference_line, tidy
from basinax.benchmarks._tasks import Options, Task, matrices
from basinax.optimizers import spectra, spectra_adamw, spectra_signum

ROUNDING = 1e-3  # slack for float32 steps recovered from float32 weights
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


# (a) Ceilings --------------------------------------------------------------------


def _norms(tree: Any) -> np.ndarray:
    """Spectral norm of every matrix, in float64 so that a bound can be checked."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree) if x.ndim == 2]
    return np.array([np.linalg.norm(x, 2) for x in leaves])


def _follow(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    rate: float,
    decay: float,
    c: float,
) -> dict[str, Any]:
    """Train, holding every norm against its bound at every step."""
    params = jax.jit(task.init)(jax.random.key(0))
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        grads = jax.grad(task.loss)(params, task.batch(task.data, key))
        updates, state = tx.update(grads, state, params)
        direction = jax.tree.map(
            lambda u, w, d: (u + rate * decay * w if d else u) / rate,
            updates,
            params,
            matrices(params),
        )
        return optax.apply_updates(params, updates), state, direction

    shapes = [x.shape for x in jax.tree.leaves(params) if x.ndim == 2]
    alpha = np.array([max(1.0, n / m) ** 0.5 for m, n in shapes])
    bound = _norms(params)
    steps_over, weights_over = [], []
    for index in range(steps):
        params, state, direction = step(params, state, jax.random.key(index))
        bound = (1 - rate * decay) * bound + rate * alpha * c
        steps_over.append(float(np.max(_norms(direction) / (alpha * c))))
        weights_over.append(float(np.max(_norms(params) / bound)))
    return {
        "step_over_bound": max(steps_over),
        "weight_over_bound": max(weights_over),
        "step_ratios": steps_over,
        "weight_ratios": weights_over,
    }


def ceilings(
    say: Say = lambda _: None, *, steps: int = 250, width: int = 128
) -> Finding:
    """Hold steps and weights of the digits perceptron against their ceilings."""
    task = _tasks.load("digits", Options(width=width))
    rate, decay, c = 0.01, 0.5, 1.0
    plain = {
        "adamw": optax.adamw(rate, weight_decay=decay, mask=matrices),
        "signum": optax.chain(
            optax.trace(0.95, nesterov=True),
            optax.scale_by_sign(),
            optax.add_decayed_weights(decay, matrices),
            optax.scale_by_learning_rate(rate),
        ),
    }
    options = {"weight_decay": decay, "weight_decay_mask": matrices}
    clipped = {
        "spectra_adamw": spectra_adamw(rate, c, **options),
        "spectra_signum": spectra_signum(rate, c, **options),
    }
    numbers: dict[str, Any] = {}
    for name, tx in {**clipped, **plain}.items():
        say(name)
        numbers[name] = _follow(task, tx, steps=steps, rate=rate, decay=decay, c=c)

    def worst(names: Sequence[str], key: str) -> float:
        return max(numbers[name][key] for name in names)

    step_ratio = worst(tuple(clipped), "step_over_bound")
    weight_ratio = worst(tuple(clipped), "weight_over_bound")
    holds = max(step_ratio, weight_ratio) <= 1 + ROUNDING
    return Finding(
        claim="Every step has spectral norm at most alpha c eta, and the weights stay "
        "below their ceiling, which tends to alpha c / lambda.",
        verdict="holds" if holds else "does not hold",
        evidence=f"Over {steps} steps of AdamW and Signum with SPECTRA the largest "
        f"step is {step_ratio:.4f} and the largest weight {weight_ratio:.4f} of its "
        "bound.",
        control="Without clipping they reach "
        f"{worst(tuple(plain), 'step_over_bound'):.1f} and "
        f"{worst(tuple(plain), 'weight_over_bound'):.1f} times the same bounds.",
        numbers={"rate": rate, "decay": decay, "threshold": c, "runs": numbers},
    )


# (b) Frank-Wolfe -----------------------------------------------------------------


def _frank_wolfe_step(
    x: np.ndarray, m: np.ndarray, *, gamma: float, b: float, radius: float
) -> tuple[np.ndarray, float]:
    """Take one composite Frank-Wolfe step in numpy; also return its relative gap.

    The subproblem min <M, V> + (b/2) ||V||_F^2 over ||V||_2 <= radius is solved by the
    singular values of -M/b, cut at the radius. Optimality is checked independently:
    <M + bV, V> + radius ||M + bV||_* is zero at the minimiser and positive elsewhere.
    """
    p, s, qt = np.linalg.svd(-m / b, full_matrices=False)
    v = (p * np.minimum(s, radius)) @ qt
    slope = m + b * v
    nuclear = np.linalg.svd(slope, compute_uv=False).sum()
    gap = abs(np.sum(slope * v) + radius * nuclear) / (radius * nuclear)
    return (1 - gamma) * x + gamma * v, float(gap)


def frank_wolfe(say: Say = lambda _: None, *, steps: int = 50) -> Finding:
    """Compare SPECTRA with the hard clip to composite Frank-Wolfe, in float64."""
    rate, decay, c, beta = 0.05, 0.4, 0.7, 0.9
    generator = np.random.default_rng(0)
    design = generator.standard_normal((40, 12))
    answer = generator.standard_normal((40, 20))
    start = 0.3 * generator.standard_normal((12, 20))
    alpha = (20 / 12) ** 0.5  # (in, out): fan-out over fan-in

    def gradient(x: Any) -> Any:
        return design.T @ (design @ x - answer) / 40

    differences: dict[str, list[float]] = {}
    gaps, cut = [], []
    with jax.enable_x64(True):
        for kind in ("hard", "soft"):
            say(kind)
            tx = spectra(
                optax.trace(beta), rate, c, weight_decay=decay, kind=kind, method="svd"
            )
            params: Any = {"x": jnp.asarray(start)}
            state = tx.init(params)
            x, m = start, np.zeros_like(start)
            differences[kind] = []
            for _ in range(steps):
                grads = {"x": jnp.asarray(gradient(np.asarray(params["x"])))}
                updates, state = tx.update(grads, state, params)
                params = optax.apply_updates(params, updates)
                m = beta * m + gradient(x)
                x, gap = _frank_wolfe_step(
                    x,
                    m,
                    gamma=rate * decay,
                    b=decay / alpha,
                    radius=alpha * c / decay,
                )
                gaps.append(gap)
                cut.append(np.mean(np.linalg.svd(m, compute_uv=False) > c))
                difference = np.max(np.abs(np.asarray(params["x"]) - x))
                differences[kind].append(float(difference))
    exact, control = max(differences["hard"]), max(differences["soft"])
    return Finding(
        claim="SPECTRA with the hard clip is composite Frank-Wolfe for f(X) + "
        "(lambda / 2 alpha) ||X||_F^2 on the ball ||X||_2 <= alpha c / lambda.",
        verdict="holds" if exact < 1e-12 else "does not hold",
        evidence=f"Largest difference over {steps} steps in float64: {exact:.1e} "
        f"({np.mean(cut):.0%} of all singular values were clipped; the numpy "
        f"subproblem is solved to a relative gap of {max(gaps):.0e}).",
        control=f"With the soft clip, another algorithm, the difference is "
        f"{control:.1e}.",
        numbers={
            "max_difference": exact,
            "max_difference_soft": control,
            "max_relative_gap": max(gaps),
            "clipped_fraction": float(np.mean(cut)),
            "differences": differences,
        },
    )


# Figure --------------------------------------------------------------------------


def _draw_ceilings(axis: Axes, finding: Finding) -> None:
    runs = finding.numbers["runs"]
    for base, colour in {"adamw": BLUE, "signum": VERMILION}.items():
        for name, dash in ((base, (0, (4, 1.5))), (f"spectra_{base}", "-")):
            axis.plot(runs[name]["weight_ratios"], color=colour, ls=dash, label=name)
    axis.set_yscale("log")
    reference_line(axis, 1.0, "ceiling")
    tidy(axis, "Weights against their ceiling", "step", "spectral norm over ceiling")
    axis.legend(frameon=False, fontsize=8)


def _draw_frank_wolfe(axis: Axes, finding: Finding) -> None:
    found = finding.numbers["differences"]
    floor = 1e-18  # where both are equal to the last bit
    hard = np.maximum(found["hard"], floor)
    axis.plot(hard, color=BLUE, label="hard clip")
    axis.plot(found["soft"], color=GREY, label="soft clip (control)")
    axis.set_yscale("log")
    tidy(axis, "Distance to composite Frank-Wolfe", "step", "largest difference")
    axis.legend(frameon=False, fontsize=8)


def _draw_spikes(axis: Axes, finding: Finding) -> None:
    palette = iter((GREY, "#E69F00", VERMILION, BLUE, "#56B4E9", GREEN, "#CC79A7"))
    for name, found in finding.numbers.items():
        dash = "-" if found["spectral"] else (0, (4, 1.5))
        axis.plot(found["mean_curve"], color=next(palette), ls=dash, label=name)
    axis.set_yscale("log")
    tidy(axis, "Rank-one spikes of norm 100", "step", "relative squared error")
    axis.legend(
        frameon=False, fontsize=7, loc="center right", bbox_to_anchor=(1.0, 0.44)
    )


def _draw_language_model(axis: Axes, finding: Finding) -> None:
    for name, found in finding.numbers["runs"].items():
        colour = BLUE if name.endswith("adamw") else VERMILION
        dash = "-" if name.startswith("spectra") else (0, (4, 1.5))
        rates = [r["learning_rate"] for r in found["rates"]]
        losses = [r["test_loss"]["mean"] for r in found["rates"]]
        axis.plot(rates, losses, color=colour, ls=dash, marker="o", label=name)
    axis.set_xscale("log")
    tidy(axis, "Byte-level language model", "learning rate", "test loss (nats)")
    axis.legend(frameon=False, fontsize=8)


_PANELS = {
    "ceilings": _draw_ceilings,
    "Frank-Wolfe": _draw_frank_wolfe,
    "spikes": _draw_spikes,
    "language model": _draw_language_model,
}

PARTS = (
    Part("ceilings", ceilings),
    Part("Frank-Wolfe", frank_wolfe),
    Part("spikes", spikes),
    Part("language model", language_model, slow="about ten minutes on two cores"),
)


def draw(findings: dict[str, Finding]) -> Figure:
    """Draw one panel per experiment that ran."""
    columns = 2 if len(findings) == 4 else max(1, len(findings))
    rows = max(1, -(-len(findings) // columns))
    figure = new_figure(4.8 * columns, 3.9 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, finding) in zip(axes, findings.items(), strict=False):
        _PANELS[name](axis, finding)
    return figure
