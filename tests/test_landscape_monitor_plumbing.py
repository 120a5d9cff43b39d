"""Monitors: norms, types, recovery, schedules, own metrics, mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax.landscape import (
    Metric,
    MonitorState,
    metrics,
    monitor,
)
from basinax.landscape._draws import hashed_signs


def parabola(w):
    return 0.5 * sum(
        jnp.sum(c * leaf.astype(jnp.float32) ** 2)
        for c, leaf in zip((2.0, 7.0), jax.tree.leaves(w), strict=True)
    )


def norms():
    return {"g": metrics.gradient_norm(), "u": metrics.update_norm()}


def test_norms_before_and_behind_the_step():
    w = jnp.array([3.0, 4.0])
    tx = optax.chain(optax.scale(-0.1), monitor(norms()))
    _, state = tx.update(w, tx.init(w), w)
    assert [round(float(v), 6) for v in state[1].values.values()] == [0.5, 0.5]
    _, state = tx.update(w, tx.init(w), w, grad=w)
    assert [round(float(v), 6) for v in state[1].values.values()] == [5.0, 0.5]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_values_are_float32(dtype):
    w = {"a": jnp.ones((3, 2), dtype), "frozen": None, "s": jnp.ones((), dtype)}
    tx = monitor(
        {"top": metrics.lambda_max(), "trace": metrics.hessian_trace()} | norms()
    )
    state = tx.init(w)
    updates, new = jax.jit(lambda s: tx.update(w, s, w, value_fn=parabola))(state)
    assert isinstance(new, MonitorState)
    assert updates.keys() == w.keys()
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
    assert all(v.dtype == jnp.float32 for v in new.values.values())
    # Both curvatures are exact in half precision.
    np.testing.assert_allclose(new.values["top"], 7, rtol=1e-3)
    np.testing.assert_allclose(new.values["trace"], 6 * 2 + 7, rtol=1e-3)


def test_negative_curvature_and_none():
    w = jnp.ones(5)
    tx = monitor({"top": metrics.lambda_max(), "edge": metrics.stability(0.5)})
    for c in (-3.0, 0.0):
        _, state = tx.update(
            w, tx.init(w), w, value_fn=lambda w, c=c: 0.5 * c * jnp.sum(w**2)
        )
        np.testing.assert_allclose(optax.tree.get(state, "top"), c, atol=1e-6)
        np.testing.assert_allclose(optax.tree.get(state, "edge"), c / 4, atol=1e-6)


def test_recovers_from_nan():
    """A bad batch shows in the value, and does not spoil the next measurement."""
    w = {"a": jnp.ones((3, 2)), "s": jnp.ones(())}
    tx = monitor({"top": metrics.lambda_max()})

    @jax.jit
    def update(state, factor):
        value_fn = lambda w: factor * parabola(w)  # noqa: E731
        return tx.update(w, state, w, value_fn=value_fn)[1]

    state = update(tx.init(w), jnp.nan)
    assert np.isnan(optax.tree.get(state, "top"))
    state = update(state, 1.0)
    np.testing.assert_allclose(optax.tree.get(state, "top"), 7, rtol=1e-5)


def test_an_overtaking_eigenvalue_is_noticed():
    """Although the kept vector is exactly the eigenvector of the other one."""
    tx, w = monitor({"top": metrics.lambda_max(num_steps=3)}), jnp.ones(20)

    @jax.jit
    def update(state, h):
        value_fn = lambda w: 0.5 * jnp.sum(h * w**2)  # noqa: E731
        return tx.update(w, state, w, value_fn=value_fn)[1]

    h = jnp.ones(20).at[0].set(5.0)
    state = update(tx.init(w), h)
    np.testing.assert_allclose(optax.tree.get(state, "top"), 5, rtol=1e-4)
    np.testing.assert_allclose(abs(state.memory[0].vector[0]), 1, rtol=1e-4)
    for _ in range(3):
        state = update(state, h.at[1].set(8.0))
    np.testing.assert_allclose(optax.tree.get(state, "top"), 8, rtol=1e-3)


def test_stability_follows_a_schedule():
    w = jnp.ones(3)
    rate = optax.linear_schedule(0.4, 0.2, 2)
    tx = monitor({"edge": metrics.stability(rate, 0.5, nesterov=True)}, every=2)
    state, found = tx.init(w), []
    update = jax.jit(lambda s: tx.update(w, s, w, value_fn=lambda w: jnp.sum(w**2))[1])
    for _ in range(3):
        state = update(state)
        found.append(float(state.values["edge"]))
    first, last = (2 * eta * (1 + 2 * 0.5) / (2 + 2 * 0.5) for eta in (0.4, 0.2))
    np.testing.assert_allclose(found, [first, first, last], rtol=1e-5)


def test_own_metrics():
    count = Metric(
        lambda params: jnp.zeros((), jnp.int32),
        lambda memory, seen: (memory + 1, memory + 1),
    )
    largest = lambda seen: jnp.max(jnp.abs(seen.updates))  # noqa: E731
    tx = monitor({"count": count, "largest": largest}, every=3)
    w = jnp.array([1.0, -4.0])
    state = tx.init(w)
    update = jax.jit(tx.update)
    for _ in range(7):
        _, state = update(w, state, w)
    assert float(state.values["count"]) == 3  # steps 0, 3 and 6
    assert float(optax.tree.get(state, "largest")) == 4


def test_mistakes():
    w = jnp.ones(2)
    tx = monitor({"top": metrics.lambda_max()})
    with pytest.raises(ValueError, match=r"value_fn=lambda p: loss_fn\(p, batch\)"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match=r"needs params.*tx\.update"):
        tx.update(w, tx.init(w), value_fn=parabola)
    with pytest.raises(ValueError, match="value_fn must return one real"):
        tx.update(w, tx.init(w), w, value_fn=lambda w: w)
    for every in (0, True, 1.5):
        with pytest.raises(ValueError, match="every must be a positive int"):
            monitor({}, every)
    with pytest.raises(TypeError, match="'x' must be a Metric"):
        monitor({"x": 3})
    tx = monitor({"x": lambda seen: seen.updates})
    with pytest.raises(ValueError, match="'x' must return a real scalar"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        metrics.lambda_max(0)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.hessian_trace(1)


def test_hashed_signs_are_independent():
    """Over seeds, indices, leaves and positions; n signs have a mean of 1/√n."""
    like = {"a": jnp.ones((40, 30)), "b": jnp.ones((40, 30))}
    draws = [
        np.asarray(leaf).ravel()
        for seed in (0, 1)
        for index in (0, 1, 2)
        for leaf in jax.tree.leaves(hashed_signs(like, seed, index))
    ]
    signs = np.stack(draws)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    limit = 5 / np.sqrt(signs.shape[1])
    assert abs(signs.mean(1)).max() < limit
    correlation = signs @ signs.T / signs.shape[1] - np.eye(len(signs))
    assert abs(correlation).max() < limit
    for lag in (1, 2, 30):
        assert abs((signs[:, lag:] * signs[:, :-lag]).mean(1)).max() < limit


def test_gradient_shows_an_eigenvalue_that_overtook():
    """One short round finds what the last eigenvector knows nothing of."""
    before = jnp.linspace(0.1, 1, 400).at[0].set(4.0)
    after = before.at[7].set(8.0)
    tx = monitor({"top": metrics.lambda_max(num_steps=3, max_rounds=1)})

    def loss(w, curvature):
        return 0.5 * jnp.sum(curvature * w**2)

    w = jnp.ones(400)
    state = tx.init(w)
    for curvature in (before, before, after):
        gradient = jax.grad(loss)(w, curvature)
        _, state = tx.update(
            gradient, state, w, value_fn=functools.partial(loss, curvature=curvature)
        )
    np.testing.assert_allclose(state.values["top"], 8.0, rtol=0.01)
