"""A small problem with several sources, and the walk over them compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from basinax.optimizers import nexus_value_and_grad

K, D = 4, 5


def draws(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def params(seed=1, dtype=np.float32):
    return {"a": draws(3, seed=seed, dtype=dtype), "b": draws(2, seed=9, dtype=dtype)}


def sources(seed=2, count=K, dtype=np.float32):
    return draws(count, D, D, seed=seed, dtype=dtype), draws(
        count, D, seed=seed + 1, dtype=dtype
    )


def loss(tree, source):
    """Neither quadratic nor convex."""
    matrix, centre = source
    theta = jnp.concatenate(jax.tree.leaves(tree))
    return jnp.sum(jnp.logaddexp(matrix @ (theta - centre), 0)) + 0.1 * theta @ theta


@functools.cache
def walk(normalize="global", reduce="mean", scale=1.0):
    fn = nexus_value_and_grad(
        lambda p, s: scale * loss(p, s), 0.0, normalize=normalize, reduce=reduce
    )
    return jax.jit(lambda p, s, gamma: fn(p, s, inner_learning_rate=gamma))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def scaled(factor, tree):
    return jax.tree.map(lambda x: factor * x, tree)


def close(tree, other, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(flat(tree), flat(other), rtol=rtol, atol=atol)
