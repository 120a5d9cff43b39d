"""Stacked gradients over leaves of several shapes, for tests of their geometry."""

import functools

import jax
import numpy as np
from hypothesis import strategies as st

from basinax.landscape import (
    gradient_cosines,
    gradient_noise_scale,
)

COUNT = 5


def tree_of(rows):
    """Spread (n, 9) numbers over leaves of several shapes."""
    n = len(rows)
    parts = {"w": rows[:, :6].reshape(n, 2, 3), "b": rows[:, 6:8], "none": None}
    return parts | {"scalar": rows[:, 8], "empty": rows[:, :0]}


def random_rows(seed, count=COUNT, dtype=np.float32):
    rng = np.random.default_rng(seed)
    lengths = 10 ** rng.uniform(-2, 2, (count, 1))
    return (lengths * rng.normal(size=(count, 9)) + rng.normal(size=9)).astype(dtype)


cosines_of = jax.jit(gradient_cosines)
noise_of = jax.jit(gradient_noise_scale, static_argnames="batch_size")
many = st.integers(0, 2**31 - 1)
# Sums of ten numbers in float32.
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
