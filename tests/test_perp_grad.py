"""The projection of one gradient: orthogonality, norms, invariances, range."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basinax.optimizers import project_orthogonal
from basinax.optimizers._tangent import _split

# Forty examples of a compiled function each; the machine may be busy.
FORTY = hypothesis.settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
COSINES = (0.0, 0.5, -0.7, 0.72, 0.9, -0.999, 0.999999)

split = jax.jit(_split, static_argnums=2, static_argnames="lazy")
rescaled = jax.jit(project_orthogonal)
bare = jax.jit(functools.partial(project_orthogonal, rescale=False))


def pair(size, cosine, seed=0, dtype=np.float32):
    """Draw weights and a gradient with a given angle between them."""
    rng = np.random.default_rng(seed)
    w, t = rng.standard_normal((2, size))
    t -= (t @ w) / (w @ w) * w
    g = cosine * w / np.linalg.norm(w)
    g += np.sqrt(1 - cosine**2) * t / np.linalg.norm(t)
    return np.asarray(jnp.asarray(g, dtype)), np.asarray(jnp.asarray(w, dtype))


def wide(x):
    return np.asarray(x, np.float64)


def abs_cosine(x, y):
    x, y = (wide(v) / np.abs(wide(v)).max() for v in (x, y))
    return abs(np.vdot(x, y)) / np.linalg.norm(x) / np.linalg.norm(y)


def norm(x):
    return np.linalg.norm(wide(x))


def update(tx, g, w):
    return tx.update(g, tx.init(w), w)[0]


class TestProjection:
    @pytest.mark.parametrize("size", [2, 1000, 100_000])
    def test_orthogonal_and_of_full_norm(self, size):
        for cosine in COSINES:
            g, w = pair(size, cosine)
            out, plain = rescaled(g, w), bare(g, w)
            # One pass where the angle is wide, two where it is not.
            assert abs_cosine(out, w) <= 5e-7, cosine
            assert abs_cosine(plain, w) <= 5e-7, cosine
            np.testing.assert_allclose(norm(out), norm(g), rtol=5e-7)
            assert norm(plain) <= norm(g) * (1 + 1e-6)
            radial = np.vdot(wide(w), wide(g)) / norm(w)
            np.testing.assert_allclose(norm(plain) ** 2 + radial**2, norm(g) ** 2, 1e-6)
            assert np.vdot(wide(out), wide(g)) > 0  # a descent direction

    def test_double_precision(self, x64):
        for cosine in COSINES:
            g, w = pair(1000, cosine, dtype=np.float64)
            out = rescaled(g, w)
            assert out.dtype == jnp.float64
            assert abs_cosine(out, w) <= 1e-15, cosine
            np.testing.assert_allclose(norm(out), norm(g), rtol=1e-15)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_costs_one_rounding(self, dtype):
        for cosine in COSINES[:-1]:  # the last is parallel after rounding
            g, w = pair(1000, cosine, dtype=dtype)
            out = rescaled(g, w)
            assert out.dtype == g.dtype
            eps = float(jnp.finfo(dtype).eps)
            assert abs_cosine(out, w) <= 2 * eps, cosine
            np.testing.assert_allclose(norm(out), norm(g), rtol=2 * eps)

    @FORTY
    @hypothesis.given(SEEDS, st.sampled_from(COSINES[:-1]))
    def test_idempotent_homogeneous_and_blind_to_the_length_of_weights(
        self, seed, cosine
    ):
        g, w = pair(30, cosine, seed)
        out = rescaled(g, w)
        # Rounding of g counts 1/sin times in its tangential part, here at most 22.
        atol = 3e-6 * np.abs(out).max()
        np.testing.assert_allclose(rescaled(out, w), out, rtol=0, atol=atol)
        for scale in (-3.0, 1e-30, 1e30):
            scale = np.float32(scale)
            found = wide(rescaled(scale * g, w)) / scale
            np.testing.assert_allclose(found, out, rtol=0, atol=atol)
            found = rescaled(g, scale * w)
            np.testing.assert_allclose(found, out, rtol=0, atol=atol)

    @FORTY
    @hypothesis.given(SEEDS)
    def test_l2_in_the_gradient_changes_only_the_norm(self, seed):
        g, w = pair(30, 0.3, seed)
        out, found = rescaled(g, w), rescaled(g + np.float32(2) * w / norm(w), w)
        ratio = norm(g + 2 * w / norm(w)) / norm(g)
        np.testing.assert_allclose(found, ratio * wide(out), rtol=0, atol=3e-6)

    def test_equivariant_under_rotations(self, x64):
        g, w = pair(20, 0.6, dtype=np.float64)
        q, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((20, 20)))
        found, wanted = rescaled(q @ g, q @ w), q @ np.asarray(rescaled(g, w))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-14)

    def test_shape_and_order_do_not_matter(self):
        g, w = pair(24, 0.6)
        out = np.asarray(rescaled(g, w))
        stacked = rescaled(g.reshape(2, 3, 4), w.reshape(2, 3, 4))
        np.testing.assert_allclose(stacked.ravel(), out, rtol=0, atol=1e-6)
        order = np.random.default_rng(2).permutation(24)
        np.testing.assert_allclose(rescaled(g[order], w[order]), out[order], atol=1e-6)

    @pytest.mark.parametrize("scale_w", [1e-35, 1e-20, 1.0, 1e20, 1e37])
    @pytest.mark.parametrize("scale_g", [1e-34, 1e-12, 1.0, 1e12, 1e37])
    def test_any_scale(self, scale_w, scale_g):
        for cosine in (0.3, -0.9):
            g, w = pair(30, cosine)
            out = wide(rescaled(np.float32(scale_g) * g, np.float32(scale_w) * w))
            # Smallest entries of 1e-35 round in the last digits that are normal.
            exact = wide(rescaled(g, w))
            np.testing.assert_allclose(out / scale_g, exact, rtol=0, atol=1e-3)
            assert abs_cosine(out, w) < 1e-3
            if min(scale_g, scale_w) > 1e-30:
                np.testing.assert_allclose(out / scale_g, exact, rtol=0, atol=2e-6)

    def test_zeros(self):
        g, w = pair(8, 0.4)
        zero = np.zeros_like(g)
        np.testing.assert_array_equal(rescaled(g, zero), g)
        np.testing.assert_array_equal(rescaled(zero, w), zero)
        np.testing.assert_array_equal(rescaled(zero, zero), zero)
        np.testing.assert_array_equal(bare(g, zero), g)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_parallel_is_exactly_zero(self, dtype):
        w = jnp.asarray(pair(50, 0.0)[1], dtype)
        for factor in (1, -1, 2, -0.5):  # exact in every dtype
            np.testing.assert_array_equal(rescaled(factor * w, w), jnp.zeros_like(w))
        if dtype == "float32":  # the product rounds
            for factor in (1.7, -1.7, 1e-30, 3e30):
                out = rescaled(jnp.float32(factor) * w, w)
                np.testing.assert_array_equal(out, jnp.zeros_like(w))
        np.testing.assert_array_equal(rescaled(jnp.float32(3), jnp.float32(-0.7)), 0.0)

    def test_nan_and_infinity_reach_the_whole_block(self):
        g, w = pair(8, 0.4)
        for bad in (np.nan, np.inf):
            for spoilt in ((np.append(g[1:], bad), w), (g, np.append(w[1:], bad))):
                assert np.isnan(rescaled(*map(np.float32, spoilt))).all()

    def test_complex_numbers_are_pairs_of_real_ones(self):
        g, w = pair(20, 0.6)
        out = rescaled(g[:10] + 1j * g[10:], w[:10] + 1j * w[10:])
        wanted = np.asarray(rescaled(g, w))
        np.testing.assert_allclose(out, wanted[:10] + 1j * wanted[10:], atol=1e-6)

    def test_identity_where_the_loss_ignores_the_scale(self):
        rng = np.random.default_rng(0)
        x, w = jnp.asarray(rng.standard_normal((16, 6)), jnp.float32), pair(6, 0.0)[1]
        loss = lambda w: jnp.mean(jnp.tanh(x @ (w / jnp.linalg.norm(w))) ** 2)  # noqa: E731
        g = jax.grad(loss)(jnp.asarray(w))
        np.testing.assert_allclose(rescaled(g, w), g, rtol=0, atol=1e-6 * norm(g))

    @pytest.mark.parametrize("axes", [0, (0, 2), -1])
    def test_slices_are_a_batch(self, axes):
        rng = np.random.default_rng(0)
        g, w = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
        found = project_orthogonal(g, w, axes=axes)
        tupled = (axes,) if isinstance(axes, int) else axes
        kept = [i for i in range(3) if i not in [a % 3 for a in tupled]]
        flat = lambda x: np.transpose(  # noqa: E731
            x, (*kept, *[a % 3 for a in tupled])
        ).reshape(np.prod([x.shape[i] for i in kept]), -1)
        wanted = jax.vmap(project_orthogonal)(flat(g), flat(w))
        np.testing.assert_allclose(flat(np.asarray(found)), wanted, atol=2e-6)

    def test_no_nan_in_its_derivative(self):
        zero, (g, w) = np.zeros(8, np.float32), pair(8, 0.4)
        total = jax.jit(jax.grad(lambda g, w: project_orthogonal(g, w).sum(), (0, 1)))
        for operands in ((g, w), (zero, w), (g, zero), (zero, zero), (w, w)):
            assert all(np.isfinite(d).all() for d in total(*operands))

    def test_derivative_of_the_bare_projection(self, x64):
        g, w = pair(6, 0.4, dtype=np.float64)
        found = jax.jacobian(bare)(g, w)
        wanted = np.eye(6) - np.outer(w, w) / (w @ w)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-14)

    def test_eager_jit_and_vmap_agree(self):
        g, w = zip(*[pair(12, c) for c in (0.2, 0.95, -0.1)], strict=True)
        many = jax.vmap(project_orthogonal)(np.stack(g), np.stack(w))
        for i in range(3):
            # The safe branch of the three is taken for all under vmap.
            np.testing.assert_allclose(many[i], rescaled(g[i], w[i]), atol=2e-6)
            np.testing.assert_array_equal(
                project_orthogonal(g[i], w[i]), rescaled(g[i], w[i])
            )

    def test_accelerators_take_the_careful_path(self):
        """Elsewhere than on CPU both passes always run; the results agree."""
        for cosine in COSINES[:-1]:
            g, w = (jnp.asarray(x) for x in pair(100, cosine))
            lazy, eager = (split([g], [w], None, lazy=x) for x in (True, False))
            np.testing.assert_allclose(eager.ratio, lazy.ratio, rtol=3e-5)
            np.testing.assert_allclose(
                (eager.c + eager.d) * eager.shift, lazy.c + lazy.d, rtol=0, atol=1e-7
            )
