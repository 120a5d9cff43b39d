"""Every public transformation against every check of the conformance suite."""

import inspect

import optax
import pytest
from conformance import checks_for
from registry import CASES

from basinax import optimizers


@pytest.mark.parametrize(
    ("case", "check"),
    [
        pytest.param(case, check, id=f"{case.name}-{name}")
        for case in CASES
        for name, check in checks_for(case).items()
    ],
)
def test_conforms(case, check):
    check(case)


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


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
