"""Mathematics of the spectral kernels: identities, bounds, derivatives, edge cases."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basinax.optimizers import (
    hard_spectral_clip,
    orthogonalize,
    soft_spectral_clip,
)

EXACT = ("eigh", "svd")
METHODS = ("auto", "eigh", "polynomial", "newton_schulz", "svd")
SHAPES = ((5, 7), (6, 6), (8, 3))

properties = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**31 - 1)
thresholds = st.floats(-2, 2).map(lambda e: 10.0**e)  # κ from 0.01 to 100


def rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def with_spectrum(rng, shape, singular_values):
    m, n = shape
    k = min(m, n)
    return rotation(rng, m)[:, :k] * singular_values @ rotation(rng, n)[:, :k].T


def random_matrix(seed, shape):
    """A matrix of spectral norm 1 whose singular values spread over two decades."""
    rng = np.random.default_rng(seed)
    s = 10 ** rng.uniform(-2, 0, min(shape))
    s[0] = 1.0
    return with_spectrum(rng, shape, s)


def reference(x, c):
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u * (s / np.sqrt(1 + (s / c) ** 2)) @ vt


def assert_close(actual, expected, rtol):
    """Compare matrices relative to the norm of the expected one."""
    scale = np.linalg.norm(expected) or 1.0
    assert np.linalg.norm(np.asarray(actual, np.float64) - expected) <= rtol * scale


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", EXACT)
class TestIdentities:
    """Exact identities in double precision; eps·κ² is at most 2e-12 here."""

    rtol = 2e-12

    @properties
    @given(seed=seeds, shape=shapes, c=thresholds)
    def test_map_of_singular_values(self, method, seed, shape, c):
        x = random_matrix(seed, shape)
        h = soft_spectral_clip(x, c, method=method)
        assert_close(h, reference(x, c), self.rtol)
        s = np.linalg.svd(x, compute_uv=False)
        t = np.linalg.svd(h, compute_uv=False)
        assert t[0] < c * (1 + 1e-12)
        assert np.all(t <= s * (1 + 1e-9))
        assert np.linalg.norm(h) <= np.linalg.norm(x)

    @properties
    @given(seed=seeds, shape=shapes, c=thresholds, t=st.floats(-20, 20))
    def test_homogeneous_and_odd(self, method, seed, shape, c, t):
        x, t = random_matrix(seed, shape), 10.0**t
        h = t * np.asarray(soft_spectral_clip(x, c, method=method))
        assert_close(soft_spectral_clip(t * x, t * c, method=method), h, self.rtol)
        assert_close(soft_spectral_clip(-t * x, t * c, method=method), -h, self.rtol)

    @properties
    @given(seed=seeds, shape=shapes, c=thresholds)
    def test_equivariant(self, method, seed, shape, c):
        x, rng = random_matrix(seed, shape), np.random.default_rng(seed + 1)
        q, r = rotation(rng, shape[0]), rotation(rng, shape[1])
        h = np.asarray(soft_spectral_clip(x, c, method=method))
        assert_close(
            soft_spectral_clip(q @ x @ r, c, method=method), q @ h @ r, self.rtol
        )
        assert_close(soft_spectral_clip(x.T, c, method=method), h.T, self.rtol)

    @properties
    @given(seed=seeds, shape=shapes, c=thresholds, d=thresholds)
    def test_semigroup_and_inverse(self, method, seed, shape, c, d):
        x = random_matrix(seed, shape)
        h = soft_spectral_clip(soft_spectral_clip(x, d, method=method), c)
        e = 1 / np.sqrt(1 / c**2 + 1 / d**2)
        assert_close(h, np.asarray(soft_spectral_clip(x, e, method=method)), 1e-11)
        d = max(d, 1.0)  # the inverse loses κ² digits
        h = np.asarray(soft_spectral_clip(x, d, method=method))
        gram = np.eye(shape[1]) - h.T @ h / d**2
        values, vectors = np.linalg.eigh(gram)
        assert_close(h @ (vectors / np.sqrt(values)) @ vectors.T, x, 1e-9)

    @properties
    @given(seed=seeds, shape=shapes, c=thresholds)
    def test_nonexpansive(self, method, seed, shape, c):
        x, y = random_matrix(seed, shape), random_matrix(seed + 1, shape)
        for clip in (
            lambda x: soft_spectral_clip(x, c, method=method),
            lambda x: hard_spectral_clip(x, c),
        ):
            moved = np.linalg.norm(clip(x) - clip(y))
            assert moved <= np.linalg.norm(x - y) * (1 + 1e-12)

    @properties
    @given(seed=seeds, shape=shapes, c=thresholds)
    def test_between_hard_clips(self, method, seed, shape, c):
        x = random_matrix(seed, shape)
        soft = np.linalg.svd(soft_spectral_clip(x, c, method=method), compute_uv=False)
        hard = np.linalg.svd(hard_spectral_clip(x, c), compute_uv=False)
        assert np.all(soft <= hard + 1e-13)
        assert np.all(hard / np.sqrt(2) <= soft + 1e-13)

    def test_limits(self, method):
        x = random_matrix(0, (5, 7))
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        large = np.asarray(soft_spectral_clip(x, 1e3, method=method))
        assert np.linalg.norm(large - x) <= 1e-6 / 2 * np.linalg.norm(x)
        small = np.asarray(soft_spectral_clip(x, 1e-5, method=method)) / 1e-5
        assert_close(small, u @ vt, 1e-5)

    def test_scaled_orthonormal_rows(self, method):
        rows = rotation(np.random.default_rng(0), 8)[:5]
        h = soft_spectral_clip(3.0 * rows, 2.0, method=method)
        assert_close(h, rows * 3 / np.sqrt(1 + 9 / 4), 1e-14)

    def test_rank_deficient_keeps_null_space(self, method):
        rng = np.random.default_rng(0)
        x = with_spectrum(rng, (5, 7), np.array([3.0, 1.0, 0, 0, 0]))
        for c in (1.0, 1e-3):
            h = np.asarray(soft_spectral_clip(x, c, method=method))
            assert_close(h, reference(x, c), 1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 9), (9, 1)])
def test_single_row_and_column_are_vectors(method, shape):
    v = jax.random.normal(jax.random.key(0), shape)
    for c in (0.3, 30.0):
        expected = v / np.sqrt(1 + np.sum(v**2) / c**2)
        clipped = soft_spectral_clip(v, c, method=method)
        np.testing.assert_allclose(clipped, expected, rtol=2e-6)


@pytest.mark.parametrize("method", ["auto", "eigh", "polynomial", "svd"])
@pytest.mark.parametrize("shape", [(24, 96), (48, 48), (96, 24)])
def test_single_precision(method, shape):
    """1e-5 relative, norm at most c, up to κ = 30 where every method is exact."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    x /= np.linalg.norm(x, 2)
    for kappa in (1e-3, 1, 3, 10, 19):
        h = soft_spectral_clip(jnp.asarray(x, jnp.float32), 1 / kappa, method=method)
        assert_close(h, reference(x.astype(np.float32), 1 / kappa), 1e-5)
        norm = np.linalg.norm(np.asarray(h, np.float64), 2)
        assert norm <= (1 + 1e-6) / kappa


