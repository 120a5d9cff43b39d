"""SAM and ASAM: masks and trees, precision, transformations and meshes, mistakes."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from tree_checks import close, identical, norm

from basinax import optimizers as bx
from basinax.optimizers._ascent import ascent

rng = np.random.default_rng(0)


# --- masks and trees -----------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        {"free": True, "fixed": False},
        lambda params: {"free": True, "fixed": {"a": False, "b": np.bool_(False)}},
    ],
    ids=["prefix", "callable"],
)
def test_masked_leaves_stay_put_and_do_not_count(mask):
    loss_fn = lambda p: jnp.sum(  # noqa: E731
        p["free"] ** 3 * p["fixed"]["a"] * p["fixed"]["b"]
    )
    free = jnp.array([1.0, 2.0])
    fixed = {"a": jnp.array([3.0, 1.0]), "b": jnp.array(1.5)}
    params = {"free": free, "fixed": fixed}
    clean = jax.grad(loss_fn)(params)
    step = ascent(clean, params, 0.2, mask=mask)
    assert step["fixed"] == {"a": None, "b": None}
    identical(step["free"], ascent(clean["free"], free, 0.2))
    _, gradient = bx.sam_value_and_grad(loss_fn, rho=0.2, mask=mask)(params)
    wanted = jax.grad(loss_fn)({"free": free + step["free"], "fixed": fixed})
    identical(gradient, wanted)  # also for what stays put


def test_unscaled_leaves_have_unit_scale():
    w = {"weight": jnp.array([2.0, 0.0]), "bias": jnp.zeros(2)}
    g = {"weight": jnp.array([1.0, 1.0]), "bias": jnp.array([3.0, 4.0])}
    step = ascent(g, w, 1.0, adaptive=True, unscaled={"weight": False, "bias": True})
    length = np.sqrt(4 + 25)
    close(
        step,
        {"weight": np.array([4, 0]) / length, "bias": np.array([3, 4]) / length},
        1e-6,
    )
    assert norm(ascent(g, w, 1.0, adaptive=True)["bias"]) == 0


def test_holes_in_trees():
    params = {"w": jnp.array([3.0, 4.0]), "none": None, "masked": optax.MaskedNode()}
    loss_fn = lambda p: jnp.sum(p["w"] ** 2)  # noqa: E731
    gradient = jax.grad(loss_fn)(params)
    found = bx.sam_value_and_grad(loss_fn, rho=0.5)(params)[1]
    assert jax.tree.structure(found) == jax.tree.structure(params)
    close(found["w"], np.array([6.6, 8.8]), 1e-6)
    # A gradient that the loop left out: its parameter stays put.
    params = {"w": jnp.array([3.0, 4.0]), "v": jnp.array(2.0)}
    loss_fn = lambda p: jnp.sum(p["w"] ** 2) * p["v"] ** 2  # noqa: E731
    gradient = jax.grad(loss_fn)(params) | {"v": None}
    tx = bx.sam(0.5)
    updates, _ = tx.update(gradient, tx.init(params), params, value_fn=loss_fn)
    assert updates["v"] is None
    close(updates["w"], 4 * np.array([6.6, 8.8]), 1e-6)


def test_module_with_leaves_that_are_no_arrays():
    model = {"w": jnp.array([0.3, -0.5]), "activation": jnp.tanh}
    loss_fn = lambda model: jnp.sum(model["activation"](model["w"]) ** 2)  # noqa: E731
    oracle = bx.sam_value_and_grad(
        loss_fn,
        rho=0.1,
        value_and_grad=lambda f, argnums, has_aux: eqx.filter_value_and_grad(
            f, has_aux=has_aux
        ),
    )
    value, gradient = oracle(model)
    plain = bx.sam_value_and_grad(lambda w: jnp.sum(jnp.tanh(w) ** 2), rho=0.1)
    identical((value, gradient["w"]), plain(model["w"]))
    assert gradient["activation"] is None


# --- precision -----------------------------------------------------------------------


def test_zero_gradient_gives_no_perturbation_and_no_nan():
    params = {"w": jnp.zeros((2, 3)), "b": jnp.ones(3)}
    zero = jax.tree.map(jnp.zeros_like, params)
    with jax.debug_nans(True):  # not even in a branch that is not selected
        for adaptive in (False, True):
            identical(ascent(zero, params, 0.1, adaptive=adaptive), zero)
            loss_fn = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum((p["b"] - 1) ** 2)  # noqa: E731
            oracle = bx.sam_value_and_grad(loss_fn, rho=0.1, adaptive=adaptive)
            identical(jax.jit(oracle)(params), (jnp.zeros(()), zero))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows_everywhere(bad):
    params = {"w": jnp.ones(2), "b": jnp.ones(())}
    gradient = {"w": jnp.array([bad, 1.0]), "b": jnp.ones(())}
    step = ascent(gradient, params, 0.1)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(step))
    assert not np.isnan(
        ascent(gradient, params, 0.1, mask={"w": False, "b": True})["b"]
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_does_not_round_the_perturbation_away(dtype):
    n, rho = 16384, 0.05
    w, step = jnp.ones(n, dtype), rho / n**0.5
    assert dtype(1 + step) == 1
    seen = []

    def loss_fn(w):
        """Nearly flat at one: what comes out is the perturbation."""
        seen.append(w.dtype)
        w = w.astype(jnp.float32) - 1
        return jnp.sum(jnp.square(w)) + 1e-6 * jnp.sum(w)

    _, gradient = bx.sam_value_and_grad(loss_fn, rho=rho)(w)
    assert seen == [dtype, jnp.float32]
    assert gradient.dtype == dtype
    np.testing.assert_allclose(np.float32(gradient), 2 * step + 1e-6, rtol=4e-3)
    tx = bx.sam(rho)
    updates, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w, value_fn=loss_fn)
    np.testing.assert_array_equal(np.float32(updates), np.float32(gradient))


def test_loss_that_cannot_take_float32_is_explained():
    w = jnp.ones((1, 1, 3), jnp.bfloat16)
    x = jnp.ones((1, 1, 5), jnp.bfloat16)
    loss_fn = lambda w: jnp.sum(jax.lax.conv(x, w, (1,), "SAME"))  # noqa: E731
    with pytest.raises(TypeError) as caught:
        bx.sam_value_and_grad(loss_fn, rho=0.1)(w)
    assert "half-precision parameters as float32" in " ".join(caught.value.__notes__)
    cast = lambda w: loss_fn(w.astype(jnp.bfloat16))  # noqa: E731
    bx.sam_value_and_grad(cast, rho=0.1)(w)


# --- transformations and meshes ------------------------------------------------------


def test_oracle_under_vmap_and_scan():
    loss_fn = lambda w, x: jnp.sum(jnp.sin(w * x))  # noqa: E731
    oracle = bx.sam_value_and_grad(loss_fn, rho=0.3)
    w, x = (jnp.asarray(rng.standard_normal((3, 4)), jnp.float32) for _ in range(2))
    one_by_one = [oracle(w[i], x[i])[1] for i in range(3)]
    close(jax.vmap(oracle)(w, x)[1], jnp.stack(one_by_one), 1e-5, 1e-6)

    def step(w, x):
        return w - 0.1 * oracle(w, x)[1], None

    looped = w[0]
    for row in x:
        looped = looped - 0.1 * oracle(looped, row)[1]
    close(jax.jit(lambda w: jax.lax.scan(step, w, x)[0])(w[0]), looped, 1e-5, 1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_network_on_a_mesh(axis_type):
    """With examples and weights split over devices, the ascent is the whole batch's."""
    params = {
        "in": np.float32(rng.standard_normal((4, 8))),
        "out": np.float32(rng.standard_normal((8, 4))),
    }
    x = np.float32(rng.standard_normal((16, 4)))

    def loss_fn(params, x):
        hidden = jnp.tanh(jnp.matmul(x, params["in"], out_sharding=hidden_layout))
        outputs = jnp.matmul(hidden, params["out"], out_sharding=layout)
        return jnp.mean(jnp.square(outputs - x))

    oracle = bx.sam_value_and_grad(loss_fn, rho=0.5)
    layout = hidden_layout = None
    wanted = jax.jit(oracle)(params, x)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        if axis_type == AxisType.Explicit:
            layout = jax.P("data", None)
            hidden_layout = jax.P("data", "model")
        specs = {"in": jax.P(None, "model"), "out": jax.P("model", None)}
        put = {
            k: jax.device_put(params[k], NamedSharding(mesh, s))
            for k, s in specs.items()
        }
        rows = jax.device_put(x, NamedSharding(mesh, jax.P("data", None)))
        value, gradient = jax.jit(bx.sam_value_and_grad(loss_fn, rho=0.5))(put, rows)
        for name, leaf in gradient.items():
            assert leaf.sharding.is_equivalent_to(put[name].sharding, 2)
    # Means of 64 numbers of order one, added in another order.
    close(jax.tree.map(np.asarray, (value, gradient)), wanted, 1e-4, 1e-6)


