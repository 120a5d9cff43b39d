"""Derivatives of the spectral maps: against differences, finite where others fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basinax.optimizers import hard_spectral_clip, soft_spectral_clip

METHODS = ("auto", "eigh", "polynomial", "newton_schulz", "svd")
SHAPES = ((5, 7), (6, 6), (8, 3))


@pytest.mark.usefixtures("x64")
class TestDerivative:
    @pytest.mark.parametrize(
        ("method", "shape"),
        # The rule is one for all methods; what differs is the value beside it.
        [("auto", shape) for shape in SHAPES] + [(m, SHAPES[0]) for m in METHODS[1:]],
    )
    def test_against_differences(self, method, shape):
        self.check(lambda x, c: soft_spectral_clip(x, c, method=method), shape)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_hard(self, shape):
        self.check(hard_spectral_clip, shape)

    def check(self, clip, shape):
        keys = jax.random.split(jax.random.key(0))
        x, dx = (jax.random.normal(k, shape) for k in keys)
        c, dc, h = jnp.asarray(1.7), jnp.asarray(0.3), 1e-6
        _, tangent = jax.jvp(clip, (x, c), (dx, dc))
        plus, minus = clip(x + h * dx, c + h * dc), clip(x - h * dx, c - h * dc)
        np.testing.assert_allclose(tangent, (plus - minus) / (2 * h), atol=1e-8)
        # Reverse mode is the transpose of the same linear map.
        weight = jnp.cos(jnp.arange(x.size)).reshape(shape)
        gx, gc = jax.grad(lambda x, c: jnp.vdot(weight, clip(x, c)), (0, 1))(x, c)
        pulled = jnp.vdot(gx, dx) + gc * dc
        np.testing.assert_allclose(pulled, jnp.vdot(weight, tangent), rtol=1e-10)

    @pytest.mark.parametrize("clip", [soft_spectral_clip, hard_spectral_clip])
    def test_finite_at_repeated_and_zero_singular_values(self, clip):
        dx = jax.random.normal(jax.random.key(0), (4, 6))
        for x, c in ((jnp.zeros((4, 6)), 1.0), (3 * jnp.eye(4, 6), 1.0)):
            _, tangent = jax.jvp(lambda x, c=c: clip(x, c), (x,), (dx,))
            assert jnp.isfinite(tangent).all()
        # At zero the map is the identity to first order.
        _, tangent = jax.jvp(lambda x: clip(x, 1.0), (jnp.zeros((4, 6)),), (dx,))
        np.testing.assert_allclose(tangent, dx, rtol=1e-12)