@pytest.mark.parametrize("kappa", [1, 5, 10, 20, 30, 40, 50, 64])
@pytest.mark.parametrize("spectrum", ["spread", "spike", "flat"])
def test_polynomial_error_in_every_direction(kappa, spectrum):
    """At most 5e-4 in each singular direction, never above the exact value."""
    rng = np.random.default_rng(1)
    k = 24
    s = {
        "spread": np.geomspace(1e-3, 1, k)[::-1],
        "spike": np.r_[1.0, np.full(k - 1, 0.3 / kappa)],
        "flat": np.r_[1.0, np.full(k - 1, 0.9)],
    }[spectrum]
    left, right = rotation(rng, k), rotation(rng, 40)[:, :k]
    x = jnp.asarray(left * s @ right.T, jnp.float32)
    gram = np.asarray(x, np.float64) @ np.asarray(x, np.float64).T
    bound = min(np.abs(gram).sum(1).max(), np.linalg.norm(gram))
    c = np.sqrt(bound) / kappa
    h = np.asarray(soft_spectral_clip(x, c, method="polynomial"), np.float64)
    exact = s / np.sqrt(1 + (s / c) ** 2)
    # Rounding of the factors at 1e-3 of the norm costs what eigh loses too.
    achieved = np.sum(left * (h @ right), 0)
    relative = achieved / exact - 1
    assert np.abs(relative).max() <= 5e-4
    assert np.linalg.norm(h, 2) <= c * (1 + 1e-6)


def test_authors_iteration_is_far_off_where_the_polynomial_is_not():
    """Control for the test above: 15 percent at κ = 50 with thirty products."""
    s = np.r_[1.0, np.full(23, 0.006)]
    rng = np.random.default_rng(1)
    x = jnp.asarray(with_spectrum(rng, (24, 40), s), jnp.float32)
    exact = reference(x, 0.02)
    for method, low, high in (("newton_schulz", 0.05, 0.2), ("polynomial", 0, 5e-4)):
        h = np.asarray(soft_spectral_clip(x, 0.02, method=method), np.float64)
        t = np.linalg.svd(h, compute_uv=False)[-1]
        error = 1 - t / np.linalg.svd(exact, compute_uv=False)[-1]
        assert low <= error <= high, method


