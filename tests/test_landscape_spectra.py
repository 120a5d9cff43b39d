"""Eigenpairs against prescribed spectra: accuracy, honesty, and the odd cases."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial
from prescribed import matrix_of, multiply, outliers, prescribed

from basinax.landscape import _lanczos as lanczos
from basinax.landscape import eigenpairs, hessian

KEY = jax.random.key(0)
SIZE = 120
EPS = float(np.finfo(np.float32).eps)


def columns(pairs):
    """Stack eigenvectors as the columns of a matrix."""
    leaves = jax.tree.leaves(pairs.vectors)
    return np.concatenate(
        [np.asarray(x, np.float64).reshape(len(x), -1) for x in leaves], 1
    ).T


def wanted(values, which, k):
    rank = {"LA": -values, "SA": values, "LM": -abs(values)}[which]
    return values[np.argsort(rank)][:k]


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("k", [1, 6])
def test_values_vectors_and_residuals(which, k):
    values = outliers(SIZE)
    operator, like = prescribed(values)
    pairs = eigenpairs(operator, like, k, key=KEY, which=which)
    assert pairs.converged.all()
    assert pairs.values.shape == pairs.residuals.shape == (k,)
    # |error| <= residual <= tol |λ| holds for every eigenvalue, isolated or not.
    expected = wanted(values, which, k)
    np.testing.assert_allclose(pairs.values, expected, rtol=1e-3, atol=20 * EPS)
    vectors = columns(pairs)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=50 * EPS)
    matrix = matrix_of(operator)
    residuals = np.linalg.norm(
        matrix @ vectors - vectors * np.asarray(pairs.values), axis=0
    )
    np.testing.assert_allclose(residuals, pairs.residuals, rtol=0.01, atol=50 * EPS)


def test_tree_of_vectors():
    operator, like = prescribed(outliers(SIZE))
    vectors = eigenpairs(operator, like, 6, key=KEY).vectors
    shapes = jax.tree.map(jnp.shape, vectors)
    assert shapes == {"x": (6,), "none": None, "w": (6, SIZE - 1, 1)}


def test_float64(x64):
    values = outliers(SIZE)
    operator, like = prescribed(values, np.float64)
    pairs = eigenpairs(operator, like, 4, key=KEY, tol=1e-12)
    assert pairs.converged.all()
    assert pairs.values.dtype == jnp.float64
    np.testing.assert_allclose(pairs.values, values[:4], rtol=1e-13)


def test_no_ghosts():
    """Without reorthogonalisation all of these would be copies of the largest."""
    values = np.concatenate([[1.0, 0.9], np.linspace(0.001, 0.3, SIZE - 2)])
    operator, like = prescribed(values)
    pairs = eigenpairs(operator, like, 25, key=KEY, max_matvecs=80, basis_size=80)
    assert pairs.matvecs == 80
    assert np.sum(np.abs(pairs.values - 1) < 1e-3) == 1
    done = pairs.converged
    assert done.sum() > 10
    expected = np.sort(values)[:-26:-1]
    np.testing.assert_allclose(pairs.values[done], expected[done], rtol=1e-3)


def test_basis_stays_orthonormal():
    """The spectrum spans six decades, so one Gram-Schmidt pass would not do."""
    operator, like = prescribed(np.geomspace(1e-6, 1, SIZE))
    basis = lanczos.allocate(like, 81)
    bits = jax.tree.map(lambda x: jax.random.bits(KEY, x.shape, jnp.uint16), like)
    basis, vector = lanczos.start(basis, like, bits, 0)
    scale = jnp.zeros(())
    for index in range(80):
        step = lanczos.extend(basis, like, operator(vector), index, scale)
        basis, vector, scale = step.basis, step.vector, step.scale
        if step.coefficients[1] == 0:
            break
    live = np.concatenate([x.reshape(81, -1) for x in jax.tree.leaves(basis)], 1)
    live = live[: index + 1].astype(np.float64)
    assert len(live) > 20
    np.testing.assert_allclose(live @ live.T, np.eye(len(live)), atol=10 * EPS)


@pytest.mark.parametrize("basis_size", [5, 20])
@pytest.mark.parametrize("which", ["LA", "LM"])
def test_thick_restarts(basis_size, which):
    values = np.linspace(-0.98, 1, SIZE) ** 3
    operator, like = prescribed(values)
    pairs = eigenpairs(
        operator, like, 3, key=KEY, which=which, basis_size=basis_size, max_matvecs=2000
    )
    assert pairs.matvecs > basis_size
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.values, wanted(values, which, 3), rtol=1e-3)
    vectors = columns(pairs)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-5)


@pytest.mark.parametrize("basis_size", [None, 6])
@pytest.mark.parametrize(
    ("values", "k", "expected"),
    [
        (np.zeros(30), 3, [0, 0, 0]),
        (np.ones(30), 3, [1, 1, 1]),
        ([2, 2, *[0] * 28], 1, [2]),
        ([2, 2, 1, *[0] * 27], 2, [2, 2]),
        ([2, 2, 1, *[0] * 27], 3, [2, 2, 1]),
        ([2, 2, 2, 1, *[0] * 26], 4, [2, 2, 2, 1]),
        ([3, 1, *[0] * 26, -2, -2], 3, [3, 1, 0]),
    ],
)
def test_exhausted_krylov_spaces(values, k, expected, basis_size):
    """Few distinct eigenvalues: breakdown, then copies from the complement."""
    operator, like = prescribed(values)
    pairs = eigenpairs(operator, like, k, key=KEY, basis_size=basis_size)
    assert pairs.converged.all()
    assert pairs.matvecs <= 20
    np.testing.assert_allclose(pairs.values, expected, atol=1e-5)
    vectors = columns(pairs)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-5)


@pytest.mark.parametrize("basis_size", [None, 6])
@pytest.mark.parametrize("top", [(3, 3, 3, 1), (5, 3, 3, 1), (3, 2, 2, 2)])
def test_copies_beside_a_bulk(top, basis_size):
    """No Krylov space is exhausted here, so one chain finds each value once."""
    values = np.concatenate([top, outliers(SIZE)[5:]])
    operator, like = prescribed(values)
    pairs = eigenpairs(
        operator, like, 4, key=KEY, copies=True, basis_size=basis_size, tol=1e-4
    )
    assert pairs.converged.all()
    assert pairs.matvecs < 80
    np.testing.assert_allclose(pairs.values, top, rtol=1e-4)
    vectors = columns(pairs)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(4), atol=1e-5)
    residuals = np.linalg.norm(
        matrix_of(operator) @ vectors - vectors * np.asarray(pairs.values), axis=0
    )
    assert np.all(residuals <= pairs.residuals + 50 * EPS)


def test_one_chain_finds_one_copy():
    """What `copies` is for."""
    values = np.concatenate([[3, 3, 2], outliers(SIZE)[5:]])
    operator, like = prescribed(values)
    once = eigenpairs(operator, like, 2, key=KEY)
    twice = eigenpairs(operator, like, 2, key=KEY, copies=True)
    np.testing.assert_allclose(once.values, [3, 2], rtol=1e-5)
    np.testing.assert_allclose(twice.values, [3, 3], rtol=1e-5)


def test_copies_do_not_delay_a_simple_spectrum_much():
    operator, like = prescribed(outliers(SIZE))
    plain = eigenpairs(operator, like, 5, key=KEY)
    checked = eigenpairs(operator, like, 5, key=KEY, copies=True)
    np.testing.assert_allclose(checked.values, plain.values, rtol=1e-5)
    assert plain.matvecs < checked.matvecs < 4 * plain.matvecs


def test_memory_is_stated_before_starting():
    operator, like = prescribed(outliers(SIZE))
    # 20 vectors of the basis, one more, and 11 + 1 during a restart.
    need = 33 * SIZE * 4
    pairs = eigenpairs(operator, like, 2, key=KEY, basis_size=20, max_bytes=need)
    assert pairs.converged.all()
    with pytest.raises(ValueError, match=r"33 vectors .* 1.58e\+04 bytes.*basis_size"):
        eigenpairs(operator, like, 2, key=KEY, basis_size=20, max_bytes=need - 1)


def test_breakdown_is_told_from_a_small_coupling():
    """A threshold at the root of eps would cut the first of these chains."""
    like = jnp.ones(3)
    for coupling, survives in ((1e-4, True), (1e-6, False)):
        matrix = jnp.diag(jnp.array([1.0, 0.5, 0.25])).at[[0, 1], [1, 0]].set(coupling)
        basis = lanczos.allocate(like, 3).at[0, 0].set(1)
        step = lanczos.extend(basis, like, matrix[0], 0, jnp.zeros(()))
        expected = [0, coupling > 1e-5, 0]
        np.testing.assert_allclose(step.vector, expected, atol=1e-6)
        np.testing.assert_allclose(
            step.coefficients, [1, coupling * survives], rtol=1e-5
        )


@pytest.mark.parametrize("size", [2, 12])
def test_all_pairs_of_a_small_problem(size):
    values = np.linspace(-1, 2, size)
    operator, like = prescribed(values)
    pairs = eigenpairs(operator, like, size, key=KEY, which="SA")
    assert pairs.matvecs == size
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.values, values, atol=20 * EPS)


def test_one_number():
    pairs = eigenpairs(lambda v: -3 * v, jnp.float32(0), 1, key=KEY)
    assert (float(pairs.values[0]), pairs.matvecs) == (-3, 1)
    assert abs(float(pairs.vectors[0])) == 1


@settings(max_examples=8, deadline=None)
@given(exponent=st.integers(-80, 80), seed=st.integers(0, 2**32 - 1))
def test_units_of_the_loss_do_not_matter(exponent, seed):
    """Squares of 2**-80 vanish in float32, those of 2**80 overflow."""
    operator, like = prescribed(outliers(SIZE))
    key = jax.random.key(seed)
    plain = eigenpairs(operator, like, 2, key=key)
    scaled = Partial(multiply, operator.args[0] * 2.0**exponent)
    other = eigenpairs(scaled, like, 2, key=key)
    assert plain.matvecs == other.matvecs
    np.testing.assert_allclose(np.ldexp(other.values, -exponent), plain.values, 1e-6)
    np.testing.assert_allclose(columns(other), columns(plain), atol=1e-5)


def test_key_decides_the_start_and_nothing_else():
    operator, like = prescribed(outliers(SIZE))
    first, same, other = (
        eigenpairs(operator, like, 3, key=jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(columns(first), columns(same))
    assert not np.array_equal(first.residuals, other.residuals)
    np.testing.assert_allclose(first.values, other.values, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("healthy_products", [0, 4])
def test_a_non_finite_operator_never_converges(bad, healthy_products):
    operator, like = prescribed(np.ones(30))
    calls = []

    def failing(v):
        calls.append(None)
        factor = 1 if len(calls) <= healthy_products else bad
        return jax.tree.map(lambda x: factor * x, operator(v))

    pairs = eigenpairs(failing, like, 6, key=KEY)
    assert pairs.matvecs == healthy_products + 1
    assert not pairs.converged.any()
    assert np.isnan(pairs.values).all()
    assert np.isnan(pairs.residuals).all()
    assert np.isnan(columns(pairs)).all()


def test_gives_up_honestly():
    values = np.linspace(0, 1, SIZE) ** 2
    operator, like = prescribed(values)
    pairs = eigenpairs(operator, like, 4, key=KEY, tol=1e-5, max_matvecs=12)
    assert pairs.matvecs == 12
    assert not pairs.converged.all()
    np.testing.assert_array_equal(
        pairs.converged, pairs.residuals <= 1e-5 * pairs.values
    )


def test_no_tolerance_asks_for_less_than_rounding():
    operator, like = prescribed(outliers(SIZE))
    pairs = eigenpairs(operator, like, 3, key=KEY, tol=0.0)
    assert pairs.converged.all()
    assert pairs.matvecs < 20


def test_counts_products_and_accepts_a_plain_function():
    """An operator may be an ordinary loop over batches that do not fit at once."""
    values = outliers(SIZE)
    operator, like = prescribed(values)
    halves = [Partial(multiply, operator.args[0] * share) for share in (0.25, 0.75)]
    calls = []

    def streamed(v):
        calls.append(None)
        return jax.tree.map(jnp.add, *(half(v) for half in halves))

    pairs = eigenpairs(streamed, like, 2, key=KEY)
    assert pairs.matvecs == len(calls) < 20
    np.testing.assert_allclose(pairs.values, [10, 6], rtol=1e-5)


def quartic(params, x):
    return jnp.mean((x @ params["w"] ** 2 + params["b"]) ** 2)


def quartic_problem(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=12), "b": rng.normal()}
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
    return params, jnp.asarray(rng.normal(size=(20, 12)), dtype)


def test_new_parameters_and_data_compile_nothing(caplog):
    traces = []

    def counted(params, x):
        traces.append(None)
        return quartic(params, x)

    def measure(seed):
        params, x = quartic_problem(seed)
        return eigenpairs(hessian(counted, params, x), params, 2, key=KEY).values

    first = measure(0)
    assert len(traces) == 1
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        second = measure(1)
    assert "Compiling" not in caplog.text
    assert len(traces) == 1
    assert not np.allclose(first, second)
    # The log does show a compilation where one is due.
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(1.0)
    assert "Compiling" in caplog.text


def test_low_precision_parameters():
    """The basis and the projected matrix are float32; only products are bfloat16."""
    params, x = quartic_problem(0)
    low, low_x = jax.tree.map(lambda p: p.astype(jnp.bfloat16), (params, x))
    exact = jax.tree.map(lambda p: p.astype(jnp.float32), (low, low_x))
    reference = eigenpairs(hessian(quartic, *exact), exact[0], 2, key=KEY)
    pairs = eigenpairs(hessian(quartic, low, low_x), low, 2, key=KEY, tol=0.02)
    assert pairs.converged.all()
    assert pairs.values.dtype == pairs.vectors["w"].dtype == jnp.float32
    np.testing.assert_allclose(pairs.values, reference.values, rtol=0.03)
    vectors = columns(pairs)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(2), atol=20 * EPS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"which": "BE"}, "which must be one of .*'LA', 'SA', 'LM'.*got 'BE'"),
        ({"k": 0}, "k must lie between 1 and the number of parameters, 4; got 0"),
        ({"k": 5}, "k must lie between 1 and the number of parameters, 4; got 5"),
        ({"k": 3, "max_matvecs": 2}, "max_matvecs must be at least k = 3"),
        ({"k": 1, "basis_size": 2}, "basis_size must be at least 3, .*; got 2"),
        ({"like": {"w": jnp.arange(3)}}, r"like\['w'\] is int32"),
        ({"like": {"w": jnp.ones(3, complex)}}, r"like\['w'\] is complex64"),
        ({"like": None}, "like holds no numbers"),
        ({"operator": lambda v: v[:2]}, "operator's result must be shaped like"),
        ({"operator": lambda v: {"w": v}}, "operator's result must be shaped like"),
    ],
)
def test_errors_say_what_is_wrong(overrides, message):
    arguments = {"operator": lambda v: v, "like": jnp.ones(4), "k": 1} | overrides
    with pytest.raises(ValueError, match=message):
        eigenpairs(**arguments, key=KEY)


def test_refuses_to_be_traced():
    with pytest.raises(ValueError, match=r"eigenpairs .* call it outside jit"):
        jax.jit(lambda like: eigenpairs(lambda v: v, like, 1, key=KEY))(jnp.ones(3))
