"""Curvature on eight devices: same numbers as on one, and nothing gathered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from basinax.landscape import _lanczos as lanczos
from basinax.landscape import (
    check_operator,
    dense,
    eigenpairs,
    empirical_fisher,
    fisher,
    gauss_newton,
    gradient_covariance,
    hessian,
    over_batches,
    restrict,
    trace,
)
from basinax.landscape._vectors import random_bits

KEY = jax.random.key(0)
SPECS = {"w": P("data", "model"), "b": P()}


def loss(params, x):
    """Couple all parameters, through sums over sharded axes."""
    hidden = jnp.sin(params["w"] * params["b"] + x)
    return jnp.sum(hidden**2) + jnp.sum(params["w"] * x) ** 2 / 40


def problem():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(8, 4)), "b": rng.normal()}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    return params, jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(request.param,) * 2)


@pytest.fixture
def sharded(mesh):
    params, x = problem()
    params = {
        name: jax.device_put(leaf, NamedSharding(mesh, SPECS[name]))
        for name, leaf in params.items()
    }
    return params, jax.device_put(x, NamedSharding(mesh, SPECS["w"]))


@pytest.mark.parametrize("linearize", [False, True])
def test_hessian_product(mesh, sharded, linearize):
    params, x = problem()
    expected = hessian(loss, params, x)(params)
    params, x = sharded
    product = hessian(loss, params, x, linearize=linearize)(params)
    for name, leaf in product.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-4)
    wanted = NamedSharding(mesh, SPECS["w"])
    assert product["w"].sharding.is_equivalent_to(wanted, 2)


def test_eigenpairs(mesh, sharded):
    params, x = problem()
    exact = np.linalg.eigvalsh(dense(hessian(loss, params, x), params))
    params, x = sharded
    operator = hessian(loss, params, x, linearize=True)
    pairs = eigenpairs(operator, params, 2, key=KEY, basis_size=4)
    assert pairs.matvecs > 4  # so it restarted
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.values, exact[:-3:-1], rtol=1e-3)
    wanted = NamedSharding(mesh, P(None, *SPECS["w"]))
    assert pairs.vectors["w"].sharding.is_equivalent_to(wanted, 3)


def test_random_bits_are_drawn_in_place(mesh, sharded):
    params, _ = sharded
    plain = random_bits(KEY, problem()[0])
    for name, leaf in random_bits(KEY, params).items():
        wanted = NamedSharding(mesh, SPECS[name])
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        np.testing.assert_array_equal(leaf, plain[name])


def test_a_step_gathers_nothing(sharded):
    """Only scalars and projections cross the mesh; parameters stay where they are."""
    params, _ = sharded
    basis = lanczos.allocate(params, 4)
    step = jax.jit(lanczos.extend).lower(basis, params, params, 1, jnp.zeros(()))
    text = step.compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    weights = jnp.ones((4, 2))
    assert "all-gather" not in lanczos.combine.lower(basis, weights).compile().as_text()


def test_trace_does_not_depend_on_the_mesh(sharded):
    params, x = problem()
    expected = trace(hessian(loss, params, x), params, key=KEY, num_probes=5)
    params, x = sharded
    estimate = trace(hessian(loss, params, x), params, key=KEY, num_probes=5)
    np.testing.assert_allclose(estimate.value, expected.value, rtol=1e-4)
    np.testing.assert_allclose(
        estimate.standard_error, expected.standard_error, rtol=1e-3
    )


def test_dense(sharded):
    params, x = problem()
    expected = dense(hessian(loss, params, x), params)
    params, x = sharded
    matrix = dense(hessian(loss, params, x), params)
    np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-4)


def model(w, x):
    return jnp.tanh(x @ w)


def mean_loss(w, x):
    return jnp.mean(jnp.sum(model(w, x) ** 2, -1))


def example_loss(w, x):
    return jnp.sum(model(w, x[None]) ** 2)


def in_two_batches(w, x):
    stacked = jnp.stack([x, x + 1])
    return over_batches(lambda x: hessian(mean_loss, w, x), (stacked,))


OPERATORS = {
    "hessian": lambda w, x: hessian(mean_loss, w, x),
    "kept": lambda w, x: gauss_newton(model, "cross_entropy", w, x, linearize=True),
    "gauss_newton": lambda w, x: gauss_newton(model, "cross_entropy", w, x),
    "fisher": lambda w, x: fisher(model, w, x, key=KEY, num_samples=2),
    "empirical_fisher": lambda w, x: empirical_fisher(example_loss, w, (x,)),
    "covariance": lambda w, x: gradient_covariance(example_loss, w, (x,)),
    "over_batches": in_two_batches,
    "restrict": lambda w, x: restrict(hessian(mean_loss, w, x), True),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_data_parallel(mesh, name):
    """The batch is sharded, the parameters are copied to every device."""
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 3), (16, 5)))
    expected = OPERATORS[name](w, x)(w)
    w = jax.device_put(w, NamedSharding(mesh, P()))
    x = jax.device_put(x, NamedSharding(mesh, P(("data", "model"), None)))
    product = OPERATORS[name](w, x)(w)
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5)
    assert product.sharding.is_fully_replicated


def test_sharded_parameters_stay_sharded(mesh, sharded):
    """Sums over batches and blocks live where the parameters do."""
    params, x = problem()
    make = functools.partial(over_batches, lambda x: hessian(loss, params, x))
    expected = make((jnp.stack([x, 2 * x]),))(params)
    params, x = sharded
    mask = {"w": True, "b": False}
    for batches in ((jnp.stack([x, 2 * x]),), [(x,), (2 * x,)]):
        mean = over_batches(lambda x: hessian(loss, params, x), batches)
        for product in (mean(params), restrict(mean, mask)(mask_out(params))):
            assert product["w"].sharding.is_equivalent_to(
                NamedSharding(mesh, SPECS["w"]), 2
            )
        np.testing.assert_allclose(
            mean(params)["w"], expected["w"], rtol=1e-4, atol=1e-4
        )
    check_operator(mean, params, key=KEY)


def mask_out(params):
    return params | {"b": jnp.zeros_like(params["b"])}


@pytest.mark.parametrize("mesh", [AxisType.Explicit], indirect=True)
def test_under_a_mesh_context(sharded, mesh):
    """Training scripts set the mesh globally."""
    with jax.set_mesh(mesh):
        params, x = sharded
        estimate = trace(hessian(loss, params, x), params, key=KEY, num_probes=2)
        pairs = eigenpairs(lambda v: v, params, 1, key=KEY)
    assert np.isfinite(estimate.value)
    np.testing.assert_allclose(pairs.values, 1, rtol=1e-6)
