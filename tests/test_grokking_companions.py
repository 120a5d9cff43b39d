"""Grokfast, training at a fixed weight norm, and grokking tickets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basinax.optimizers import (
    grokfast_ema,
    keep_masked,
    keep_weight_norm,
    magnitude_mask,
)


def run(tx, gradients, params=None):
    """Return the updates for a sequence of gradients."""
    state = tx.init(gradients[0])
    return jax.lax.scan(lambda s, g: tx.update(g, s, params)[::-1], state, gradients)[1]


# --- Grokfast ------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("init", ["first", "zeros"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), alpha=st.floats(0, 0.99), lamb=st.floats(-2, 10))
def test_grokfast_recursion(init, seed, alpha, lamb):
    g = np.random.default_rng(seed).normal(size=(6, 3))
    mu = g[0] if init == "first" else np.zeros(3)
    expected = []
    for row in g:
        mu = alpha * mu + (1 - alpha) * row
        expected.append(row + lamb * mu)
    found = run(grokfast_ema(alpha, lamb, init=init), jnp.asarray(g))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_grokfast_gain_of_constant_and_alternating_gradients():
    """1 + λ at zero frequency; 1 + λ (1-α)/(1+α) at the highest, once settled."""
    alpha, lamb, steps = 0.9, 5.0, 300
    constant = run(grokfast_ema(alpha, lamb), jnp.ones(steps))
    np.testing.assert_allclose(constant, 1 + lamb, rtol=1e-6)  # from the first step on
    zeros = run(grokfast_ema(alpha, lamb, init="zeros"), jnp.ones(steps))
    built_up = 1 - alpha ** np.arange(1, steps + 1)
    np.testing.assert_allclose(zeros, 1 + lamb * built_up, rtol=1e-5)
    signs = jnp.asarray((-1.0) ** np.arange(steps), jnp.float32)
    alternating = run(grokfast_ema(alpha, lamb), signs) * signs
    gain = 1 + lamb * (1 - alpha) / (1 + alpha)
    np.testing.assert_allclose(alternating[-50:], gain, rtol=1e-6)
    assert gain < 1.3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_grokfast_averages_in_single_precision(dtype):
    """In the gradients' own precision the average would stop short of its limit."""
    g = jnp.concatenate([jnp.full(1, 1.0), jnp.full(2000, 2.0)]).astype(dtype)
    tx = grokfast_ema(0.995, 1.0)
    assert tx.init(g[0]).ema.dtype == jnp.float32
    found = run(tx, g)
    assert found.dtype == dtype
    # μ is within 2·0.995²⁰⁰⁰ < 1e-4 of 2, less than half a spacing.
    assert found[-1] == 4
    own = jnp.ones((), dtype)
    for _ in range(2000):
        own = (jnp.asarray(0.995, dtype) * own + jnp.asarray(0.005, dtype) * 2).astype(
            dtype
        )
        if own == 2:
            break
    else:
        assert own < 1.99


def test_grokfast_mistakes():
    for alpha in (1.0, -0.1, np.nan):
        with pytest.raises(ValueError, match="alpha"):
            grokfast_ema(alpha)
    with pytest.raises(ValueError, match="first, zeros"):
        grokfast_ema(init="ones")


# --- fixed weight norm ---------------------------------------------------------------

SCOPES = ("global", "leaf", "neuron")


def tree(seed=0, scale=1.0, dtype="float32"):
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 2, 4), "kernel": (5, 3), "bias": (3,)}
    return {
        name: jnp.asarray(scale * rng.normal(size=shape), dtype)
        for name, shape in shapes.items()
    }


