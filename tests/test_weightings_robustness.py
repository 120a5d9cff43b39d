"""Weightings in every precision, alone and in batches, and called by mistake."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from beartype import beartype
from weighting_cases import (
    EVERY,
    JACOBIANS,
    ORDER,
    POWERS,
    WEIGHTINGS,
    assert_finite,
    assert_same_update,
    gram,
    weigh,
)

from basinax import optimizers as bx
from basinax.benchmarks import _speed_weightings


@EVERY
def test_single_precision(name):
    """Gradients of condition up to ten lose that factor, and T, of the digits."""
    for label in ("random", "aligned", "dominated", "orthogonal"):
        jacobian = JACOBIANS[label].astype(np.float32).astype(np.float64)
        with jax.enable_x64(True):
            expected = weigh(name, jacobian)
        weights = weigh(name, jacobian, np.float32)
        condition = np.linalg.cond(jacobian @ jacobian.T)
        rtol = 4 * np.finfo(np.float32).eps * max(condition, 30)
        atol = rtol * np.abs(expected).max()
        np.testing.assert_allclose(weights, expected, rtol=0, atol=atol, err_msg=label)


@EVERY
def test_float32_stays_finite(name):
    for jacobian in JACOBIANS.values():
        assert_finite(weigh(name, jacobian, np.float32))
    base = JACOBIANS["random"] @ JACOBIANS["random"].T
    for factors in ([1e-15] * 4, [1e15] * 4, [1e15, 1e-15, 1.0, 1e-5]):
        factors = np.array(factors)
        g = jnp.asarray(base * factors[:, None] * factors[None, :], np.float32)
        weights = np.asarray(WEIGHTINGS[name](g))
        assert_finite(weights)
        assert np.any(weights != 0)
    for bad in (np.nan, np.inf):
        g = gram(JACOBIANS["random"], np.float32).at[1, 2].set(bad)
        assert np.isnan(WEIGHTINGS[name](g)).all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.bfloat16) for name in WEIGHTINGS] + [("nash", jnp.float16)],
)
def test_dtype_is_kept(name, dtype):
    weights = WEIGHTINGS[name](gram(JACOBIANS["random"], np.float32).astype(dtype))
    assert weights.dtype == dtype
    assert_finite(weights.astype(np.float32))


@EVERY
def test_one_task(name):
    weighting = WEIGHTINGS[name]
    if name == "pcgrad":
        weighting = functools.partial(bx.pcgrad_weights, key=jax.random.key(0))
    weights = weighting(jnp.full((1, 1), 4.0))
    c = {"cagrad": 0.4, "cagrad1.5": 1.5}.get(name, 0)
    expected = 4 ** POWERS.get(name, 0) * (1 + c) / (1 + c**2)
    np.testing.assert_allclose(weights, [expected], rtol=1e-5)


@EVERY
def test_batches_equal_single_calls(name):
    labels = ("random", "stationary", "identical", "all zero")
    stack = jnp.stack([gram(JACOBIANS[label], np.float32) for label in labels])
    together = jax.jit(jax.vmap(WEIGHTINGS[name]))(stack)
    for label, g, weights in zip(labels, stack, together, strict=True):
        expected = np.asarray(WEIGHTINGS[name](g), np.float64)
        weights = np.asarray(weights, np.float64)
        # Batched factorizations round differently; 1e-3 of a sum where that matters.
        rtol = 1e-5 if label == "random" else 2e-3
        assert_same_update(weights, expected, JACOBIANS[label], rtol)
        assert_finite(weights)


@EVERY
def test_annotations(name):
    checked = jaxtyping.jaxtyped(typechecker=beartype)
    weighting = WEIGHTINGS[name]
    g = gram(JACOBIANS["random"], np.float32)
    if isinstance(weighting, functools.partial):
        options = dict(weighting.keywords)
        if "order" in options:
            options["order"] = jnp.asarray(options["order"])
        checked(weighting.func)(g, **options)
    else:
        checked(weighting)(g)


@EVERY
def test_only_gram_matrices(name):
    weighting = WEIGHTINGS[name]
    with pytest.raises(ValueError, match=r"\(T, T\) Gram matrix.*\(3, 4\)"):
        weighting(jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"use jax\.vmap"):
        weighting(jnp.ones((2, 4, 4)))
    with pytest.raises(TypeError, match="floating point, got int32"):
        weighting(jnp.ones((4, 4), jnp.int32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: bx.cagrad_weights(g, -0.1), "c must be finite and >= 0"),
        (lambda g: bx.cagrad_weights(g, np.inf), "c must be finite"),
        (lambda g: bx.cagrad_weights(g, rescale=3), "rescale must be 0"),
        (lambda g: bx.cagrad_weights(g, rescale=True), "rescale must be 0"),
        (lambda g: bx.fairgrad_weights(g, 0.0), "alpha must be finite and > 0"),
        (lambda g: bx.fairgrad_weights(g, -1), "alpha must be finite and > 0"),
        (lambda g: bx.fairgrad_weights(g, np.nan), "alpha must be finite"),
        (lambda g: bx.upgrad_weights(g, [1.0]), "one number per task, 4"),
        (lambda g: bx.upgrad_weights(g, [1.0, -1, 0, 0]), "preference must be >= 0"),
        (bx.pcgrad_weights, "key= or order="),
        (
            lambda g: bx.pcgrad_weights(g, ORDER, key=jax.random.key(0)),
            "key= or order=",
        ),
        (lambda g: bx.pcgrad_weights(g, ORDER[:2]), "one row per task"),
    ],
)
def test_wrong_options(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.eye(4))


def test_wrong_types():
    with pytest.raises(TypeError, match="alpha must be one number"):
        bx.fairgrad_weights(jnp.eye(4), np.ones(2))
    with pytest.raises(TypeError, match="alpha must be one number"):
        bx.fairgrad_weights(jnp.eye(4), "2")
    with pytest.raises(TypeError, match="order must hold task numbers"):
        bx.pcgrad_weights(jnp.eye(4), ORDER.astype(float))


def test_options_may_be_traced():
    g = gram(JACOBIANS["random"], np.float32)
    traced = jax.jit(bx.fairgrad_weights)(g, 2.0)
    np.testing.assert_allclose(traced, bx.fairgrad_weights(g, 2.0), rtol=1e-5)
    traced = jax.jit(bx.cagrad_weights)(g, 0.4)
    np.testing.assert_allclose(traced, bx.cagrad_weights(g, 0.4), rtol=1e-5)


def test_speed_part(monkeypatch):
    names = (_speed_weightings.REFERENCE, "mean", "aligned_mtl")
    chosen = {name: _speed_weightings.weightings()[name] for name in names}
    monkeypatch.setattr(_speed_weightings, "weightings", lambda: chosen)
    rows = _speed_weightings.measure((3,), rounds=2)
    assert len(rows) == len(names) * len(_speed_weightings.PROBLEMS)
    assert all(row["milliseconds"] > 0 for row in rows)
    text = str(_speed_weightings.table(rows, 2))
    assert "aligned_mtl" in text
    assert "dependent 3" in text
