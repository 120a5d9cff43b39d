"""Sharpness of hostile inputs: zeros, NaN, half precision, meshes, retracing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from landscape_models import GOLDEN as MODEL
from landscape_models import loss_of, problem

from basinax.landscape import (
    average_sharpness,
    eigenpairs,
    epsilon_sharpness,
    gradient_norm,
    hessian,
    pac_bayes_sharpness,
    relative_flatness,
    sam_sharpness,
    worst_case_sharpness,
)
from basinax.landscape._draws import signs_like

KEY = jax.random.key(0)


def quadratic(w, h):
    return 0.5 * jnp.sum(h * w**2)


MEASURES = {
    "one step": sam_sharpness,
    "worst case": functools.partial(worst_case_sharpness, steps=3),
    "average": functools.partial(average_sharpness, key=KEY, num_draws=2),
}
each_measure = pytest.mark.parametrize("name", MEASURES)


def value_of(result):
    return float(getattr(result, "value", result))


@each_measure
def test_zero_radius_zero_gradient_and_nan(name):
    measure = MEASURES[name]
    w, h = jnp.array([1.0, 0.0]), jnp.array([2.0, 3.0])
    assert abs(value_of(measure(quadratic, w, h, rho=0.0))) < 1e-6
    assert abs(value_of(measure(quadratic, w, 0 * h, rho=0.1))) < 1e-6
    for bad in (np.nan, np.inf):
        assert np.isnan(value_of(measure(quadratic, w, h.at[0].set(bad), rho=0.1)))
    for rho in (-0.1, np.nan, [0.1, 0.2]):
        with pytest.raises(ValueError, match="rho must be one number >= 0"):
            measure(quadratic, w, h, rho=rho)
    with pytest.raises(ValueError, match="adaptive='layer' is unknown"):
        measure(quadratic, w, h, rho=0.1, adaptive="layer")
    with pytest.raises(ValueError, match="params holds no numbers"):
        measure(quadratic, {}, h, rho=0.1)
    with pytest.raises(ValueError, match="loss_fn must return one real"):
        measure(jnp.multiply, w, h, rho=0.1)


def test_mistakes():
    w = {"m": jnp.ones((2, 2)), "v": jnp.ones(2)}
    loss = lambda w: jnp.sum(w["m"] ** 2)  # noqa: E731
    with pytest.raises(ValueError, match="norm='l1' is unknown; use one of l2, linf"):
        sam_sharpness(loss, w, rho=0.1, norm="l1")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        worst_case_sharpness(loss, w, rho=0.1, steps=0)
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        average_sharpness(loss, w, rho=0.1, key=KEY, num_draws=0)
    with pytest.raises(ValueError, match="increase must be positive"):
        pac_bayes_sharpness(loss, w, key=KEY, increase=0.0)
    operator = hessian(loss, w)
    with pytest.raises(ValueError, match="different axes"):
        relative_flatness(operator, w, lambda w: w["v"])
    with pytest.raises(ValueError, match="one array of params"):
        relative_flatness(operator, w, lambda w: w)
    with pytest.raises(ValueError, match="key="):
        relative_flatness(operator, w, lambda w: w["m"], num_probes=3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    """The rise is that of the rounded weights, and comes back in float32."""
    w = {"m": jnp.full((3, 2), 0.75, dtype), "none": None, "s": jnp.ones((), dtype)}
    loss = lambda w: jnp.sum(w["m"]) + 2 * w["s"]  # noqa: E731
    for measure in (sam_sharpness, functools.partial(worst_case_sharpness, steps=3)):
        rise = measure(loss, w, rho=0.1)
        assert rise.dtype == jnp.float32
        # rho |g| = 0.1 √(6 + 4); the sum of w + d is rounded to 8 bits.
        np.testing.assert_allclose(rise, 0.1 * np.sqrt(10), atol=0.1)
    found = average_sharpness(loss, w, rho=0.1, key=KEY, num_draws=2)
    assert found.value.dtype == jnp.float32


def test_huge_and_tiny_gradients():
    for size in (1e-30, 1e30):
        w = jnp.array([3.0, 4.0])
        rise = sam_sharpness(lambda w, s: s * jnp.sum(w), w, jnp.float32(size), rho=1.0)
        np.testing.assert_allclose(rise, size * np.sqrt(2), rtol=1e-5)
    c = jnp.array([3e-30, 4e-30])
    norm = gradient_norm(lambda w: jnp.sum(c * w), jnp.ones(2))
    np.testing.assert_allclose(norm, 5e-30, rtol=1e-6)


def test_new_parameters_and_data_do_not_retrace():
    traces = 0

    def loss(w, h):
        nonlocal traces
        traces += 1
        return quadratic(w, h)

    counts = []
    for scale in (1.0, 2.0):
        w, h = scale * jnp.ones(3), scale * jnp.ones(3)
        sam_sharpness(loss, w, h, rho=0.1 * scale)
        worst_case_sharpness(loss, w, h, rho=0.1 * scale)
        average_sharpness(loss, w, h, rho=0.1 * scale, key=KEY, num_draws=2)
        counts.append(traces)
    assert counts[1] == counts[0]


def test_one_step_over_batches():
    """The m-sharpness of the docstring: a mean of the traced function."""
    w, h = jnp.ones(3), jnp.arange(12.0).reshape(4, 3)
    one = functools.partial(sam_sharpness, quadratic, w, rho=0.1)
    together = jax.jit(lambda h: jax.lax.map(one, h))(h)
    np.testing.assert_allclose(together, [one(row) for row in h], rtol=1e-5, atol=1e-6)


def coupled(w):
    return jnp.sum(jnp.sin(w["w"] * w["b"]) ** 2)


def measures_of(w):
    """Return one value of every kind, in a ball with all the broadcasting there is."""
    options = {"rho": 0.1, "adaptive": "filter"}
    values = [value_of(m(coupled, w, **options)) for m in MEASURES.values()]
    box = epsilon_sharpness(
        coupled, w, epsilon=0.01, steps=3, num_directions=2, key=KEY
    )
    return [*values, float(box.rise)]


@functools.cache
def on_one_device():
    rng = np.random.default_rng(0)
    w = {"w": rng.normal(size=(8, 4)), "b": rng.normal()}
    w = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), w)
    return w, measures_of(w)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded(axis_type):
    """Eight devices measure what one measures."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    w, expected = on_one_device()
    specs = {"w": P("data", "model"), "b": P()}
    placed = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in w.items()}
    np.testing.assert_allclose(measures_of(placed), expected, rtol=1e-4, atol=1e-5)


