"""Random probes, and means over them with standard errors.

For z with independent entries of mean zero and variance one, E[z zᵀ] = I. So zᵀ A z has
the trace of A as its mean, z ∘ A z the diagonal and ‖A z‖² the squared Frobenius norm.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from basinax.landscape._vectors import (
    check_concrete,
    check_same,
    check_vector,
    inner,
    norm,
    placement,
    random_bits,
    wide_dtype,
)


class Estimate(NamedTuple):
    """A stochastic estimate and its uncertainty.

    Attributes:
        value: the estimate, a scalar or, for a diagonal, a tree.
        standard_error: its standard deviation over keys, itself estimated from the
            spread over the probes, in the shape and units of `value`; infinite where a
            single probe says nothing about its own spread.
    """

    value: Float[Array, ""] | PyTree
    standard_error: Float[Array, ""] | PyTree


@functools.cache
def _signs_at(place: Sharding | None) -> Callable[..., Array]:
    def draw(
        key: PRNGKeyArray, index: Array, leaf: Array, shape: tuple[int, ...], dtype: str
    ) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(key, index), leaf)
        count = math.prod(shape)
        # A sign is one bit; the generator is what costs, so all of a word are used.
        words = jax.random.bits(key, (-(-count // 32), 1), jnp.uint32)
        bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
        return 1 - 2 * bits.ravel()[:count].reshape(shape).astype(dtype)

    return jax.jit(draw, static_argnames=("shape", "dtype"), out_shardings=place)


@jax.jit
def _uniform(bits: PyTree, like: PyTree) -> PyTree:
    """Turn random integers into numbers uniform on ±√3, of variance one."""

    def spread(b: Array, x: Array) -> Array:
        # 2¹⁶ equally spaced levels have the variance (2³² - 1) / 12.
        centred = b.astype(jnp.float32) - (2**15 - 0.5)
        return (centred * np.sqrt(12 / (2**32 - 1)).astype(np.float32)).astype(x.dtype)

    return jax.tree.map(lambda b, x: spread(b, jnp.asarray(x)), bits, like)


def signs(key: PRNGKeyArray, index: int, like: PyTree) -> PyTree:
    """Draw ±1 per number: of all probes, those of least variance.

    One compiled call per leaf, which leaves of equal shape share; see `random_bits`.
    """
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten(
        _signs_at(placement(leaf))(
            key, index, number, shape=jnp.shape(leaf), dtype=str(jnp.result_type(leaf))
        )
        for number, leaf in enumerate(leaves)
    )


def uniform(key: PRNGKeyArray, index: int, like: PyTree) -> PyTree:
    """Draw numbers of variance one whose multiples practically never coincide.

    Few signs do: of three parameters there are four sign vectors up to a factor. What
    concludes something from linear dependence needs these.
    """
    return _uniform(random_bits(jax.random.fold_in(key, index), like), like)


def multiplied(
    operator: Callable[[PyTree], PyTree],
    like: PyTree,
    key: PRNGKeyArray,
    num_probes: int,
) -> Iterator[tuple[PyTree, PyTree]]:
    """Go through pairs of a sign probe z and its product A z, one at a time."""
    for index in range(num_probes):
        probe = signs(key, index, like)
        product = operator(probe)
        check_same(product, probe, "the operator's result")
        yield probe, product


@jax.jit
def quadratic_form(probe: PyTree, product: PyTree) -> Float[Array, ""]:
    """Compute zᵀ A z."""
    return inner(probe, product)


@jax.jit
def length(product: PyTree) -> Float[Array, ""]:
    """Compute ‖A z‖."""
    return norm(product)


def result_dtype(like: PyTree) -> jnp.dtype:
    """Return the dtype in which estimates about these parameters are given."""
    return jnp.result_type(*map(wide_dtype, jax.tree.leaves(like)))


def on_host(samples: Sequence[Any]) -> np.ndarray:
    """Fetch what was computed per probe, in float64."""
    return np.asarray(jax.device_get(list(samples)), np.float64)


def mean(samples: np.ndarray, dtype: jnp.dtype) -> Estimate:
    """Average independent samples."""
    with np.errstate(invalid="ignore"):  # of infinite samples
        deviation = samples.std(ddof=1) if len(samples) > 1 else np.inf
        value = samples.mean()
    if np.isnan(value):
        deviation = np.nan
    return make(value, deviation / np.sqrt(len(samples)), dtype)


def make(value: float, standard_error: float, dtype: jnp.dtype) -> Estimate:
    """Wrap two host numbers."""
    return Estimate(jnp.asarray(value, dtype), jnp.asarray(standard_error, dtype))


def check(like: PyTree, num_probes: int, caller: str, least: int = 1) -> None:
    """Raise ValueError for parameters or a number of probes that cannot be used.

    Args:
        like: tree of the parameters.
        num_probes: number of probes asked for.
        caller: name of the function, and of the method where that matters.
        least: number of probes it cannot do without.
    """
    if num_probes < least:
        raise ValueError(
            f"num_probes must be at least {least} for {caller}, got {num_probes}."
        )
    check_vector(like, "like")
    check_concrete(like, caller)


def check_method(method: str, valid: tuple[str, ...]) -> None:
    """Raise ValueError for an unknown method."""
    if method not in valid:
        raise ValueError(f"method must be one of {valid}, got {method!r}.")
