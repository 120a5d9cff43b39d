"""Sharpness: golden values, closed forms, order, invariance, hostile inputs.

`golden/landscape_sharpness.npz` holds float64 values for the models of
`golden/landscape.npz`, computed with torch.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from landscape_models import APPLY, problem
from landscape_models import GOLDEN as MODEL

from basinax.landscape import (
    average_sharpness,
    empirical_fisher,
    epsilon_sharpness,
    fisher_rao_norm,
    gauss_newton,
    gradient_norm,
    hessian,
    normalize_logits,
    pac_bayes_sharpness,
    relative_flatness,
    sam_sharpness,
    worst_case_sharpness,
)
from basinax.landscape._draws import normal_like
from basinax.landscape._worst_case import _intervals

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "landscape_sharpness.npz")
KEY = jax.random.key(0)
# The conv net and the transformer block take long to compile.
MODELS = pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cnn", "tf"))]
)
BALLS = {"sam_l2": (False, "l2"), "asam_l2": (True, "l2")}
BALLS |= {"sam_linf": (False, "linf"), "asam_linf": (True, "linf")}


def quadratic(w, h):
    return 0.5 * jnp.sum(h * w**2)


def linear(w, c):
    return 1 + jnp.sum(c * w)


# --- golden values -------------------------------------------------------------------


@MODELS
@pytest.mark.usefixtures("x64")
def test_one_step(name):
    loss, params, x, y = problem(name, jnp.float64)
    rho = float(GOLDEN[f"{name}.sam_rho"])
    for ball, (adaptive, norm) in BALLS.items():
        rise = sam_sharpness(loss, params, x, y, rho=rho, adaptive=adaptive, norm=norm)
        np.testing.assert_allclose(rise, GOLDEN[f"{name}.{ball}_1step"], rtol=1e-9)
    found = gradient_norm(loss, params, x, y)
    np.testing.assert_allclose(found, GOLDEN[f"{name}.grad_norm"], rtol=1e-9)


@MODELS
@pytest.mark.usefixtures("x64")
def test_average_of_small_noise_is_the_trace(name):
    loss, params, x, y = problem(name, jnp.float64)
    rho = 1e-4  # the fourth order is 1e-8 of the second, well below sampling
    for adaptive, key in ((False, "avg"), (True, "adaptive_avg")):
        found = average_sharpness(
            loss, params, x, y, rho=rho, key=KEY, num_draws=60, adaptive=adaptive
        )
        value, error = float(found.value) / rho**2, float(found.standard_error) / rho**2
        expected = float(GOLDEN[f"{name}.{key}_quadratic_coeff"])
        assert abs(value - expected) < 4 * error
        assert error < 0.15 * expected  # one-sided draws would have 300 times that


@MODELS
@pytest.mark.usefixtures("x64")
def test_fisher_rao(name):
    loss, params, x, y = problem(name, jnp.float64)
    ggn = gauss_newton(APPLY[name], "cross_entropy", params, x)
    found = fisher_rao_norm(ggn, params)
    np.testing.assert_allclose(found, GOLDEN[f"{name}.fisher_rao_ggn"], rtol=1e-9)
    one = functools.cache(lambda: lambda p, a, b: loss(p, a[None], b[None]))()
    found = fisher_rao_norm(empirical_fisher(one, params, (x, y)), params)
    np.testing.assert_allclose(found, GOLDEN[f"{name}.fisher_rao_emp"], rtol=1e-9)


@MODELS
@pytest.mark.usefixtures("x64")
def test_relative_flatness(name):
    loss, params, x, y = problem(name, jnp.float64)
    layer = str(GOLDEN[f"{name}.relflat_layer"])
    expected = float(GOLDEN[f"{name}.relflat_kappa"])
    operator = hessian(loss, params, x, y, linearize=True)
    exact = relative_flatness(operator, params, lambda p: p[layer])
    np.testing.assert_allclose(exact.value, expected, rtol=1e-9)
    assert exact.standard_error == 0
    probed = relative_flatness(
        operator, params, lambda p: p[layer], num_probes=100, key=KEY
    )
    assert abs(probed.value - expected) < 4 * probed.standard_error
    assert probed.standard_error < 0.2 * expected


@pytest.mark.usefixtures("x64")
def test_order_on_a_trained_net():
    """One step <= worst case <= rho |T g| + rho² λ(T H T) / 2, close to the edge."""
    loss, params, x, y = problem("mlp", jnp.float64)
    top, slope = MODEL["mlp.hess_eig"][-1], float(gradient_norm(loss, params, x, y))
    for rho in (0.01, 0.05, 0.1):
        one = float(sam_sharpness(loss, params, x, y, rho=rho))
        worst = float(worst_case_sharpness(loss, params, x, y, rho=rho))
        bound = rho * slope + 0.5 * rho**2 * top
        assert one * (1 + 1e-6) < worst < bound
        assert worst > 0.6 * bound
        # The ascent has converged: five times the steps find next to nothing more.
        longer = float(worst_case_sharpness(loss, params, x, y, rho=rho, steps=100))
        assert worst <= longer * (1 + 1e-12)
        assert worst > 0.98 * longer
    for ball in BALLS.values():
        options = dict(zip(("adaptive", "norm"), ball, strict=True), rho=0.01)
        one = float(sam_sharpness(loss, params, x, y, **options))
        assert worst_case_sharpness(loss, params, x, y, **options) >= one * (1 - 1e-9)


# --- invariance ----------------------------------------------------------------------


def relu_net(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def relu_loss(params, x, y, model=relu_net):
    logits = jax.nn.log_softmax(model(params, x), -1)
    return -jnp.mean(jnp.take_along_axis(logits, y[:, None], -1))


normalized_net = normalize_logits(relu_net)
normalized_loss = functools.partial(relu_loss, model=normalized_net)
# Twice the weights in a, half in b: the same function.
UP, DOWN = 4.0, 0.25


def relu_problem(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(4, 12)), "b": rng.normal(size=(12, 3))}
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), params)
    x = jnp.asarray(rng.normal(size=(30, 4)), dtype)
    return params, x, jnp.asarray(rng.integers(0, 3, 30))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("adaptive", ["elementwise", "filter"])
def test_adaptive_measures_ignore_scales_between_relu_layers(adaptive):
    params, x, y = relu_problem()
    scaled = {"a": UP * params["a"], "b": DOWN * params["b"]}

    def measures(params, adaptive):
        options = {"adaptive": adaptive, "rho": 0.03}
        for norm in ("l2", "linf"):
            yield sam_sharpness(relu_loss, params, x, y, norm=norm, **options)
            yield worst_case_sharpness(relu_loss, params, x, y, norm=norm, **options)
        yield average_sharpness(
            relu_loss, params, x, y, key=KEY, num_draws=3, **options
        ).value

    before, after = ([*map(float, measures(p, adaptive))] for p in (params, scaled))
    np.testing.assert_allclose(after, before, rtol=1e-9)
    if adaptive == "elementwise":  # one control is enough
        plain, changed = ([*map(float, measures(p, False))] for p in (params, scaled))
        assert all(abs(b / a - 1) > 0.05 for a, b in zip(plain, changed, strict=True))


@pytest.mark.usefixtures("x64")
def test_curvature_weighed_by_weights_ignores_scales_between_relu_layers():
    params, x, y = relu_problem()
    scaled = {"a": UP * params["a"], "b": DOWN * params["b"]}
    for p in (params, scaled):
        ggn = gauss_newton(relu_net, "cross_entropy", p, x)
        curvature = hessian(relu_loss, p, x, y)
        found = (
            fisher_rao_norm(ggn, p),
            relative_flatness(curvature, p, lambda p: p["b"]).value,
            relative_flatness(curvature, p, lambda p: p["a"]).value,
        )
        if p is params:
            before = found
    np.testing.assert_allclose(found, before, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_normalized_logits_ignore_the_last_scale():
    params, x, y = relu_problem()
    scaled = params | {"b": 5 * params["b"]}
    for loss in (normalized_loss, relu_loss):
        rises = [
            float(sam_sharpness(loss, p, x, y, rho=0.03, adaptive=True))
            for p in (params, scaled)
        ]
        same = abs(rises[1] / rises[0] - 1) < 1e-9
        assert same == (loss is normalized_loss)
    z = normalized_net(params, x)
    np.testing.assert_allclose(z.mean(-1), 0, atol=1e-15)
    np.testing.assert_allclose(jnp.sum(z**2, -1), 1, rtol=1e-12)
    # Equal logits have no direction, but a finite gradient.
    constant = normalize_logits(lambda p: p * jnp.ones(3))
    gradient = jax.grad(lambda p: constant(p)[0])(1.0)
    assert constant(1.0).tolist() == [0, 0, 0]
    assert np.isfinite(gradient)


@pytest.mark.usefixtures("x64")
def test_fisher_rao_of_a_homogeneous_net():
    """Without biases a net of depth 2 has wᵀ E w = 4 E[⟨∂ℓ/∂z, z⟩²]."""
    params, x, y = relu_problem()
    z = relu_net(params, x)
    gradient = jax.nn.softmax(z, -1) - jax.nn.one_hot(y, 3)
    expected = 4 * jnp.mean(jnp.sum(gradient * z, -1) ** 2)
    one = lambda p, a, b: relu_loss(p, a[None], b[None])  # noqa: E731
    found = fisher_rao_norm(empirical_fisher(one, params, (x, y)), params)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# --- closed forms --------------------------------------------------------------------


def sphere_maximum(h, w, rho):
    """Maximise ½ (w+d)ᵀ H (w+d) over |d| = rho: H (w + d) = μ d with μ >= λ_max."""
    low, high = h.max() * (1 + 1e-12), h.max() + 1e3
    for _ in range(200):
        mu = (low + high) / 2
        length = np.linalg.norm(h * w / (mu - h))
        low, high = (mu, high) if length > rho else (low, mu)
    d = h * w / (mu - h)
    return 0.5 * np.sum(h * ((w + d) ** 2 - w**2))


@pytest.mark.usefixtures("x64")
def test_worst_case_of_a_quadratic():
    rng = np.random.default_rng(0)
    h, w = np.geomspace(0.1, 3, 12), 0.1 * rng.normal(size=12)
    for rho in (0.02, 0.2, 2.0):
        found = worst_case_sharpness(quadratic, jnp.asarray(w), h, rho=rho, steps=60)
        expected = sphere_maximum(h, w, rho)
        assert found <= expected * (1 + 1e-9)
        np.testing.assert_allclose(found, expected, rtol=5e-3)
    # In a box the maximum of a separable convex function is at the corner.
    found = worst_case_sharpness(quadratic, jnp.asarray(w), h, rho=0.2, norm="linf")
    expected = quadratic(abs(w) + 0.2, h) - quadratic(w, h)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # At the minimum only the curvature is left.
    found = worst_case_sharpness(quadratic, jnp.zeros(12), h, rho=0.2, steps=60)
    np.testing.assert_allclose(found, 0.5 * 0.2**2 * h.max(), rtol=1e-2)


@pytest.mark.usefixtures("x64")
def test_worst_case_in_an_ellipsoid():
    """With T = |w| the quadratic in u has curvature T H T and slope T H w."""
    h, w = np.geomspace(0.1, 3, 12), np.linspace(0.55, -0.55, 12)
    found = worst_case_sharpness(
        quadratic, jnp.asarray(w), h, rho=0.3, steps=60, adaptive=True
    )
    t = abs(w)
    expected = sphere_maximum(t * h * t, w / t, 0.3)
    np.testing.assert_allclose(found, expected, rtol=5e-3)


def test_checkpoints():
    """The shares .22, .41, .57, .70, .80, .87, .93, .99 of Croce and Hein."""
    intervals = np.array(_intervals(100))
    ends = np.flatnonzero(intervals) + 1
    assert ends.tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    np.testing.assert_array_equal(np.cumsum(intervals)[ends - 1], ends)
    for steps in (1, 2, 5, 20):
        assert sum(_intervals(steps)) <= steps == len(_intervals(steps))


@pytest.mark.usefixtures("x64")
def test_average_of_a_quadratic():
    h, w = jnp.linspace(-1, 3, 500), jnp.linspace(-2, 2, 500)
    for rho in (0.1, 10.0):
        found = average_sharpness(quadratic, w, h, rho=rho, key=KEY)
        expected = rho**2 / 2 * float(h.sum())
        assert abs(found.value - expected) < 4 * found.standard_error
        # Exactly rho²/2 √(2 Σ h² / draws), which 20 draws tell to 16 %.
        exact = rho**2 / 2 * np.sqrt(2 * np.sum(np.square(h)) / 20)
        np.testing.assert_allclose(found.standard_error, exact, rtol=0.6)
    again = average_sharpness(quadratic, w, h, rho=rho, key=KEY)
    assert again.value == found.value
    alone = average_sharpness(quadratic, w, h, rho=rho, key=KEY, num_draws=1)
    assert np.isinf(alone.standard_error)


@pytest.mark.usefixtures("x64")
def test_epsilon_sharpness():
    rng = np.random.default_rng(0)
    w, c = jnp.asarray(rng.normal(size=8)), jnp.asarray(rng.normal(size=8))
    found = epsilon_sharpness(linear, w, c, epsilon=1e-2)
    rise = float(1e-2 * jnp.sum((abs(w) + 1) * abs(c)))
    np.testing.assert_allclose(found.rise, rise, rtol=1e-12)
    percentage = 100 * rise / (1 + float(linear(w, c)))
    np.testing.assert_allclose(found.value, percentage, rtol=1e-12)
    found = epsilon_sharpness(quadratic, w, abs(c), epsilon=1e-2)
    corner = jnp.sign(w) * (abs(w) + 1e-2 * (abs(w) + 1))
    expected = quadratic(corner, abs(c)) - quadratic(w, abs(c))
    np.testing.assert_allclose(found.rise, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_epsilon_sharpness_in_a_subspace():
    rng = np.random.default_rng(0)
    w, c = ({"m": rng.normal(size=(3, 2)), "v": rng.normal(size=4)} for _ in range(2))
    w, c = jax.tree.map(jnp.asarray, (w, c))

    def loss(w, c):
        return 1 + jnp.sum(w["m"] * c["m"]) + jnp.sum(w["v"] * c["v"])

    found = epsilon_sharpness(loss, w, c, epsilon=1e-2, num_directions=3, key=KEY)
    flat = lambda t: np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)])  # noqa: E731
    draws = [flat(normal_like(jax.random.fold_in(KEY, i), w)) for i in range(3)]
    basis = np.stack([d / np.linalg.norm(d) for d in draws], 1)
    box = 1e-2 * (abs(np.linalg.lstsq(basis, flat(w))[0]) + 1)
    np.testing.assert_allclose(found.rise, box @ abs(basis.T @ flat(c)), rtol=1e-9)
    # All directions of the space hold all of it.
    with pytest.raises(ValueError, match="between 1 and the number of parameters, 10"):
        epsilon_sharpness(loss, w, c, num_directions=11, key=KEY)
    with pytest.raises(ValueError, match="key="):
        epsilon_sharpness(loss, w, c, num_directions=2)


@pytest.mark.usefixtures("x64")
def test_pac_bayes_of_a_quadratic():
    h, w = jnp.linspace(1, 3, 300), jnp.linspace(-2, 2, 300)
    options = {"key": KEY, "increase": 0.3, "tol": 1e-5}
    found = pac_bayes_sharpness(quadratic, w, h, **options)
    exact = np.sqrt(2 * 0.3 / float(h.sum()))
    assert abs(found.sigma - exact) < 4 * found.standard_error
    # δσ/σ = δI/2I and I has relative error √(2 Σh²/20) / Σh.
    error = exact / 2 * np.sqrt(2 * np.sum(np.square(h)) / 20) / float(h.sum())
    np.testing.assert_allclose(found.standard_error, error, rtol=0.6)
    np.testing.assert_allclose(found.sharpness, found.sigma**-2, rtol=1e-12)
    found = pac_bayes_sharpness(
        quadratic, w, h, **options, magnitude_aware=True, epsilon=0.01
    )
    exact = (2 * 0.3 - 0.01**2 * h.sum()) / jnp.sum(h * w**2)
    assert abs(found.sigma - jnp.sqrt(exact)) < 4 * found.standard_error
    assert found.standard_error < 0.05 * found.sigma


def test_pac_bayes_extremes():
    flat = pac_bayes_sharpness(lambda w: 0 * jnp.sum(w), jnp.ones(3), key=KEY)
    assert np.isinf(flat.sigma)
    assert flat.sharpness == 0
    jump = pac_bayes_sharpness(
        lambda w: jnp.any(w != 0).astype(jnp.float32), jnp.zeros(3), key=KEY
    )
    assert jump.sigma == 0
    assert np.isinf(jump.sharpness)
    # Overflow to NaN far out is a rise like any other.
    walls = pac_bayes_sharpness(
        lambda w: jnp.where(jnp.max(abs(w)) > 1, jnp.nan, 0.0), jnp.zeros(3), key=KEY
    )
    assert 0.1 < walls.sigma < 1
    lost = pac_bayes_sharpness(lambda w: jnp.nan * jnp.sum(w), jnp.ones(3), key=KEY)
    assert np.isnan(lost).all()
