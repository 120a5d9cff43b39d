"""Small flax models used as pure functions of a plain tree of arrays.

A module is built once for its structure; afterwards only ``init(key) -> params`` and
``apply(params, inputs) -> logits`` are used, with params a nested dict of arrays, so
every optimizer and every curvature operator sees an ordinary tree. Activations are
smooth: the second derivatives the landscape instruments measure then exist everywhere.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

ROTARY_BASE = 10_000.0
INIT_SCALE = 0.02  # standard deviation of every transformer weight at the start


class Functional(NamedTuple):
    """A model as a pair of pure functions."""

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Turn a module constructor into pure ``init`` and ``apply``.

    Args:
      build: makes the module from its random streams; parameters only, no mutable
        statistics.

    Returns:
      ``init(key)`` gives a nested dict of arrays, ``apply(params, inputs)`` the
      module's output.
    """
    # Only the static graph is kept: the abstract module never holds real weights.
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.split(build(nnx.Rngs(key)))[1])

    def apply(params: Any, inputs: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graph, params)
        return model(inputs)

    return Functional(init, apply)


def count(params: Any) -> int:
    """Count the scalars in a tree of arrays (or of shapes)."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))


class MLP(nnx.Module):
    """Fully connected network with biases and GELU between the layers."""

    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs) -> None:
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in pairs])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits for inputs of shape (..., sizes[0])."""
        for layer in self.layers[:-1]:
            x = jax.nn.gelu(layer(x))
        return self.layers[-1](x)


def rotary(x: jax.Array) -> jax.Array:
    """Rotate pairs of features of (batch, time, heads, features) by position."""
    time, half = x.shape[1], x.shape[3] // 2
    frequency = ROTARY_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(time, dtype=jnp.float32)[:, None] * frequency[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


class Block(nnx.Module):
    """Pre-norm causal attention, then a gated feed-forward layer."""

    def __init__(
        self, width: int, heads: int, out_scale: float, *, rngs: nnx.Rngs
    ) -> None:
        self.heads = heads
        inward = nnx.initializers.normal(INIT_SCALE)
        outward = nnx.initializers.normal(out_scale)

        def linear(m: int, n: int, init: jax.nn.initializers.Initializer) -> nnx.Linear:
            return nnx.Linear(m, n, use_bias=False, kernel_init=init, rngs=rngs)

        self.attention_norm = nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs)
        self.qkv = linear(width, 3 * width, inward)
        self.mix = linear(width, width, outward)
        self.feed_norm = nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs)
        self.gate = linear(width, 4 * width, inward)
        self.up = linear(width, 4 * width, inward)
        self.down = linear(4 * width, width, outward)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, width) to the same shape."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x))
        qkv = qkv.reshape(batch, time, 3, self.heads, width // self.heads)
        q, k, v = rotary(qkv[:, :, 0]), rotary(qkv[:, :, 1]), qkv[:, :, 2]
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(attended.reshape(batch, time, width))
        h = self.feed_norm(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class Transformer(nnx.Module):
    """Causal language model: rotary positions, RMS norms, untied output matrix."""

    def __init__(
        self, vocabulary: int, width: int, depth: int, heads: int, *, rngs: nnx.Rngs
    ) -> None:
        if width % (2 * heads):
            raise ValueError(f"width {width} is not a multiple of {2 * heads}")
        init = nnx.initializers.normal(INIT_SCALE)
        # Residual branches start smaller with depth, as in GPT-2.
        out_scale = INIT_SCALE / (2 * depth) ** 0.5
        self.embed = nnx.Embed(vocabulary, width, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List(
            [Block(width, heads, out_scale, rngs=rngs) for _ in range(depth)]
        )
        self.norm = nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(
            width, vocabulary, use_bias=False, kernel_init=init, rngs=rngs
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return next-token logits for integer tokens of shape (batch, time)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
