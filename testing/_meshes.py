"""Checks that sharded updates equal those of one device and keep their layout.

The leaves are split over the devices in every way that matters to a matrix method:
along rows, along columns, along both, two equal shapes with unequal layouts, and
stacks split along the stack or inside it. Their sizes are multiples of eight, the
largest number of devices that is used.
"""

import functools

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

from basinax.testing._case import Case
from basinax.testing._trees import Tree, assert_close, describe, leaf_names, sample

AXES = ("data", "model")

LEAVES = {
    "rows": ((16, 4), jax.P(AXES, None)),
    "columns": ((4, 16), jax.P(None, AXES)),
    "both": ((8, 6), jax.P("data", "model")),
    "twin": ((8, 6), jax.P("model", None)),
    "vector": ((8,), jax.P("data")),
    "scalar": ((), jax.P()),
}
STACKS = {
    "stack": ((8, 4, 6), jax.P(AXES, None, None)),
    "stack_of_rows": ((2, 8, 6), jax.P(None, AXES, None)),
}


def device_mesh(axis_type: AxisType) -> Mesh:
    """Make a mesh of eight, four or two devices, the second axis of length two."""
    count = next(n for n in (8, 4, 2) if n <= jax.device_count())
    shape, kinds = (count // 2, 2), (axis_type,) * 2
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=jax.devices()[:count])


def _trees(case: Case, mesh: Mesh | None = None) -> tuple[Tree, Tree]:
    """Draw parameters and gradients, laid out on the mesh if there is one."""
    leaves = LEAVES | (STACKS if case.stacked else {})
    shapes = {name: shape for name, (shape, _) in leaves.items()}
    params, grads = sample(0, shapes), sample(1, shapes)
    if mesh is None:
        return params, grads
    layout = {name: NamedSharding(mesh, spec) for name, (_, spec) in leaves.items()}
    return jax.device_put((params, grads), (layout, layout))


def _two_steps(case: Case, params: Tree, grads: Tree) -> tuple[Tree, Tree, Tree]:
    """Return the state before the first step, then updates and state after two."""
    tx = case.make()
    update = jax.jit(case.updater(tx))
    updates, initial = None, tx.init(params)
    state = initial
    for _ in range(2):
        updates, state = update(grads, state, params)
    return initial, updates, state


# Of the case at hand: both kinds of mesh compare with it.
@functools.lru_cache(maxsize=1)
def _on_one_device(case: Case) -> tuple[Tree, Tree]:
    return _two_steps(case, *_trees(case))[1:]


def _assert_same_layout(actual: Tree, desired: Tree, what: str) -> None:
    pairs = zip(leaf_names(actual), leaf_names(desired), strict=True)
    for (name, found), (_, wanted) in pairs:
        # The type holds the layout over Explicit axes, the array that over Auto ones.
        types = jax.typeof(found), jax.typeof(wanted)
        assert types[0] == types[1], f"{what}: {name} is {types[0]}, not {types[1]}"
        assert found.sharding.is_equivalent_to(wanted.sharding, wanted.ndim), (
            f"{what}: {name} lies as {found.sharding}, expected {wanted.sharding}"
        )


def _assert_laid_out_like_params(case: Case, state: Tree, params: Tree) -> None:
    """Assert it for the state leaves that stand for a parameter."""

    def masked(x: Tree) -> bool:
        return isinstance(x, optax.MaskedNode)

    def check(leaf: Tree, param: jax.Array) -> Tree:
        if not masked(leaf) and leaf.shape == param.shape:
            # Of its own type: a mask is boolean, an accumulator may be wider.
            what = f"state leaf of a parameter {describe(param)}"
            _assert_same_layout(leaf, param.astype(leaf.dtype), what)
        return leaf

    optax.tree.map_params(case.make(), check, state, params, is_leaf=masked)


def _check_mesh(case: Case, axis_type: AxisType) -> None:
    mesh = device_mesh(axis_type)
    with jax.set_mesh(mesh):
        params, grads = _trees(case, mesh)
        initial, updates, state = _two_steps(case, params, grads)
        _assert_same_layout(updates, params, "updates")
        _assert_laid_out_like_params(case, initial, params)
        _assert_laid_out_like_params(case, state, params)
        # What the compiler expects of the next step, so that it needs no other.
        before, after = (dict(leaf_names(tree)) for tree in (initial, state))
        for name, leaf in before.items():
            types = jax.typeof(leaf), jax.typeof(after[name])
            assert types[0] == types[1], f"state: {name} was {types[0]}, is {types[1]}"
    expected, expected_state = _on_one_device(case)
    # Float32 sums of at most 16 numbers of order one, added in another order, and
    # singular values that a coupled iteration amplifies by at most its ~60.
    assert_close(updates, expected, "updates", rtol=1e-4, atol=1e-5)
    assert_close(state, expected_state, "state", rtol=1e-4, atol=1e-5)


def check_auto_mesh(case: Case) -> None:
    """On an Auto mesh, steps equal those of one device and keep the layout."""
    _check_mesh(case, AxisType.Auto)


def check_explicit_mesh(case: Case) -> None:
    """On an Explicit mesh, steps equal those of one device and keep the layout."""
    _check_mesh(case, AxisType.Explicit)
