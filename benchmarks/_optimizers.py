"""Optimizers that the comparison can train, each with its learning-rate grid.

Every entry receives the same recipe: the same schedule shape, the same decoupled
weight decay on the same matrices, the same number of steps. Every grid has the same
number of points at the same half-decade spacing; only its centre differs, because a
sign step and an Adam step of the same learning rate are not the same size.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from basinax.benchmarks._tasks import Params, Usage
from basinax.optimizers import (
    perp_adamw,
    spectra_adamw,
    spectra_ademamix,
    spectra_signum,
)

WEIGHT_DECAY = 0.1
WARMUP_FRACTION = 0.1
FINAL_FRACTION = 0.01  # last learning rate over the peak


class Recipe(NamedTuple):
    """What the comparison hands to every optimizer alike."""

    schedule: optax.Schedule
    steps: int
    warmup_steps: int
    weight_decay: float
    decay_mask: Callable[[Params], Any]
    threshold: float
    dimension_numbers: Callable[[Params], Any]


class Entry(NamedTuple):
    """One optimizer of the registry."""

    make: Callable[[Recipe], optax.GradientTransformation]
    grid: tuple[float, ...]
    note: str
    base: str | None = None
    """The entry it adds something to; results then include the paired difference."""


def warmup_steps(steps: int) -> int:
    """Return the length of the warm-up of a run."""
    return max(1, round(WARMUP_FRACTION * steps))


def schedule(peak: jax.typing.ArrayLike, steps: int) -> optax.Schedule:
    """Linear warm-up then cosine decay; ``peak`` may be traced.

    The first step already moves, so that update sizes can be divided by the rate.
    """
    warmup = warmup_steps(steps)
    shape = optax.schedules.warmup_cosine_decay_schedule(
        init_value=1.0 / warmup,
        peak_value=1.0,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=FINAL_FRACTION,
    )
    return lambda count: jnp.asarray(peak) * shape(count)


def narrow(grid: Sequence[float], size: int) -> tuple[float, ...]:
    """Keep the ``size`` central points of a grid."""
    if not 1 <= size <= len(grid):
        raise Usage(f"--grid {size}: choose from 1 to {len(grid)} points")
    start = (len(grid) - size) // 2
    return tuple(grid[start : start + size])


def _adamw(recipe: Recipe) -> optax.GradientTransformation:
    return optax.adamw(
        recipe.schedule,
        b1=0.9,
        b2=0.999,
        weight_decay=recipe.weight_decay,
        mask=recipe.decay_mask,
    )


def _perp_adamw(recipe: Recipe) -> optax.GradientTransformation:
    # Vectors are left out: those that start at zero are parallel to their gradients.
    return perp_adamw(
        recipe.schedule,
        b1=0.9,
        b2=0.999,
        weight_decay=recipe.weight_decay,
        weight_decay_mask=recipe.decay_mask,
        mask=recipe.decay_mask,
    )


def _lion(recipe: Recipe) -> optax.GradientTransformation:
    return optax.lion(
        recipe.schedule, weight_decay=recipe.weight_decay, mask=recipe.decay_mask
    )


def _signum(recipe: Recipe) -> optax.GradientTransformation:
    # optax.signum has neither Nesterov momentum nor weight decay.
    return optax.chain(
        optax.trace(decay=0.95, nesterov=True),
        optax.scale_by_sign(),
        optax.add_decayed_weights(recipe.weight_decay, recipe.decay_mask),
        optax.scale_by_learning_rate(recipe.schedule),
    )


def _muon(recipe: Recipe) -> optax.GradientTransformation:
    # consistent_rms lets one learning rate serve the matrices and the Adam part.
    return optax.contrib.muon(
        recipe.schedule,
        weight_decay=recipe.weight_decay,
        weight_decay_mask=recipe.decay_mask,
        consistent_rms=0.2,
    )


ADEMAMIX_B1, ADEMAMIX_B3, ADEMAMIX_ALPHA = 0.9, 0.999, 8.0


def ademamix_alpha(steps: int) -> optax.Schedule:
    """Grow the weight of the slow average linearly to its final value."""
    return optax.schedules.linear_schedule(0.0, ADEMAMIX_ALPHA, steps)


def ademamix_b3(steps: int) -> optax.Schedule:
    """Grow the half-life of the slow average linearly from b1's to b3's."""

    def half_life(decay: float) -> jax.Array:
        return jnp.log(0.5) / jnp.log(decay)

    first, last = half_life(ADEMAMIX_B1), half_life(ADEMAMIX_B3)

    def b3(count: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.minimum(jnp.asarray(count) / steps, 1.0)
        return 0.5 ** (1.0 / (first + done * (last - first)))

    return b3


def _ademamix(recipe: Recipe) -> optax.GradientTransformation:
    return optax.contrib.ademamix(
        recipe.schedule,
        b1=ADEMAMIX_B1,
        b3=ademamix_b3(recipe.steps),
        alpha=ademamix_alpha(recipe.steps),
        weight_decay=recipe.weight_decay,
        mask=recipe.decay_mask,
    )


def _spectra(recipe: Recipe) -> dict[str, Any]:
    return {
        "weight_decay": recipe.weight_decay,
        "weight_decay_mask": recipe.decay_mask,
        "warmup_steps": recipe.warmup_steps,
        "dimension_numbers": recipe.dimension_numbers,
    }


def _spectra_adamw(recipe: Recipe) -> optax.GradientTransformation:
    return spectra_adamw(recipe.schedule, recipe.threshold, **_spectra(recipe))


def _spectra_signum(recipe: Recipe) -> optax.GradientTransformation:
    return spectra_signum(recipe.schedule, recipe.threshold, **_spectra(recipe))


def _spectra_ademamix(recipe: Recipe) -> optax.GradientTransformation:
    return spectra_ademamix(
        recipe.schedule,
        recipe.threshold,
        b1=ADEMAMIX_B1,
        b3=ademamix_b3(recipe.steps),
        alpha=ademamix_alpha(recipe.steps),
        **_spectra(recipe),
    )


_LARGEST = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_LARGE = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_MIDDLE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_SMALL = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)

BASELINE = "adamw"  # the optimizer that step times are relative to

OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(_adamw, _MIDDLE, "optax.adamw, b2 0.999"),
    "spectra_adamw": Entry(
        _spectra_adamw, _LARGEST, "AdamW with spectral clipping", "adamw"
    ),
    "signum": Entry(_signum, _MIDDLE, "sign of Nesterov momentum 0.95"),
    "spectra_signum": Entry(
        _spectra_signum, _LARGEST, "Signum with spectral clipping", "signum"
    ),
    "ademamix": Entry(_ademamix, _MIDDLE, "optax.contrib.ademamix, b3 0.999, alpha 8"),
    "spectra_ademamix": Entry(
        _spectra_ademamix, _LARGE, "AdEMAMix with spectral clipping", "ademamix"
    ),
    "perp_adamw": Entry(
        _perp_adamw, _LARGE, "AdamW on gradients orthogonal to the weights", "adamw"
    ),
    "lion": Entry(_lion, _SMALL, "optax.lion, b2 0.99"),
    "muon": Entry(
        _muon, _LARGE, "optax.contrib.muon, consistent_rms 0.2, Adam on vectors"
    ),
}


def choose(names: Sequence[str] | None) -> dict[str, Entry]:
    """Look up optimizers by name, all of them for None.

    Raises:
      Usage: a name is unknown.
    """
    if names is None:
        return dict(OPTIMIZERS)
    for name in names:
        if name not in OPTIMIZERS:
            valid = ", ".join(OPTIMIZERS)
            raise Usage(f"unknown optimizer {name!r}; valid names: {valid}")
    return {name: OPTIMIZERS[name] for name in names}