def test_auto_on_cpu_decomposes_where_polynomials_are_not_exact():
    rng = np.random.default_rng(0)
    spiky = with_spectrum(rng, (24, 40), np.geomspace(1e-3, 1, 24))
    x = jnp.asarray(spiky, jnp.float32)
    for kappa, same in ((20, "polynomial"), (40, "eigh"), (200, "eigh")):
        auto = soft_spectral_clip(x, 1 / kappa)
        chosen = soft_spectral_clip(x, 1 / kappa, method=same)
        np.testing.assert_array_equal(auto, chosen)
        # The eigenvalues of the Gram matrix cost eps·κ² of the smallest directions.
        eps = float(jnp.finfo(jnp.float32).eps)
        assert_close(auto, reference(x, 1 / kappa), 1e-5 + 0.1 * eps * kappa**2)


@pytest.mark.parametrize("kappa", [100, 1e3, 1e5])
@pytest.mark.parametrize("method", ["auto", "eigh", "polynomial", "svd"])
def test_never_above_the_threshold(method, kappa):
    """Beyond the accurate range results fall short; they do not overshoot."""
    rng = np.random.default_rng(0)
    spiky = with_spectrum(rng, (32, 32), np.geomspace(1e-6, 1, 32))
    dense = rng.normal(size=(32, 32))
    for x in (spiky, dense / np.linalg.norm(dense, 2)):
        x = jnp.asarray(x, jnp.float32)
        h = np.asarray(soft_spectral_clip(x, 1 / kappa, method=method), np.float64)
        # The smallest eigenvalues of the Gram matrix are rounding noise of relative
        # size eps·m against the floor 8·eps: a few percent for eigh.
        assert np.linalg.norm(h, 2) <= 1.1 / kappa


@pytest.mark.parametrize("kappa", [3, 30, 1e3, 1e5])
def test_bfloat16_iteration_stays_finite(kappa):
    """Ten steps in bfloat16 overshoot by at most 15 percent (more steps diverge)."""
    x = np.random.default_rng(0).normal(size=(48, 48))
    x = jnp.asarray(x / np.linalg.norm(x, 2), jnp.bfloat16)
    h = soft_spectral_clip(
        x, 1 / kappa, method="newton_schulz", dtype=jnp.bfloat16
    ).astype(jnp.float32)
    assert np.linalg.norm(h, 2) <= 1.15 / kappa


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("method", ["auto", "polynomial"])
def test_low_precision_input_is_computed_in_single(method, dtype):
    x = jax.random.normal(jax.random.key(0), (16, 48)).astype(dtype)
    h = soft_spectral_clip(x, 1.0, method=method)
    assert h.dtype == dtype
    # One rounding of the result; entries well inside the normal range.
    eps = float(jnp.finfo(dtype).eps)
    assert_close(h.astype(jnp.float32), reference(x.astype(jnp.float32), 1.0), eps)


@pytest.mark.parametrize("method", METHODS)
class TestEdges:
    def test_zero(self, method):
        for c in (0.0, 1.0, np.inf):
            assert not soft_spectral_clip(jnp.zeros((3, 5)), c, method=method).any()

    def test_zero_and_infinite_threshold(self, method):
        x = jax.random.normal(jax.random.key(0), (3, 5))
        assert not soft_spectral_clip(x, 0.0, method=method).any()
        np.testing.assert_array_equal(soft_spectral_clip(x, np.inf, method=method), x)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_non_finite_matrix_is_nan_and_alone(self, method, bad):
        x = jax.random.normal(jax.random.key(0), (2, 3, 5))
        clip = jax.vmap(lambda x: soft_spectral_clip(x, 1.0, method=method))
        h = clip(x.at[0, 1, 2].set(bad))
        assert jnp.isnan(h[0]).all()
        np.testing.assert_allclose(h[1], clip(x)[1], rtol=1e-6)

    def test_extreme_scales(self, method):
        x = jax.random.normal(jax.random.key(0), (4, 6))
        h = soft_spectral_clip(x, 1.0, method=method)
        for scale in (1e-30, 1e30):
            scaled = soft_spectral_clip(x * scale, scale, method=method) / scale
            np.testing.assert_allclose(scaled, h, rtol=0, atol=2e-5)
        largest = jnp.full((4, 6), 3e38)
        for c in (1.0, 1e38):
            expected = np.full((4, 6), c / np.sqrt(24))
            clipped = soft_spectral_clip(largest, c, method=method)
            np.testing.assert_allclose(clipped, expected, rtol=0.05)

    def test_empty(self, method):
        for shape in ((0, 4), (3, 0), (0, 3, 4)):
            assert soft_spectral_clip(jnp.ones(shape), 1, method=method).shape == shape


