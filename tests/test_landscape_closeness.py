"""Distances to the minima of several sources: quadratics, the bound, descent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from basinax.landscape import (
    closeness,
    closeness_bound,
    gradient_cosines,
    gradient_variance,
)

SGD = optax.sgd(0.05)


def flat(params):
    return jnp.concatenate([params["w"].ravel(), params["b"][None]])


def loss(params, hessian, minimum):
    """½ (v - m)ᵀ H (v - m) of seven coupled numbers in two leaves."""
    d = flat(params) - minimum
    return 0.5 * d @ (hessian @ d)


def problem(seed=0, sources=3, dtype=np.float32, lowest=0.5, highest=5.0):
    rng = np.random.default_rng(seed)
    values = rng.uniform(lowest, highest, (sources, 7))
    bases = np.linalg.qr(rng.normal(size=(sources, 7, 7)))[0]
    hessians = np.einsum("nij,nj,nkj->nik", bases, values, bases)
    minima = rng.normal(size=(sources, 7))
    point = rng.normal(size=7)
    params = {"w": point[:6].reshape(2, 3), "b": point[6], "none": None}
    batches = jax.tree.map(lambda x: jnp.asarray(x, dtype), (hessians, minima))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params), batches


def distances(params, minima):
    return np.linalg.norm(flat(params)[None] - minima, axis=1)


# --- Newton --------------------------------------------------------------------------


@pytest.mark.parametrize("as_list", [False, True])
def test_exact_on_quadratics(x64, as_list):
    params, batches = problem(dtype=np.float64)
    if as_list:
        batches = list(zip(*batches, strict=True))
    found = closeness(loss, params, batches, tol=1e-12)
    hessians, minima = problem(dtype=np.float64)[1]
    exact = distances(params, minima)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10)
    close(found.distances, exact)
    close(found.mean_squared_distance, (exact**2).mean())
    d = flat(params)[None] - minima
    slopes = np.einsum("nij,nj->ni", hessians, d)
    close(found.losses, (d * slopes).sum(1) / 2)
    close(found.gradient_norms, np.linalg.norm(slopes, axis=1))
    np.testing.assert_allclose(found.losses_reached, 0, atol=1e-20)
    np.testing.assert_allclose(found.gradient_norms_reached, 0, atol=1e-10)
    assert found.converged.all()
    assert (found.residuals <= 1e-12).all()


def test_damping_moves_to_the_damped_minimum():
    params, (hessians, minima) = problem()
    found = closeness(loss, params, (hessians, minima), damping=2.0, tol=1e-5)
    d = flat(params)[None] - minima
    expected = [
        np.linalg.norm(np.linalg.solve(h + 2 * np.eye(7), h @ x))
        for h, x in zip(np.asarray(hessians), np.asarray(d), strict=True)
    ]
    np.testing.assert_allclose(found.distances, expected, rtol=1e-4)
    assert (found.distances < distances(params, minima)).all()


def test_singular_hessians_have_a_nearest_minimum():
    """Where a direction is flat, the distance is that to the flat of minima."""
    params, (hessians, minima) = problem()
    values, bases = np.linalg.eigh(hessians)
    values[:, :2] = 0
    singular = np.einsum("nij,nj,nkj->nik", bases, values, bases)
    found = closeness(loss, params, (jnp.asarray(singular), minima), tol=1e-4)
    d = np.einsum("nij,ni->nj", bases, flat(params)[None] - minima)
    expected = np.linalg.norm(d[:, 2:], axis=1)
    np.testing.assert_allclose(found.distances, expected, rtol=1e-3)
    assert found.converged.all()


def test_indefinite_hessians_have_none():
    params, (hessians, minima) = problem(lowest=-1)
    lowest = np.linalg.eigvalsh(hessians)[:, 0]
    assert (lowest < 0).any()
    found = closeness(loss, params, (hessians, minima))
    np.testing.assert_array_equal(np.isinf(found.distances), lowest < 0)
    np.testing.assert_array_equal(found.converged, lowest > 0)
    assert found.mean_squared_distance == np.inf
    damped = closeness(loss, params, (hessians, minima), damping=1.5)
    assert damped.converged.all()
    assert np.isfinite(damped.mean_squared_distance)


def test_before_convergence_distances_are_too_small():
    params, batches = problem()
    exact = distances(params, batches[1])
    before = np.zeros(3)
    for steps in (1, 3, 5):
        found = closeness(loss, params, batches, steps=steps, tol=1e-5)
        assert not found.converged.any()
        assert (before < found.distances).all()
        assert (found.distances < exact).all()
        before = found.distances
    # The residual is that of the equations, here of the loss itself.
    left = found.gradient_norms_reached / found.gradient_norms
    np.testing.assert_allclose(found.residuals, left, rtol=1e-3)


@pytest.mark.parametrize("size", [1e-25, 1e15])
def test_sizes(size):
    """Distances far from one, at losses whose squared gradients leave the range."""
    params, (hessians, minima) = problem()
    expected = size * np.float64(distances(params, minima))
    params, minima = jax.tree.map(lambda x: np.float32(size) * x, (params, minima))
    found = closeness(loss, params, (hessians, minima), tol=1e-5)
    np.testing.assert_allclose(found.distances, expected, rtol=1e-4)


def test_at_the_minimum_and_with_nan():
    params, (hessians, minima) = problem()
    minima = minima.at[1].set(flat(params))
    minima = minima.at[2, 0].set(jnp.nan)
    for options in ({}, {"method": "descent", "optimizer": SGD, "steps": 2}):
        found = closeness(loss, params, (hessians, minima), **options)
        assert found.distances[1] == found.residuals[1] == 0
        assert found.converged[1]
        for values in (found.distances, found.losses, found.residuals):
            np.testing.assert_array_equal(np.isnan(values), [False, False, True])
        assert not found.converged[2]
        assert np.isnan(found.mean_squared_distance)


def test_bfloat16_parameters():
    params, batches = problem()
    narrow = optax.tree.cast(params, jnp.bfloat16)
    found = closeness(loss, narrow, batches, tol=0.03)
    assert found.distances.dtype == jnp.float32
    np.testing.assert_allclose(
        found.distances, distances(params, batches[1]), rtol=0.15
    )


def test_sources_share_their_code():
    calls = []

    def counted(params, hessian, minimum):
        calls.append(1)
        return loss(params, hessian, minimum)

    counts = []
    for seed, sources in ((0, 1), (1, 4), (2, 2)):
        params, batches = problem(seed, sources)
        closeness(counted, params, batches)
        closeness(counted, params, batches, method="descent", optimizer=SGD, steps=2)
        counts.append(len(calls))
    assert counts[0] == counts[-1]


def test_valley():
    """Three sources whose mean has the same minimum wherever their minima are.

    L_k = ½ ‖x - a_k sin φ‖² with unit vectors a_k at 120 degrees: at x = 0 the minima
    lie at distance |sin φ|, and the cosines of the gradients are -1/2 for every φ.
    """
    turns = 2 * np.pi * np.arange(3) / 3
    sources = np.stack([np.cos(turns), np.sin(turns)], 1).astype(np.float32)
    x = jnp.zeros(2)
    for phi in (0.1, 1.2):
        batches = (jnp.asarray(np.sin(phi) * sources, jnp.float32),)
        found = closeness(valley, x, batches)
        np.testing.assert_allclose(found.distances, np.sin(phi), rtol=1e-6)
        grads = jax.vmap(jax.grad(valley), (None, 0))(x, *batches)
        np.testing.assert_allclose(gradient_cosines(grads).mean, -0.5, rtol=1e-5)
        np.testing.assert_allclose(
            gradient_variance(grads, unbiased=False).total,
            found.mean_squared_distance,
            rtol=1e-5,
        )


def valley(x, minimum):
    return 0.5 * jnp.sum((x - minimum) ** 2)


# --- the bound -----------------------------------------------------------------------


def ensembles(seed=0, count=200, sources=4, size=6):
    """Return Hessians, minima and the point where the mean loss has its minimum."""
    rng = np.random.default_rng(seed)
    bases = np.linalg.qr(rng.normal(size=(count, sources, size, size)))[0]
    values = 10 ** rng.uniform(-1, 1, (count, sources, size))
    hessians = np.einsum("cnij,cnj,cnkj->cnik", bases, values, bases)
    minima = rng.normal(size=(count, sources, size))
    sums = np.einsum("cnij,cnj->ci", hessians, minima)
    return hessians, minima, np.linalg.solve(hessians.sum(1), sums[..., None])[..., 0]


def test_bound_holds_on_random_quadratics(x64):
    hessians, minima, point = ensembles()
    d = point[:, None] - minima
    grads = jnp.asarray(np.einsum("cnij,cnj->cni", hessians, d))
    exact = (d**2).sum(-1).mean(-1)
    lowest = np.linalg.eigvalsh(hessians)[..., 0]
    bound = jax.jit(jax.vmap(closeness_bound))
    each, common = bound(grads, lowest), bound(grads, lowest.min(1))
    assert (exact <= each).all()
    assert (each <= common * (1 + 1e-12)).all()
    # By definition, and at a stationary point as minus a sum over pairs.
    largest = 1 / lowest.min(1) ** 2
    np.testing.assert_allclose(common, largest * (np.square(grads).sum((1, 2)) / 4))
    angles = jax.vmap(gradient_cosines)(grads)
    products = angles.cosines * angles.norms[:, :, None] * angles.norms[:, None, :]
    pairs = np.triu(products, 1).sum((1, 2))
    np.testing.assert_allclose(common, -2 * largest / 4 * pairs, rtol=1e-9)
    # Not void: within a factor of some hundred for conditions up to a hundred.
    assert np.median(np.asarray(each) / exact) < 100


def test_bound_is_attained_and_void():
    grads = {"a": jnp.array([[3.0], [0.0]]), "b": jnp.array([[4.0], [1.0]])}
    np.testing.assert_allclose(closeness_bound(grads, 2.0), (25 + 1) / 4 / 2)
    found = closeness_bound(grads, jnp.array([5.0, 0.5]))
    np.testing.assert_allclose(found, (1 + 4) / 2)
    for curvature in (0.0, -1.0, jnp.array([1.0, 0.0])):
        assert closeness_bound(grads, curvature) == np.inf
    nothing = {"a": jnp.zeros((2, 1)), "b": None}
    assert closeness_bound(nothing, 0.0) == 0
    assert np.isnan(closeness_bound(grads, jnp.nan))
    assert np.isnan(closeness_bound({"a": jnp.array([[jnp.nan]])}, 1.0))
    tiny = closeness_bound(jnp.full((2, 4), 1e-30), 1e-30)
    np.testing.assert_allclose(tiny, 4, rtol=1e-6)


# --- descent -------------------------------------------------------------------------


def test_gradient_descent_in_closed_form(x64):
    """On a quadratic the error shrinks by I - η H per step."""
    params, (hessians, minima) = problem(dtype=np.float64)
    found = closeness(
        loss, params, (hessians, minima), method="descent", optimizer=SGD, steps=7
    )
    d = np.asarray(flat(params)[None] - minima)
    shrink = np.linalg.matrix_power(np.eye(7)[None] - 0.05 * np.asarray(hessians), 7)
    left = np.einsum("nij,nj->ni", shrink, d)
    slopes, before = (np.einsum("nij,nj->ni", hessians, x) for x in (left, d))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10)
    close(found.distances, np.linalg.norm(d - left, axis=1))
    close(found.losses_reached, (left * slopes).sum(1) / 2)
    norms, starts = (np.linalg.norm(x, axis=1) for x in (slopes, before))
    close(found.gradient_norms_reached, norms)
    close(found.residuals, norms / starts)
    assert not found.converged.any()


def test_line_searches_get_what_they_ask_for():
    params, batches = problem()
    found = closeness(
        loss, params, batches, method="descent", optimizer=optax.lbfgs(), steps=25
    )
    assert found.converged.all()
    np.testing.assert_allclose(
        found.distances, distances(params, batches[1]), rtol=1e-2
    )


# --- meshes and mistakes -------------------------------------------------------------


def coupled(params, scale, minimum):
    d = jnp.sum((params["w"] - minimum) ** 2) + jnp.sum((params["b"] + 1) ** 2)
    return scale * d + jnp.sum(params["w"] - minimum) ** 2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(8, 4)), "b": rng.normal(size=4)}
    params = jax.tree.map(np.float32, params)
    batches = np.float32([0.5, 2.0]), np.float32(rng.normal(size=(2, 8, 4)))
    specs = {"w": P("data", "model"), "b": P()}
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, specs[name]))
        for name, x in params.items()
    }
    minima = jax.device_put(batches[1], NamedSharding(mesh, P(None, "data", "model")))
    newton, descent = {"tol": 1e-5}, {"method": "descent", "optimizer": SGD, "steps": 3}
    for options in [newton, descent] if kind == AxisType.Explicit else [newton]:
        expected = closeness(coupled, params, batches, **options)
        found = closeness(coupled, placed, (batches[0], minima), **options)
        for a, b in zip(found, expected, strict=True):
            # Gradients of order 10, of which rounding is left at the minimum.
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    stacked = {"w": minima}
    expected = (batches[1] ** 2).sum() / 2
    np.testing.assert_allclose(closeness_bound(stacked, 1.0), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradient"}, "method must be one of newton, descent"),
        ({"method": "descent"}, "needs an optimizer"),
        ({"optimizer": SGD}, "takes none"),
        ({"method": "descent", "optimizer": SGD, "damping": 1.0}, "damping belongs"),
        ({"damping": -1.0}, "damping must be"),
        ({"steps": 0}, "steps must be"),
        ({"batches": []}, "at least one"),
        ({"batches": [jnp.ones(2)]}, "each a tuple"),
        ({"batches": jnp.ones((3, 2))}, "batches must be a tuple"),
        ({"batches": (jnp.ones((3, 2)), jnp.ones(2))}, "leading axis in common"),
        ({"batches": (jnp.ones((0, 2)),)}, "at least one source"),
        ({"batches": (jnp.ones(()),)}, "leading axis in common"),
        ({"params": {}}, "no numbers"),
        ({"params": jnp.arange(2)}, "int32"),
        ({"loss_fn": lambda x, minimum: x - minimum}, "one real"),
    ],
)
def test_mistakes(options, message):
    call = {"loss_fn": valley, "params": jnp.ones(2), "batches": (jnp.ones((3, 2)),)}
    call |= options
    with pytest.raises(ValueError, match=message):
        closeness(call.pop("loss_fn"), call.pop("params"), call.pop("batches"), **call)


def test_more_mistakes():
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda x: closeness(valley, x, (jnp.ones((3, 2)),)))(jnp.ones(2))
    with pytest.raises(ValueError, match="one number or one per source, 3"):
        closeness_bound(jnp.ones((3, 2)), jnp.ones(2))
    with pytest.raises(ValueError, match="without arrays"):
        closeness_bound({}, 1.0)
