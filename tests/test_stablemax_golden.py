"""Values of the authors' code and exact values at the same logits, reproduced.

`golden/grokking_losses.npz` stacks fourteen sets of logits, each rounded to float64 and
to float32: ordinary ones, scales from 1e-10 to 1e30, targets ahead by 20 to 2e8 or
behind by 50.  `stablemax_*`, `softmax32_*`, `log_stablemax` and `s/*` come from the
authors' PyTorch code (commit 0cc9e8dc of LucasPrietoAl/grokking-at-the-edge-of-
numerical-stability; all but softmax32 in float64), `exact_*` from 60-digit arithmetic.
Gradients are those of the mean over the six samples of a set.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax import optimizers as bx

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "grokking_losses.npz")
SETS = [str(name) for name in GOLDEN["sets"]]
LABELS = GOLDEN["labels"].astype(np.int32)
SAMPLES = len(LABELS)
LOSSES = {
    "stablemax": bx.stablemax_cross_entropy_with_integer_labels,
    "softmax": bx.collapse_free_cross_entropy_with_integer_labels,
}
# Softmax at a lead of 100 rounds an exponent of 100: a relative error of 100 eps/2.
RTOL = {"f64": 3e-14, "f32": 6e-6}
STABLEMAX_RTOL = {"f64": 2e-15, "f32": 6e-7}  # a few roundings, at any scale
# Products below the smallest normal number are flushed to zero.
FLOOR = {"f64": 1e-300, "f32": 1e-37}
# The authors' float64 rounds p_t - 1 once the target is far ahead.
ROUNDED = ("gap1e4", "sym1e5", "sym1e8")


@pytest.fixture(params=["f64", "f32"])
def precision(request):
    with jax.enable_x64(request.param == "f64"):
        yield request.param


def golden(precision, key, name=None):
    values = GOLDEN[f"{precision}/{key}"]
    return values if name is None else values[SETS.index(name)]


@functools.cache
def evaluate(loss, precision):
    """Return losses of all sets and the gradients of each set's mean."""
    z = jnp.asarray(golden(precision, "z"))
    labels = jnp.broadcast_to(jnp.asarray(LABELS), z.shape[:2])

    @jax.jit
    def both(z):
        values, pull = jax.vjp(lambda z: loss(z, labels), z)
        return values, pull(jnp.full_like(values, 1 / SAMPLES))[0]

    return both(z)


def assert_relative(actual, expected, rtol, floor):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    seen = np.abs(expected) > floor
    np.testing.assert_allclose(actual[seen], expected[seen], rtol=rtol, atol=0)
    assert np.all(np.abs(actual[~seen]) <= 2 * floor)


@pytest.mark.parametrize("name", LOSSES)
def test_exact_losses_and_gradients(name, precision):
    rtol = STABLEMAX_RTOL if name == "stablemax" else RTOL
    results = evaluate(LOSSES[name], precision)
    for actual, kind in zip(results, ("none", "grad"), strict=True):
        exact = golden(precision, f"exact_{name}_ce_{kind}")
        assert_relative(actual, exact, rtol[precision], FLOOR[precision])


def test_soft_labels_keep_the_digits_too(precision):
    """One-hot labels go through log-probabilities, whose derivatives are as exact."""
    one_hot = np.eye(golden(precision, "z").shape[-1])

    def loss(z, labels):
        return bx.stablemax_cross_entropy(z, jnp.asarray(one_hot, z.dtype)[labels])

    values, gradients = evaluate(loss, precision)
    exact = golden(precision, "exact_stablemax_ce_none")
    assert_relative(values, exact, STABLEMAX_RTOL[precision], FLOOR[precision])
    # On a target that is not the most probable class, p_t - 1 is a difference.
    for name in ("gap20", "gap100", "gap1e4", "sym1e5", "sym1e8"):
        exact = golden(precision, "exact_stablemax_ce_grad", name)
        gradient = gradients[SETS.index(name)]
        assert_relative(gradient, exact, STABLEMAX_RTOL[precision], FLOOR[precision])


def test_authors_losses_where_their_arithmetic_holds(precision):
    values, gradients = evaluate(LOSSES["stablemax"], precision)
    for name in set(SETS) - set(ROUNDED):
        index, rtol = SETS.index(name), RTOL[precision]
        theirs = golden(precision, "stablemax_ce_none", name)[:, 0]
        assert_relative(values[index], theirs, rtol, FLOOR[precision])
        theirs = golden(precision, "stablemax_ce_grad", name)
        assert_relative(gradients[index], theirs, rtol, FLOOR[precision])


def test_controls_collapse():
    """The sets are hard: the authors' float64 and ordinary float32 fail on them."""
    exact = golden("f64", "exact_stablemax_ce_grad", "sym1e8")
    theirs = golden("f64", "stablemax_ce_grad", "sym1e8")
    assert np.abs(theirs / exact - 1).max() > 0.05
    samples = np.arange(SAMPLES)
    optax_loss = optax.losses.softmax_cross_entropy_with_integer_labels
    _, usual = evaluate(optax_loss, "f32")
    for name in ("gap20", "gap100", "gap1e4", "sym1e5"):
        assert not golden("f32", "softmax32_ce_grad", name)[samples, LABELS].any()
        assert not usual[SETS.index(name)][samples, LABELS].any()


def test_log_stablemax(precision):
    z = jnp.asarray(golden(precision, "z"))
    ours = np.asarray(bx.log_stablemax(z), np.float64)
    # They compute in float64 whatever z was rounded to, with an error of its eps where
    # p rounds to 1; ours is relative, so the targets can be held to the exact losses.
    tolerance = {"f64": 3e-16, "f32": 1.5e-7}[precision]
    theirs = golden(precision, "log_stablemax")
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    target = ours[:, np.arange(SAMPLES), LABELS]
    exact = golden(precision, "exact_stablemax_ce_none")
    assert_relative(-target, exact, STABLEMAX_RTOL[precision], FLOOR[precision])


def test_function_s(precision):
    x = jnp.asarray(golden(precision, "s/x"))
    s, slope = golden(precision, "s/s"), golden(precision, "s/ds_autograd")
    eps = float(jnp.finfo(x.dtype).eps)
    # s = e^symlog: an exponent of 69 at 1e30 costs 69 roundings.
    np.testing.assert_allclose(jnp.exp(bx.symlog(x)), s, rtol=100 * eps)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = slope / s
    # Their float32 derivative is NaN at x = 1, where an unused branch overflows.
    known = np.isfinite(expected) & (np.abs(expected) > FLOOR[precision])
    ours = jax.jit(jax.vmap(jax.grad(bx.symlog)))(x)
    np.testing.assert_allclose(ours[known], expected[known], rtol=4 * eps)
    ones = np.asarray(x) == 1
    assert ones.any()
    np.testing.assert_array_equal(ours[ones], 0.5)


def test_stablemax_is_s_over_its_sum(precision):
    z = jnp.asarray(golden(precision, "z"))
    p = np.asarray(bx.stablemax(z), np.float64)
    wide = np.asarray(z, np.float64)
    s = np.where(wide >= 0, 1 + np.abs(wide), 1 / (1 + np.abs(wide)))
    rtol = {"f64": 4e-15, "f32": 6e-7}[precision]
    assert_relative(p, s / s.sum(-1, keepdims=True), rtol, FLOOR[precision])
