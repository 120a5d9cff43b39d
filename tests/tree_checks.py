"""Norms of trees and comparisons of all their leaves, on the host."""

import jax
import numpy as np


def norm(tree):
    """Compute the Euclidean norm of a tree in float64."""
    squares = [np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree)]
    return np.sqrt(np.sum(squares))


def close(actual, desired, rtol=1e-12, atol=0.0):
    """Compare two trees of one structure."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for found, wanted in zip(
        jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


def identical(actual, desired):
    """Compare two trees bit for bit, but for the sign of zero."""
    close(actual, desired, rtol=0)
