"""Curvature on eight devices: same numbers as on one, and nothing gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from basinax.landscape import _lanczos as lanczos
from basinax.landscape import dense, eigenpairs, hessian, trace
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


def test_data_parallel(mesh):
    """The batch is sharded, the parameters are copied to every device."""

    def mean_loss(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 3), (16, 5)))
    expected = hessian(mean_loss, w, x)(w)
    w = jax.device_put(w, NamedSharding(mesh, P()))
    x = jax.device_put(x, NamedSharding(mesh, P("data", None)))
    product = hessian(mean_loss, w, x)(w)
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mesh", [AxisType.Explicit], indirect=True)
def test_under_a_mesh_context(sharded, mesh):
    """Training scripts set the mesh globally."""
    with jax.set_mesh(mesh):
        params, x = sharded
        estimate = trace(hessian(loss, params, x), params, key=KEY, num_probes=2)
        pairs = eigenpairs(lambda v: v, params, 1, key=KEY)
    assert np.isfinite(estimate.value)
    np.testing.assert_allclose(pairs.values, 1, rtol=1e-6)
