"""Softmax collapse: reference logs, exact thresholds, rounding, labels, masks.

`golden/grokking_diagnostics.npz` holds what the authors' logger reports (Prieto et al.,
arXiv:2501.04697): for 16, 32 and 64 bits the fraction of samples whose normaliser is
exactly 1 and of samples whose loss is exactly 0, and the onset of the first with the
lead of one class.
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basinax.landscape import softmax_collapse

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "grokking_diagnostics.npz")
SETS = sorted({k.split("/")[1] for k in GOLDEN if k.endswith("/z")})
UNIT_ROUNDOFF = {
    "bfloat16": 2**-8,
    "float16": 2**-11,
    "float32": 2**-24,
    "float64": 2**-53,
}

collapse = jax.jit(softmax_collapse, static_argnames=("dtype", "axis", "phi"))


def symlog(x):
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def all_zero(numbers):
    return not np.any(numbers)


def leading(gap, classes):
    """Return one sample in which class 0 leads all others by the gap."""
    return np.eye(1, classes) * np.asarray(gap, np.float64).reshape(-1, 1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("stored", ["f32", "f64"])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_reference_fractions(column, stored):
    """None of these logits lies in the band where the order of summation decides."""
    for name in SETS:
        z = GOLDEN[f"logits/{name}/{stored}/z"]
        sums, losses = GOLDEN[f"logits/{name}/{stored}/fractions"][:, column]
        dtype = ("float16", "float32", "float64")[column]
        result = collapse(z, GOLDEN["logits/labels"], dtype=dtype)
        found = [result.absorbed, result.absorbed_sum, result.zero_loss]
        np.testing.assert_allclose(found, [sums, sums, losses], rtol=1e-6, err_msg=name)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_reference_onset(dtype):
    gaps, classes = GOLDEN["onset/gaps"], int(GOLDEN["onset/num_classes"])
    expected = GOLDEN[f"onset/collapsed{dtype[-2:]}"]
    z = jnp.asarray(leading(gaps, classes))
    each = jax.vmap(lambda row: collapse(row[None], dtype=dtype))(z)
    u = UNIT_ROUNDOFF[dtype]
    outside = (gaps < math.log(1 / u)) | (gaps > math.log((classes - 1) / u))
    assert set(expected[outside]) == {0, 1}
    np.testing.assert_array_equal(each.absorbed[outside], expected[outside])
    np.testing.assert_array_equal(each.absorbed_sum[outside], expected[outside])


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("classes", [2, 10, 113, 5000])
def test_onset_of_absorption_is_exact(dtype, classes):
    """At ln((C-1)/u) to the rounding of the lead itself, with or without float64."""
    gap = math.log((classes - 1) / UNIT_ROUNDOFF[dtype])
    step = gap * max(2**-22, 2 * UNIT_ROUNDOFF[dtype])
    # Rounding the logits to `dtype` must not move them.
    kind = jnp.dtype(min(dtype, "float32", key=lambda d: jnp.finfo(d).bits))
    low, high = (
        leading(gap + d, classes).astype(kind).astype(np.float32) for d in (-step, step)
    )
    assert not collapse(low, dtype=dtype).absorbed
    assert collapse(high, dtype=dtype).absorbed


@pytest.mark.parametrize(
    ("dtype", "alive", "dead"),
    [
        ("bfloat16", 5, 11),
        ("float16", 7, 13.5),
        ("float32", 16, 22),
        ("float64", 36, 42),
    ],
)
def test_known_gaps(dtype, alive, dead, x64):
    """Every measure of the correct class dies with its normaliser, others later."""
    z = jnp.asarray(leading([alive, dead], 113))
    result = jax.vmap(lambda row: collapse(row[None], jnp.zeros(1, int), dtype=dtype))(
        z
    )
    for name in ("absorbed", "absorbed_sum", "zero_loss", "zero_target_grad"):
        np.testing.assert_array_equal(getattr(result, name), [0, 1], err_msg=name)
    np.testing.assert_array_equal(result.zero_grad, [0, 0])
    np.testing.assert_array_equal(result.underflow, [0, 0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_operation_is_rounded(dtype):
    """Against NumPy, with leads of all sizes: a rounding more or less would count."""
    kind, rng = jnp.dtype(dtype).type, np.random.default_rng(0)
    scale = 0.7 * math.log(1 / UNIT_ROUNDOFF[dtype])
    logits = (rng.normal(size=(4000, 11)) * scale).astype(np.float32)
    y = rng.integers(0, 11, 4000)
    y[::2] = logits[::2].argmax(-1)

    z = logits.astype(kind)
    shifted = z - z.max(-1, keepdims=True)
    terms = np.exp(shifted)
    total = terms.astype(np.float32).sum(-1).astype(kind)
    p = terms / total[:, None]
    rows = np.arange(4000)
    expected = {
        "absorbed_sum": total == 1,
        "zero_loss": np.log(total) - shifted[rows, y] == 0,
        "zero_target_grad": p[rows, y] == 1,
        "zero_grad": (p == np.eye(11, dtype=kind)[y]).all(-1),
        "underflow": terms == 0,
    }
    result = collapse(logits, y, dtype=dtype)
    # exp may differ by a unit in its last place, which tips a few samples in 4000.
    for name, hit in expected.items():
        found, wanted = getattr(result, name), hit.mean()
        np.testing.assert_allclose(found, wanted, atol=1e-3, err_msg=name)
    assert 0.01 < expected["zero_loss"].mean() < expected["absorbed_sum"].mean() < 0.98


def test_gradient_dies_when_the_exponential_underflows():
    z = jnp.asarray(leading([50.0, 200.0], 4))
    result = softmax_collapse(z, jnp.zeros(2, int))
    assert (result.zero_loss, result.zero_grad, result.underflow) == (1, 0.5, 3 / 8)


def test_optax_loss_is_zero_where_predicted():
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(500, 5)) * 15, jnp.float32)
    y = jnp.asarray(rng.integers(0, 5, 500))
    loss_fn = optax.losses.softmax_cross_entropy_with_integer_labels
    gradient = jax.jit(jax.vmap(jax.grad(loss_fn)))(z, y)
    # optax adds a logarithm and subtracts two logits, which rounds once more where
    # logits are larger than 1.  The normaliser, though, is the same.
    zero = np.mean(np.asarray(gradient[jnp.arange(500), y]) == 0)
    found = softmax_collapse(z, y).zero_target_grad
    assert 0.02 < zero < 0.98
    np.testing.assert_allclose(found, zero, atol=1 / 500)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_monotone_in_scale_and_blind_to_order(seed):
    rng = np.random.default_rng(seed)
    z = jnp.asarray(rng.normal(size=(50, 7)), jnp.float32)
    fractions = [float(collapse(c * z, dtype="float32").absorbed) for c in (1, 16, 64)]
    assert fractions == sorted(fractions)
    shuffled = z[rng.permutation(50)][:, rng.permutation(7)]
    assert collapse(16 * shuffled, dtype="float32").absorbed == fractions[1]


def test_confidently_wrong_sample():
    result = softmax_collapse(leading(50, 10), np.array([3]))
    assert result.absorbed == result.absorbed_sum == 1
    assert result.zero_loss == result.zero_target_grad == result.zero_grad == 0


def test_without_labels():
    result = softmax_collapse(leading(50, 10))
    assert result.zero_loss is result.zero_target_grad is result.zero_grad is None
    assert result.absorbed == result.absorbed_sum == 1


def test_float64_question_without_64_bit_types():
    z = jnp.asarray(leading([30, 50], 10))
    assert z.dtype == jnp.float32
    result = softmax_collapse(z, jnp.zeros(2, int), dtype="float64")
    assert result.absorbed == 0.5
    assert set(result[1:]) == {None}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_stablemax_collapses_at_a_power_instead(dtype):
    """±L absorbs above L = sqrt((C-1)/u), where softmax did at a logarithm of it.

    In float16 such logits are representable; rounding symlog(L) moves the onset by a
    factor 1 + u·symlog(L).
    """
    bound = math.sqrt(112 / UNIT_ROUNDOFF[dtype])
    for factor, expected in ((0.8, 0), (1.3, 1)):
        z = jnp.asarray((2 * np.eye(1, 113) - 1) * factor * bound)
        assert collapse(z, dtype=dtype, phi=symlog).absorbed == expected
        assert collapse(z, dtype=dtype).absorbed == 1


def test_where_removes_classes_and_samples():
    z = jnp.array([[50.0, 0.0, 49.0], [0.0, 1.0, 2.0], [50.0, 0.0, 0.0]])
    y = jnp.zeros(3, int)
    classes = jnp.array([[True, True, False]])
    dropped, removed = (
        softmax_collapse(z, y, where=classes),
        softmax_collapse(z[:, :2], y),
    )
    assert dropped == removed
    assert softmax_collapse(z, y).absorbed == np.float32(1 / 3)
    samples = jnp.array([[True], [True], [False]])
    assert softmax_collapse(z, y, where=samples) == softmax_collapse(z[:2], y[:2])
    nothing = softmax_collapse(z, y, where=False)
    assert all_zero(nothing)


def test_axis():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)) * 20)
    y = jnp.argmax(z, 1)
    last = softmax_collapse(jnp.moveaxis(z, 1, -1), y)
    assert softmax_collapse(z, y, axis=1) == last
    assert 0 < last.absorbed < 1


def test_broken_logits_and_labels_do_not_count():
    """A NaN or an overflow is another failure than collapse; see the docstring."""
    z = jnp.array([[np.nan, 0.0], [np.inf, 0.0], [-np.inf, -np.inf], [1e6, 0.0]])
    y = jnp.zeros(4, int)
    assert all_zero(softmax_collapse(z, y, dtype="float16")[:5])
    assert softmax_collapse(z, y).absorbed == softmax_collapse(z, y).zero_loss == 0.25
    result = softmax_collapse(leading(50, 3), np.array([7]))
    assert result.absorbed == 1
    assert result.zero_loss == result.zero_target_grad == result.zero_grad == 0


def test_edges():
    assert softmax_collapse(jnp.ones((3, 1)), jnp.zeros(3, int)).zero_loss == 1
    assert all_zero(softmax_collapse(jnp.ones((0, 4)), jnp.zeros(0, int)))
    assert softmax_collapse(jnp.ones((3, 0))).absorbed == 0
    assert softmax_collapse(jnp.array([50.0, 0.0]), jnp.int32(0)).zero_loss == 1
    tie = softmax_collapse(jnp.array([[50.0, 50.0, 0.0]]))
    assert tie.absorbed == tie.absorbed_sum == 0


def test_collapse_mistakes():
    z = jnp.ones((2, 3))
    with pytest.raises(TypeError, match="floating point, got int32"):
        softmax_collapse(jnp.ones((2, 3), int))
    with pytest.raises(TypeError, match="one-hot"):
        softmax_collapse(z, z)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        softmax_collapse(z, jnp.zeros(3, int))
    with pytest.raises(TypeError, match="bfloat16"):
        softmax_collapse(z, dtype="int8")
