"""Properties of the walk over micro-batches, in all its forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from walking_problem import (
    D,
    K,
    close,
    draws,
    flat,
    loss,
    params,
    scaled,
    sources,
    walk,
)

from basinax.optimizers import (
    nexus_value_and_grad,
)

FORMS = ("global", "per_leaf", None)


def gradients(point, batches):
    return jax.vmap(jax.grad(loss), (None, 0))(point, batches)


# One micro-batch, and no walk


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_one_microbatch_is_the_gradient(gamma):
    one = sources(count=1)
    value, gradient = walk(None)(params(), one, gamma)
    expected = jax.value_and_grad(loss)(params(), jax.tree.map(lambda x: x[0], one))
    close((value, gradient), expected)
    _, unit = walk()(params(), one, gamma)
    np.testing.assert_allclose(np.linalg.norm(flat(unit)), 1, rtol=1e-5)
    close(unit, scaled(1 / np.linalg.norm(flat(gradient)), gradient))


def test_without_walking_it_is_accumulation(x64):
    """At γ = 0 exactly; for small γ up to a term of first order."""
    start, batches = params(dtype=np.float64), sources(dtype=np.float64)
    each = gradients(start, batches)
    flats = np.stack([flat(jax.tree.map(lambda g, k=k: g[k], each)) for k in range(K)])
    units = flats / np.linalg.norm(flats, axis=1, keepdims=True)
    for form, expected in ((None, flats.mean(0)), ("global", units.mean(0))):
        at_rest = flat(walk(form)(start, batches, 0.0)[1])
        np.testing.assert_allclose(at_rest, expected, rtol=1e-12)
        off = [
            np.linalg.norm(flat(walk(form)(start, batches, gamma)[1]) - at_rest)
            for gamma in (1e-3, 1e-4)
        ]
        np.testing.assert_allclose(off[0] / off[1], 10, rtol=0.05)


# Algebra of the walk


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(FORMS), st.floats(0, 0.5))
def test_equals_a_loop(seed, form, gamma):
    start, batches = params(seed), sources(seed)
    point, total, losses = start, jax.tree.map(jnp.zeros_like, start), []
    for source in zip(*batches, strict=True):
        value, g = jax.value_and_grad(loss)(point, source)
        if form == "global":
            g = scaled(1 / np.linalg.norm(flat(g)), g)
        elif form == "per_leaf":
            g = jax.tree.map(lambda x: x / jnp.linalg.norm(x), g)
        total = jax.tree.map(jnp.add, total, g)
        point = jax.tree.map(lambda p, a: p - gamma * a, start, total)
        losses.append(value)
    value, gradient = walk(form)(start, batches, gamma)
    close(gradient, scaled(1 / K, total), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-4)


def test_reductions_agree():
    start, batches, gamma = params(), sources(), 0.2
    mean, total, way = (
        walk("global", reduce)(start, batches, gamma)[1]
        for reduce in ("mean", "sum", "displacement")
    )
    close(total, scaled(K, mean))
    close(way, scaled(gamma, total))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.5))
def test_bounded_by_one(seed, gamma):
    start, batches = params(seed), sources(seed)
    assert np.linalg.norm(flat(walk()(start, batches, gamma)[1])) <= 1 + 1e-5
    leaves = jax.tree.leaves(walk("per_leaf")(start, batches, gamma)[1])
    assert max(np.linalg.norm(leaf) for leaf in leaves) <= 1 + 1e-5


def test_parallel_gradients_reach_the_bound():
    slopes = jnp.array([1.0, 5.0, 0.1])
    fn = nexus_value_and_grad(lambda w, s: s * jnp.sum(w), 0.1)
    _, gradient = fn(jnp.ones(4), slopes)
    np.testing.assert_allclose(np.linalg.norm(gradient), 1, rtol=1e-6)


def test_scaling_the_loss(x64):
    start, batches = params(dtype=np.float64), sources(dtype=np.float64)
    one, seven = (walk("global", scale=c)(start, batches, 0.3) for c in (1.0, 7.0))
    close(one[1], seven[1], rtol=1e-10)
    raw = walk(None, scale=7.0)(start, batches, 0.3 / 7)[1]
    close(raw, scaled(7, walk(None)(start, batches, 0.3)[1]), 1e-10)
    assert not np.allclose(
        flat(raw), 7 * flat(walk(None)(start, batches, 0.3 / 7)[1]), rtol=1e-3
    )


def test_order(x64):
    """It matters in first order of γ, not without walking nor for equal batches."""
    start, batches = params(dtype=np.float64), sources(dtype=np.float64)
    back = jax.tree.map(lambda x: x[::-1], batches)

    def difference(gamma):
        one, other = (flat(walk()(start, b, gamma)[1]) for b in (batches, back))
        return np.linalg.norm(one - other)

    assert difference(0.0) < 1e-14
    np.testing.assert_allclose(difference(1e-3) / difference(1e-4), 10, rtol=0.05)


def test_rotation_equivariance(x64):
    """Of the global norm; the norm per leaf depends on the leaves."""
    rotation = jnp.linalg.qr(draws(D, D, seed=5, dtype=np.float64))[0]
    matrix, centre = sources(dtype=np.float64)
    theta = draws(D, seed=6, dtype=np.float64)
    turned = (matrix @ rotation.T, centre @ rotation.T)
    cut = lambda x: {"a": x[:3], "b": x[3:]}  # noqa: E731
    for form, holds in (("global", True), (None, True), ("per_leaf", False)):
        plain = flat(walk(form)(cut(theta), (matrix, centre), 0.2)[1])
        after = flat(walk(form)(cut(rotation @ theta), turned, 0.2)[1])
        assert np.allclose(rotation @ plain, after, rtol=1e-9) is holds


def test_geometric_median():
    """Normalised accumulation ends there, not at the mean: a bias to know of."""
    centres = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    fn = nexus_value_and_grad(lambda w, p: 0.5 * jnp.sum((w - p) ** 2), 0.0)

    def step(w, rate):
        return w - rate * fn(w, centres)[1], None

    rates = jnp.geomspace(0.3, 1e-4, 2000)
    end, _ = jax.jit(lambda w: jax.lax.scan(step, w, rates))(jnp.array([1.0, 2.0]))
    away = np.asarray(end) - np.asarray(centres)
    units = away / np.linalg.norm(away, axis=1, keepdims=True)
    np.testing.assert_allclose(units.sum(0), 0, atol=2e-3)  # its definition
    assert np.linalg.norm(away.mean(0)) > 1


# Zeros, extremes, precision


def test_zero_gradients():
    fn = nexus_value_and_grad(lambda w, s: s * jnp.sum(w**2), 0.1)
    w = jnp.array([3.0, -4.0])
    assert not np.any(fn(w, jnp.zeros(3))[1])
    one = fn(w, jnp.array([0.0, 1.0, 0.0]))[1]
    np.testing.assert_allclose(one, jnp.array([0.6, -0.8]) / 3, rtol=1e-6)
    for form in FORMS:
        fn = nexus_value_and_grad(lambda w, s: 0 * jnp.sum(w), 0.1, normalize=form)
        assert not np.any(fn(w, jnp.zeros(3))[1])


@pytest.mark.parametrize("size", [1e-10, 1e-3, 1e25, 1e38])
def test_extreme_gradients(size):
    fn = nexus_value_and_grad(lambda w, s: jnp.sum(s * w), 0.1)
    gradient = fn(jnp.ones(2), size * jnp.array([[0.75, 1.0]]))[1]
    # Gradients of the size of eps count as such: 1e-10 is shortened by 1 %.
    expected = np.array([0.6, 0.8]) / (1 + 1e-12 / (1.25 * size))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_nan_surfaces():
    fn = nexus_value_and_grad(lambda w, s: s * jnp.sum(w), 0.1)
    value, gradient = fn(jnp.ones(2), jnp.array([1.0, jnp.nan]))
    assert np.isnan(value)
    assert np.isnan(gradient).all()


def test_half_precision_parameters():
    """The accumulator keeps what a difference of parameters loses to rounding."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=4000), jnp.bfloat16)
    slopes = jnp.asarray(rng.normal(size=(8, 4000)), jnp.float32)
    gamma = 0.05

    def linear(w, slope):  # the same gradient wherever the rounded point is
        return jnp.sum(slope * w.astype(jnp.float32))

    fn = nexus_value_and_grad(linear, gamma)
    exact = fn(w.astype(jnp.float32), slopes)[1]
    got = fn(w, slopes)[1]
    assert got.dtype == jnp.float32

    def error(x):
        return np.linalg.norm(x - exact) / np.linalg.norm(exact)

    assert error(got) < 1e-6
    moved = w
    for slope in slopes:
        u = jax.grad(linear)(moved, slope).astype(jnp.float32)
        moved = (moved - gamma * u / jnp.linalg.norm(u)).astype(jnp.bfloat16)
    difference = (w.astype(jnp.float32) - moved.astype(jnp.float32)) / (8 * gamma)
    assert error(difference) > 0.3
    wide = nexus_value_and_grad(linear, gamma, accumulator_dtype=jnp.bfloat16)
    assert wide(w, slopes)[1].dtype == jnp.bfloat16
