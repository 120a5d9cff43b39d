"""The weightings, Gram matrices to try them on, and an assertion per property."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from basinax import optimizers as bx

ORDER = np.array([[1, 2, 3], [3, 2, 0], [0, 3, 1], [2, 0, 1]])
WEIGHTINGS = {
    "mean": bx.mean_weights,
    "mgda": bx.mgda_weights,
    "pcgrad": functools.partial(bx.pcgrad_weights, order=ORDER),
    "cagrad": bx.cagrad_weights,
    "cagrad1.5": functools.partial(bx.cagrad_weights, c=1.5),
    "imtl_g": bx.imtl_g_weights,
    "nash": bx.nash_weights,
    "fairgrad": bx.fairgrad_weights,
    "fairgrad0.5": functools.partial(bx.fairgrad_weights, alpha=0.5),
    "upgrad": bx.upgrad_weights,
    "aligned_mtl": bx.aligned_mtl_weights,
}
EVERY = pytest.mark.parametrize("name", WEIGHTINGS)
NON_CONFLICTING = ["mgda", "cagrad1.5", "nash", "fairgrad", "fairgrad0.5", "upgrad"]
POWERS = {"nash": -1 / 2, "fairgrad": -2 / 3, "fairgrad0.5": -1 / 3}
"""w(sG) = s^p w(G); p = 0 unless listed."""


def jacobians():
    """Return task gradients of four tasks, usual and degenerate."""
    rng = np.random.default_rng(0)
    draw = rng.standard_normal
    wide = draw((4, 7))
    return {
        "random": wide,
        "aligned": wide + 3 * draw((1, 7)),
        "conflicting": wide - 0.9 * wide.mean(0),
        "scales": wide * np.array([[1e-3], [1.0], [30.0], [1e2]]),
        "dominated": np.array([[1, 0, 0], [5, 1, 0], [9, 0, 2], [7, 1, 1.0]]),
        "orthogonal": np.diag([1.0, 2, 3, 4]),
        "duplicated": wide[[0, 1, 0, 1]],
        "nearly duplicated": wide[[0, 1, 0, 1]] + 1e-6 * draw((4, 7)),
        "identical": wide[[0, 0, 0, 0]],
        "rank two": draw((4, 2)) + np.array([[2.0, 0.0]]),
        "stationary": np.array([[1, 0], [-1, 1], [0, -1], [-1, -1.0]]),
        "opposite": np.array([[1, 2], [-1, -2], [2, 4], [-2, -4.0]]),
        "one zero": wide * np.array([[1.0], [0.0], [1.0], [1.0]]),
        "all zero": np.zeros((4, 3)),
    }


JACOBIANS = jacobians()
UNIQUE = ["random", "aligned", "conflicting", "scales", "dominated", "orthogonal"]


def gram(jacobian, dtype=np.float64):
    return jnp.asarray(jacobian @ jacobian.T, dtype)


def weigh(name, jacobian, dtype=np.float64):
    """Return weights in float64, checked for shape and dtype."""
    weights = WEIGHTINGS[name](gram(jacobian, dtype))
    assert weights.shape == (len(jacobian),)
    assert weights.dtype == dtype
    return np.asarray(weights, np.float64)


def size(weights, jacobian):
    """Bound the length of the update by the triangle inequality."""
    return np.abs(weights) @ np.linalg.norm(jacobian, axis=1)


def assert_finite(weights):
    assert np.isfinite(weights).all(), weights


def assert_same_update(actual, expected, jacobian, rtol):
    """Weights need not be unique where gradients depend on each other; updates are."""
    error = np.linalg.norm((actual - expected) @ jacobian)
    assert error <= rtol * max(size(actual, jacobian), size(expected, jacobian))


def assert_non_conflicting(weights, jacobian, rtol):
    rates = jacobian @ (weights @ jacobian)
    norms = np.linalg.norm(jacobian, axis=1)
    assert (rates >= -rtol * size(weights, jacobian) * norms).all(), rates


def assert_in_simplex(weights, rtol):
    assert (weights >= 0).all()
    assert abs(weights.sum() - 1) <= rtol


def assert_shortest(weights, jacobian, rtol):
    """(Gw)_t ≥ wᵀGw for all t is necessary and sufficient."""
    rates = jacobian @ (weights @ jacobian)
    norms = np.linalg.norm(jacobian, axis=1)
    length = size(weights, jacobian)
    slack = rtol * length * (norms + length) + (1e-14 * norms.max()) ** 2
    assert (rates >= weights @ rates - slack).all(), rates


def assert_fair(weights, jacobian, alpha, rtol):
    rates = jacobian @ (weights @ jacobian)
    expected = weights ** (-1 / alpha)
    # A rate is a difference, known to a rounding error of its terms.
    slack = 1e-14 * size(weights, jacobian) * np.linalg.norm(jacobian, axis=1)
    assert (np.abs(rates - expected) <= rtol * expected + slack).all()


def assert_equal_projections(weights, jacobian, rtol):
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    projections = units @ (weights @ jacobian)
    slack = rtol * size(weights, jacobian)
    np.testing.assert_allclose(projections, projections.mean(), rtol=0, atol=slack)


def assert_conflict_averse(weights, jacobian, c, rtol):
    """The update is in the ball, and a bound shows that no point there does better.

    For every w in the simplex and d in the ball min_t ⟨g_t, d⟩ ≤ ⟨g_w, d⟩ ≤ ⟨g_w, g₀⟩ +
    c‖g₀‖‖g_w‖, and w can be read off the weights.
    """
    weights = weights * (1 + c**2)
    update, mean = weights @ jacobian, jacobian.mean(0)
    radius = c * np.linalg.norm(mean)
    slack = rtol * (np.linalg.norm(mean) + size(weights, jacobian))
    assert np.linalg.norm(update - mean) <= radius + slack
    w = weights - 1 / len(weights)
    assert (w >= -1e-15).all()
    w = w / w.sum()
    bound = (w @ jacobian) @ mean + radius * np.linalg.norm(w @ jacobian)
    longest = np.linalg.norm(jacobian, axis=1).max()
    assert (jacobian @ update).min() >= bound - slack * longest