def test_signs_have_no_structure():
    """Half are negative, and no axis, leaf or lag shows through."""
    signs = signs_like({"a": jnp.ones((64, 32)), "b": jnp.ones((64, 32))})
    a, b = (np.asarray(x) for x in jax.tree.leaves(signs))
    assert set(np.unique(a)) == {-1.0, 1.0}
    # Means of n independent signs have standard deviation 1/√n; 5 of these.
    assert abs(a.mean()) < 5 / np.sqrt(a.size)
    assert abs((a * b).mean()) < 5 / np.sqrt(a.size)
    assert abs((a[1:] * a[:-1]).mean()) < 5 / np.sqrt(a.size)
    assert abs((a[:, 1:] * a[:, :-1]).mean()) < 5 / np.sqrt(a.size)
    assert abs(a.mean(0)).max() < 5 / np.sqrt(64)


@pytest.mark.slow
def test_worst_case_of_a_float32_net_agrees_with_float64():
    loss, params, x, y = problem("mlp", jnp.float32)
    assert loss is loss_of("mlp")
    single = float(worst_case_sharpness(loss, params, x, y, rho=0.1))
    with jax.enable_x64(True):
        _, params, x, y = problem("mlp", jnp.float64)
        double = float(worst_case_sharpness(loss, params, x, y, rho=0.1))
        top = eigenpairs(hessian(loss, params, x, y), params, 1, key=KEY).values[0]
    # Errors of a loss of .08 in float32, relative to a rise of .01.
    np.testing.assert_allclose(single, double, rtol=1e-3)
    np.testing.assert_allclose(top, MODEL["mlp.hess_eig"][-1], rtol=1e-3)
