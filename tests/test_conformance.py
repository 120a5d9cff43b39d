"""Every public transformation against every check of the conformance suite."""

import inspect

import jax
import optax
import pytest
from registry import CASES, LIKE

from basinax import optimizers
from basinax.testing import checks_for
from basinax.testing._trees import assert_same_types, sample

pytestmark = pytest.mark.usefixtures("quick_compile")

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
# These have a file of their own.
MESHES = {"auto_mesh", "explicit_mesh"}


def pairs():
    for case in CASES:
        for name, check in checks_for(case).items():
            if name in MESHES:
                continue
            later = case.name in LIKE and name not in WIRING
            marks = pytest.mark.slow if later else ()
            yield pytest.param(case, check, id=f"{case.name}-{name}", marks=marks)


@pytest.mark.parametrize(("case", "check"), list(pairs()))
def test_conforms(case, check):
    check(case)


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert set(LIKE) <= set(names)
    assert set(LIKE.values()) <= set(names) - set(LIKE)


def test_wiring_is_of_checks():
    assert {name for case in CASES for name in checks_for(case)} >= WIRING | MESHES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_promises_beyond_the_checks(case):
    """Extra arguments without help from optax; `init` also on bare shapes."""
    tx = case.make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    shapes = jax.eval_shape(sample)
    assert_same_types(tx.init(shapes), jax.eval_shape(tx.init, shapes), case.name)


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
