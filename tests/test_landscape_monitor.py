"""The monitor and the edges of stability: exact spectra, simulated descent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax.landscape import (
    adam_diagonal,
    dense,
    edge_of_stability,
    hessian,
    metrics,
    monitor,
    preconditioned,
    sam_edge,
)

# --- edges ---------------------------------------------------------------------------

OPTIMIZERS = {
    "plain": (optax.sgd, {}),
    "heavy ball": (functools.partial(optax.sgd, momentum=0.8), {"momentum": 0.8}),
    "nesterov": (
        functools.partial(optax.sgd, momentum=0.8, nesterov=True),
        {"momentum": 0.8, "nesterov": True},
    ),
    "average": (
        lambda rate: optax.chain(optax.ema(0.8, debias=False), optax.sgd(rate)),
        {"momentum": 0.8, "ema": True},
    ),
}


@functools.partial(jax.jit, static_argnames="make")
def distance_after(make, rate, curvature):
    """Descend a parabola from 1 and return how far the last iterates are from 0."""
    tx = make(rate)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(curvature * w, state, w)
        return (optax.apply_updates(w, updates), state), abs(w)

    w = jnp.float32(1)
    path = jax.lax.scan(step, (w, tx.init(w)), length=400)[1]
    return jnp.max(path[-20:])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_descent_diverges_beyond_the_edge_and_not_before(name):
    make, options = OPTIMIZERS[name]
    rate = 0.3
    threshold = 1 / float(edge_of_stability(1.0, rate, **options))
    assert distance_after(make, rate, 1.02 * threshold) > 1e3
    assert distance_after(make, rate, 0.98 * threshold) < 1e-3


def test_sam_diverges_beyond_its_edge_and_not_before():
    """SAM's ascent has fixed length rho, so the edge depends on the gradient's norm.

    On a parabola with |g| held at G a step is w <- w - η λ (w + rho sign w), whose edge
    is where the iterate is reflected onto its negative: |w| = G / λ.
    """
    rate, rho, size = 0.3, 0.2, 0.7
    edge = float(sam_edge(size, rate, rho))
    np.testing.assert_allclose(edge + rho * edge**2 / size, 2 / rate, rtol=1e-6)
    for factor in (0.98, 1.02):
        curvature = factor * edge
        w = size / curvature
        step = w - rate * curvature * (w + rho)
        assert (abs(step) > w) == (factor > 1)
    assert float(sam_edge(1.0, 0.5, 0.0)) == 4
    assert float(sam_edge(0.0, 0.5, 0.1)) == 0
    assert float(sam_edge(0.0, 0.5, 0.0)) == 4
    np.testing.assert_allclose(sam_edge(1.0, 0.5, 1e-6), 4, rtol=2e-5)
    assert sam_edge(jnp.ones((3, 1)), jnp.ones((1, 2)), jnp.ones((1, 1))).shape == (
        3,
        2,
    )


def coupled(w, x):
    return jnp.mean(jnp.tanh(x @ w["a"]) ** 2) + jnp.sum(w["b"] ** 2 * w["a"][0, 0])


def small_problem():
    rng = np.random.default_rng(0)
    w = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=2)}
    x = jnp.asarray(rng.normal(size=(20, 4)), jnp.float32)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), w), x


def test_adam_diverges_beyond_its_edge():
    """Adam with a frozen divisor D, on a quadratic with curvature H."""
    h, d = jnp.array([3.0, 0.5]), jnp.array([6.0, 0.1])
    matrix = dense(preconditioned(hessian(lambda w: 0.5 * jnp.sum(h * w**2), h), d), h)
    top = np.linalg.eigvalsh(matrix)[-1]
    np.testing.assert_allclose(top, 5, rtol=1e-6)
    make = OPTIMIZERS["average"][0]
    for rate in (3.5, 3.7):  # the edge is 3.6 / (0.2 · 5)
        ratio = float(edge_of_stability(top, rate, 0.8, ema=True))
        bounded = bool(distance_after(make, rate, top) < 1)  # it may overflow to NaN
        assert bounded == (ratio < 1) == (rate < 3.6)


def test_preconditioned_is_symmetric_and_checked():
    w, x = small_problem()
    diagonal = jax.tree.map(lambda leaf: 0.1 + leaf**2, w)
    operator = hessian(coupled, w, x)
    matrix = dense(preconditioned(operator, diagonal), w)
    d = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(diagonal)])
    expected = dense(operator, w) / np.sqrt(d[:, None] * d[None])
    np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="shaped like the parameters"):
        preconditioned(operator, diagonal)({"a": w["a"]})


def test_adam_diagonal_is_what_adam_divides_by():
    w = small_problem()[0]
    tx = optax.chain(optax.scale_by_adam(b1=0.0, b2=0.9, eps=0.1), optax.scale(-1.0))
    state = tx.init(w)
    for scale in (1.0, 3.0, 0.1):
        grads = jax.tree.map(lambda leaf, s=scale: s * leaf, w)
        divisor = adam_diagonal(state, grads, b2=0.9, eps=0.1)
        updates, state = tx.update(grads, state, w)
        for key in w:
            np.testing.assert_allclose(
                updates[key], -grads[key] / divisor[key], rtol=1e-4
            )
    with pytest.raises(ValueError, match="no ScaleByAdamState"):
        adam_diagonal(optax.sgd(0.1).init(w), w)


# --- a small net in training ---------------------------------------------------------


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return jnp.asarray(x[:300] / 16 - 0.3, jnp.float32), jnp.asarray(y[:300])


def net_loss(params, x, y):
    logits = jnp.tanh(x @ params["a"]) @ params["b"]
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.mean(loss)


def net():
    rng = np.random.default_rng(0)
    shapes = {"a": (64, 16), "b": (16, 10)}
    return {
        name: jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)
        for name, shape in shapes.items()
    }


@functools.cache
def trained_net(every=5, steps=61):
    """Train by Adam under `lax.scan`; return parameters and values of every step."""
    x, y = digits()
    calls = []

    def loss(params):
        calls.append(None)
        return net_loss(params, x, y)

    watch = monitor(
        {
            "sharpness": metrics.lambda_max(),
            "adam": metrics.stability(
                0.01,
                0.9,
                ema=True,
                preconditioner=lambda seen: adam_diagonal(
                    seen.extra["opt_state"], seen.updates
                ),
            ),
            "trace": metrics.hessian_trace(num_probes=8),
            "cosine": metrics.gradient_cosine(),
            "size": metrics.parameter_norm(),
        },
        every,
    )
    tx = optax.chain(watch, optax.adam(1e-2))

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params)
        updates, new = tx.update(
            grads, state, params, value_fn=loss, opt_state=state, unknown=1
        )
        kept = {
            "residual": new[0].memory[2].residual,
            "error": optax.tree.get(new, "standard_error"),
        }
        return (optax.apply_updates(params, updates), new), (
            params,
            new[0].values,
            kept,
        )

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[1]

    path, values, kept = jax.device_get(train(net()))
    traced = len(calls)
    train(net())
    assert len(calls) == traced
    return path, values, kept


@functools.cache
def exact_spectra(steps=(0, 5, 30, 60)):
    x, y = digits()
    path = trained_net()[0]
    spectra = {}
    for step in steps:
        params = jax.tree.map(lambda leaf, s=step: jnp.asarray(leaf[s]), path)
        matrix = np.asarray(dense(hessian(net_loss, params, x, y), params))
        spectra[step] = np.linalg.eigvalsh(matrix)
    return spectra


def check_monitor_follows_the_largest_eigenvalue():
    """Four products or so find it within 2 percent, cold start included."""
    _, values, kept = trained_net()
    for step, spectrum in exact_spectra().items():
        top = spectrum[-1]
        np.testing.assert_allclose(values["sharpness"][step], top, rtol=0.02)
        # The residual bounds the distance to some eigenvalue.
        distance = np.abs(spectrum - values["sharpness"][step]).min()
        assert distance <= kept["residual"][step] + 1e-5 * top
        assert kept["residual"][step] < 0.5 * top
    # It had something to follow.
    assert max(values["sharpness"]) > 1.3 * min(values["sharpness"])


def check_preconditioned_stability_of_adam():
    x, y = digits()
    path, values, _ = trained_net()
    at = lambda step: jax.tree.map(lambda leaf: jnp.asarray(leaf[step]), path)  # noqa: E731
    gradient = jax.jit(jax.grad(net_loss))
    nu = jax.tree.map(jnp.zeros_like, net())
    for step in range(31):
        g = gradient(at(step), x, y)
        nu = jax.tree.map(lambda n, g: 0.999 * n + 0.001 * g**2, nu, g)
        if step in (0, 30):
            d = jax.tree.map(
                lambda n, s=step: jnp.sqrt(n / (1 - 0.999 ** (s + 1))) + 1e-8, nu
            )
            operator = preconditioned(hessian(net_loss, at(step), x, y), d)
            top = np.linalg.eigvalsh(np.asarray(dense(operator, g)))[-1]
            expected = edge_of_stability(top, 0.01, 0.9, ema=True)
            np.testing.assert_allclose(values["adam"][step], expected, rtol=0.05)


def check_trace_has_an_honest_error():
    _, values, kept = trained_net()
    for step, spectrum in exact_spectra().items():
        # Student's t with 7 degrees of freedom exceeds 6 with probability 5e-4.
        error = kept["error"][step]
        assert abs(values["trace"][step] - spectrum.sum()) < 6 * error
        assert error < 0.3 * spectrum.sum()
    # New probes every time.
    assert len(set(kept["error"][::5].tolist())) == 13


def check_values_change_every_n_steps_only():
    path, values, _ = trained_net()
    for name, curve in values.items():
        steps = np.arange(len(curve))
        np.testing.assert_array_equal(curve, curve[steps - steps % 5], err_msg=name)
        assert len(np.unique(curve)) > 10
    size = np.sqrt(sum(np.sum(p[10] ** 2) for p in path.values()))
    np.testing.assert_allclose(values["size"][10], size, rtol=1e-5)


def check_cosine_of_successive_measurements():
    x, y = digits()
    path, values, _ = trained_net()
    gradient = jax.jit(jax.grad(net_loss))
    flat = [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)])
        for g in (
            gradient(jax.tree.map(lambda leaf, s=s: leaf[s], path), x, y)
            for s in (25, 30)
        )
    ]
    expected = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    np.testing.assert_allclose(values["cosine"][30], expected, rtol=1e-3)
    assert values["cosine"][0] == 0


def test_a_net_in_training():
    """In one test, because compiling the training is most of the cost of each check."""
    check_monitor_follows_the_largest_eigenvalue()
    check_trace_has_an_honest_error()
    check_preconditioned_stability_of_adam()
    check_cosine_of_successive_measurements()
    check_values_change_every_n_steps_only()
