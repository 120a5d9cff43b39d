"""Operators whose spectrum is known because it was prescribed."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial


@jax.jit
def multiply(matrix, tree):
    """Apply a matrix to the concatenated leaves, in the dtypes of the leaves."""
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    return unravel(matrix @ flat)


def rotation(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def prescribed(values, dtype=np.float32):
    """Return an operator with these eigenvalues and a tree it acts on."""
    values = np.asarray(values, np.float64)
    q = rotation(len(values))
    like = {"x": dtype(1), "none": None, "w": np.ones((len(values) - 1, 1), dtype)}
    operator = Partial(multiply, jnp.asarray((q * values) @ q.T, dtype))
    return operator, jax.tree.map(jnp.asarray, like)


def matrix_of(operator):
    """Return the matrix behind a prescribed operator, in float64."""
    return np.asarray(operator.args[0], np.float64)


def flat(tree):
    return np.concatenate(
        [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    )


def outliers(size, seed=0):
    """Return a spectrum like a trained network's: a bulk, outliers, a negative tail."""
    bulk = np.random.default_rng(seed).normal(size=size - 7) * 0.05
    return np.concatenate([[10, 6, 4, 3, 2.5], bulk, [-0.6, -0.4]])
