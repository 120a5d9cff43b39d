"""Alignment of gradients with the weights: definition, extremes, Euler, the monitor.

`golden/grokking_diagnostics.npz` holds cosines of weights with negative gradients from
the authors' first public logger (Prieto et al., arXiv:2501.04697).
"""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basinax.landscape import MonitorNLMState, monitor_nlm, nlm_alignment

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "grokking_diagnostics.npz")


def all_zero(numbers):
    return not np.any(numbers)


@pytest.mark.usefixtures("x64")
def test_reference_cosines():
    cases = [k for k in GOLDEN if k.startswith("nlm/")]
    assert cases
    for key in cases:
        case = key.removeprefix("nlm/")
        w, g = (jnp.asarray(GOLDEN[f"proj/{case}/{name}"]) for name in "wg")
        result = nlm_alignment(w, g)
        # A few roundings of sums of at most 72 numbers.
        tol = 4 * float(jnp.finfo(w.dtype).eps)
        for found in (result.cosine, result.global_cosine):
            assert found.dtype == w.dtype
            np.testing.assert_allclose(found, GOLDEN[key], rtol=0, atol=tol)
        np.testing.assert_allclose(result.radial_fraction, GOLDEN[key] ** 2, atol=tol)


align = jax.jit(nlm_alignment, static_argnames=("scope", "axes"))


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("scope", ["leaf", "global", "neuron"])
def test_parallel_and_orthogonal_at_any_size(scope, size):
    rng = np.random.default_rng(0)
    w = {
        "a": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=4), jnp.float32),
    }
    for sign in (1, -1):
        g = jax.tree.map(functools.partial(jnp.multiply, np.float32(-sign * size)), w)
        for params, grads in ((w, g), (g, w)):
            result = align(params, grads, scope=scope)
            for found in (*jax.tree.leaves(result.cosine), result.global_cosine):
                np.testing.assert_allclose(found, sign, rtol=1e-6)
            np.testing.assert_allclose(result.radial_fraction, 1, rtol=1e-6)
    turned = jnp.stack([jnp.array([[2.0, 0], [0, 3]]), jnp.array([[0, 5.0], [7, 0]])])
    w, g = turned * np.float32([[[1]], [[0]]]), turned * np.float32([[[0]], [[size]]])
    result = align(w, g, scope=scope)
    assert result.global_cosine == result.radial_fraction == 0


def test_zero_and_extreme_blocks():
    w = {"zero": jnp.zeros(3), "max": jnp.full(4, 3.4e38), "empty": jnp.ones((0, 3))}
    g = {"zero": jnp.ones(3), "max": -jnp.full(4, 1e-37), "empty": jnp.ones((0, 3))}
    result = align(w, g)
    np.testing.assert_allclose(result.cosine["max"], 1, rtol=1e-6)
    assert result.cosine["zero"] == result.cosine["empty"] == 0
    assert result.global_cosine > 0  # 2e-37, nearly all of g belongs to "zero"
    assert all_zero(nlm_alignment({}, {})[1:])
    nothing = align(w, jax.tree.map(jnp.zeros_like, w))
    assert {float(x) for x in jax.tree.leaves(nothing)} == {0.0}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_totals_by_definition(seed):
    """Per leaf, per neuron and for the tree, against one formula in float64."""
    rng = np.random.default_rng(seed)
    w, g = (
        {"a": rng.normal(size=(5, 3)), "b": rng.normal(size=(3,)) * 10.0**k}
        for k in rng.uniform(-3, 3, 2)
    )

    def cosine(x, y):
        return -x.ravel() @ y.ravel() / np.linalg.norm(x) / np.linalg.norm(y)

    def radial(blocks):
        parallel = sum((cosine(x, y) * np.linalg.norm(y)) ** 2 for x, y in blocks)
        return parallel / sum(np.linalg.norm(y) ** 2 for _, y in blocks)

    leaves = [(w["a"], g["a"]), (w["b"], g["b"])]
    neurons = [*zip(w["a"].T, g["a"].T, strict=True), leaves[1]]
    whole = tuple(np.concatenate([t["a"].ravel(), t["b"]]) for t in (w, g))
    params, grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (w, g))
    # Rounding of float32 inputs, amplified by nothing.
    close = functools.partial(np.testing.assert_allclose, atol=2e-6)
    for scope, blocks in (("leaf", leaves), ("neuron", neurons), ("global", [whole])):
        result = align(params, grads, scope=scope)
        found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(result.cosine)])
        close(found, [cosine(x, y) for x, y in blocks])
        close(result.radial_fraction, radial(blocks))
        close(result.global_cosine, cosine(*whole))


