"""Three small trained models whose curvature is known to float64.

`golden/landscape*.npz` hold weights, data and curvature that were computed with torch
in float64 by double backward: a perceptron, a convolutional net and a transformer
block.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

FILES = sorted((pathlib.Path(__file__).parent / "golden").glob("landscape*.npz"))
GOLDEN = {name: array for file in FILES for name, array in np.load(file).items()}


def cross_entropy(logits, labels):
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


def affine(params, name, x):
    kernel, bias = params[f"{name}.kernel"], params[f"{name}.bias"]
    return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def mlp(params, x):
    for layer in ("l0", "l1"):
        x = jnp.tanh(affine(params, layer, x))
    return affine(params, "l2", x)


def cnn(params, x):
    for layer in ("conv0", "conv1"):
        x = jax.lax.conv_general_dilated(
            x,
            params[f"{layer}.kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jnp.tanh(x + params[f"{layer}.bias"].reshape(1, 1, 1, -1))
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return affine(params, "dense", x.reshape(len(x), -1))


def layer_norm(params, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    scale, bias = (params[f"{name}.{part}"][None, None] for part in ("scale", "bias"))
    return x * scale + bias


def transformer(params, tokens):
    heads = int(GOLDEN["tf.heads"])
    n, steps = tokens.shape
    h = params["emb"][tokens] + params["pos"][None, :steps]
    a = layer_norm(params, "ln1", h)
    q, k, v = (affine(params, m, a).reshape(n, steps, heads, -1) for m in "qkv")
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1])
    causal = np.tril(np.ones((1, 1, steps, steps), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), -1)
    mixed = jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, steps, -1)
    h = h + affine(params, "o", mixed)
    inner = jax.nn.silu(affine(params, "fc", layer_norm(params, "ln2", h)))
    h = h + affine(params, "proj", inner)
    return affine(params, "head", layer_norm(params, "lnf", h))


APPLY = {"mlp": mlp, "cnn": cnn, "tf": transformer}


@functools.cache
def loss_of(name):
    return lambda params, x, y: cross_entropy(APPLY[name](params, x), y)


def problem(name, dtype):
    """Return the loss, its parameters and its data."""
    names = GOLDEN[f"{name}.param_names"]
    params = {str(n): jnp.asarray(GOLDEN[f"{name}.w.{n}"], dtype) for n in names}
    x = GOLDEN[f"{name}.x"]
    x = jnp.asarray(x, dtype if x.dtype.kind == "f" else jnp.int32)
    return loss_of(name), params, x, jnp.asarray(GOLDEN[f"{name}.y"], jnp.int32)


def flatten(name, tree):
    """Lay a tree out as the golden vectors are: by parameter name."""
    leaves = [tree[str(n)] for n in GOLDEN[f"{name}.param_names"]]
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])


def unflatten(name, vector, like):
    names = [str(n) for n in GOLDEN[f"{name}.param_names"]]
    ends = np.cumsum([like[n].size for n in names])[:-1]
    parts = zip(names, np.split(vector, ends), strict=True)
    return {n: jnp.asarray(x.reshape(like[n].shape), like[n].dtype) for n, x in parts}
