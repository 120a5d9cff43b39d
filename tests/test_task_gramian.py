"""Gram matrices of stacked trees: values, range, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stacked_trees import gram, matrix, tree

GRADS = tree()


@pytest.mark.parametrize("scale", [1.0, 1e-37, 1e-20, 1e20, 1e37])
def test_gramian_is_that_of_the_jacobian(scale):
    grads = jax.tree.map(lambda x: x * jnp.float32(scale), GRADS)
    found, rows = gram(grads), matrix(grads)
    expected = rows @ rows.T
    norms = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(found.norms, norms, rtol=1e-6)
    cosines = expected / np.outer(norms, norms)
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-6)
    seen = np.asarray(found.matrix, np.float64)
    # Out of range, a multiple.
    factor = 1 if scale == 1 else seen[0, 0] / expected[0, 0]
    np.testing.assert_allclose(seen, factor * expected, atol=1e-6 * np.abs(seen).max())
    assert 1 <= seen[0, 0] < 1e3


def test_scaling_in_range_is_exact():
    # Sums of a few small integers: every order of operations gives the same number.
    rng = np.random.default_rng(3)
    rows = rng.integers(-8, 9, (3, 5)) * np.array([[2.0**-30], [1.0], [2.0**35]])
    found = gram(jnp.asarray(rows, jnp.float32)).matrix
    np.testing.assert_array_equal(found, (rows @ rows.T).astype(np.float32))


def test_rows_of_different_sizes_keep_their_angles():
    rows = np.array([[3e-30, 4e-30], [1e30, 0.0], [0.0, 0.0]])
    found = gram(jnp.asarray(rows, jnp.float32))
    np.testing.assert_allclose(found.cosines[0, 1], 0.6, rtol=1e-6)
    np.testing.assert_array_equal(found.cosines[2], 0)
    np.testing.assert_allclose(found.norms, [5e-30, 1e30, 0], rtol=1e-6)


def test_zero_rows_do_not_set_the_scale():
    rows = jnp.array([[3e-30, 4e-30], [0.0, 0.0]])
    found = gram(rows).matrix
    assert 1 <= found[0, 0] < 100
    np.testing.assert_array_equal(found[1], 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_single(dtype):
    # One in 300 squares of 1.0 would be lost at 2048 in float16, at 256 in bfloat16.
    found = gram({"x": jnp.ones((2, 5000), dtype), "y": jnp.ones((2, 3), dtype)})
    assert found.unit.dtype == jnp.float32
    np.testing.assert_array_equal(found.matrix, 5003.0)


def test_complex_leaves_are_pairs_of_numbers():
    grads = jnp.array([[1 + 2j], [3 - 1j]])
    np.testing.assert_allclose(gram(grads).matrix, [[5, 1], [1, 10]], rtol=1e-6)


def test_float64_is_summed_in_double(x64):
    grads = tree(1, "float64")
    found, rows = gram(grads).matrix, matrix(grads)
    np.testing.assert_allclose(found, rows @ rows.T, rtol=1e-13, atol=1e-13)
