"""Stochastic traces and norms: unbiased, with standard errors that mean what they say.

Keys are fixed, so a statistical bound either always holds or never; each is set so
that it would hold for all but one key in ten thousand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from prescribed import flat, matrix_of, multiply, outliers, prescribed, rotation

from basinax.landscape import frobenius_norm, hessian, trace
from basinax.landscape._low_rank_trace import leave_out

KEY = jax.random.key(0)
SIZE = 16


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
        ({"method": "hutch"}, r"one of .*'hutchinson', 'hutch\+\+', .*, got 'hutch'"),
        ({"num_probes": 0}, "num_probes must be at least 1 for trace .*, got 0"),
        (
            {"num_probes": 2, "method": "hutch++"},
            r"num_probes must be at least 3 for trace by hutch\+\+, got 2",
        ),
        (
            {"num_probes": 3, "method": "xtrace"},
            "num_probes must be at least 4 for trace by xtrace, got 3",
        ),
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


LOW_RANK = pytest.mark.parametrize("method", ["hutch++", "xtrace"])


@LOW_RANK
def test_low_rank_methods_are_unbiased_with_honest_errors(method):
    """Ten samples: 2 standard errors of a mean cover 92 % (Student, 9 degrees).

    So 150 runs hold 138 ± 3.3, and all 150 less than once in ten thousand keys. The
    error XTrace was published with covers 80 to 88 % of runs like these.
    """
    values = np.concatenate([1 / np.arange(1, 31), -1 / np.arange(2, 12)])
    operator, like = prescribed(values)
    probes = {"hutch++": 30, "xtrace": 20}[method]
    found = [
        trace(
            operator, like, key=jax.random.key(seed), num_probes=probes, method=method
        )
        for seed in range(150)
    ]
    errors = np.array([x.value for x in found]) - values.sum()
    stated = np.array([x.standard_error for x in found])
    assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(150)
    assert 125 <= np.sum(abs(errors) < 2 * stated) < 150
    # Hutchinson at as many products: its variance is known.
    variance = 2 * np.sum(values**2) / probes
    assert errors.std() < 0.7 * np.sqrt(variance)


@pytest.mark.parametrize("samples", [8, 25])
@pytest.mark.parametrize("name", ["bulk", "decay"])
def test_xtrace_error_has_no_bias(name, samples):
    """The relative error of a root mean square over 300 runs is 4 %."""
    size, runs, rng = 50, 300, np.random.default_rng(samples)
    values = {"bulk": np.linspace(1, 3, size), "decay": 1 / np.arange(1, size + 1)}
    q = rotation(size)
    matrix = (q * values[name]) @ q.T
    errors, variances, published = [], [], []
    for _ in range(runs):
        probes = rng.uniform(-np.sqrt(3), np.sqrt(3), (size, samples))
        basis, triangle = np.linalg.qr(matrix @ probes)
        single, covariance = leave_out(
            triangle, basis.T @ probes, basis.T @ matrix @ basis
        )
        errors.append(single.mean() - values[name].sum())
        published.append(single.var(ddof=1) / samples)
        variances.append(published[-1] + covariance)
    true = np.mean(np.square(errors))
    np.testing.assert_allclose(np.sqrt(np.mean(variances) / true), 1, atol=0.16)
    assert np.sqrt(np.mean(published) / true) < 0.9


def test_xtrace_leaves_out_what_it_says():
    """The closed form against bases built anew without one and two columns."""
    size, samples, rng = 12, 5, np.random.default_rng(0)
    q = rotation(size)
    matrix = (q * rng.normal(size=size)) @ q.T
    probes = rng.normal(size=(size, samples))

    def estimate(probe, columns):
        basis = np.linalg.qr(matrix @ probes[:, columns])[0]
        rest = probes[:, probe] - basis @ (basis.T @ probes[:, probe])
        return np.trace(basis.T @ matrix @ basis) + rest @ matrix @ rest

    everyone = set(range(samples))
    expected = [estimate(i, [*(everyone - {i})]) for i in range(samples)]
    changes = np.zeros((samples, samples))
    for i in range(samples):
        for j in everyone - {i}:
            changes[i, j] = expected[i] - estimate(i, [*(everyone - {i, j})])
    basis, triangle = np.linalg.qr(matrix @ probes)
    single, covariance = leave_out(triangle, basis.T @ probes, basis.T @ matrix @ basis)
    np.testing.assert_allclose(single, expected, rtol=1e-10)
    np.testing.assert_allclose(covariance, np.sum(changes * changes.T) / 20, rtol=1e-9)


def test_xtrace_of_the_drawn_probes():
    """Half of the products are of probes, the others of an orthonormal basis."""
    operator, like = prescribed(np.linspace(-1, 2, 30))
    vectors = []

    def recorded(vector):
        vectors.append(flat(vector))
        return operator(vector)

    found = trace(recorded, like, key=KEY, num_probes=16, method="xtrace")
    probes, matrix = np.stack(vectors[:8], 1), matrix_of(operator)
    np.testing.assert_allclose(np.mean(probes**2), 1, atol=0.25)
    basis, triangle = np.linalg.qr(matrix @ probes)
    np.testing.assert_allclose(
        abs(basis.T @ np.stack(vectors[8:], 1)), np.eye(8), atol=1e-4
    )
    single, covariance = leave_out(triangle, basis.T @ probes, basis.T @ matrix @ basis)
    assert covariance > 0
    np.testing.assert_allclose(found.value, single.mean(), rtol=1e-4)
    error = np.sqrt(single.var(ddof=1) / 8 + covariance)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-3)


@LOW_RANK
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_exact_when_products_span_the_range(method, rank):
    values = np.concatenate([np.linspace(-1, 3, rank), np.zeros(12 - rank)])
    operator, like = prescribed(values)
    found = trace(operator, like, key=KEY, num_probes=40, method=method)
    np.testing.assert_allclose(found.value, values.sum(), rtol=1e-5, atol=1e-5)
    # What cannot be told from rounding is owned up to: 64 eps √P ‖A z‖.
    assert found.standard_error < 1e-3
    if rank == 12:
        assert found.standard_error == 0


@LOW_RANK
@pytest.mark.parametrize("factor", [0.0, -3.0])
def test_low_rank_methods_on_one_number_and_on_zero(method, factor):
    for like in (jnp.float32(2), jnp.ones(5)):
        found = trace(lambda v: factor * v, like, key=KEY, num_probes=15, method=method)
        np.testing.assert_allclose(found.value, factor * like.size, rtol=1e-5)
        assert found.standard_error <= 1e-5


def test_few_sign_vectors_do_not_fake_a_low_rank():
    """Three numbers have four sign vectors up to a factor; repeats are no evidence."""
    matrix = jnp.asarray(prescribed([1, 2, 4])[0].args[0])
    for seed in range(20):
        found = trace(
            lambda v: matrix @ v,
            jnp.ones(3),
            key=jax.random.key(seed),
            num_probes=6,
            method="xtrace",
        )
        np.testing.assert_allclose(found.value, 7, rtol=1e-5)


@LOW_RANK
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_low_rank_methods_show_a_non_finite_operator(method, bad):
    for like in (jnp.ones(9), jnp.float32(1)):
        found = trace(lambda v: v * bad, like, key=KEY, num_probes=6, method=method)
        assert not np.isfinite(found.value)
        assert np.isnan(found.standard_error)


@LOW_RANK
def test_low_rank_methods_beat_hutchinson_on_outliers(method):
    values = outliers(60)
    operator, like = prescribed(values)

    def rms(method):
        found = [
            trace(operator, like, key=jax.random.key(s), num_probes=36, method=method)
            for s in range(12)
        ]
        return np.sqrt(np.mean([(x.value - values.sum()) ** 2 for x in found]))

    # Twelve runs leave 20 % of error on each; measured ratios are above 10.
    assert rms(method) < 0.3 * rms("hutchinson")


@LOW_RANK
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_rank_methods_in_low_precision(method, dtype):
    scales = jnp.asarray(np.geomspace(1, 1e-3, 40), dtype)
    found = trace(lambda v: scales * v, scales, key=KEY, num_probes=30, method=method)
    assert found.value.dtype == found.standard_error.dtype == jnp.float32
    # Probes and basis vectors are rounded to 8 bits before they are multiplied.
    np.testing.assert_allclose(found.value, np.sum(scales, dtype=float), rtol=0.05)


def test_frobenius_norm_is_covered():
    """Ten squares per run, mildly skewed: as for the trace, with some more margin."""
    operator, like, matrix = problem()
    exact, hits, errors = np.linalg.norm(matrix), 0, []
    for seed in range(100):
        found = frobenius_norm(operator, like, key=jax.random.key(seed), num_probes=10)
        errors.append(float(found.value) - exact)
        hits += abs(errors[-1]) < 2 * found.standard_error
    assert 78 <= hits <= 99
    # The root of a mean is low by standard_error² / (2 value), here by 1 %.
    assert abs(np.mean(errors)) < 4 * np.std(errors) / 10 + 0.01 * exact


def test_frobenius_norm_of_the_drawn_probes():
    operator, like, _ = problem()
    squares = []

    def recorded(probe):
        product = operator(probe)
        squares.append(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(product)))
        return product

    found = frobenius_norm(recorded, like, key=KEY, num_probes=5)
    root = np.sqrt(np.mean(squares))
    np.testing.assert_allclose(found.value, root, rtol=1e-5)
    error = np.std(squares, ddof=1) / np.sqrt(5) / (2 * root)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-4)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_frobenius_norm_in_any_unit(unit):
    found = frobenius_norm(lambda v: unit * v, jnp.ones(4), key=KEY, num_probes=2)
    np.testing.assert_allclose(found.value / np.float32(unit), 2, rtol=1e-6)
    assert found.standard_error == 0


def test_frobenius_norm_of_nothing_and_of_nonsense():
    zero = frobenius_norm(lambda v: 0 * v, jnp.ones(4), key=KEY, num_probes=2)
    assert zero == (0, 0)
    one = frobenius_norm(lambda v: v, jnp.ones(4), key=KEY, num_probes=1)
    assert one == (2, np.inf)
    for bad in (np.nan, np.inf):
        found = frobenius_norm(
            lambda v, bad=bad: bad * v, jnp.ones(4), key=KEY, num_probes=2
        )
        assert not np.isfinite(found.value)
        assert np.isnan(found.standard_error)
    with pytest.raises(ValueError, match="num_probes must be at least 1"):
        frobenius_norm(lambda v: v, jnp.ones(4), key=KEY, num_probes=0)
    with pytest.raises(ValueError, match=r"method must be one of \('hutchinson',\)"):
        frobenius_norm(lambda v: v, jnp.ones(4), key=KEY, num_probes=2, method="svd")
