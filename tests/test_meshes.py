"""Sharded updates on Auto and Explicit meshes equal those of a single device.

The leaves are split over eight devices in every way that matters to a matrix method:
along rows, along columns, along both, two equal shapes with unequal layouts, and
stacks split along the stack or inside it.
"""

import functools

import jax
import optax
import pytest
from conformance_case import assert_close, leaf_names, sample
from jax.sharding import AxisType, NamedSharding
from registry import CASES

DEVICES = ("data", "model")

LEAVES = {
    "rows": ((16, 4), jax.P(DEVICES, None)),
    "columns": ((4, 16), jax.P(None, DEVICES)),
    "both": ((8, 6), jax.P("data", "model")),
    "twin": ((8, 6), jax.P("model", None)),
    "vector": ((8,), jax.P("data")),
    "scalar": ((), jax.P()),
}
STACKS = {
    "stack": ((8, 4, 6), jax.P(DEVICES, None, None)),
    "stack_of_rows": ((2, 8, 6), jax.P(None, DEVICES, None)),
}


def trees(case, mesh=None):
    """Draw parameters and gradients, laid out on the mesh if there is one."""
    leaves = LEAVES | (STACKS if case.stacked else {})
    shapes = {name: shape for name, (shape, _) in leaves.items()}
    params, grads = sample(0, shapes), sample(1, shapes)
    if mesh is None:
        return params, grads
    layout = {name: NamedSharding(mesh, spec) for name, (_, spec) in leaves.items()}
    return jax.device_put((params, grads), (layout, layout))


def two_steps(case, params, grads):
    """Return the state before the first step, then updates and state after two."""
    tx = case.make()
    update = jax.jit(case.updater(tx))
    initial = state = tx.init(params)
    for _ in range(2):
        updates, state = update(grads, state, params)
    return initial, updates, state


@functools.cache
def on_one_device(index):
    return two_steps(CASES[index], *trees(CASES[index]))[1:]


def assert_same_layout(actual, desired, what):
    for (name, found), (_, wanted) in zip(
        leaf_names(actual), leaf_names(desired), strict=True
    ):
        # The type holds the layout over Explicit axes, the array that over Auto ones.
        assert jax.typeof(found) == jax.typeof(wanted), f"{what}: {name}"
        assert found.sharding.is_equivalent_to(wanted.sharding, wanted.ndim), (
            f"{what}: {name} lies as {found.sharding}, expected {wanted.sharding}"
        )


def assert_laid_out_like_params(case, state, params):
    """Assert it for the state leaves that stand for a parameter."""

    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731

    def check(leaf, param):
        if not masked(leaf) and leaf.shape == param.shape:
            # Of its own type: a mask is boolean, an accumulator may be wider.
            assert_same_layout(leaf, param.astype(leaf.dtype), "state")
        return leaf

    optax.tree.map_params(case.make(), check, state, params, is_leaf=masked)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[c.name for c in CASES])
def test_sharded_steps_equal_those_of_one_device(index, axis_type):
    case = CASES[index]
    mesh = jax.make_mesh((4, 2), DEVICES, axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        params, grads = trees(case, mesh)
        initial, updates, state = two_steps(case, params, grads)
        assert_same_layout(updates, params, "updates")
        assert_laid_out_like_params(case, initial, params)
        assert_laid_out_like_params(case, state, params)
        # What the compiler expects of the next step, so that it needs no other.
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, initial)
    expected, expected_state = on_one_device(index)
    # Float32 sums of at most 16 numbers of order one, added in another order, and
    # singular values that a coupled iteration amplifies by at most its ~60.
    assert_close(updates, expected, "updates", rtol=1e-4, atol=1e-5)
    assert_close(state, expected_state, "state", rtol=1e-4, atol=1e-5)
