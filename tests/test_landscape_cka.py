"""Centred kernel alignment against its definition, its invariances and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from landscape_models import GOLDEN

from basinax.landscape import cka, minibatch_cka

UNBIASED = pytest.mark.parametrize("unbiased", [False, True])
# More features than examples go by Gram matrices, fewer by products of features.
BOTH = pytest.mark.parametrize(
    ("widths", "unbiased"), [((6, 6), True), ((25, 40), False)]
)


def gram(x):
    x = x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(0)
    return x @ x.T


def hsic_1(k, l):  # noqa: E741
    """HSIC₁ as Song et al. define it, with all its sums written out."""
    n, one = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    sums = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * (one @ k @ l @ one)
    return (np.trace(k @ l) + sums - mixed) / (n * (n - 3))


def by_definition(a, b, unbiased):
    k, l = gram(a), gram(b)  # noqa: E741
    h = hsic_1 if unbiased else lambda x, y: np.sum(x * y)
    return h(k, l) / np.sqrt(h(k, k) * h(l, l))


def features(widths, n=12, seed=0, shared=2):
    """Draw two sets of features, some of them in common."""
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(n, width)) for width in widths)
    b[:, :shared] = a[:, :shared]
    return a, b


@pytest.mark.parametrize(
    ("unbiased", "name"), [(False, "cka.linear"), (True, "cka.linear_unbiased")]
)
def test_golden(x64, unbiased, name):
    found = cka(GOLDEN["cka.a"], GOLDEN["cka.b"], unbiased=unbiased)
    np.testing.assert_allclose(found, GOLDEN[name], rtol=1e-12)


@UNBIASED
def test_definition(x64, unbiased):
    """By Gram matrices; the golden numbers are of fewer features than examples."""
    a, b = features((25, 40))
    found = cka(a, b, unbiased=unbiased)
    np.testing.assert_allclose(found, by_definition(a, b, unbiased), rtol=1e-12)


@BOTH
def test_invariances(x64, widths, unbiased):
    """Order of units, rotation, shift, scale and shape do not matter; stretching does.

    Also the order of the examples, as long as it is the same on both sides.
    """
    rng = np.random.default_rng(1)
    a, b = features(widths)
    wanted = cka(a, b, unbiased=unbiased)
    rotation = np.linalg.qr(rng.normal(size=(widths[0],) * 2))[0]
    order, rows = rng.permutation(widths[0]), rng.permutation(len(a))
    same = [
        (a[:, order], b),
        (a @ rotation, b),
        (a - rng.normal(size=(1, widths[0])), -3.5 * b),
        (a[rows], b[rows]),
    ]
    if unbiased:
        same += [(b, a), (a.reshape(len(a), 1, -1), b[..., None])]
        found = cka(a, a @ rotation, unbiased=True)
        np.testing.assert_allclose(found, 1, rtol=1e-12)
    for x, y in same:
        np.testing.assert_allclose(cka(x, y, unbiased=unbiased), wanted, rtol=1e-11)
    stretched = a * np.geomspace(1, 30, widths[0])[None]
    for x, y in [(stretched, b), (a[rows], b)]:
        assert abs(cka(x, y, unbiased=unbiased) - wanted) > 0.005


def test_bias():
    """Unrelated features: the plain form nears one with their number, HSIC₁ zero."""
    a, b = features((99, 99), n=12, shared=0)
    assert cka(a, b) > 0.85
    # The cosine of two random matrices with n (n - 3) / 2 free entries.
    assert abs(cka(a, b, unbiased=True)) < 4 / np.sqrt(12 * 9 / 2)


@BOTH
def test_scale_and_offset(widths, unbiased):
    """Fourth powers of the features would neither fit nor be told from zero.

    An offset of 1e4 leaves float32 features three digits.
    """
    a, b = (x.astype(np.float32) for x in features(widths))
    wanted = by_definition(a.astype(np.float64), b.astype(np.float64), unbiased)
    for x, y in [(5e37 * a, 1e-34 * b), (1e20 * a, 1e20 * b), (1e-30 * a, b)]:
        np.testing.assert_allclose(cka(x, y, unbiased=unbiased), wanted, rtol=2e-5)
    found = cka(a + np.float32(1e4), b, unbiased=unbiased)
    np.testing.assert_allclose(found, wanted, rtol=1e-2)


def test_nothing_to_compare():
    a, b = (x.astype(np.float32) for x in features((6, 6)))
    # A third is no sum of few powers of two: its mean is off by rounding.
    constant = np.full_like(a, 1 / 3)
    broken = [a.copy(), a.copy()]
    broken[0][2, 1], broken[1][2, 1] = np.nan, np.inf
    for x in (constant, np.zeros_like(a), *broken):
        assert np.isnan(cka(x, b))
        assert np.isnan(cka(b, x))
        assert np.isnan(cka(b, x, unbiased=True))
    assert np.isnan(minibatch_cka([(a, b), (broken[0], b)]))
    assert np.isnan(minibatch_cka([(constant, b)]))
    np.testing.assert_allclose(
        minibatch_cka([(constant, b), (a, b)]),
        minibatch_cka([(np.zeros_like(a), b), (a, b)]),
    )
    wanted = by_definition(a[:, :3], b, False)
    a[:, 3:] = 1 / 3
    np.testing.assert_allclose(cka(a, b), wanted, rtol=1e-5)


def test_dtypes():
    a, b = features((4, 6))
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (a, b)]
    found = cka(*narrow)
    assert found.dtype == jnp.float32
    wanted = by_definition(*(np.asarray(x, np.float64) for x in narrow), False)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    whole = (10 * a).astype(np.int8)
    wanted = by_definition(whole.astype(float), b, False)
    np.testing.assert_allclose(cka(whole, b), wanted, rtol=1e-5)


@BOTH
def test_derivative(x64, widths, unbiased):
    """The power of two that divides is a constant, which must not show."""
    a, b = features(widths)
    direction = np.random.default_rng(2).normal(size=a.shape)

    def value(step):
        return cka(a + step * direction, b, unbiased=unbiased)

    slope = jax.jit(jax.grad(value))(0.0)
    difference = (value(1e-5) - value(-1e-5)) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-7)


@pytest.mark.parametrize(
    ("axis", "widths"),
    [
        (AxisType.Auto, (4, 8)),
        (AxisType.Explicit, (4, 8)),
        (AxisType.Explicit, (24, 8)),
    ],
)
def test_mesh(axis, widths):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis,) * 2)
    a, b = (x.astype(np.float32) for x in features(widths, n=16))
    wanted = by_definition(a, b, True)
    x = jax.device_put(a, NamedSharding(mesh, P("data", "model")))
    y = b.reshape(16, 4, 2)
    y = jax.device_put(y, NamedSharding(mesh, P("data", None, "model")))
    np.testing.assert_allclose(cka(x, y, unbiased=True), wanted, rtol=1e-5)


def test_minibatches(x64):
    """Means of HSIC₁ over batches, with their sizes as weights."""
    a, b = features((6, 6), n=30, seed=3)
    a, b = 1e3 * a, 1e-2 * b  # scales differ from batch to batch
    parts = [slice(0, 12), slice(12, 24), slice(24, 30)]
    h = np.zeros(3)
    for part in parts:
        k, l = gram(a[part]), gram(b[part])  # noqa: E741
        h += len(k) * np.array([hsic_1(k, l), hsic_1(k, k), hsic_1(l, l)])
    found = minibatch_cka((a[part], b[part]) for part in parts)
    np.testing.assert_allclose(found, h[0] / np.sqrt(h[1] * h[2]), rtol=1e-12)
    a, b = a[:12], b[:12]
    whole = minibatch_cka([(a, b)])
    np.testing.assert_allclose(whole, cka(a, b, unbiased=True), rtol=1e-12)


def test_minibatches_tend_to_the_whole():
    """Of 4000 examples in batches of 8, where the mean of their own CKA does not."""
    a, b = features((20, 20), n=4000, shared=5)
    pairs = [(a[i : i + 8], b[i : i + 8]) for i in range(0, 4000, 8)]
    whole = float(cka(a, b))
    # Its standard error over seeds is about 0.01.
    assert abs(minibatch_cka(pairs) - whole) < 0.04
    assert np.mean([cka(x, y) for x, y in pairs[:50]]) > whole + 0.3


@pytest.mark.parametrize(
    ("shapes", "unbiased", "message"),
    [
        (((5, 2), (6, 2)), False, "5 and 6 examples"),
        (((5,), (5, 2)), False, r"features_a has shape \(5,\)"),
        (((5, 2), ()), False, r"features_b has shape \(\)"),
        (((5, 0), (5, 2)), False, r"features_a has shape \(5, 0\)"),
        (((1, 2), (1, 2)), False, "at least 2 examples, got 1"),
        (((3, 2), (3, 2)), True, "at least 4 examples, got 3"),
        (((0, 2), (0, 2)), True, "at least 4 examples, got 0"),
    ],
)
def test_mistakes(shapes, unbiased, message):
    a, b = (np.ones(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        cka(a, b, unbiased=unbiased)
    if shapes[0]:
        with pytest.raises(ValueError, match=f"minibatch_cka.*{message}"):
            minibatch_cka([(a, b)], unbiased=unbiased)


def test_other_mistakes():
    x = np.ones((5, 2), np.float32)
    with pytest.raises(ValueError, match="features_b is complex64"):
        cka(x, x + np.complex64(1j))
    with pytest.raises(ValueError, match="no batches"):
        minibatch_cka([])
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda x: minibatch_cka([(x, x)]))(x)
