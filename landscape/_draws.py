"""Random and patterned trees shaped like the parameters, placed like them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from basinax.landscape._vectors import placement, wide_dtype


@functools.cache
def _normal_at(place: Sharding | None) -> Callable[..., Array]:
    def normal(
        key: PRNGKeyArray,
        index: Int[Array, ""],
        shape: tuple[int, ...],
        dtype: jnp.dtype,
    ) -> Array:
        return jax.random.normal(jax.random.fold_in(key, index), shape, dtype)

    static = ("shape", "dtype")
    return jax.jit(normal, static_argnames=static, out_shardings=place)


def normal_like(key: PRNGKeyArray, like: PyTree) -> PyTree:
    """Draw standard normal numbers in at least float32, placed like the parameters.

    One compiled call per leaf, which leaves of equal shape share; see `random_bits`.

    Args:
        key: random key.
        like: tree of concrete arrays that sets structure, shapes and placement.
    """
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten(
        _normal_at(placement(leaf))(
            key, index, shape=jnp.shape(leaf), dtype=wide_dtype(leaf)
        )
        for index, leaf in enumerate(leaves)
    )


def signs_like(like: PyTree) -> PyTree:
    """Make a fixed pattern of ±1 that no structured vector is orthogonal to."""
    return hashed_signs(like, 0, 0)


def hashed_signs(
    like: PyTree, seed: Int[Array, ""] | int, index: Int[Array, ""] | int
) -> PyTree:
    """Make ±1 as a hash of seed, index and position.

    It compiles at once, whereas `jax.random` takes a quarter of a second per leaf of a
    program, and the result lies where the parameters lie, also while they are traced.

    Args:
        like: tree of arrays that sets structure, shapes, dtypes and placement.
        seed: integer; chooses a family of patterns.
        index: integer; chooses a pattern.
    """
    first, second = (jnp.asarray(word).astype(jnp.uint32) for word in (seed, index))
    word = _mix(_mix(first + jnp.uint32(_GOLDEN)) + second)
    leaves, treedef = jax.tree.flatten(like)
    words = (_mix(word + jnp.uint32(number)) for number in range(len(leaves)))
    return treedef.unflatten(map(_signs, words, leaves))


# 2³² over the golden ratio: zero would stay zero.
_GOLDEN = 0x9E3779B9


def _signs(word: Array, leaf: Array) -> Array:
    shape = jnp.shape(leaf)
    position = jnp.zeros((1,) * len(shape), jnp.uint32)
    for axis, length in enumerate(shape):
        line = jnp.arange(length, dtype=jnp.uint32)
        along = tuple(length if i == axis else 1 for i in range(len(shape)))
        position = position * jnp.uint32(length) + line.reshape(along)
    odd = _mix(_mix(position + word) + word) & 1
    ones = jnp.ones_like(leaf)  # whose layout the product takes over
    return (1 - 2 * odd.astype(ones.dtype)) * ones


def _mix(x: Array) -> Array:
    """Hash 32 bits: the finaliser of MurmurHash3, where every bit flips every bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