def test_euler_identity_of_a_homogeneous_net():
    """Without biases ⟨w, ∂L/∂w⟩ = Σ z ∂L/∂z for every layer of a ReLU net."""
    rng = np.random.default_rng(0)
    sizes = (6, 16, 16, 5)
    params = [
        jnp.asarray(rng.normal(size=s) * 2 / np.sqrt(s[0]), jnp.float32)
        for s in itertools.pairwise(sizes)
    ]
    x = jnp.asarray(rng.normal(size=(40, 6)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 5, 40))

    @jax.jit
    def logits_fn(params):
        h = jax.nn.relu(jax.nn.relu(x @ params[0]) @ params[1])
        return h @ params[2]

    def loss_of(z):
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(z, y)
        return jnp.mean(loss)

    z = logits_fn(params)
    euler = float(jnp.sum(z * jax.jit(jax.grad(loss_of))(z)))
    grads = jax.jit(jax.grad(lambda p: loss_of(logits_fn(p))))(params)
    result = nlm_alignment(params, grads)
    assert abs(euler) > 1e-2
    for w, g, cosine in zip(params, grads, result.cosine, strict=True):
        radial = -float(cosine) * np.linalg.norm(w) * np.linalg.norm(g)
        np.testing.assert_allclose(radial, euler, rtol=1e-4)


def test_axes_choose_the_neurons():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)), jnp.float32)
    g = w * jnp.array([1.0, -1.0]).reshape(1, 1, 2)
    flax = nlm_alignment(w, g, scope="neuron").cosine
    np.testing.assert_allclose(flax, [-1, 1], rtol=1e-6)
    torch = nlm_alignment(w, g, scope="neuron", axes=lambda _, x: range(1, x.ndim))
    assert torch.cosine.shape == (3,)
    assert np.abs(torch.cosine).max() < 1
    one = nlm_alignment(w, g, scope="neuron", axes=(-1,))
    assert one.cosine.shape == (3, 4)


def test_mask_leaves_out():
    w = {"a": jnp.ones(3), "b": {"c": jnp.ones(2), "d": None}}
    g = {"a": -jnp.ones(3), "b": {"c": jnp.full(2, np.nan), "d": None}}
    result = nlm_alignment(w, g, mask={"a": True, "b": False})
    assert result.cosine["b"] == {"c": optax.MaskedNode(), "d": None}
    np.testing.assert_allclose(result.global_cosine, 1, rtol=1e-6)
    by_call = nlm_alignment(w, g, mask=lambda p: {"a": True, "b": False})
    assert by_call.global_cosine == result.global_cosine


def test_nan_shows():
    w = {"a": jnp.ones(3), "b": jnp.ones(2)}
    for bad in (np.nan, np.inf):
        result = nlm_alignment(w, {"a": jnp.ones(3), "b": jnp.array([bad, 1.0])})
        np.testing.assert_allclose(result.cosine["a"], -1, rtol=1e-6)
        numbers = (result.cosine["b"], result.global_cosine, result.radial_fraction)
        assert np.isnan(numbers).all()


def test_alignment_mistakes():
    w = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match="shaped like the parameters"):
        nlm_alignment(w, {"a": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="use one of leaf, global, neuron"):
        nlm_alignment(w, w, scope="layer")
    with pytest.raises(ValueError, match="scope='neuron'"):
        monitor_nlm(axes=0)
    with pytest.raises(ValueError, match=r"\['b'\].*\(2,\)"):
        nlm_alignment(w, w, scope="neuron", axes=1)
    with pytest.raises(ValueError, match="once"):
        nlm_alignment(w, w, scope="neuron", axes=(0, -1))
    with pytest.raises(TypeError, match=r"\['i'\] is int32.*mask"):
        nlm_alignment({"i": jnp.arange(3)}, {"i": jnp.arange(3)})


# --- monitor -------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["leaf", "global", "neuron"])
def test_monitor_keeps_what_the_function_returns(scope):
    rng = np.random.default_rng(0)
    w, g = ({"a": jnp.asarray(rng.normal(size=(4, 3)))} for _ in range(2))
    tx = optax.chain(monitor_nlm(scope=scope), optax.adam(1e-2))
    state = tx.init(w)
    assert not any(x.any() for x in jax.tree.leaves(state[0]))
    updates, updated = jax.jit(tx.update)(g, state, w)
    assert jax.tree.map(jnp.shape, updated) == jax.tree.map(jnp.shape, state)
    expected = nlm_alignment(w, g, scope=scope)
    np.testing.assert_allclose(
        optax.tree.get(updated, "global_cosine"), expected.global_cosine, rtol=1e-5
    )
    for found, wanted in zip(
        jax.tree.leaves(updated[0]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    plain, _ = optax.adam(1e-2).update(g, optax.adam(1e-2).init(w), w)
    np.testing.assert_allclose(updates["a"], plain["a"], rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_monitor_state_is_float32(dtype):
    w = {"a": jnp.ones((3, 2), dtype), "frozen": None}
    tx = monitor_nlm()
    state = tx.init(w)
    updates, updated = tx.update(w, state, w)
    assert updates["a"] is w["a"]
    for leaf in (*jax.tree.leaves(state), *jax.tree.leaves(updated)):
        assert leaf.dtype == jnp.float32
        assert not leaf.weak_type
    assert isinstance(updated, MonitorNLMState)
    np.testing.assert_allclose(updated.alignment.cosine["a"], -1, rtol=1e-6)


def test_monitor_with_mask_and_without_params():
    w = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    g = {"kernel": -jnp.ones((3, 2)), "bias": jnp.array([np.nan, 1.0])}
    tx = monitor_nlm(mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    updates, state = tx.update(g, tx.init(w), w)
    assert updates is not g
    assert np.isnan(updates["bias"][0])
    np.testing.assert_allclose(optax.tree.get(state, "global_cosine"), 1, rtol=1e-6)
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        tx.update(g, state)