@pytest.mark.parametrize("method", ["auto", "eigh", "polynomial", "svd"])
def test_stack_is_one_matrix_at_a_time(method):
    """Matrices that differ by decades do not see each other."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 6, 4))
    x = x * 10.0 ** jnp.arange(-3, 3).reshape(2, 3, 1, 1)
    c = jnp.arange(1.0, 7.0).reshape(2, 3)
    stack = soft_spectral_clip(x, c, method=method)
    hard = hard_spectral_clip(x, c)
    for i, j in itertools.product(range(2), range(3)):
        one = soft_spectral_clip(x[i, j], c[i, j], method=method)
        scale = jnp.abs(one).max()
        np.testing.assert_allclose(stack[i, j], one, rtol=0, atol=3e-6 * scale)
        np.testing.assert_allclose(
            hard[i, j], hard_spectral_clip(x[i, j], c[i, j]), rtol=0, atol=3e-6 * scale
        )


class TestHardClip:
    @pytest.mark.usefixtures("x64")
    @properties
    @given(seed=seeds, shape=shapes, c=thresholds)
    def test_projection(self, seed, shape, c):
        x = random_matrix(seed, shape)
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        h = hard_spectral_clip(x, c)
        assert_close(h, u * np.minimum(s, c) @ vt, 1e-12)
        assert_close(hard_spectral_clip(h, c), np.asarray(h), 1e-12)

    def test_inside_the_ball_unchanged(self):
        x = jax.random.normal(jax.random.key(0), (4, 6))
        np.testing.assert_array_equal(hard_spectral_clip(x, 100.0), x)
        np.testing.assert_array_equal(hard_spectral_clip(x, np.inf), x)

    def test_edges(self):
        assert not hard_spectral_clip(jnp.ones((3, 4)), 0.0).any()
        assert not hard_spectral_clip(jnp.zeros((3, 4)), 0.0).any()
        assert jnp.isnan(hard_spectral_clip(jnp.full((3, 4), jnp.nan), 1.0)).all()
        assert hard_spectral_clip(jnp.ones((0, 4)), 1.0).shape == (0, 4)
        # Rank one, with a threshold far below the rounding of the decomposition.
        rank_one = hard_spectral_clip(jnp.ones((4, 6)), 1e-30)
        np.testing.assert_allclose(
            rank_one, np.full((4, 6), 1e-30 * 24**-0.5), rtol=1e-5
        )
        largest = hard_spectral_clip(jnp.full((4, 6), 3e38), 1.0)
        np.testing.assert_allclose(largest, np.full((4, 6), 24**-0.5), rtol=1e-5)


class TestOrthogonalize:
    @pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
    def test_singular_values_near_one(self, shape):
        x = jax.random.normal(jax.random.key(0), shape)
        s = np.linalg.svd(orthogonalize(x), compute_uv=False)
        assert 0.65 < s.min() < s.max() < 1.25

    def test_edges(self):
        assert not orthogonalize(jnp.zeros((3, 4))).any()
        assert jnp.isnan(orthogonalize(jnp.full((3, 4), jnp.inf))).all()
        assert orthogonalize(jnp.ones((0, 4))).shape == (0, 4)
        x = jax.random.normal(jax.random.key(0), (4, 6))
        for scale in (1e6, 1e30):
            np.testing.assert_allclose(
                orthogonalize(scale * x), orthogonalize(x), rtol=0, atol=1e-5
            )


class TestBadInput:
    @pytest.mark.parametrize("clip", [soft_spectral_clip, hard_spectral_clip])
    def test_operands(self, clip):
        x = jnp.ones((3, 4))
        for threshold in (-1.0, np.nan, jnp.asarray(-0.1)):
            with pytest.raises(ValueError, match="threshold must be >= 0"):
                clip(x, threshold)
        with pytest.raises(TypeError, match="threshold must be a number"):
            clip(x, "large")
        with pytest.raises(ValueError, match="need a matrix"):
            clip(jnp.ones(4), 1.0)
        with pytest.raises(ValueError, match="fits no matrix stack"):
            clip(x, jnp.ones(2))
        with pytest.raises(TypeError, match="got int32"):
            clip(jnp.ones((3, 4), int), 1.0)
        with pytest.raises(TypeError, match="got complex64"):
            clip(jnp.ones((3, 4), complex), 1.0)

    def test_words_and_counts(self):
        x = jnp.ones((3, 4))
        with pytest.raises(ValueError, match="use one of auto, eigh"):
            soft_spectral_clip(x, 1.0, method="lu")
        with pytest.raises(ValueError, match="at least 1"):
            soft_spectral_clip(x, 1.0, method="newton_schulz", steps=0)
        with pytest.raises(TypeError, match="compile-time int"):
            jax.jit(lambda s: orthogonalize(x, steps=s))(3)
