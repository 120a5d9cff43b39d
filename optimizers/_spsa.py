"""Gradients from differences of losses along random directions (SPSA).

    p = [L(θ + μz) − L(θ − μz)] / 2μ,        ĝ = (1/n) Σ p z        with z ~ N(0, I)

is unbiased for a loss quadratic in θ: there p = ⟨∇L, z⟩ exactly.  Two forward passes
buy one number, so in D dimensions the cosine between ĝ and the gradient is about
√(n/(n+D)).  Spall, "Multivariate stochastic approximation using a simultaneous
perturbation gradient approximation" (IEEE TAC 37, 1992).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree


def draw_direction(key: PRNGKeyArray, like: PyTree) -> PyTree:
    """Draw standard normal numbers in at least float32.

    Each leaf has its own key, `fold_in(key, index)`, so that nothing is concatenated.
    Leaves of equal shape are drawn by one call: every separate generator in a program
    takes a quarter of a second to compile on CPUs.

    Args:
        key: random key.
        like: tree that sets structure, shapes and layout over Explicit mesh axes.
    """
    leaves, treedef = jax.tree.flatten(like)
    groups: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        kind = jax.typeof(leaf)
        dtype = jnp.promote_types(kind.dtype, jnp.float32)
        groups.setdefault((kind.shape, dtype, kind.sharding), []).append(index)
    out: list[Any] = [None] * len(leaves)
    for (shape, dtype, sharding), members in groups.items():
        # Only an Explicit axis shows in a type, and only there it must be named.
        place = sharding if any(sharding.spec) else None
        draw = functools.partial(
            jax.random.normal, shape=shape, dtype=dtype, out_sharding=place
        )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.array(members))
        for index, direction in zip(members, jax.vmap(draw)(keys), strict=True):
            out[index] = direction
    return treedef.unflatten(out)


def spsa_gradient(
    loss: Callable[[PyTree], Array],
    params: PyTree,
    direction: Callable[[Any], PyTree],
    mu: Any,
    num_samples: int,
) -> tuple[Float[Array, " n"], PyTree]:
    """Estimate a gradient from 2n evaluations, in the memory of one direction.

    Args:
        loss: scalar function of the parameters; evaluated in at least float32.
        params: point θ, a tree of arrays.
        direction: sample index, which may be traced, to a tree z like `params`.
        mu: distance μ per coordinate.
        num_samples: n.

    Returns:
        The n differences p and the mean of p·z, in at least float32.
    """

    def sample(index: Any) -> tuple[Array, PyTree]:
        z = direction(index)
        ahead, behind = (
            jnp.asarray(loss(_move(params, step, z))) for step in (mu, -mu)
        )
        wide = jnp.promote_types(ahead.dtype, jnp.float32)
        p = (ahead.astype(wide) - behind.astype(wide)) / jnp.asarray(2 * mu, wide)
        return p, jax.tree.map(lambda leaf: p.astype(leaf.dtype) * leaf, z)

    if num_samples == 1:
        p, estimate = sample(0)
        return p[None], estimate

    def add(total: PyTree, index: Array) -> tuple[PyTree, Array]:
        p, one = sample(index)
        return jax.tree.map(jnp.add, total, one), p

    start = jax.tree.map(lambda w: jnp.zeros_like(w, _wide(w)), params)
    total, p = jax.lax.scan(add, start, jnp.arange(num_samples))
    return p, jax.tree.map(lambda leaf: leaf / num_samples, total)


def _wide(leaf: Any) -> Any:
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def _move(params: PyTree, step: Any, direction: PyTree) -> PyTree:
    """Return θ + step·z in at least float32; in less the step would round away."""

    def move(w: Any, z: Array) -> Array:
        wide = _wide(w)
        return jnp.asarray(w, wide) + jnp.asarray(step, wide) * z.astype(wide)

    return jax.tree.map(move, params, direction)