# --- mistakes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rho": -0.1}, ValueError, "rho must be finite and >= 0, got -0.1"),
        ({"rho": np.nan}, ValueError, "rho must be finite"),
        ({"rho": np.ones(2)}, ValueError, "rho must be a scalar"),
        ({"rho": "large"}, TypeError, "rho must be a number, got str"),
        ({"rho": 0.1, "adaptive": True, "eta": -1.0}, ValueError, "eta must be"),
        ({"rho": 0.1, "eta": 0.01}, ValueError, "eta=0.01 has no effect without"),
        ({"rho": 0.1, "unscaled": True}, ValueError, "unscaled has no effect without"),
    ],
)
def test_wrong_options_at_construction(options, kind, message):
    for make in (bx.sam, functools.partial(bx.sam_value_and_grad, jnp.sum)):
        with pytest.raises(kind, match=message):
            make(**options)


def test_wrong_calls():
    params, loss_fn = {"w": jnp.ones(2)}, lambda p: jnp.sum(p["w"] ** 2)
    with pytest.raises(TypeError, match=r"fn\(params, batch, rho=schedule\(i\)\)"):
        bx.sam_value_and_grad(loss_fn, rho=optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="rho must be finite"):
        bx.sam_value_and_grad(loss_fn, rho=0.1)(params, rho=-1.0)
    tx = bx.sam(0.1)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"value_fn is missing.*value_fn=lambda p: l"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match="params is missing"):
        tx.update(params, state, value_fn=loss_fn)
    for mask, kind in (({"v": True}, ValueError), ({"w": jnp.ones(2)}, TypeError)):
        with pytest.raises(kind, match="mask must"):
            bx.sam_value_and_grad(loss_fn, rho=0.1, mask=mask)(params)
    with pytest.raises(TypeError, match=r"\['w'\] of dtype complex64"):
        bx.sam(0.1).update({"w": 1j * params["w"]}, state, params, value_fn=loss_fn)
