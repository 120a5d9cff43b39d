"""Stochastic traces: unbiased, with standard errors that mean what they say.

Keys are fixed, so a statistical bound either always holds or never; each is set so
that it would hold for all but one key in ten thousand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from basinax.landscape import hessian, trace

KEY = jax.random.key(0)
SIZE = 16


@jax.jit
def multiply(matrix, tree):
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    return unravel(matrix @ flat)


def problem():
    """Return a dense symmetric matrix as an operator on several leaves."""
    half = np.random.default_rng(0).normal(size=(SIZE, SIZE))
    matrix = (half + half.T) / 2 + np.eye(SIZE)
    like = {
        "a": jnp.ones((2, 4)),
        "b": [jnp.ones(7), None],
        "c": jnp.ones(()),
    }
    return Partial(multiply, jnp.asarray(matrix, jnp.float32)), like, matrix


def test_unbiased_with_the_theoretical_standard_error():
    operator, like, matrix = problem()
    probes = 1500
    estimate = trace(operator, like, key=KEY, num_probes=probes)
    variance = 2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2))
    standard_error = np.sqrt(variance / probes)
    assert abs(estimate.value - np.trace(matrix)) < 4 * standard_error
    # The relative error of a sample deviation is about √(kurtosis / 4n), here 3 %.
    np.testing.assert_allclose(estimate.standard_error, standard_error, rtol=0.12)


def test_mean_and_standard_error_of_the_drawn_probes():
    operator, like, matrix = problem()
    samples = []

    def recorded(probe):
        z = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(probe)])
        np.testing.assert_array_equal(np.abs(z), 1)
        samples.append(z @ matrix @ z)
        return operator(probe)

    estimate = trace(recorded, like, key=KEY, num_probes=4)
    assert len(set(samples)) == 4
    np.testing.assert_allclose(estimate.value, np.mean(samples), rtol=1e-5)
    np.testing.assert_allclose(
        estimate.standard_error, np.std(samples, ddof=1) / 2, rtol=1e-5
    )


def test_standard_errors_cover_the_truth():
    """With 10 probes 2 standard errors cover 92 %, so 100 runs hold 80 but rarely."""
    operator, like, matrix = problem()
    hits = 0
    for seed in range(100):
        estimate = trace(operator, like, key=jax.random.key(seed), num_probes=10)
        hits += abs(estimate.value - np.trace(matrix)) < 2 * estimate.standard_error
    assert 80 <= hits <= 99


def test_exact_for_a_diagonal_operator():
    w = {"a": jnp.arange(1.0, 5), "b": jnp.array(2.0), "none": None}
    operator = hessian(lambda p: jnp.sum(p["a"] ** 3) + p["b"] ** 4, w)
    estimate = trace(operator, w, key=KEY, num_probes=3)
    np.testing.assert_allclose(estimate.value, 6 * 10 + 12 * 4, rtol=1e-6)
    np.testing.assert_allclose(estimate.standard_error, 0, atol=1e-4)


def test_probes_are_independent_between_leaves_and_between_each_other():
    """Swapping two leaves has trace zero; equal signs on both would give 2n."""
    like = {"x": jnp.ones(200), "y": jnp.ones(200)}
    estimate = trace(lambda v: {"x": v["y"], "y": v["x"]}, like, key=KEY, num_probes=50)
    # Var = 2 ‖A‖² = 2 · 400
    expected = np.sqrt(800 / 50)
    assert abs(estimate.value) < 4 * expected
    np.testing.assert_allclose(estimate.standard_error, expected, rtol=0.4)


def test_same_key_same_estimate():
    operator, like, _ = problem()
    first, same, other = (
        trace(operator, like, key=jax.random.key(seed), num_probes=4)
        for seed in (1, 1, 2)
    )
    assert first == same
    assert first.value != other.value


def test_one_probe_knows_nothing_of_its_error():
    operator, like, _ = problem()
    estimate = trace(operator, like, key=KEY, num_probes=1)
    assert np.isfinite(estimate.value)
    assert estimate.standard_error == np.inf


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_accumulated_in_float32(dtype):
    """A bfloat16 sum of ones stops growing at 256."""
    estimate = trace(lambda v: v, jnp.ones(5001, dtype), key=KEY, num_probes=2)
    assert estimate.value.dtype == jnp.float32
    assert estimate.value == 5001
    assert estimate.standard_error == 0


def test_float64(x64):
    scales = jnp.asarray(np.random.default_rng(0).normal(size=50))
    estimate = trace(lambda v: scales * v, scales, key=KEY, num_probes=2)
    assert estimate.value.dtype == jnp.float64
    np.testing.assert_allclose(estimate.value, np.sum(scales), rtol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_operator_shows(bad):
    estimate = trace(lambda v: v * bad, jnp.ones(3), key=KEY, num_probes=2)
    assert not np.isfinite(estimate.value)
    assert np.isnan(estimate.standard_error)


def test_new_parameters_do_not_retrace():
    traces = []

    def loss(w, x):
        traces.append(None)
        return jnp.sum(jnp.sin(w * x)) ** 2

    values = []
    for seed in range(3):
        w = jnp.linspace(0.1, 1.0, 6) + seed
        operator = hessian(loss, w, 2 * w)
        values.append(float(trace(operator, w, key=KEY, num_probes=2).value))
    assert len(set(values)) == 3
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method": "hutch"}, r"method must be one of \('hutchinson',\), got 'hutch'"),
        ({"num_probes": 0}, "num_probes must be at least 1, got 0"),
        ({"like": [jnp.ones(2), jnp.arange(2)]}, r"like\[1\] is int32"),
        ({"like": {}}, "like holds no numbers"),
        ({"operator": lambda v: v[:2]}, "operator's result must be shaped like"),
    ],
)
def test_errors_say_what_is_wrong(overrides, message):
    arguments = {"operator": lambda v: v, "like": jnp.ones(4), "num_probes": 2}
    with pytest.raises(ValueError, match=message):
        trace(**(arguments | overrides), key=KEY)


def test_refuses_to_be_traced():
    with pytest.raises(ValueError, match=r"trace .* call it outside jit"):
        jax.jit(lambda x: trace(lambda v: v, x, key=KEY, num_probes=1))(jnp.ones(3))
