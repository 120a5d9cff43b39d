"""Mathematics of StableMax and of the losses that do not collapse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basinax import optimizers as bx

stable = bx.stablemax_cross_entropy_with_integer_labels
free = bx.collapse_free_cross_entropy_with_integer_labels
usual = optax.losses.softmax_cross_entropy_with_integer_labels
LOSSES = pytest.mark.parametrize("loss", [stable, free], ids=["stablemax", "softmax"])

properties = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CLASSES = 6
# Magnitudes from 1e-8 to 1e15, both signs, and zero.
logits_1d = st.lists(
    st.one_of(
        st.just(0.0),
        st.tuples(st.floats(-8, 15), st.sampled_from([-1, 1])).map(
            lambda t: t[1] * 10.0 ** t[0]
        ),
    ),
    min_size=CLASSES,
    max_size=CLASSES,
)
targets = st.integers(0, CLASSES - 1)


@functools.cache
def compiled(function):
    return jax.jit(function)


@functools.cache
def value_and_grad(loss):
    return jax.jit(jax.value_and_grad(lambda x, t: jnp.sum(loss(x, t))))


def s(x):
    x = np.asarray(x, np.float64)
    return np.where(x >= 0, 1 + np.abs(x), 1 / (1 + np.abs(x)))


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


class TestSymlog:
    @pytest.mark.usefixtures("x64")
    @properties
    @given(logits_1d)
    def test_logarithm_of_s(self, x):
        x = np.array(x)
        y = compiled(bx.symlog)(x)
        # The exponential of y turns rounding of y into |y| roundings.
        np.testing.assert_allclose(np.exp(y), s(x), rtol=2e-14)
        np.testing.assert_array_equal(compiled(bx.symlog)(-x), -y)
        np.testing.assert_allclose(s(x) * s(-x), 1, rtol=1e-15)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    def test_slopes(self, dtype):
        x = jnp.array([0.0, -0.0, 1.0, -1.0, 3.0], dtype)
        y, dy = jax.jvp(compiled(bx.symlog), (x,), (jnp.ones_like(x),))
        assert y.dtype == dy.dtype == dtype
        np.testing.assert_array_equal(dy, np.array([1, 1, 0.5, 0.5, 0.25], dtype))
        np.testing.assert_array_equal(y[:2], 0)

    @pytest.mark.usefixtures("x64")
    def test_second_derivative(self):
        x = jnp.array([-3.0, -1e-3, 0.5, 7.0])
        second = jax.jit(jax.vmap(jax.grad(jax.grad(bx.symlog))))(x)
        np.testing.assert_allclose(second, -jnp.sign(x) / (1 + abs(x)) ** 2, rtol=1e-14)
        h = 1e-6  # continuously differentiable at 0, curvature of either sign
        difference = (bx.symlog(h) - bx.symlog(-h)) / (2 * h)
        np.testing.assert_allclose(difference, 1, rtol=h)

    def test_extremes(self):
        big = float(jnp.finfo(jnp.float32).max)
        x = jnp.array([-jnp.inf, -big, big, jnp.inf, jnp.nan])
        expected = [-np.inf, -128 * np.log(2), 128 * np.log(2), np.inf, np.nan]
        np.testing.assert_allclose(bx.symlog(x), expected, rtol=1e-6)

    def test_integers_are_refused(self):
        with pytest.raises(TypeError, match="symlog needs real floating point, got in"):
            bx.symlog(jnp.arange(3))


class TestProbabilities:
    def test_known_value_and_no_shift_invariance(self):
        x = jnp.array([0.0, 1.0, -1.0])
        np.testing.assert_allclose(bx.stablemax(x), [2 / 7, 4 / 7, 1 / 7], rtol=3e-7)
        np.testing.assert_allclose(bx.stablemax(x + 1), np.array([2, 3, 1]) / 6, 3e-7)

    @properties
    @given(logits_1d)
    def test_a_distribution_in_the_order_of_the_logits(self, x):
        x = np.array(x, np.float32)
        p = np.asarray(compiled(bx.stablemax)(x))
        eps = np.finfo(np.float32).eps
        assert abs(p.sum(dtype=np.float64) - 1) <= 4 * eps * CLASSES
        assert (p > 0).all()
        assert (np.diff(p[np.argsort(x)]) >= 0).all()
        assert p[np.argmax(x)] == p.max()
        np.testing.assert_allclose(p, s(x) / s(x).sum(), rtol=8 * eps)
        order = np.random.default_rng(0).permutation(CLASSES)
        np.testing.assert_allclose(compiled(bx.stablemax)(x[order]), p[order], 4 * eps)
        log_p = compiled(bx.log_stablemax)(x)
        np.testing.assert_allclose(np.exp(log_p), p, rtol=1e-5)  # exponents up to 70
        np.testing.assert_allclose(log_p[p < 0.5], np.log(p[p < 0.5]), rtol=1e-6)

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("name", ["stablemax", "log_stablemax"])
    def test_softmax_of_symlog_with_derivatives(self, name):
        ours = getattr(bx, name)
        theirs = jax.nn.softmax if name == "stablemax" else jax.nn.log_softmax
        x, v, w = (normal(CLASSES, seed=i, dtype=np.float64) for i in range(3))

        def up_to_second_order(f):
            gradient = jax.grad(lambda x: jnp.sum(w * f(x)))
            return f(x), *jax.jvp(gradient, (x,), (v,))

        both = jax.jit(
            lambda: (
                up_to_second_order(ours),
                up_to_second_order(lambda x: theirs(bx.symlog(x))),
            )
        )
        for actual, expected in zip(*both(), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-15)

    def test_limits(self):
        big = float(jnp.finfo(jnp.float32).max)
        for x, expected in (
            ([-big, -big], [0.5, 0.5]),
            ([big, big, -big, -1.0], [0.5, 0.5, 0, 0]),
            ([1.0, -jnp.inf], [1, 0]),
            ([1.0, jnp.inf], [np.nan, np.nan]),
            ([1.0, jnp.nan], [np.nan, np.nan]),
            ([-jnp.inf, -jnp.inf], [np.nan, np.nan]),
        ):
            x = jnp.array(x)
            np.testing.assert_allclose(bx.stablemax(x), expected, rtol=1e-6)
            p = np.exp(bx.log_stablemax(x))
            np.testing.assert_allclose(p, expected, rtol=1e-5, atol=1e-37)

    @pytest.mark.parametrize("function", [bx.stablemax, bx.log_stablemax])
    def test_axes_and_mask(self, function):
        x, gone = normal(2, 3, 4), 0 if function is bx.stablemax else -np.inf
        rows = function(x.transpose(1, 2, 0).reshape(3, 8)).reshape(3, 4, 2)
        many = function(x, axis=(2, 0))
        np.testing.assert_allclose(many, rows.transpose(2, 0, 1), rtol=1e-6)
        kept = np.array([True, False, True, True])
        masked = function(x.at[..., 1].set(jnp.nan), where=kept[None, None])
        np.testing.assert_allclose(masked[..., kept], function(x[..., kept]), 3e-7)
        np.testing.assert_array_equal(masked[..., 1], gone)
        samples = np.array([[True, True, False], [False, True, True]])
        one_out = np.asarray(function(x, where=samples))
        np.testing.assert_array_equal(one_out[~samples], gone)
        np.testing.assert_allclose(one_out[samples], function(x)[samples], rtol=3e-7)


class TestGradient:
    @pytest.mark.usefixtures("x64")
    @properties
    @given(logits_1d, targets)
    def test_closed_form(self, x, t):
        x = np.array(x)
        _, gradient = value_and_grad(stable)(x, t)
        p = s(x) / s(x).sum()
        e = p.copy()
        e[t] = -p[np.arange(CLASSES) != t].sum()
        np.testing.assert_allclose(gradient, e / (1 + np.abs(x)), rtol=1e-14)
        weighted = (1 + np.abs(x)) * gradient
        assert abs(weighted.sum()) <= 1e-15 * CLASSES

    @LOSSES
    @pytest.mark.usefixtures("x64")
    def test_finite_differences(self, loss):
        x, h = normal(CLASSES, dtype=np.float64), 1e-6
        _, gradient = value_and_grad(loss)(x, 2)
        for j, unit in enumerate(np.eye(CLASSES)):
            ahead, behind = (value_and_grad(loss)(x + d * unit, 2)[0] for d in (h, -h))
            np.testing.assert_allclose((ahead - behind) / (2 * h), gradient[j], 1e-8)

    @LOSSES
    @pytest.mark.usefixtures("x64")
    def test_derivatives_of_every_order_and_mode(self, loss):
        """Those of the plain formula, at points where that is accurate."""
        y = bx.symlog if loss is stable else lambda x: x
        x, v = normal(4, dtype=np.float64), normal(4, seed=1, dtype=np.float64)

        def derivatives(f):
            def along(t):
                return f(x + t * v)

            third = along
            for _ in range(3):
                third = functools.partial(
                    lambda g, t: jax.jvp(g, (t,), (1.0,))[1], third
                )
            return (
                jax.hessian(f)(x),  # forward over reverse
                jax.jacrev(jax.grad(f))(x),
                jax.jacrev(jax.jacfwd(f))(x),
                third(0.0),
                jax.grad(lambda x: jnp.vdot(v, jax.jvp(jax.grad(f), (x,), (v,))[1]))(x),
            )

        both = jax.jit(
            lambda: (
                derivatives(lambda x: loss(x, jnp.array(1))),
                derivatives(lambda x: -jax.nn.log_softmax(y(x))[1]),
            )
        )
        for ours, plain in zip(*both(), strict=True):
            np.testing.assert_allclose(ours, plain, rtol=1e-11, atol=1e-15)

    def test_curvature_survives_collapse(self):
        """diag(p) - p pᵀ in float32, where 1 - p_t or p_t is far below eps."""
        label = jnp.array(0)
        ours = jax.jit(jax.hessian(lambda x: free(x, label)))
        theirs = jax.jit(jax.hessian(lambda x: usual(x, label)))
        for gap in (30.0, 60.0, -30.0):
            x = np.array([gap, 0.0, 1.0])
            q = np.exp(x[1:] - gap)
            p, p_t = q / (1 + q.sum()), 1 / (1 + q.sum())
            exact = np.empty((3, 3))
            exact[1:, 1:] = np.diag(p * (p_t + p[::-1]))
            exact[1, 2] = exact[2, 1] = -p[0] * p[1]
            exact[0, 1:] = exact[1:, 0] = -p_t * p
            exact[0, 0] = p_t * p.sum()
            hessian = ours(x.astype(np.float32))
            seen = np.abs(exact) > 1e-37
            np.testing.assert_allclose(hessian[seen], exact[seen], rtol=1e-5)
            assert gap < 0 or theirs(x.astype(np.float32))[0, 0] == 0

    @LOSSES
    def test_vmap(self, loss):
        x, t = normal(5, CLASSES), jnp.arange(5)
        value, together = value_and_grad(loss)(x, t)
        each, per_sample = jax.jit(jax.vmap(jax.value_and_grad(loss)))(x, t)
        np.testing.assert_allclose(each.sum(), value, rtol=1e-6)
        np.testing.assert_allclose(per_sample, together, rtol=1e-6)


class TestCollapse:
    def test_stablemax_never(self):
        others = np.arange(CLASSES) != 1
        for gap in (20.0, 100.0, 1e4, 1e15):
            x = np.where(others, 0, gap).astype(np.float32)
            loss, gradient = value_and_grad(stable)(x, 1)
            rest = (CLASSES - 1) / (1 + gap)
            np.testing.assert_allclose(loss, np.log1p(rest), rtol=1e-6)
            np.testing.assert_allclose(gradient[others], 1 / (gap + CLASSES), 1e-6)
            e_t = -rest / (1 + rest)
            np.testing.assert_allclose(gradient[1], e_t / (1 + gap), rtol=1e-6)
            assert value_and_grad(usual)(x, 1)[1][1] == 0

    def test_softmax_until_the_exponential_underflows(self):
        others = np.arange(CLASSES) != 1
        for gap in (20.0, 40.0, 60.0, 80.0):
            x, q = np.where(others, 0, gap).astype(np.float32), np.exp(-gap)
            loss, gradient = value_and_grad(free)(x, 1)
            np.testing.assert_allclose(loss, (CLASSES - 1) * q, rtol=1e-5)
            np.testing.assert_allclose(gradient[1], -(CLASSES - 1) * q, rtol=1e-5)
            np.testing.assert_allclose(gradient[others], q, rtol=1e-5)
            loss, gradient = value_and_grad(usual)(x, 1)
            assert loss == gradient[1] == 0
        x = np.where(others, 0, 200).astype(np.float32)
        loss, gradient = value_and_grad(free)(x, 1)
        assert loss == 0
        assert np.isfinite(gradient).all()

    def test_softmax_agrees_with_optax(self):
        x = jnp.clip(4 * normal(5, CLASSES), -10, 10)
        t = jnp.arange(5)
        (ours, grad), (theirs, other) = (value_and_grad(f)(x, t) for f in (free, usual))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        np.testing.assert_allclose(grad, other, rtol=0, atol=1e-6)
        each = compiled(free)(x, t), compiled(usual)(x, t)
        np.testing.assert_allclose(*each, rtol=1e-6, atol=1e-6)

    @LOSSES
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    def test_extreme_logits_are_finite(self, loss, dtype):
        big = float(jnp.finfo(dtype).max)
        values = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e30, -1e30, big, -big]
        values = np.clip(values, -big, big)
        if loss is free:  # a loss of 6e38 is inf, as it should be
            values = np.clip(values, -1e38, 1e38)
        x = jnp.asarray(np.stack([np.roll(values, i) for i in range(10)]), dtype)
        for t in range(4):
            _, gradient = value_and_grad(loss)(x, jnp.full(10, t))
            each = compiled(loss)(x, jnp.full(10, t))
            assert np.isfinite(each).all()
            assert gradient.dtype == dtype
            assert np.isfinite(gradient.astype(np.float32)).all()
        for c in (big, -big):
            same = jnp.full((10, 10), c, dtype)
            each = compiled(loss)(same, jnp.full(10, 3))
            np.testing.assert_allclose(each, np.log(10), rtol=1e-6)

    @LOSSES
    def test_uniform_logits(self, loss):
        c = jnp.array([0.0, -0.5, 1, 30, -1e4, 1e20, -1e38])
        x = jnp.broadcast_to(c[:, None], (7, 5))
        np.testing.assert_allclose(loss(x, jnp.arange(7) % 5), np.log(5), rtol=1e-6)

    @LOSSES
    def test_one_class(self, loss):
        value, gradient = value_and_grad(loss)(jnp.array([[3.0], [-1e30]]), [0, 0])
        assert value == 0
        assert not gradient.any()
