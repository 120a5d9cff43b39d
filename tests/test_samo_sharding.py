"""Multi-task gradients on meshes: directions, rows and heads as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from basinax.optimizers import f_mtl_value_and_grad, samo_value_and_grad
from basinax.optimizers._spsa import draw_direction

KINDS = [AxisType.Auto, AxisType.Explicit]
SPECS = {
    "rows": jax.P("d", None),
    "columns": jax.P(None, "d"),
    "vector": jax.P("d"),
    "heads": [jax.P("d"), jax.P("d"), jax.P()],
}
OWNER = {"rows": -1, "columns": -1, "vector": -1, "heads": [0, 1, 2]}


def problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = {
        "rows": draw(8, 16),
        "columns": draw(8, 16),
        "vector": draw(16),
        "heads": [draw(16) for _ in range(3)],
    }
    directions = {"rows": draw(3, 1, 8, 16), "columns": draw(3, 1, 8, 16)}
    directions |= {"vector": draw(3, 1, 16), "heads": [None] * 3}
    return params, draw(4, 8), directions


def losses_fn(params, x):
    if jax.typeof(params["vector"]).sharding.spec[0]:
        # A loss on Explicit axes says where its products lie.
        params = jax.tree.map(lambda w: jax.sharding.reshard(w, jax.P()), params)
    h = jnp.tanh(x @ (params["rows"] + params["columns"]) + params["vector"][None])
    return jnp.stack([jnp.mean((h @ w - 1) ** 2) for w in params["heads"]])


def by_key(axis):
    fn = samo_value_and_grad(
        losses_fn,
        rho=0.1,
        owner=OWNER,
        axis=axis,
        num_samples=2 if axis == "map" else 1,
        diagnostics=True,
    )
    return lambda params, x, directions: fn(params, x, key=jax.random.key(0))


def by_directions(params, x, directions):
    fn = samo_value_and_grad(losses_fn, rho=0.1, owner=OWNER, adaptive=True)
    return fn(params, x, directions=directions)


def flat(params, x, directions):
    return f_mtl_value_and_grad(losses_fn, rho=0.1, owner=OWNER)(params, x)


def exact(params, x, directions):
    fn = samo_value_and_grad(losses_fn, rho=0.1, owner=OWNER, local="exact")
    return fn(params, x)


METHODS = {
    "map": by_key("map"),
    "unroll": by_key("unroll"),
    "vmap": by_key("vmap"),
    "given directions": by_directions,
    "exact": exact,
    "f_mtl": flat,
}


@functools.cache
def on_one_device(name):
    return jax.device_get(jax.jit(METHODS[name])(*problem()))


def layouts(mesh, leading=0):
    nothing = (None,) * leading
    return jax.tree.map(lambda spec: NamedSharding(mesh, jax.P(*nothing, *spec)), SPECS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("map", AxisType.Auto),
        ("given directions", AxisType.Auto),
        *((name, AxisType.Explicit) for name in METHODS),
    ],
    ids=str,
)
def test_same_numbers_as_on_one_device(name, kind):
    wanted = on_one_device(name)
    params, x, directions = problem()
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, layouts(mesh))
        directions = {
            leaf: jax.device_put(z, layouts(mesh, 2)[leaf]) if leaf != "heads" else z
            for leaf, z in directions.items()
        }
        found = jax.jit(METHODS[name])(params, x, directions)
    if kind == AxisType.Explicit:
        rows = found[1][0].shared if name == "f_mtl" else found[1].shared
        assert jax.typeof(rows["rows"]).sharding.spec == jax.P(None, "d", None)
        assert jax.typeof(rows["columns"]).sharding.spec == jax.P(None, None, "d")
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        scale = np.abs(y).max()
        where = jax.tree_util.keystr(path)
        # Differences of losses in single precision lose three digits, 1e-7/mu.
        rtol = 1e-3 if "slopes" in where else 2e-5
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * scale, err_msg=where)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_directions_are_bit_equal_and_laid_out_like_the_parameters(kind):
    params, *_ = problem()
    params.pop("heads")
    wanted = jax.device_get(draw_direction(jax.random.key(1), params))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    places = layouts(mesh)
    places.pop("heads")
    with jax.set_mesh(mesh):
        params = jax.device_put(params, places)
        found = jax.jit(draw_direction)(jax.random.key(1), params)
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[name])
        if kind == AxisType.Explicit:
            assert leaf.sharding.is_equivalent_to(places[name], leaf.ndim)
