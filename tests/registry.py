"""Every public transformation, as cases for the conformance suite.

A new transformation joins the conformance, mesh and framework tests by one entry here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax import landscape
from basinax import optimizers as bx
from basinax.testing import Case

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


def stacked(make):
    """Put a stack of two tasks, whose gradients are g and 2g, before an aggregation."""

    @functools.wraps(make)
    def build(**options):
        stack = lambda u, _: jax.tree.map(lambda x: jnp.stack([x, 2 * x]), u)  # noqa: E731
        return optax.chain(optax.stateless(stack), make(**options))

    return build


AGGREGATE_STATIC = ("weighting", "num_tasks", "normalize", "mask", "key")
SAMO_STATIC = ("weighting", "num_tasks", "key", "num_samples", "owner")
TASK_LOSSES = {"losses": jnp.array([0.5, 1.5])}


def two_losses(loss_fn):
    """Make two task losses of one."""

    def value_fn(params):
        loss = loss_fn(params)
        return jnp.stack([loss, 2 * loss])

    return {"value_fn": value_fn}


def two_microbatches(loss_fn):
    """Make a loss that scales with its micro-batch, and two of them."""
    return {
        "value_fn": lambda params, scale: scale * loss_fn(params),
        # Not of jax: what is compiled with it is shared by checks of any precision.
        "microbatches": np.array([1.0, 2.0], np.float32),
    }


def nexus_multi_steps(learning_rate=0.1, inner_learning_rate=0.01):
    """Wrap an optimizer, whose learning rate the checks can then set."""
    return bx.nexus_multi_steps(
        optax.sgd(learning_rate), inner_learning_rate, every_k=1
    )


def reptile(learning_rate=0.1, inner_learning_rate=0.25):
    """Call the interpolation what the checks call it."""
    return bx.reptile(inner_learning_rate, learning_rate)


CASES = (
    clip("spectral_clip[eigh]", method="eigh"),
    clip("spectral_clip[polynomial]", method="polynomial"),
    clip(
        "spectral_clip[newton_schulz]",
        method="newton_schulz",
    ),
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
        "spectra",
        functools.partial(bx.spectra, optax.scale_by_rms()),
        kind="hard",
    ),
    spectra("spectra_adamw", bx.spectra_adamw, hyperparameters={"b1": 0.8}),
    spectra(
        "spectra_signum",
        bx.spectra_signum,
        hyperparameters={"beta": 0.8},
        kind="hard",
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
    Case(
        "sam",
        functools.partial(bx.sam, rho=0.05),
        is_optimizer=False,
        hyperparameters={"rho": 0.2},
        schedules=("rho",),
        static_args=("mask", "unscaled"),
        extra_args=lambda loss_fn: {"value_fn": loss_fn},
    ),
    Case(
        "asam",
        functools.partial(bx.asam, rho=0.05),
        is_optimizer=False,
        hyperparameters={"rho": 0.2, "eta": 0.1},
        schedules=("rho",),
        static_args=("mask", "unscaled"),
        extra_args=lambda loss_fn: {"value_fn": loss_fn},
    ),
    Case(
        "aggregate[mgda]",
        functools.partial(stacked(bx.aggregate), weighting=bx.mgda_weights),
        is_optimizer=False,
        static_args=AGGREGATE_STATIC,
        stacked=True,
    ),
    Case(
        "aggregate[famo]",
        functools.partial(
            stacked(bx.aggregate), weighting=bx.famo(), num_tasks=2, normalize="l2"
        ),
        is_optimizer=False,
        learning_rate=1.0,  # normalised gradients
        static_args=AGGREGATE_STATIC,
        extra_args=lambda _: TASK_LOSSES,
    ),
    Case(
        "aggregate[random]",
        functools.partial(
            stacked(bx.aggregate), weighting=bx.random_weights(), num_tasks=2, key=0
        ),
        is_optimizer=False,
        static_args=AGGREGATE_STATIC,
        stacked=True,
    ),
    Case(
        "grad_drop_aggregate",
        functools.partial(stacked(bx.grad_drop_aggregate), key=0, leak=0.1),
        is_optimizer=False,
        learning_rate=0.1,  # the sum of both
        hyperparameters={"leak": 0.5},
        static_args=("mask", "key"),
        stacked=True,
    ),
    # With random directions, a step takes seven times as long to compile; their tests
    # have a file of their own.
    Case(
        "samo[exact]",
        functools.partial(bx.samo, weighting=bx.mean_weights, rho=0.05, local="exact"),
        is_optimizer=False,
        hyperparameters={"rho": 0.2, "alpha": 0.3},
        schedules=("rho",),
        static_args=SAMO_STATIC,
        extra_args=two_losses,
    ),
    Case(
        "nexus",
        functools.partial(bx.nexus, inner_learning_rate=0.01),
        is_optimizer=False,
        learning_rate=1.0,  # normalised gradients
        hyperparameters={"inner_learning_rate": 0.1},
        schedules=("inner_learning_rate",),
        static_args=("normalize", "reduce", "axis_name", "unroll", "eps"),
        extra_args=two_microbatches,
        uses_gradients=False,
    ),
    Case(
        "nexus_multi_steps",
        nexus_multi_steps,
        learning_rate=1.0,
        hyperparameters={"learning_rate": 0.05, "inner_learning_rate": 0.1},
        schedules=("inner_learning_rate",),
    ),
    Case(
        "reptile",
        reptile,
        learning_rate=1.0,
        hyperparameters={"learning_rate": 0.05, "inner_learning_rate": 0.2},
        schedules=("learning_rate", "inner_learning_rate"),
        extra_args=two_microbatches,
        uses_gradients=False,
    ),
)

# Cases that share the update of another, which is checked in full: for them the default
# run keeps to what options and chaining can break.
LIKE = {
    "spectral_clip[newton_schulz]": "spectral_clip[eigh]",
    "spectral_clip[normalize]": "spectral_clip[eigh]",
    "pre_spectral_clip": "spectral_clip[eigh]",
    "spectra": "spectra_adamw",
    "spectra_signum": "spectra_adamw",
    "perp_grad[global]": "perp_grad",
    "perp_sgd": "perp_adamw",
    "asam": "sam",
    "aggregate[random]": "aggregate[mgda]",
    "reptile": "nexus",
}


def with_variants_later(cases):
    """Return pytest's parameters; those that share their update wait for -m slow."""
    return [
        pytest.param(c, id=c.name, marks=pytest.mark.slow if c.name in LIKE else ())
        for c in cases
    ]
