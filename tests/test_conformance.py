"""Every public transformation against every check of the conformance suite."""

import inspect

import optax
import pytest
from conformance import checks_for
from registry import CASES

from basinax import optimizers

# What options and chaining can break in a transformation whose update is checked
# elsewhere.
WIRING = {
    "keeps_dtype",
    "state_is_strongly_typed",
    "none_leaves",
    "zero_gradients",
    "compiles_once",
    "inject_hyperparams",
    "schedules",
    "converges_on_mixed_target",
}


def pairs():
    for case in CASES:
        for name, check in checks_for(case).items():
            later = case.like and name not in WIRING
            marks = pytest.mark.slow if later else ()
            yield pytest.param(case, check, id=f"{case.name}-{name}", marks=marks)


@pytest.mark.parametrize(("case", "check"), list(pairs()))
def test_conforms(case, check):
    check(case)


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    in_full = {case.name for case in CASES if not case.like}
    assert {case.like for case in CASES if case.like} <= in_full


def test_wiring_is_of_checks():
    assert {name for case in CASES for name in checks_for(case)} >= WIRING


def test_every_public_transformation_is_registered():
    transformations = (
        optax.GradientTransformation,
        optax.GradientTransformationExtraArgs,
    )
    public = {
        name
        for name in optimizers.__all__
        if inspect.isfunction(function := getattr(optimizers, name))
        and inspect.signature(function).return_annotation in transformations
    }
    registered = {getattr(case.make, "func", case.make).__name__ for case in CASES}
    assert public
    assert public <= registered
