"""Gradient geometry: angles, variance, coherence, noise scale and spectra.

`golden/landscape_gradients.npz` holds values of a small trained model that were
computed with torch in float64.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import landscape_models as models
import numpy as np
import optax
import pytest
from gradient_rows import COUNT, close, cosines_of, many, noise_of, random_rows, tree_of
from hypothesis import given, settings
from hypothesis import strategies as st

from basinax.landscape import (
    coherence,
    gradient_cosines,
    gradient_noise_scale,
    gradient_spectrum,
    gradient_variance,
    noise_scale_from_norms,
)

# --- definitions ---------------------------------------------------------------------


def test_golden_values(x64):
    """Per-example gradients of a trained model."""
    golden = {
        key: models.GOLDEN[f"mlp.{key}"]
        for key in (
            "coherence_alpha",
            "m_coherence",
            "mean_pairwise_cosine",
            "frac_conflict",
            "noise_scale_simple",
            "gradcov_trace_unbiased",
            "gradcov_trace_biased",
            "grad_norm",
        )
    }
    _, params, x, y = models.problem("mlp", jnp.float64)

    def loss(params, x, y):
        return models.cross_entropy(models.mlp(params, x[None]), y[None])

    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(params, x, y)
    exact = functools.partial(np.testing.assert_allclose, rtol=1e-9)
    angles = gradient_cosines(grads)
    exact(angles.mean, golden["mean_pairwise_cosine"])
    exact(angles.conflict, golden["frac_conflict"])
    exact(angles.norms**2, models.GOLDEN["mlp.per_example_grad_sqnorm"])
    exact(coherence(grads), (golden["coherence_alpha"], golden["m_coherence"]))
    # Negative here: at a trained point the gradient drowns in its noise.
    noise = gradient_noise_scale(grads)
    exact(noise.scale.value, golden["noise_scale_simple"])
    exact(noise.trace.value, golden["gradcov_trace_unbiased"])
    spread = gradient_variance(grads, unbiased=False)
    exact(spread.total, golden["gradcov_trace_biased"])
    exact(spread.mean_norm, golden["grad_norm"])


@settings(max_examples=15, deadline=None)
@given(seed=many)
def test_measures_by_definition(seed):
    """One formula each, in float64 and without trees."""
    rows = random_rows(seed)
    g = rows.astype(np.float64)
    grads = tree_of(rows)
    gram = g @ g.T
    norms = np.sqrt(np.diag(gram))
    expected = gram / norms[:, None] / norms[None]
    pairs = expected[~np.eye(COUNT, dtype=bool)]
    angles = cosines_of(grads)
    close(angles.cosines, expected)
    close(angles.norms, norms)
    close(angles.mean, pairs.mean())
    if abs(pairs).min() > 1e-5:
        close(angles.conflict, (pairs < 0).mean())
    mean = g.mean(0)
    alpha = gram.mean() / np.diag(gram).mean()
    close(coherence(grads), (alpha, COUNT * alpha))
    for unbiased in (True, False):
        total = ((g - mean[None]) ** 2).sum() / (COUNT - unbiased)
        spread = gradient_variance(grads, unbiased=unbiased)
        expected = (total, total / (mean @ mean), np.linalg.norm(mean))
        close(spread, expected)


def noise_of_rows(g, b=1.0):
    """Return B, tr S and ‖G‖² in float64, from the definitions."""
    trace = b * g.var(0, ddof=1).sum()
    square = g.mean(0) @ g.mean(0) - trace / (b * len(g))
    return np.array([trace / square, trace, square])


@settings(max_examples=10, deadline=None)
@given(seed=many)
def test_standard_errors_leave_one_out(seed):
    """The closed form of the jackknife against n computations with a row missing."""
    rows = random_rows(seed)
    g = rows.astype(np.float64)
    noise = noise_of(tree_of(rows), batch_size=4)
    values = noise_of_rows(g, 4)
    without = [noise_of_rows(np.delete(g, i, 0), 4) for i in range(COUNT)]
    moved = np.array(without) - np.mean(without, 0)[None]
    # A ratio to first order.
    moved[:, 0] = (moved[:, 1] - values[0] * moved[:, 2]) / values[2]
    errors = np.sqrt((COUNT - 1) / COUNT * (moved**2).sum(0))
    # ‖G‖² may be a small difference of large numbers.
    size = max(abs(values[2]), values[1] / 4)
    loss = size / abs(values[2])
    for found, value, error, atol in zip(
        noise, values, errors, (0, 0, size), strict=True
    ):
        np.testing.assert_allclose(found.value, value, 1e-5 * loss, 1e-5 * atol)
        np.testing.assert_allclose(
            found.standard_error, error, 1e-4 * loss, 1e-4 * atol
        )


# --- invariances and extremes --------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=many)
def test_cosines_ignore_positive_scales_and_follow_permutations(seed):
    rng = np.random.default_rng(seed)
    rows = random_rows(seed)
    base = cosines_of(tree_of(rows))
    scales = np.float32(10.0) ** rng.uniform(-15, 15, (COUNT, 1)).astype(np.float32)
    scaled = cosines_of(tree_of(rows * scales))
    close(scaled.cosines, base.cosines)
    close(scaled.norms, base.norms * scales[:, 0])
    order = rng.permutation(COUNT)
    permuted = cosines_of(tree_of(rows[order]))
    close(permuted.cosines, np.asarray(base.cosines)[np.ix_(order, order)])
    close(permuted.mean, base.mean)
    flipped = cosines_of(tree_of(rows * np.float32([[-1], *[[1]] * (COUNT - 1)])))
    close(flipped.cosines[0, 1:], -base.cosines[0, 1:])
    found = np.asarray(base.cosines)
    assert (found == found.T).all()
    assert (np.diag(found) == 1).all()
    assert abs(found).max() == 1


@settings(max_examples=15, deadline=None)
@given(seed=many, size=st.sampled_from([1e-30, 1.0, 1e30]))
def test_coherence_lies_between_cancellation_and_agreement(seed, size):
    rows = random_rows(seed)
    alpha, m = (float(x) for x in coherence(tree_of(np.float32(size) * rows)))
    assert 0 <= alpha <= 1
    assert m == np.float32(COUNT * alpha)
    close(alpha, coherence(tree_of(rows)).alpha)
    # More of the same, as a set, is not more coherent; each example has more friends.
    twice = coherence(tree_of(np.concatenate([rows, rows])))
    close(twice, (alpha, 2 * m))


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1.0, 1e20, 3e38])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_closed_forms_at_any_size(size, dtype):
    def grads(rows):
        rows = jnp.asarray(np.float32(size) * np.float32(rows), dtype)
        return {"a": rows[:, :2], "b": rows[:, 2:].reshape(-1, 1, 2)}

    same, orthogonal = grads(np.full((4, 4), 0.5)), grads(np.eye(4))
    unequal = grads(np.diag([1, 0.5, 0.25, 0]))
    opposed = grads(np.kron([[1], [-1]], np.eye(2, 4)))
    for tree, expected in (
        (same, 4),
        (orthogonal, 1),
        (unequal, 1),
        (opposed, 0),
    ):
        close(coherence(tree).m_coherence, expected)
    for result in (gradient_variance(same), gradient_noise_scale(same).scale):
        assert not any(jax.tree.leaves(result)[:2])  # no noise, with no error
    spread = gradient_variance(orthogonal)
    close(spread.relative, 4)  # (1 - 1/4) · 4/3 over 1/4
    close(np.asarray(spread.mean_norm) / float(orthogonal["a"][0, 0]), 0.5)
    assert gradient_variance(opposed).relative == np.inf
    angles = gradient_cosines(opposed)
    close(angles.cosines, np.kron([[1, -1], [-1, 1]], np.eye(2)))
    close(np.asarray(angles.norms) / float(opposed["a"][0, 0]), 1)
    close((angles.mean, angles.conflict), (-1 / 3, 1 / 3))
    assert {x.dtype for x in angles} == {jnp.dtype(jnp.float32)}


def test_zero_and_nonfinite_gradients():
    nothing = jnp.zeros((3, 2))
    assert not jax.tree.reduce(
        operator.or_,
        jax.tree.map(
            jnp.any,
            (
                gradient_cosines(nothing),
                coherence(nothing),
                gradient_variance(nothing),
                gradient_noise_scale(nothing),
            ),
        ),
    )
    one = gradient_cosines(jnp.array([[0.0, 0.0], [3.0, 4.0], [0.0, -2.0]]))
    close(one.cosines, [[0, 0, 0], [0, 1, -0.8], [0, -0.8, 1]])
    for bad in (jnp.nan, jnp.inf):
        rows = jnp.ones((3, 2)).at[1, 0].set(bad)
        found = np.isnan(gradient_cosines(rows).cosines)
        expected = np.zeros((3, 3), bool)
        expected[1, :] = expected[:, 1] = True
        np.testing.assert_array_equal(found, expected)
        results = (
            gradient_cosines(rows)[2:],
            coherence(rows),
            gradient_variance(rows).relative,
            gradient_noise_scale(rows).scale,
            gradient_spectrum(rows),
        )
        assert np.isnan(jax.tree.leaves(results)).all()


def test_nearly_equal_gradients():
    """Deviations of 1e-6 of the mean, where a difference of squares has no digits."""
    rng = np.random.default_rng(0)
    noise = np.round(rng.normal(size=(COUNT, 9)) * 8) / 2**20
    rows = (1 + noise).astype(np.float32)  # exact
    expected = noise_of_rows(rows.astype(np.float64))
    found = noise_of(tree_of(rows), batch_size=1)
    # The mean is rounded to 6e-8 of itself, against deviations of 8e-6.
    np.testing.assert_allclose(found.trace.value, expected[1], rtol=1e-3)
    np.testing.assert_allclose(found.scale.value, expected[0], rtol=1e-3)


def test_precision_of_mixed_trees(x64):
    """Narrow leaves beside wide ones, whose sizes only float64 can tell."""
    rows = jnp.array([[3e-200, 4e-200], [4e-200, 3e-200]])
    tree = {"wide": rows, "narrow": jnp.zeros((2, 1), jnp.bfloat16)}
    np.testing.assert_allclose(
        gradient_cosines(tree).cosines[0, 1], 24 / 25, rtol=1e-15
    )
    np.testing.assert_allclose(
        coherence(tree).alpha, 49 / 50, rtol=1e-15
    )  # (7² + 7²) / 4 over 25


def test_per_leaf_by_tree_map():
    grads = tree_of(random_rows(1)) | {"empty": optax.MaskedNode()}
    parts = jax.tree.map(gradient_variance, grads)
    total = sum(parts[name].total for name in ("w", "b", "scalar"))
    close(total, gradient_variance(grads).total)
    assert parts["none"] is None


# --- statistics ----------------------------------------------------------------------


def draws(trials, n, seed=0):
    """Return gradients with known tr S = 1² + 2² + ... and ‖G‖² = 4, and these."""
    rng = np.random.default_rng(seed)
    spread = np.arange(1, 4)
    mean = np.array([2.0, 0, 0])
    # Uniform noise has no tails, so that few trials tell.
    noise = rng.uniform(-np.sqrt(3), np.sqrt(3), (trials, n, 3)) * spread
    return mean + noise, float((spread**2).sum()), 4.0


def assert_unbiased(samples, truth):
    error = samples.std() / np.sqrt(len(samples))
    # Four standard errors, small against the truth, so that a bias would show.
    assert error < 0.02 * truth
    assert abs(samples.mean() - truth) < 4 * error


def test_estimates_are_unbiased_and_know_their_errors():
    """Over 4,000 draws of 16 gradients: means, and errors against their spread."""
    rows, trace, square = draws(4000, 16)
    noise = jax.jit(jax.vmap(gradient_noise_scale))(jnp.asarray(rows, jnp.float32))
    assert_unbiased(np.asarray(noise.trace.value), trace)
    assert_unbiased(np.asarray(noise.squared_norm.value), square)
    spread, typical = (
        np.array([f(noise.trace), f(noise.squared_norm)])
        for f in (
            lambda x: np.std(x.value),
            lambda x: np.sqrt(np.mean(np.asarray(x.standard_error) ** 2)),
        )
    )
    # Var ‖G‖² = 4 GᵀSG / n + 2 tr S² / n (n - 1), the latter of which, a quadratic
    # function of the noise, the jackknife sees twice.
    np.testing.assert_allclose(spread[1], np.sqrt(1 + 2 * 98 / 240), rtol=0.05)
    np.testing.assert_allclose(typical[1], np.sqrt(1 + 4 * 98 / 240), rtol=0.05)
    np.testing.assert_allclose(typical[0], spread[0], rtol=0.15)
    spread = jax.vmap(gradient_variance)(jnp.asarray(rows, jnp.float32))
    assert_unbiased(np.asarray(spread.total), trace)
    found = jax.jit(jax.vmap(coherence))(jnp.asarray(rows, jnp.float32))
    # E ‖ḡ‖² = ‖G‖² + tr S / n and E ‖g‖² = ‖G‖² + tr S; their ratio is off by O(1/n).
    expected = (square + trace / 16) / (square + trace)
    np.testing.assert_allclose(np.mean(found.alpha), expected, rtol=0.02)


def test_scale_covers_the_truth():
    """With 200 gradients the ratio is nearly normal: two errors cover 95 %."""
    rows, trace, square = draws(500, 200, seed=1)
    noise = jax.vmap(gradient_noise_scale)(jnp.asarray(rows, jnp.float32)).scale
    off = (np.asarray(noise.value) - trace / square) / np.asarray(noise.standard_error)
    assert 0.91 < np.mean(abs(off) < 2) < 0.985


def test_noise_scale_from_two_batch_sizes():
    """Micro-batches of 4 against batches of 32, over 4,000 steps."""
    rows, trace, square = draws(4000, 32, seed=2)
    small = np.linalg.norm(rows[:, :4].mean(1), axis=1)
    big = np.linalg.norm(rows.mean(1), axis=1)
    noise = noise_scale_from_norms(
        np.float32(small), np.float32(big), small_batch=4, big_batch=32
    )
    for estimate, truth in zip(noise, (trace / square, trace, square), strict=True):
        error = float(estimate.standard_error)
        assert error < 0.05 * truth
        assert abs(estimate.value - truth) < 4 * error
    # Errors of means are those of the samples over √k.
    per_step = (small**2 - big**2) / (1 / 4 - 1 / 32)
    expected = per_step.std(ddof=1) / np.sqrt(4000)
    np.testing.assert_allclose(noise.trace.standard_error, expected, rtol=1e-4)
    once = noise_scale_from_norms(5e-25, 4e-25, small_batch=1, big_batch=4)
    close(once.scale.value, 12 / 13)
    assert once.scale.standard_error == np.inf


def test_batch_sizes_agree():
    """Gradients of single examples and of their micro-batches estimate one B."""
    rows, trace, square = draws(1, 40_000, seed=3)
    singles = noise_of(jnp.asarray(rows[0], jnp.float32), batch_size=1)
    means = rows[0].reshape(-1, 8, 3).mean(1)
    batches = noise_of(jnp.asarray(means, jnp.float32), batch_size=8)
    for noise in (singles, batches):
        off = abs(noise.scale.value - trace / square)
        assert off < 3 * noise.scale.standard_error
        assert noise.scale.standard_error < 0.05 * trace / square
    assert gradient_noise_scale(means[:2]).trace.standard_error == np.inf
