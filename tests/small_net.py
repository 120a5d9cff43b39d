"""A network of a few weights, with a leaf that is None."""

import jax
import jax.numpy as jnp
import numpy as np


def model(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def loss(params, x, y):
    return jnp.mean(jnp.sum((model(params, x) - y) ** 2, -1))


def point(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(2, 3)), "v": rng.normal(size=(3, 1)), "none": None}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def data(rows, dtype=np.float64, seed=0):
    rng = np.random.default_rng((1, seed))
    x, y = rng.normal(size=(rows, 2)), rng.normal(size=(rows, 1))
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)
