"""Every public transformation, as cases for the conformance suite.

A new transformation joins the conformance, mesh and framework tests by one entry here.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from conformance import Case

from basinax import landscape
from basinax import optimizers as bx

RATE = ("learning_rate",)
THRESHOLD = ("threshold",)
MATRICES = optax.contrib.MuonDimensionNumbers(-2, -1)


def most(params):
    """Mask the last row of leaves named "second", out of the other checks' sight."""

    def keep(path, leaf):
        every = jnp.ones_like(leaf, bool)
        masked = "second" in jax.tree_util.keystr(path)
        return every.at[-1].set(False) if masked else every

    return jax.tree_util.tree_map_with_path(keep, params)


def clip(name, make=bx.spectral_clip, stacked=False, **options):
    """Return the case of a bare clip; thresholds of the order of the sample's norms."""
    return Case(
        name,
        functools.partial(make, threshold=1.0, **options),
        is_optimizer=False,
        hyperparameters={"threshold": 0.6},
        schedules=THRESHOLD,
        stacked=stacked,
    )


def spectra(
    name, make, learning_rate=0.3, stacked=False, hyperparameters=(), **options
):
    """Return the case of a full optimizer with spectral clipping."""
    return Case(
        name,
        functools.partial(
            make, learning_rate=0.1, threshold=1.0, weight_decay=0.0, **options
        ),
        learning_rate=learning_rate,
        hyperparameters={"learning_rate": 0.05, "threshold": 0.6, "weight_decay": 0.02}
        | dict(hyperparameters),
        schedules=RATE + THRESHOLD,
        static_args=("warmup_steps",),
        stacked=stacked,
    )


CASES = (
    clip("spectral_clip[eigh]", method="eigh"),
    clip("spectral_clip[polynomial]", method="polynomial"),
    clip("spectral_clip[newton_schulz]", method="newton_schulz"),
    clip("spectral_clip[hard]", kind="hard"),
    clip("spectral_clip[normalize]", kind="normalize"),
    clip(
        "spectral_clip[stacks]",
        dimension_numbers=MATRICES,
        vectors="reference",
        stacked=True,
    ),
    clip("pre_spectral_clip", bx.pre_spectral_clip),
    Case(
        "scale_by_mars",
        bx.scale_by_mars,
        is_optimizer=False,
        hyperparameters={"b1": 0.8, "gamma": 0.1},
        stacked=False,  # it clips by the norm of a whole leaf
    ),
    # These share the kernels above: one of them with the default, the others with
    # what compiles fast.
    spectra(
        "spectra", functools.partial(bx.spectra, optax.scale_by_rms()), kind="hard"
    ),
    spectra("spectra_adamw", bx.spectra_adamw, hyperparameters={"b1": 0.8}),
    spectra(
        "spectra_signum", bx.spectra_signum, hyperparameters={"beta": 0.8}, kind="hard"
    ),
    spectra(
        "spectra_ademamix",
        bx.spectra_ademamix,
        hyperparameters={"b1": 0.8},
        b3=0.95,  # the default remembers longer than the checks run
        alpha=2.0,
        dimension_numbers=MATRICES,
        stacked=True,
        method="eigh",
    ),
    Case(
        "grokfast_ema",
        bx.grokfast_ema,
        is_optimizer=False,
        learning_rate=0.05,  # times 1 + lamb
        hyperparameters={"alpha": 0.8, "lamb": 1.0},
        static_args=("init",),
        stacked=True,
    ),
    Case(
        "keep_weight_norm",
        bx.keep_weight_norm,
        is_optimizer=False,
        reaches_every_point=False,  # no point but those on a sphere
    ),
    Case(
        "keep_masked",
        functools.partial(bx.keep_masked, mask=most),
        is_optimizer=False,
        static_args=("mask",),
        stacked=True,
    ),
    Case(
        "monitor_nlm",
        functools.partial(landscape.monitor_nlm, scope="neuron"),
        is_optimizer=False,
        static_args=("scope",),
    ),
    Case(
        "monitor",
        functools.partial(
            landscape.monitor,
            metrics={
                "sharpness": landscape.metrics.lambda_max(num_steps=2),
                "cosine": landscape.metrics.gradient_cosine(),
                "size": landscape.metrics.parameter_norm(),
            },
            every=2,
        ),
        is_optimizer=False,
        static_args=("metrics", "every"),
        extra_args=lambda loss_fn: {"value_fn": loss_fn},
    ),
    Case(
        "perp_grad",
        bx.perp_grad,
        is_optimizer=False,
        hyperparameters={"radial_scale": 0.5},
        static_args=("min_size",),
        stacked=False,  # one projection spans a whole leaf
        reaches_every_point=False,  # it stands still where gradient ∥ weights
    ),
    Case(
        "perp_grad[neuron]",
        functools.partial(bx.perp_grad, scope="neuron", rescale=False),
        is_optimizer=False,
        hyperparameters={"radial_scale": 0.5},
        static_args=("min_size",),
        reaches_every_point=False,
    ),
    Case(
        "perp_grad[global]",
        functools.partial(bx.perp_grad, scope="global", max_rescale=1.2),
        is_optimizer=False,
        hyperparameters={"max_rescale": 1.1},
        static_args=("min_size",),
        reaches_every_point=False,
    ),
    Case(
        "perp_sgd",
        functools.partial(bx.perp_sgd, learning_rate=0.1),
        hyperparameters={"learning_rate": 0.05, "momentum": 0.5, "weight_decay": 0.1},
        schedules=RATE,
        static_args=("min_size",),
        reaches_every_point=False,
    ),
    Case(
        "perp_adamw",
        # float16 has no 1e-8, and some checks project the whole gradient away
        functools.partial(bx.perp_adamw, learning_rate=0.1, eps=1e-6),
        hyperparameters={"learning_rate": 0.05, "b1": 0.8, "weight_decay": 0.02},
        schedules=RATE,
        static_args=("min_size",),
        reaches_every_point=False,
    ),
)
