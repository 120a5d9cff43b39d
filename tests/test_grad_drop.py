"""GradDrop: the authors' numbers, its expectation, and the transformation."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax.optimizers import TaskGrads, grad_drop, grad_drop_aggregate
from basinax.testing._trees import assert_close, assert_same_types

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "samo.npz")
JACOBIANS = sorted({k.split("/")[1] for k in GOLDEN.files if k.startswith("comb/")})

rng = np.random.default_rng(0)
GRADS = {
    "a": jnp.asarray(rng.standard_normal((3, 2, 4)), jnp.float32),
    "none": None,
    "b": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32),
}
drop = jax.jit(grad_drop)


@pytest.mark.parametrize("name", JACOBIANS)
def test_picks_what_the_authors_pick(x64, name):
    case = f"comb/{name}/"
    u = jnp.asarray(GOLDEN[case + "base_graddrop_u"])
    found = grad_drop(jnp.asarray(GOLDEN[case + "J"]), uniforms=u)
    expected = GOLDEN[case + "base_graddrop"]
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_the_average_is_the_sum(leak):
    draws = 1000
    uniforms = (jnp.arange(draws) + 0.5) / draws
    grads = GRADS["a"]
    spread = jnp.broadcast_to(uniforms[:, None, None], (draws, 2, 4))
    found = jax.vmap(lambda u: grad_drop(grads, uniforms=u, leak=leak))(spread)
    # The threshold lies within half a step of the purity, and a step is worth Σ|g|.
    error = jnp.abs(jnp.mean(found, 0) - jnp.sum(grads, 0))
    assert jnp.all(error <= 0.51 / draws * jnp.sum(jnp.abs(grads), 0) + 1e-5)
    assert jnp.max(jnp.std(found, 0)) > 0.1


def test_coordinates_in_agreement_always_pass():
    signs = jnp.array([[1.0, -1.0, 0.0, 1.0], [2.0, -3.0, 0.0, 0.0]])
    for u in (0.0, 0.5, 1 - 2.0**-24):  # the least and the largest that is drawn
        found = drop(signs, uniforms=jnp.full(4, u))
        np.testing.assert_array_equal(found, jnp.sum(signs, 0))


@pytest.mark.parametrize("scale", [1e-35, 1e35])
def test_the_choice_does_not_depend_on_scale(scale):
    u = jnp.asarray(rng.uniform(size=4), jnp.float32)
    scaled = drop(GRADS["b"] * scale, uniforms=u)
    expected = drop(GRADS["b"], uniforms=u) * scale
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_leak_per_task():
    grads = jnp.array([[1.0], [-2.0]])
    for u, expected in ((0.0, 1.0 - 2.0), (0.9, 0.25 - 2.0)):
        leak = jnp.array([0.25, 1.0])
        found = grad_drop(grads, uniforms=jnp.array([u]), leak=leak)
        np.testing.assert_allclose(found, [expected])
    everything = grad_drop(GRADS, key=0, leak=1.0)
    assert_close(everything, jax.tree.map(lambda x: x.sum(0), GRADS), "sum", 1e-6)


def test_draws_follow_the_key():
    first, again = drop(GRADS, key=jax.random.key(1)), drop(GRADS, key=1)
    other = drop(GRADS, key=2)
    assert_close(again, first, "the same key")
    assert any(jnp.any(other[n] != first[n]) for n in ("a", "b"))
    # Two leaves with the same gradients draw different numbers.
    twins = {"x": GRADS["a"], "y": GRADS["a"]}
    drawn = drop(twins, key=3)
    assert jnp.any(drawn["x"] != drawn["y"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_are_kept(dtype):
    grads = {"x": GRADS["a"].astype(dtype), "y": GRADS["b"]}
    found = grad_drop(grads, key=0)
    assert_same_types(found, jax.tree.map(lambda x: x[0], grads), "updates")
    assert drop({}, key=0) == {}


def test_nan_shows_where_it_is():
    grads = GRADS["b"].at[1, 2].set(jnp.nan)
    found = drop(grads, uniforms=jnp.full(4, 0.5))
    np.testing.assert_array_equal(jnp.isnan(found), [False, False, True, False])


def test_transformation_draws_afresh_and_takes_keys():
    params = jax.tree.map(lambda x: x[0], GRADS)
    tx = grad_drop_aggregate(key=5)
    update = jax.jit(tx.update)
    state = tx.init(params)
    first, after = update(GRADS, state, params)
    second, _ = update(GRADS, after, params)
    assert jnp.any(first["a"] != second["a"])
    given, kept = update(GRADS, after, params, key=7, unknown=1)
    assert_close(given, drop(GRADS, key=7), "updates of a given key")
    assert_close(kept, after, "state after a given key")
    keyless = grad_drop_aggregate()
    with pytest.raises(ValueError, match="grad_drop_aggregate needs random numbers"):
        keyless.update(GRADS, keyless.init(params), params)
    chain = optax.chain(tx, optax.sgd(1.0))
    updates, _ = chain.update(GRADS, chain.init(params), params)
    assert_close(updates, jax.tree.map(jnp.negative, first), "chain", rtol=1e-6)


def test_transformation_leaves_heads_and_masked_leaves_alone():
    head = jnp.arange(2.0)
    grads = TaskGrads(
        {**GRADS, "head": None},
        {"a": None, "none": None, "b": None, "head": head},
    )
    tx = grad_drop_aggregate(mask={"a": True, "none": True, "b": False, "head": True})
    updates, _ = tx.update(grads, tx.init(None), key=7)
    expected = grad_drop({"a": GRADS["a"]}, key=7)
    assert_close(updates, {**GRADS, **expected, "head": head}, "updates")


def test_bad_input_is_refused():
    for given in ({}, {"key": 0, "uniforms": GRADS}):
        with pytest.raises(ValueError, match="one of key= and uniforms="):
            grad_drop(GRADS, **given)
    with pytest.raises(TypeError, match="key is a random key"):
        grad_drop(GRADS, key=1.5)
    with pytest.raises(ValueError, match=r"array of \(3,\)"):
        grad_drop_aggregate(key=jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match="leading axes differ"):
        grad_drop({"x": jnp.ones((2, 3)), "y": jnp.ones((3, 3))}, key=0)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) for .* shape \(3,\)"):
        grad_drop(GRADS["b"], uniforms=jnp.ones(3))
