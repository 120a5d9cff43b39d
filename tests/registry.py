"""Every public transformation, as cases for the conformance suite.

A new transformation joins the conformance, mesh and framework tests by one entry here.
"""

import functools

import optax
from conformance import Case

from basinax import optimizers as bx

RATE = ("learning_rate",)
THRESHOLD = ("threshold",)
MATRICES = optax.contrib.MuonDimensionNumbers(-2, -1)


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
)
