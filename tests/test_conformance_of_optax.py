"""The defects of optax's own optimizers that the documentation reports are there.

The slow test runs the suite over all of them and prints what each breaks:

    pytest -m slow -s tests/test_conformance_of_optax.py
"""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from basinax.testing import CHECKS, ConformanceError, check_transformation

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "guides" / "conformance.md"
VERSION = "0.2.8"
pinned = pytest.mark.skipif(
    optax.__version__ != VERSION,
    reason=f"found in optax {VERSION}, this is {optax.__version__}: look again, by "
    "the slow test below, and change the page",
)

# Which learning rate suits an optimizer is a matter of tuning.
SKIP = ["converges_on_parabola", "converges_on_mixed_target"]
LEFT_OUT = {
    "contrib.dpsgd": "takes gradients per example",
    "contrib.schedule_free": "wraps another, as do two optimizers that are here",
    "lbfgs": "its line search has a calling convention of its own",
}
VALUE = {"value": jnp.float32(1.0)}
EXTRA_ARGS = {
    "contrib.momo": VALUE,
    "contrib.momo_adam": VALUE,
    "contrib.sophia": lambda loss_fn: {"obj_fn": loss_fn},
    "polyak_sgd": VALUE,
}
# They say so, or count the calls of the inner optimizer.
NO_SCHEDULE = {"contrib.sam", "optimistic_adam", "rprop", "sm3"}


def sam(learning_rate=0.1):
    return optax.contrib.sam(optax.sgd(learning_rate), optax.sgd(0.05))


def mechanize(learning_rate=0.1):
    return optax.contrib.mechanize(optax.sgd(learning_rate))


def subjects():
    """Return optax's optimizers by name: what takes a learning rate and is no link."""
    makers = {
        prefix + name: make
        for prefix, module in (("", optax), ("contrib.", optax.contrib))
        for name, make in vars(module).items()
        if inspect.isfunction(make)
        and "learning_rate" in inspect.signature(make).parameters
        and "Gradient" in str(inspect.signature(make).return_annotation)
        and not name.startswith(("_", "scale_by_"))
    }
    others = {
        "contrib.mechanize": mechanize,
        "contrib.normalize": optax.contrib.normalize,
        "contrib.sam": sam,
        "polyak_sgd": optax.polyak_sgd,
    }
    return {n: m for n, m in (makers | others).items() if n not in LEFT_OUT}


def findings():
    """Return the page's table: what each optimizer breaks."""
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    broken = {name: set(re.findall(r"`(\w+)`", checks)) for name, checks in rows}
    return {n: checks for n, checks in broken.items() if n in subjects()}


def broken_by(name):
    try:
        check_transformation(
            subjects()[name],
            name=name,
            schedules=() if name in NO_SCHEDULE else None,
            extra_args=EXTRA_ARGS.get(name),
            skip=SKIP,
        )
    except ConformanceError as error:
        print(f"\n{error}")
        return {failure.check for failure in error.failures}
    return set()


def test_every_check_is_on_the_page():
    rows = re.findall(r"^\| (`.*?`) \|", PAGE.read_text(), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} >= set(CHECKS)


@pinned
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
@pytest.mark.filterwarnings("ignore:Specifying a key will be required")
@pytest.mark.parametrize("name", sorted(subjects()))
def test_each_breaks_what_the_page_says(name):
    assert broken_by(name) == findings().get(name, set())


@pinned
def test_madgrad_keeps_the_parameters_themselves():
    """The page's example, without the suite and with it."""
    params = jnp.ones(3)
    tx = optax.contrib.madgrad(0.1)
    state = tx.init(params)
    step = jax.jit(lambda p, s: tx.update(p, s, p), donate_argnums=(0, 1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="donate the same buffer"):
        step(params, state)
    copied = jax.tree.map(jnp.copy, tx.init(jnp.ones(3)))  # what the page advises
    updates, _ = step(jnp.ones(3), copied)
    assert jnp.all(jnp.isfinite(updates))
    with pytest.raises(ConformanceError, match="same buffer"):
        check_transformation(optax.contrib.madgrad, only=["donation"])
