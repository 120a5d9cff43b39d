"""Spectral densities and what follows from them, against known spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.tree_util import Partial
from landscape_models import APPLY, GOLDEN, flatten, problem
from prescribed import flat, matrix_of, multiply, outliers, prescribed

from basinax.landscape import (
    Density,
    effective_dimension,
    extreme_ratio,
    hessian,
    log_determinant,
    moments,
    negativity_ratio,
    spectral_density,
    spectral_mean,
)
from basinax.landscape._quadrature import gauss

KEY = jax.random.key(0)
SIZE = 120
EPS = float(np.finfo(np.float32).eps)


def density_of(values, probes=3, steps=20, **options):
    operator, like = prescribed(values)
    return spectral_density(
        operator, like, key=KEY, num_probes=probes, num_steps=steps, **options
    )


@pytest.mark.parametrize("name", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_wasserstein_distance_to_a_trained_network(name):
    """Ten probes of 40 steps: 0.3 % of the range measured, 0.6 % allowed."""
    loss, params, x, y = problem(name, jnp.float32)
    operator = hessian(loss, params, x, y, linearize=True)
    found = spectral_density(operator, params, key=KEY, num_probes=10, num_steps=40)
    exact = GOLDEN[f"{name}.hess_eig"]
    distance = scipy.stats.wasserstein_distance(
        np.ravel(found.nodes), exact, np.ravel(found.weights), np.ones(len(exact))
    )
    assert distance < 0.006 * np.ptp(exact)
    np.testing.assert_allclose(found.nodes.max(), exact[-1], rtol=1e-5)
    np.testing.assert_allclose(found.nodes.min(), exact[0], rtol=1e-3)


def test_moments_of_a_trained_network():
    loss, params, x, y = problem("mlp", jnp.float32)
    operator = hessian(loss, params, x, y, linearize=True)
    found = moments(operator, params, key=KEY, num_probes=50)
    norm = found.frobenius_norm
    assert abs(norm.value - GOLDEN["mlp.hess_fro"]) < 4 * norm.standard_error
    assert norm.standard_error < 0.1 * norm.value
    error = flatten("mlp", found.diagonal.value) - GOLDEN["mlp.hess_diag"]
    stated = flatten("mlp", found.diagonal.standard_error)
    # Of 413 dependent entries 95 % are expected within two standard errors.
    assert 0.9 < np.mean(abs(error) < 2 * stated) < 0.99


def test_one_node_per_outlier():
    """Without reorthogonalisation about nine of 100 nodes would copy the largest."""
    values = np.concatenate([[1.0], np.geomspace(1e-7, 0.5, 299)])
    found = density_of(values, probes=2, steps=100)
    near = np.abs(found.nodes - 1) < 1e-3
    # A chain that broke down repeats its last node without weight.
    near &= np.asarray(found.weights) > 0
    np.testing.assert_array_equal(near.sum(1), 1)


def test_shapes_and_weights():
    found = density_of(outliers(SIZE), num_points=50)
    assert found.nodes.shape == found.weights.shape == (3, 20)
    assert found.grid.shape == found.density.shape == found.standard_error.shape
    assert found.grid.shape == (50,)
    assert np.all(np.diff(found.nodes) >= 0)
    assert np.all(np.asarray(found.weights) >= 0)
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-6)


def test_quadrature_is_exact_for_polynomials():
    """Gauss: degree 2 m - 1 for the probe itself, which squaring whole matrices of
    eigenvectors would miss from the second moment on.
    """
    operator, like = prescribed(np.linspace(-1, 2, SIZE))
    probes = []

    def recorded(vector):
        probes.append(flat(vector))
        return operator(vector)

    found = spectral_density(recorded, like, key=KEY, num_probes=1, num_steps=4)
    start, matrix = probes[0], matrix_of(operator)
    np.testing.assert_allclose(abs(start), 1 / np.sqrt(SIZE), rtol=1e-6)
    nodes, weights = np.float64(found.nodes[0]), np.float64(found.weights[0])
    for power in range(8):
        moment = start @ np.linalg.matrix_power(matrix, power) @ start
        np.testing.assert_allclose(np.sum(weights * nodes**power), moment, rtol=1e-4)
    moment = start @ np.linalg.matrix_power(matrix, 8) @ start
    assert abs(np.sum(weights * nodes**8) / moment - 1) > 1e-3


def test_weights_are_the_first_row_squared():
    alphas, betas = np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.7, 9.0])
    nodes, weights = gauss(np.stack([alphas, betas], 1), 5)
    matrix = np.diag(alphas) + np.diag(betas[:2], 1) + np.diag(betas[:2], -1)
    values, vectors = np.linalg.eigh(matrix)
    np.testing.assert_allclose(nodes, [*values, values[-1], values[-1]])
    np.testing.assert_allclose(weights, [*vectors[0] ** 2, 0, 0], rtol=1e-12)


def test_density_of_the_nodes():
    found = density_of(outliers(SIZE), sigma=0.2)
    nodes, weights = np.float64(found.nodes), np.float64(found.weights)
    curves = [
        sum(
            w * scipy.stats.norm.pdf(np.float64(found.grid), t, 0.2)
            for t, w in zip(*pair, strict=True)
        )
        for pair in zip(nodes, weights, strict=True)
    ]
    np.testing.assert_allclose(found.density, np.mean(curves, 0), atol=1e-5)
    error = np.std(curves, 0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(found.standard_error, error, atol=1e-5)
    margin = found.grid[-1] - found.nodes.max()
    np.testing.assert_allclose(margin, 0.8, rtol=1e-4)


def test_default_sigma_and_a_grid_of_ones_own():
    default = density_of(outliers(SIZE))
    np.testing.assert_allclose(jnp.trapezoid(default.density, default.grid), 1, 1e-3)
    sigma = float(default.nodes.max() - default.nodes.min()) / 20
    given = density_of(outliers(SIZE), sigma=sigma, grid=default.grid)
    np.testing.assert_allclose(given.density, default.density, rtol=1e-3, atol=1e-5)


def test_standard_errors_of_the_density_are_honest():
    """The share of the spectrum in the outliers varies between probes of 10 keys."""
    operator, like = prescribed(outliers(40))
    grid = jnp.array([-0.5, 0.0, 2.75, 10.0])
    found = [
        spectral_density(
            operator,
            like,
            key=jax.random.key(seed),
            num_probes=5,
            num_steps=12,
            sigma=0.3,
            grid=grid,
        )
        for seed in range(30)
    ]
    spread = np.std([x.density for x in found], axis=0)
    stated = np.sqrt(np.mean([np.square(x.standard_error) for x in found], axis=0))
    # The ratio of two sample deviations, of 30 and of 30 × 4 degrees, errs by 15 %.
    np.testing.assert_allclose(stated / spread, 1, atol=0.6)
    exact = np.mean(
        [scipy.stats.norm.pdf(np.float64(grid), t, 0.3) for t in outliers(40)], 0
    )
    mean = np.mean([x.density for x in found], 0)
    assert np.all(abs(mean - exact) < 4 * spread / np.sqrt(30) + 1e-3)


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.0])
def test_exact_breakdown(factor):
    """The identity and zero exhaust their Krylov space in one step."""
    calls = []

    def operator(vector):
        calls.append(None)
        return factor * vector

    found = spectral_density(operator, jnp.ones(9), key=KEY, num_probes=2, num_steps=5)
    np.testing.assert_allclose(found.nodes, factor, rtol=1e-6)
    np.testing.assert_allclose(found.weights, [[1, 0, 0, 0, 0]] * 2, atol=1e-12)
    np.testing.assert_allclose(jnp.trapezoid(found.density, found.grid), 1, 1e-3)
    assert np.isfinite(found.standard_error).all()
    assert len(calls) == 10  # β is looked at every eighth step only
    calls.clear()
    spectral_density(operator, jnp.ones(99), key=KEY, num_probes=2, num_steps=50)
    assert len(calls) == 16


def test_few_distinct_eigenvalues_exhaust_a_chain():
    """Three steps in exact arithmetic; a few more because rounding splits them."""
    values = np.array([2, 2, 1, *[0] * 27])
    found = density_of(values, probes=4, steps=12)
    assert np.all(np.sum(np.asarray(found.weights) > 0, 1) < 8)
    for level in (0, 1, 2):
        share = spectral_mean(lambda t, level=level: abs(t - level) < 1e-3, found)
        expected = np.mean(values == level)
        assert abs(share.value - expected) < 4 * share.standard_error + 1e-5


def test_steps_beyond_the_dimension():
    found = spectral_density(
        lambda v: jnp.array([2.0, 3.0]) * v,
        jnp.ones(2),
        key=KEY,
        num_probes=1,
        num_steps=6,
    )
    np.testing.assert_allclose(found.nodes, [[2, 3, 3, 3, 3, 3]], rtol=1e-6)
    np.testing.assert_allclose(found.weights, [[0.5, 0.5, 0, 0, 0, 0]], atol=1e-6)
    assert np.isinf(found.standard_error).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_operator(bad):
    found = spectral_density(
        lambda v: bad * v, jnp.ones(9), key=KEY, num_probes=2, num_steps=3
    )
    assert all(np.isnan(x).all() for x in found)
    assert np.isnan(extreme_ratio(found).value)
    assert np.isnan(negativity_ratio(found).value)


def test_float64_and_low_precision(x64):
    wide = spectral_density(
        lambda v: v * jnp.linspace(1, 2, 9),
        jnp.ones(9),
        key=KEY,
        num_probes=2,
        num_steps=9,
    )
    assert {x.dtype for x in wide} == {np.dtype(np.float64)}
    np.testing.assert_allclose(wide.nodes[0], np.linspace(1, 2, 9), rtol=1e-12)
    low = spectral_density(
        lambda v: 2 * v, jnp.ones(9, jnp.bfloat16), key=KEY, num_probes=2, num_steps=2
    )
    assert {x.dtype for x in low} == {np.dtype(np.float32)}
    np.testing.assert_allclose(low.nodes, 2, rtol=0.02)


def test_moments_of_the_spectrum():
    values = outliers(SIZE)
    found = density_of(values, probes=30, steps=15)
    for function in (np.square, np.abs, lambda t: t):
        mean = spectral_mean(function, found)
        error = abs(mean.value - np.mean(function(values)))
        assert error < 4 * mean.standard_error
        assert mean.standard_error < 0.4 * np.mean(np.abs(function(values)))
    everything = spectral_mean(np.ones_like, found)
    np.testing.assert_allclose(everything.value, 1, rtol=1e-6)


def ggn():
    """Make the dense Gauss-Newton matrix of the golden perceptron as an operator."""
    _, params, x, y = problem("mlp", jnp.float64)
    theta, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jacrev(lambda t: APPLY["mlp"](unravel(t), x))(theta)
    p = jax.nn.softmax(APPLY["mlp"](params, x))
    weighted = p[:, :, None] * (
        jacobian - jnp.einsum("nc,ncp->np", p, jacobian)[:, None]
    )
    matrix = jnp.einsum("ncp,ncq->pq", jacobian, weighted) / len(y)
    return Partial(multiply, (matrix + matrix.T) / 2), theta


def test_golden_gauss_newton_functionals(x64):
    operator, like = ggn()
    options = {"key": KEY, "num_probes": 12}
    # At 40 steps the quadrature error is below 1e-3 of the probe noise.
    found = log_determinant(operator, like, 1e-2, num_steps=40, **options)
    error = abs(found.value - GOLDEN["mlp.ggn_logdet_damp1e-2"])
    assert error < 4 * found.standard_error
    assert found.standard_error < 0.02 * abs(found.value)
    for damping in (0.001, 0.01, 0.1):
        found = effective_dimension(operator, like, damping, num_steps=40, **options)
        error = abs(found.value - GOLDEN[f"mlp.ggn_effdim_{damping}"])
        assert error < 4 * found.standard_error
        assert found.standard_error < 0.15 * found.value


def test_functionals_are_covered():
    """Eight probes: 2 standard errors cover 91 %, 60 runs hold 55 ± 2.2."""
    values = np.concatenate([np.geomspace(1e-3, 1, 20), np.zeros(10)])
    operator, like = prescribed(values)
    exact = np.sum(np.log(values + 0.1)), np.sum(values / (values + 0.1))
    hits = np.zeros(2)
    for seed in range(60):
        options = {"key": jax.random.key(seed), "num_probes": 8, "num_steps": 8}
        found = (
            log_determinant(operator, like, 0.1, **options),
            effective_dimension(operator, like, 0.1, **options),
        )
        hits += [
            abs(x.value - e) < 2 * x.standard_error
            for x, e in zip(found, exact, strict=True)
        ]
    assert np.all(hits >= 46)
    assert np.all(hits <= 59)


def test_log_determinant_where_there_is_none():
    options = {"key": KEY, "num_probes": 2, "num_steps": 3}
    indefinite = jnp.array([1.0, -1.0, 2.0])
    found = log_determinant(lambda v: indefinite * v, indefinite, 0.5, **options)
    assert np.isnan(found.value)
    found = log_determinant(lambda v: indefinite * v, indefinite, 2.0, **options)
    np.testing.assert_allclose(found.value, np.log(3 * 1 * 4), rtol=1e-5)
    zero = log_determinant(lambda v: 0 * v, jnp.ones(3), **options)
    assert zero.value == -np.inf
    one = log_determinant(lambda v: 2 * v, jnp.float32(1), **options)
    np.testing.assert_allclose(one.value, np.log(2), rtol=1e-6)


def test_extreme_ratio():
    found = density_of(outliers(SIZE), steps=40)
    ratio = extreme_ratio(found)
    np.testing.assert_allclose(ratio.value, 0.06, rtol=1e-3)
    assert ratio.standard_error < 1e-4
    assert np.isnan(extreme_ratio(density_of(np.zeros(5), steps=2)).value)


def test_literal_negativity_depends_on_the_steps():
    """It counts nodes; the default form integrates over the density."""
    values = outliers(300)
    exact = np.sum(np.sqrt(-values[values < 0])) / np.sum(np.sqrt(values[values > 0]))
    few, many = (density_of(values, probes=12, steps=steps) for steps in (15, 60))
    literal = [negativity_ratio(x, literal=True).value for x in (few, many)]
    assert literal[1] > 1.4 * literal[0]
    for found in (few, many):
        ours = negativity_ratio(found)
        assert abs(ours.value - exact) < 4 * ours.standard_error
        assert ours.standard_error < 0.1 * exact


def test_negativity_by_hand():
    nodes = jnp.array([[-1.0, 0.0, 4.0], [-4.0, 1e-9, 9.0]])
    weights = jnp.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    density = Density(nodes[0], nodes[0], nodes[0], nodes, weights)
    literal = negativity_ratio(density, literal=True)
    second = 1 / (np.sqrt(0.5e-9) + 1.5)
    ratios = np.array([np.sqrt(0.5), second])
    np.testing.assert_allclose(literal.value, ratios.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        literal.standard_error, ratios.std(ddof=1) / np.sqrt(2), rtol=1e-4
    )
    # (0.5 + 0.5) / (0.5 + 0.75); the 1e-9 is rounding and counts as zero.
    ours = negativity_ratio(density)
    np.testing.assert_allclose(ours.value, 0.8, rtol=1e-6)
    rest = np.array([0.5, 0.5]) - 0.8 * np.array([0.5, 0.75])
    error = rest.std(ddof=1) / np.sqrt(2) / 0.625
    np.testing.assert_allclose(ours.standard_error, error, rtol=1e-5)
    # With n = 1 the weight may stand inside the power.
    single = Density(*density[:3], nodes[:1], weights[:1])
    both = [negativity_ratio(single, 1.0, literal=x).value for x in (True, False)]
    np.testing.assert_allclose(both, 0.5, rtol=1e-6)
    assert negativity_ratio(single).standard_error == np.inf
    positive = Density(*density[:3], abs(nodes), weights)
    assert negativity_ratio(positive) == (0, 0)
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        negativity_ratio(density, 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_probes": 0}, "num_probes must be at least 1 for spectral_density"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_points": 0}, "num_points must be at least 1, got 0"),
        ({"sigma": 0.0}, "sigma must be positive, got 0.0"),
        ({"grid": jnp.ones((2, 2))}, r"grid must be a vector, got shape \(2, 2\)"),
        ({"like": {}}, "like holds no numbers"),
        ({"like": jnp.ones(3, complex)}, "like is complex64"),
        ({"operator": lambda v: v[:2]}, "operator's result must be shaped like"),
        ({"max_bytes": 79}, r"5 vectors .* 80 bytes.*max_bytes=79.*fewer num_steps"),
    ],
)
def test_errors_say_what_is_wrong(overrides, message):
    arguments = {"operator": lambda v: v, "like": jnp.ones(4)}
    arguments |= {"num_probes": 2, "num_steps": 5} | overrides
    with pytest.raises(ValueError, match=message):
        spectral_density(**arguments, key=KEY)


def test_errors_about_damping():
    options = {"key": KEY, "num_probes": 1}
    with pytest.raises(ValueError, match="damping must be at least 0, got -1"):
        log_determinant(lambda v: v, jnp.ones(2), -1, **options)
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        effective_dimension(lambda v: v, jnp.ones(2), 0, **options)
    with pytest.raises(ValueError, match=r"method must be one of \('lanczos',\)"):
        log_determinant(lambda v: v, jnp.ones(2), method="cholesky", **options)


def test_refuses_to_be_traced():
    def call(like):
        return spectral_density(lambda v: v, like, key=KEY, num_probes=1, num_steps=1)

    with pytest.raises(ValueError, match=r"spectral_density .* call it outside jit"):
        jax.jit(call)(jnp.ones(3))
