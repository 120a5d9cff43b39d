"""Arguments of the losses: axes, masks, labels, dtypes, hostile logits, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from basinax import optimizers as bx

stable = bx.stablemax_cross_entropy_with_integer_labels
free = bx.collapse_free_cross_entropy_with_integer_labels
usual = optax.losses.softmax_cross_entropy_with_integer_labels
LOSSES = pytest.mark.parametrize("loss", [stable, free], ids=["stablemax", "softmax"])

CLASSES = 6
targets = st.integers(0, CLASSES - 1)


@functools.cache
def value_and_grad(loss):
    return jax.jit(jax.value_and_grad(lambda x, t: jnp.sum(loss(x, t))))


def s(x):
    x = np.asarray(x, np.float64)
    return np.where(x >= 0, 1 + np.abs(x), 1 / (1 + np.abs(x)))


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


class TestArguments:
    @LOSSES
    def test_mask_equals_dropping_the_class(self, loss):
        x, t = normal(3, CLASSES), jnp.array([0, 2, 5])
        kept = np.array([True, False, True, True, False, True])
        new = jnp.array([0, 1, 3])  # the targets among the kept
        expected, dense = value_and_grad(loss)(x[:, kept], new)
        masked = jax.jit(
            jax.value_and_grad(lambda y: loss(y, t, where=kept[None]).sum())
        )
        for hidden in (0.0, 1e30, jnp.nan, jnp.inf):
            value, gradient = masked(jnp.where(kept[None], x, hidden))
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            np.testing.assert_allclose(gradient[:, kept], dense, rtol=2e-6)
            assert not gradient[:, ~kept].any()

    @LOSSES
    def test_dropped_samples(self, loss):
        """Loss 0 and gradient 0, whatever logits and label hold."""
        x = jnp.array([[1.0, jnp.nan, 3.0], [jnp.inf, 0.0, -jnp.inf], [1.0, 2.0, 3.0]])
        rows = np.array([False, False, True])
        masked = jax.jit(jax.value_and_grad(lambda x, t: loss(x, t, where=rows).sum()))
        expected, dense = value_and_grad(loss)(x[2], 2)
        for t in (jnp.array([0, 1, 2]), jnp.array([-100, 7, 2])):
            value, gradient = masked(x, t)
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            np.testing.assert_array_equal(gradient[:2], 0)
            np.testing.assert_allclose(gradient[2], dense, rtol=1e-6)

    @pytest.mark.parametrize("kind", ["stablemax", "softmax", "soft labels"])
    def test_dropped_target(self, kind):
        """No loss, as the sum over the classes that are kept says."""
        label, where = jnp.array(1), np.array([True, False, True])
        loss = {
            "stablemax": lambda x: stable(x, label, where=where),
            "softmax": lambda x: free(x, label, where=where),
            "soft labels": lambda x: bx.stablemax_cross_entropy(
                x, jax.nn.one_hot(label, 3), where=where
            ),
        }[kind]
        everything = jax.jit(
            lambda x: (loss(x), jax.grad(loss)(x), jax.hessian(loss)(x))
        )
        for value in everything(jnp.array([1.0, 2.0, 3.0])):
            np.testing.assert_array_equal(value, 0)
        if kind != "soft labels":  # whatever the classes that are kept hold
            for value in everything(jnp.array([1.0, 2.0, jnp.nan])):
                np.testing.assert_array_equal(value, 0)

    @LOSSES
    def test_labels_outside_follow_optax(self, loss):
        x = normal(CLASSES)
        for f in (loss, usual):
            for t in (-1, -CLASSES):
                value, gradient = value_and_grad(f)(x, t)
                wrapped, same = value_and_grad(f)(x, t + CLASSES)
                np.testing.assert_array_equal(value, wrapped)
                np.testing.assert_array_equal(gradient, same)
            for t in (CLASSES, CLASSES + 5, -CLASSES - 1, -100):
                value, gradient = value_and_grad(f)(x, t)
                assert np.isnan(value)
                # So that the sample can be dropped afterwards: 0 · NaN is NaN.
                assert np.isfinite(gradient).all()
                assert f is usual or not gradient.any()
        many = jnp.zeros(300).at[7].set(3)  # more classes than a byte counts
        byte = loss(many, jnp.array(7, jnp.uint8))
        np.testing.assert_array_equal(byte, loss(many, jnp.array(7)))

    @LOSSES
    def test_bad_logits(self, loss):
        inf = jnp.inf
        both = value_and_grad(loss)
        for bad in (inf, jnp.nan):
            for t in (0, 1):
                value, gradient = both(jnp.array([1.0, bad, 2.0]), t)
                assert np.isnan(value)
                assert np.isnan(gradient).all()
        value, gradient = both(jnp.array([1.0, -inf, 2.0]), 0)
        np.testing.assert_allclose(value, both(jnp.array([1.0, 2.0]), 0)[0], rtol=1e-6)
        assert gradient[1] == 0
        value, gradient = both(jnp.array([1.0, -inf, 2.0]), 1)
        assert value == inf
        assert np.isfinite(gradient).all()
        value, gradient = both(jnp.array([3.0, -inf, -inf]), 0)
        assert value == 0
        assert not gradient.any()

    def test_bad_logits_with_soft_labels(self):
        soft = jax.jit(jax.value_and_grad(bx.stablemax_cross_entropy))
        value, gradient = soft(jnp.array([1.0, -jnp.inf, 2.0]), jnp.array([1.0, 0, 0]))
        expected, same = value_and_grad(stable)(jnp.array([1.0, -jnp.inf, 2.0]), 0)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, same, rtol=1e-6)
        for bad in (jnp.nan, jnp.inf):
            value, gradient = soft(jnp.array([1.0, bad, 2.0]), jnp.array([1.0, 0, 0]))
            assert np.isnan(value)
            assert np.isnan(gradient).all()
        impossible = soft(jnp.array([1.0, -jnp.inf, 2.0]), jnp.array([0, 1.0, 0]))
        assert impossible[0] == jnp.inf

    @pytest.mark.parametrize("axis", [0, 1, (2, 0)])
    def test_axis_as_in_optax(self, axis):
        x = normal(2, 3, 4)
        axes = {a % 3 for a in ((axis,) if isinstance(axis, int) else axis)}
        batch = [n for a, n in enumerate(x.shape) if a not in axes]
        t = jnp.asarray(np.arange(np.prod(batch, dtype=int)).reshape(batch) % 2)
        np.testing.assert_allclose(free(x, t, axis), usual(x, t, axis), rtol=1e-5)
        where = jnp.asarray(np.random.default_rng(1).random(x.shape) < 0.7)
        # optax counts a dropped target, we do not.
        size = x.size // max(t.size, 1)
        order = [a for a in range(3) if a not in axes]
        order += [a % 3 for a in ((axis,) if isinstance(axis, int) else axis)]
        kept = where.transpose(order).reshape(*batch, size)
        kept = jnp.take_along_axis(kept, t[..., None], -1)[..., 0]
        expected = jnp.where(kept, usual(x, t, axis, where), 0)
        np.testing.assert_allclose(
            free(x, t, axis, where), expected, rtol=1e-5, atol=1e-6
        )

    def test_soft_labels(self):
        x, rng = normal(3, CLASSES), np.random.default_rng(0)
        t = jnp.array([0, 3, 5])
        soft = bx.stablemax_cross_entropy
        one_hot = jax.nn.one_hot(t, CLASSES)
        np.testing.assert_allclose(soft(x, one_hot), stable(x, t), rtol=1e-6)
        weights = jnp.asarray(rng.random(x.shape), np.float32)  # sums are not one
        log_p = bx.log_stablemax(x)
        both = jax.jit(jax.value_and_grad(lambda *a: soft(*a).sum(), (0, 1)))
        value, (dx, dw) = both(x, weights)
        np.testing.assert_allclose(value, -np.sum(weights * log_p), rtol=1e-6)
        np.testing.assert_allclose(dw, -log_p, rtol=1e-6)
        p = s(x) / s(x).sum(-1, keepdims=True)
        w = np.asarray(weights, np.float64)
        expected = (p * w.sum(-1, keepdims=True) - w) / (1 + np.abs(x))
        np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-6)
        moved = soft(x.T, weights.T, axis=0)
        np.testing.assert_allclose(moved, soft(x, weights), rtol=1e-6)
        everything = jax.eval_shape(functools.partial(soft, axis=None), x, weights)
        assert everything.shape == ()

    def test_dtypes(self):
        t = jnp.array([0, 1])
        functions = (
            lambda x: stable(x, t),
            lambda x: free(x, t),
            lambda x: bx.stablemax_cross_entropy(x, jax.nn.one_hot(t, 3)),
            bx.stablemax,
            bx.log_stablemax,
        )
        for f in functions:
            for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
                x = jax.ShapeDtypeStruct((2, 3), dtype)
                assert jax.eval_shape(f, x).dtype == jnp.float32
                gradient = jax.eval_shape(jax.grad(lambda x, f=f: f(x).sum()), x)
                assert gradient.dtype == dtype
            with jax.enable_x64(True):
                x = jax.ShapeDtypeStruct((2, 3), jnp.float64)
                assert jax.eval_shape(f, x).dtype == jnp.float64
        x = normal(2, 3, dtype=jnp.bfloat16)  # computed in float32, nothing rounded
        for f in functions[:3]:
            np.testing.assert_array_equal(f(x), f(x.astype(jnp.float32)))

    def test_empty_batch(self):
        x, t = jnp.zeros((0, 3)), jnp.zeros(0, int)
        assert stable(x, t).shape == free(x, t).shape == (0,)
        assert bx.stablemax_cross_entropy(x, x).shape == (0,)
        assert bx.stablemax(x).shape == bx.log_stablemax(x).shape == (0, 3)

    @LOSSES
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"logits": jnp.ones((2, 3), int)}, TypeError, "logits must be real float"),
            ({"logits": jnp.ones((2, 3)) * 1j}, TypeError, "got complex64"),
            ({"labels": jnp.ones(2)}, TypeError, "labels must be integers, got float"),
            ({"labels": jnp.ones((2, 3), int)}, ValueError, r"per sample has shape"),
            ({"labels": jnp.ones(3, int)}, ValueError, r"has shape \(2,\)"),
            ({"axis": 2}, ValueError, "axis=2 does not name"),
            ({"axis": (0, -2)}, ValueError, "different axes"),
            ({"axis": ()}, ValueError, "does not name one or several"),
            ({"where": jnp.ones(3, bool)}, ValueError, r"where of shape \(3,\) fits n"),
            ({"where": jnp.ones((3, 2), bool)}, ValueError, "fits neither logits of"),
            (
                {"logits": jnp.ones((2, 0))},
                ValueError,
                r"shape \(2, 0\) hold no class along axis=-1",
            ),
        ],
    )
    def test_mistakes(self, loss, changes, error, message):
        arguments = {"logits": jnp.ones((2, 3)), "labels": jnp.ones(2, int)} | changes
        with pytest.raises(error, match=message):
            loss(**arguments)

    def test_mistakes_with_soft_labels(self):
        with pytest.raises(ValueError, match="one weight per logit"):
            bx.stablemax_cross_entropy(jnp.ones((2, 3)), jnp.ones(2, int))
        for function in (bx.stablemax, bx.log_stablemax):
            with pytest.raises(TypeError, match="got int32; cast integers"):
                function(jnp.arange(3))
            with pytest.raises(ValueError, match="does not name"):
                function(jnp.array(1.0))


@LOSSES
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batch(loss, kind):
    """Loss and gradient stay where their samples are."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    place = NamedSharding(mesh, PartitionSpec("data"))
    x, t = normal(16, 4), jnp.arange(16) % 4
    expected = value_and_grad(loss)(x, t)
    with jax.set_mesh(mesh):
        value, gradient = value_and_grad(loss)(
            jax.device_put(x, place), jax.device_put(t, place)
        )
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-6)
    assert gradient.sharding.is_equivalent_to(place, 2)