def norms(params, scope):
    """Norms of the blocks, by definition and in float64."""
    leaves = {k: np.asarray(params[k], np.float64) for k in sorted(params)}
    if scope == "global":
        return np.sqrt(sum(np.sum(x**2) for x in leaves.values()))
    axes = lambda x: tuple(range(x.ndim - 1 if x.ndim > 1 else 1))  # noqa: E731
    over = axes if scope == "neuron" else lambda x: None
    return np.concatenate(
        [np.ravel(np.sqrt((x**2).sum(over(x)))) for x in leaves.values()]
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_norm_is_kept_for_a_hundred_steps(scope):
    tx = optax.chain(optax.adamw(1e-2, weight_decay=0.1), keep_weight_norm(scope=scope))
    params = start = tree()

    @jax.jit
    def step(params, state, seed):
        # Pushes outwards, in a direction that changes.
        grads = jax.tree.map(lambda p: jnp.sin(17 * p + seed) - p, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for seed in range(100):
        params, state = step(params, state, jnp.float32(seed))
        np.testing.assert_allclose(norms(params, scope), norms(start, scope), rtol=1e-6)
    moved = optax.tree.norm(optax.tree.sub(params, start))
    assert moved > 0.1 * optax.tree.norm(start)
    # Control: the norm is not kept by itself, nor is that of the other blocks.
    plain = optax.adamw(1e-2)
    updates, _ = plain.update(tree(1), plain.init(start), start)
    drift = norms(optax.apply_updates(start, updates), scope) / norms(start, scope) - 1
    assert np.abs(drift).max() > 1e-4


@pytest.mark.usefixtures("x64")
def test_scopes_differ_as_they_should():
    params, u = tree(dtype="float64"), tree(1, dtype="float64")
    for scope in SCOPES:
        tx = keep_weight_norm(scope=scope)
        updates, _ = jax.jit(tx.update)(u, tx.init(params), params)
        new, raw = optax.tree.add(params, updates), optax.tree.add(params, u)
        for other in SCOPES:
            same = np.allclose(norms(new, other), norms(params, other), rtol=1e-12)
            assert same == (SCOPES.index(other) <= SCOPES.index(scope))
        ratio = norms(params, scope) / norms(raw, scope)
        if scope == "global":
            for name, leaf in new.items():
                np.testing.assert_allclose(leaf, ratio * raw[name], rtol=1e-12)


def test_finds_the_nearest_point_of_the_sphere():
    """Gradient descent on ‖θ - t‖² under it ends at ‖θ_0‖ t / ‖t‖."""
    target = {"a": jnp.array([3.0, -1.0]), "b": jnp.array([[2.0], [0.5]])}
    start = {"a": jnp.array([0.3, 0.4]), "b": jnp.array([[-1.0], [1.0]])}
    tx = optax.chain(optax.sgd(0.1), keep_weight_norm())

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(optax.tree.sub(params, target), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=300)
    ratio = optax.tree.norm(start) / optax.tree.norm(target)
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, ratio * target[name], rtol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scale", [1e-32, 1e-20, 1e20, 1e36])
def test_any_scale(scope, scale):
    params, u = tree(), tree(1)
    tx = keep_weight_norm(scope=scope)
    update = jax.jit(tx.update)
    expected, _ = update(u, tx.init(params), params)
    large = functools.partial(jax.tree.map, lambda x: x * np.float32(scale))
    found, _ = update(large(u), tx.init(large(params)), large(params))
    for name, leaf in found.items():
        np.testing.assert_allclose(
            np.float64(leaf) / scale, expected[name], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("scope", SCOPES)
def test_norm_beyond_the_largest_number(scope):
    params = jnp.full((10_000, 3), 3e38)  # of norm 3e40 and more
    tx = keep_weight_norm(scope=scope)
    state = tx.init(params)
    np.testing.assert_allclose(state.rms, 3e38, rtol=1e-6)
    updates, _ = tx.update(-params / 2, state, params)
    np.testing.assert_allclose(np.float64(params) + updates, 3e38, rtol=1e-6)


def test_zero_norms():
    """A block that starts at zero stays; a step to zero is skipped."""
    tx = keep_weight_norm(scope="leaf")
    params = {"zero": jnp.zeros(3), "ones": jnp.ones(2), "empty": jnp.ones((0, 2))}
    u = {"zero": jnp.ones(3), "ones": -jnp.ones(2), "empty": jnp.ones((0, 2))}
    updates, _ = tx.update(u, tx.init(params), params)
    assert not updates["zero"].any()
    assert not updates["ones"].any()
    grow = keep_weight_norm()
    params = {"zero": jnp.zeros(3), "ones": jnp.ones(1)}
    updates, _ = grow.update(
        {"zero": jnp.ones(3), "ones": jnp.zeros(1)}, grow.init(params), params
    )
    np.testing.assert_allclose(updates["zero"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["ones"], -0.5, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norm_in_low_precision_does_not_drift(dtype):
    params = start = tree(dtype=dtype)
    tx = keep_weight_norm()
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(20):
        updates, state = update(tree(seed, 0.05, dtype), state, params)
        assert updates["bias"].dtype == dtype
        params = optax.apply_updates(params, updates)
    # Each of 42 entries rounds at random, relative to itself.
    tol = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        norms(params, "global"), norms(start, "global"), rtol=tol
    )


def test_norm_axes_mask_nan_and_mistakes():
    params, u = tree(), tree(1)
    fan_in = keep_weight_norm(
        scope="neuron", axes=lambda _, x: range(1, x.ndim) or None
    )
    state = fan_in.init(params)
    assert state.rms["kernel"].shape == (5, 1)
    rms = np.sqrt(np.mean(np.square(params["kernel"]), 1, keepdims=True))
    np.testing.assert_allclose(state.rms["kernel"], rms, rtol=1e-6)
    updates, _ = fan_in.update(u, state, params)
    new = optax.apply_updates(params, updates)
    rows = [np.linalg.norm(p["kernel"], axis=1) for p in (new, params)]
    np.testing.assert_allclose(*rows, rtol=1e-6)

    matrices = keep_weight_norm(mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    updates, _ = matrices.update(u, matrices.init(params), params)
    assert updates["bias"] is u["bias"]
    new = optax.apply_updates(params, updates) | {"bias": params["bias"]}
    np.testing.assert_allclose(norms(new, "global"), norms(params, "global"), rtol=1e-6)

    leaf = keep_weight_norm(scope="leaf")
    bad = u | {"bias": u["bias"].at[0].set(np.nan)}
    updates, _ = leaf.update(bad, leaf.init(params), params)
    assert np.isnan(updates["bias"]).all()
    assert np.isfinite(updates["kernel"]).all()

    counter = {"w": jnp.ones(2), "n": jnp.arange(2)}
    tx = keep_weight_norm()
    updates, _ = tx.update(counter, tx.init(counter), counter)
    assert updates["n"] is counter["n"]
    np.testing.assert_allclose(updates["w"], 0, atol=1e-6)

    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="leaf, global, neuron"):
        keep_weight_norm(scope="row")
    with pytest.raises(ValueError, match="axes"):
        keep_weight_norm(axes=0)


# --- tickets -------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), keep=st.floats(0, 1))
def test_mask_drops_the_smallest(seed, keep):
    """Exactly int((1-ρ)N) of distinct magnitudes, by one threshold or one per leaf."""
    params = tree(seed, 10.0 ** (seed % 60 - 30))
    for scope in ("global", "leaf"):
        mask = magnitude_mask(params, keep, scope=scope)
        groups = [list(params)] if scope == "global" else [[name] for name in params]
        for group in groups:
            w = np.concatenate([np.ravel(params[name]) for name in group])
            m = np.concatenate([np.ravel(mask[name]) for name in group])
            k = int((1 - keep) * w.size)
            assert np.sum(~m) == k
            assert np.abs(w[~m]).max(initial=0) < np.abs(w[m]).min(initial=np.inf)


def test_mask_ties_go_with_the_threshold():
    params = {"a": jnp.array([1.0, -1.0, 0.0]), "b": jnp.array([2.0, 1.0, -0.0])}
    dropped = {0: 0, 1: 2, 2: 2, 3: 5, 5: 5, 6: 6}  # k: how many go
    for k, number in dropped.items():
        mask = magnitude_mask(params, 1 - (k + 0.5) / 6 if k < 6 else 0.0)
        assert sum(int((~m).sum()) for m in mask.values()) == number


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_mask_dtypes_and_jit(dtype, x64):
    params = tree(dtype=dtype) | {"none": None, "steps": jnp.arange(3)}
    mask = magnitude_mask(params, 0.3)
    jitted = jax.jit(functools.partial(magnitude_mask, keep=0.3))(params)
    assert mask["none"] is None
    assert mask["steps"].all()
    w = np.concatenate(
        [np.ravel(np.float64(params[k])) for k in ("bias", "conv", "kernel")]
    )
    k = int(0.7 * w.size)
    threshold = np.sort(np.abs(w))[k - 1]
    for name in ("bias", "conv", "kernel"):
        assert mask[name].dtype == bool
        expected = np.abs(np.float64(params[name])) > threshold
        np.testing.assert_array_equal(mask[name], expected)
        np.testing.assert_array_equal(jitted[name], expected)


def test_mask_options_and_mistakes():
    params = tree()
    spare = magnitude_mask(
        params, 0.0, mask={"conv": True, "kernel": True, "bias": False}
    )
    assert spare["bias"].all()
    assert not spare["conv"].any()
    by_call = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)  # noqa: E731
    assert magnitude_mask(params, 0.5, mask=by_call)["bias"].all()
    assert magnitude_mask({}, 0.5) == {}
    assert magnitude_mask({"e": jnp.ones((0, 2))}, 0.5)["e"].shape == (0, 2)
    bad = magnitude_mask(jnp.array([np.nan, 1.0, 2.0]), 0.5)
    np.testing.assert_array_equal(bad, [True, False, True])
    for keep in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            magnitude_mask(params, keep)
    with pytest.raises(TypeError, match="compile-time"):
        jax.jit(magnitude_mask)(params, 0.5)
    with pytest.raises(ValueError, match="global, leaf"):
        magnitude_mask(params, 0.5, scope="neuron")


def test_retrained_ticket_stays_sparse():
    """From the initial weights, under AdamW with decay: exact zeros to the end."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(64, 10)), np.zeros(10)
    w[:3] = 2, -3, 1
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(x @ w, jnp.float32)

    @jax.jit
    def loss_fn(params):
        return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)

    def train(params, tx, steps=400):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]

    initial = {"w": jnp.asarray(rng.normal(size=10), jnp.float32), "b": jnp.zeros(())}
    adamw = optax.adamw(0.03, weight_decay=1e-3)
    dense, _ = train(initial, adamw)
    ticket = magnitude_mask(dense, 0.27)
    assert ticket["w"].tolist() == [True] * 3 + [False] * 7
    sparse = jax.tree.map(lambda w, m: jnp.where(m, w, 0), initial, ticket)
    trained, state = train(sparse, optax.chain(adamw, keep_masked(ticket)))
    assert not trained["w"][3:].any()
    assert loss_fn(trained) < 1e-2 < loss_fn(sparse)
    assert optax.tree.get(state, "mask")["w"].tolist() == ticket["w"].tolist()
    # Control: it is the mask that keeps them at zero.
    loose, _ = train(sparse, adamw, steps=5)
    assert loose["w"][3:].all()
    # First in the chain, it also keeps the moments of what it masks at zero.
    _, state = train(sparse, optax.chain(keep_masked(ticket), adamw), steps=5)
    assert not optax.tree.get(state, "mu")["w"][3:].any()


def test_masked_updates_are_replaced():
    mask = {"a": jnp.array([True, False]), "b": False}
    u = {"a": jnp.array([1.0, np.nan]), "b": jnp.full((2, 2), np.inf)}
    tx = keep_masked(mask)
    updates, state = tx.update(u, tx.init(u))
    assert updates["a"].tolist() == [1, 0]
    assert not updates["b"].any()
    # A mask of its own, which donation cannot take from the caller.
    assert state.mask["a"] is not mask["a"]
    jax.jit(tx.update, donate_argnums=1)(u, state)
    assert mask["a"].tolist() == [True, False]
    by_call = keep_masked(functools.partial(magnitude_mask, keep=0.5))
    assert by_call.init(jnp.array([1.0, 2.0])).mask.tolist() == [False, True]


def test_mask_that_does_not_fit():
    params = {"a": jnp.ones(2)}
    for mask, error in (
        ({"b": jnp.ones(2, bool)}, ValueError),
        ({"a": jnp.ones(3, bool)}, ValueError),
        ({"a": jnp.ones(2)}, TypeError),
    ):
        with pytest.raises(error, match="mask"):
            keep_masked(mask).init(params)
