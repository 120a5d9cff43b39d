"""Diagonals, moments, the compiled Lanczos and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from prescribed import flat, matrix_of, multiply, outliers, prescribed

from basinax.landscape import (
    dense,
    diagonal,
    eigenpairs,
    frobenius_norm,
    hessian,
    moments,
    spectral_density,
    trace,
)
from basinax.landscape._short_lanczos import short_lanczos

KEY = jax.random.key(0)
SIZE = 40
EPS = float(np.finfo(np.float32).eps)
METHODS = pytest.mark.parametrize("method", ["hutchinson", "diag++"])


@METHODS
def test_diagonal_is_covered(method):
    """Ten samples per entry: 2 standard errors cover 92 % of 1200 entries.

    The entries of one run are dependent, so the bounds are wide. Entries that hold few
    large off-diagonal elements have lattice-like samples and cover a little less.
    """
    operator, like = prescribed(outliers(SIZE))
    exact = np.diag(matrix_of(operator))
    probes = {"hutchinson": 10, "diag++": 30}[method]
    hits, errors = [], []
    for seed in range(30):
        found = diagonal(
            operator, like, key=jax.random.key(seed), num_probes=probes, method=method
        )
        # Leaves come in the order of keys, and so do the rows of the matrix.
        errors.append(flat(found.value) - exact)
        hits.append(abs(errors[-1]) < 2 * flat(found.standard_error))
    assert 0.85 < np.mean(hits) < 0.97
    bias = np.mean(errors, 0) / (np.std(errors, 0, ddof=1) / np.sqrt(30))
    assert np.max(abs(bias)) < 5.5  # Student with 29 degrees, 40 entries: p < 1e-3


def test_diag_plus_plus_takes_the_outliers_out():
    operator, like = prescribed(outliers(SIZE))
    exact = np.diag(matrix_of(operator))
    plain, better = (
        np.linalg.norm(
            flat(diagonal(operator, like, key=KEY, num_probes=30, method=m).value)
            - exact
        )
        for m in ("hutchinson", "diag++")
    )
    assert better < 0.2 * plain


def test_diagonal_of_the_drawn_probes():
    operator, like = prescribed(outliers(SIZE))
    samples = []

    def recorded(probe):
        product = operator(probe)
        samples.append(flat(probe) * flat(product))
        return product

    found = diagonal(recorded, like, key=KEY, num_probes=5)
    assert jax.tree.structure(found.value) == jax.tree.structure(like)
    np.testing.assert_allclose(flat(found.value), np.mean(samples, 0), atol=1e-5)
    error = np.std(samples, 0, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(flat(found.standard_error), error, atol=1e-5)


@METHODS
def test_exact_for_a_diagonal_operator(method):
    w = {"a": jnp.arange(1.0, 5), "b": jnp.array(2.0), "none": None}
    operator = hessian(lambda p: jnp.sum(p["a"] ** 3) + p["b"] ** 4, w)
    found = diagonal(operator, w, key=KEY, num_probes=15, method=method)
    np.testing.assert_allclose(found.value["a"], 6 * w["a"], rtol=1e-5)
    np.testing.assert_allclose(found.value["b"], 48, rtol=1e-5)
    np.testing.assert_allclose(flat(found.standard_error), 0, atol=1e-3)


def test_diag_plus_plus_is_exact_when_the_products_span_the_space():
    operator, like = prescribed(outliers(12))
    found = diagonal(operator, like, key=KEY, num_probes=36, method="diag++")
    np.testing.assert_allclose(
        flat(found.value), np.diag(matrix_of(operator)), atol=1e-4
    )
    np.testing.assert_allclose(flat(found.standard_error), 0, atol=1e-4)


@METHODS
def test_diagonal_in_low_precision_and_of_nonsense(method):
    ones = jnp.ones(5, jnp.bfloat16)
    found = diagonal(lambda v: 2 * v, ones, key=KEY, num_probes=15, method=method)
    assert found.value.dtype == found.standard_error.dtype == jnp.float32
    np.testing.assert_allclose(found.value, 2, rtol=0.02)
    found = diagonal(
        lambda v: v * jnp.nan, jnp.ones(5), key=KEY, num_probes=6, method=method
    )
    assert np.isnan(found.value).all()
    assert np.isnan(found.standard_error).all()


def test_one_sample_knows_nothing_of_its_error():
    found = moments(lambda v: v, jnp.ones(4), key=KEY, num_probes=1)
    assert found.trace == (4, np.inf)
    assert found.frobenius_norm == (2, np.inf)
    assert np.isinf(found.diagonal.standard_error).all()


def test_moments_are_the_single_estimates_at_the_price_of_one():
    operator, like = prescribed(outliers(SIZE))
    calls = []

    def counted(probe):
        calls.append(None)
        return operator(probe)

    found = moments(counted, like, key=KEY, num_probes=6)
    assert len(calls) == 6
    assert found.trace == trace(operator, like, key=KEY, num_probes=6)
    norm = frobenius_norm(operator, like, key=KEY, num_probes=6)
    assert found.frobenius_norm == norm
    single = diagonal(operator, like, key=KEY, num_probes=6)
    np.testing.assert_array_equal(flat(found.diagonal), flat(single))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_probes": 0}, "num_probes must be at least 1 for diagonal by hutch"),
        ({"num_probes": 2, "method": "diag++"}, r"at least 3 for diagonal by diag\+\+"),
        ({"method": "xdiag"}, r"one of \('hutchinson', 'diag\+\+'\), got 'xdiag'"),
        ({"like": {}}, "like holds no numbers"),
        ({"operator": lambda v: v[:2]}, "operator's result must be shaped like"),
    ],
)
def test_errors_say_what_is_wrong(overrides, message):
    arguments = {"operator": lambda v: v, "like": jnp.ones(4), "num_probes": 2}
    with pytest.raises(ValueError, match=message):
        diagonal(**(arguments | overrides), key=KEY)
    if "method" not in overrides:
        with pytest.raises(ValueError, match=message.replace("diagonal by hutch", "m")):
            moments(**(arguments | overrides), key=KEY)


@jax.jit
def shortest(matrix, start):
    """Run all three searches in one program."""
    return {
        which: short_lanczos(lambda v: multiply(matrix, v), start, 14, which=which)
        for which in ("LA", "SA", "LM")
    }


def test_short_lanczos_finds_extremes():
    values = outliers(SIZE)
    values[-1] = -12
    operator, like = prescribed(values)
    start = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype),
        like,
    )
    found = shortest(operator.args[0], start)
    for which, expected in {"LA": 10, "SA": -12, "LM": -12}.items():
        pair = found[which]
        np.testing.assert_allclose(pair.value, expected, rtol=1e-5)
        vector = flat(pair.vector)
        np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-5)
        true = np.linalg.norm(matrix_of(operator) @ vector - pair.value * vector)
        np.testing.assert_allclose(pair.residual, true, atol=200 * EPS)
    # A spectrum without gaps has not converged yet, and the residual says so.
    operator, _ = prescribed(np.linspace(-1, 1, SIZE))
    early = shortest(operator.args[0], start)["LA"]
    vector = flat(early.vector)
    true = np.linalg.norm(matrix_of(operator) @ vector - early.value * vector)
    assert true > 1e-3
    np.testing.assert_allclose(early.residual, true, rtol=1e-3)


def test_short_lanczos_in_odd_cases():
    start = jnp.asarray(np.random.default_rng(0).normal(size=9), jnp.float32)
    eye = jnp.eye(9)
    for factor in (0.0, 1.0, -2.0):
        for pair in shortest(factor * eye, start).values():
            np.testing.assert_allclose(pair.value, factor, rtol=1e-6)
            assert pair.residual <= 1e-5
    for pair in shortest(jnp.nan * eye, start).values():
        assert np.isnan(pair.value)
        assert np.isnan(pair.residual)
    for pair in shortest(eye, 0 * start).values():
        assert np.isnan(pair.value)
    for unit in (1e-30, 1e30):
        pair = shortest(unit * jnp.diag(jnp.arange(1.0, 10)), start)["LA"]
        np.testing.assert_allclose(pair.value / np.float32(unit), 9, rtol=1e-5)
    one = jax.jit(lambda x: short_lanczos(lambda v: -3 * v, x, 4))(jnp.float32(5))
    assert (one.value, abs(one.vector), one.residual) == (-3, 1, 0)
    low = jax.jit(lambda x: short_lanczos(lambda v: 2 * v, x, 3))(
        jnp.ones(4, jnp.bfloat16)
    )
    assert low.vector.dtype == jnp.float32
    np.testing.assert_allclose(low.value, 2, rtol=0.02)


def test_short_lanczos_under_vmap_and_cond():
    """A batched eigensolver could deadlock on CPU; there is none in it."""
    start = jnp.asarray(np.random.default_rng(0).normal(size=9), jnp.float32)
    matrices = jnp.stack([k * jnp.diag(jnp.arange(1.0, 10)) for k in (1, 2, -1)])

    def measure(matrix, start):
        return jax.lax.cond(
            matrix[0, 0] > 0,
            lambda: short_lanczos(lambda v: matrix @ v, start, 9).value,
            lambda: jnp.float32(7),
        )

    values = jax.jit(jax.vmap(measure, in_axes=(0, None)))(matrices, start)
    np.testing.assert_allclose(values, [9, 18, 7], rtol=1e-5)


def test_short_lanczos_warm_start():
    operator, like = prescribed(outliers(SIZE))
    top = eigenpairs(operator, like, 1, key=KEY)
    few = jax.jit(lambda operator, start: short_lanczos(operator, start, 4))
    warm = few(operator, jax.tree.map(lambda x: x[0] + 0.02, top.vectors))
    np.testing.assert_allclose(warm.value, 10, rtol=1e-4)
    assert warm.residual < 0.1 * few(operator, like).residual


def test_short_lanczos_errors():
    with pytest.raises(ValueError, match=r"which must be one of .* got 'BE'"):
        short_lanczos(lambda v: v, jnp.ones(2), 2, which="BE")
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        short_lanczos(lambda v: v, jnp.ones(2), 0)
    with pytest.raises(ValueError, match="start is int32"):
        short_lanczos(lambda v: v, jnp.arange(2), 2)


SPECS = {"w": P("data", "model"), "b": P()}


def coupled(params, x):
    """Couple all parameters, through sums over sharded axes."""
    hidden = jnp.sin(params["w"] * params["b"] + x)
    return jnp.sum(hidden**2) + jnp.sum(params["w"] * x) ** 2 / 40


@pytest.mark.parametrize(
    "axis_type",
    [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit],
    ids=["auto", "explicit"],
)
def test_on_a_mesh(axis_type):
    """Same numbers as on one device, leaves where the parameters are."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(8, 4)), "b": rng.normal()}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    matrix = dense(hessian(coupled, params, x), params)

    def measure(params, x):
        operator = hessian(coupled, params, x)
        options = {"key": KEY, "num_probes": 9}
        top = jax.jit(lambda o, p: short_lanczos(o, p, 8))(operator, params)
        found = {
            "xtrace": trace(operator, params, method="xtrace", **options),
            "diag++": diagonal(operator, params, method="diag++", **options).value,
            "moments": moments(operator, params, **options),
            "top": (top.value, top.residual),
        }
        density = spectral_density(
            operator, params, key=KEY, num_probes=2, num_steps=6, num_points=20
        )
        return found | {"density": density.density}, top.vector

    expected, _ = measure(params, x)
    sharded = {
        name: jax.device_put(leaf, NamedSharding(mesh, SPECS[name]))
        for name, leaf in params.items()
    }
    found, vector = measure(sharded, jax.device_put(x, NamedSharding(mesh, SPECS["w"])))
    scale = np.abs(matrix).max()
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * scale)
    wanted = NamedSharding(mesh, SPECS["w"])
    for leaf in (found["diag++"]["w"], vector["w"]):
        assert leaf.sharding.is_equivalent_to(wanted, 2)
