"""Cross-entropy as a duel between the target and the rest, exact when it is over.

With scores y_j = φ(x_j) of the logits and the odds against the target t,

    r = Σ_{j≠t} e^{y_j - y_t},    ℓ = log(1 + r),
    ∂ℓ/∂y_j = e_j,    e_j = p_j for j ≠ t,    e_t = -r / (1 + r) = -Σ_{j≠t} p_j.

The usual log Σ_j e^{y_j} - y_t is the same function, but once the target leads by
log(1/eps) its sum absorbs the rest: loss and target gradient are exactly zero.  Prieto
et al., "Grokking at the Edge of Numerical Stability" (ICLR 2025, arXiv:2501.04697) call
this softmax collapse.  Nothing is absorbed in r.

First and second derivatives are written out, because automatic ones subtract what
cancels: with the tangents dy_j and s = Σ_j e_j dy_j,

    dℓ = s,    de_j = p_j (dy_j - Σ_k p_k dy_k) for j ≠ t,    de_t = dp_t = -p_t s.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from basinax.optimizers._class_axes import (
    Axis,
    batch_shape,
    check_logits,
    class_mask,
    classes_last,
    drop_classes,
    wide,
)


class Scores(NamedTuple):
    """The map φ from logits to scores, by what the loss needs of it.

    Attributes:
        ratio: e^{φ(x) - φ(z)} of (x, z).
        difference: φ(x) - φ(z) of (x, z), with its derivatives.
        tangent: φ'(x) dx of (x, dx).
    """

    ratio: Callable[[Array, Array], Array]
    difference: Callable[[Array, Array], Array]
    tangent: Callable[[Array, Array], Array]


def integer_label_cross_entropy(
    scores: Scores, logits: Any, labels: Any, axis: Axis, where: Any
) -> Array:
    """Check the arguments and compute the loss of every sample."""
    logits, axes = check_logits(logits, axis)
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers, got {labels.dtype}; for distributions over the "
            "classes use a loss without _with_integer_labels in its name."
        )
    batch = batch_shape(logits.shape, axes)
    if labels.shape != batch:
        raise ValueError(
            f"labels of shape {labels.shape} for logits of shape {logits.shape}: with "
            f"classes along axis={axis}, one label per sample has shape {batch}."
        )
    where = class_mask(where, logits, axes)
    return _integer_label_cross_entropy(scores, axes, logits, labels, where)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _integer_label_cross_entropy(
    scores: Scores,
    axes: tuple[int, ...],
    logits: Array,
    labels: Array,
    where: Array | None,
) -> Array:
    x = wide(classes_last(logits, axes))
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    labels = jnp.where(labels < 0, labels + x.shape[-1], labels)
    valid = (labels >= 0) & (labels < x.shape[-1])
    labels = jnp.where(valid, labels, 0)
    if where is None:
        return jnp.where(valid, cross_entropy(scores, x, labels), jnp.nan)
    keep = classes_last(where, axes)
    counts = jnp.where(valid, _at(keep, labels)[..., 0], jnp.any(keep, -1))
    loss = cross_entropy(scores, drop_classes(x, keep, counts), labels)
    return jnp.where(counts, jnp.where(valid, loss, jnp.nan), 0)


def log_probabilities(
    scores: Scores, x: Float[Array, "*batch classes"]
) -> Float[Array, "*batch classes"]:
    """Compute log p_j = (y_j - y_top) - ℓ_top, where both terms have one sign."""
    # On CPU two plain reductions are several times faster than argmax.
    classes = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    is_top = x == jnp.max(x, -1, keepdims=True)
    top = jnp.min(jnp.where(is_top, classes, x.shape[-1] - 1), -1)
    # Zero by selection at the top: its derivative must not be 1 - 1 added to ℓ's.
    lag = jnp.where(_hit(x, top), 0, scores.difference(x, _at(x, top)))
    return lag - cross_entropy(scores, x, top)[..., None]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def cross_entropy(
    scores: Scores, x: Float[Array, "*batch classes"], labels: Array
) -> Float[Array, "*batch"]:
    """Compute ℓ for labels that all name a class."""
    duel = _duel(scores, x, labels)
    # Odds beyond the largest number still have a logarithm.
    large = jnp.log(duel.total) + scores.difference(duel.best, duel.target)
    return jnp.where(duel.odds == jnp.inf, large, jnp.log1p(duel.odds))[..., 0]


@cross_entropy.defjvp
def _cross_entropy_jvp(
    scores: Scores, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    (x, labels), (dx, _) = primals, tangents
    e, _ = _errors(scores, x, labels)
    return cross_entropy(scores, x, labels), jnp.sum(e * scores.tangent(x, dx), -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _errors(scores: Scores, x: Array, labels: Array) -> tuple[Array, Array]:
    """Compute e, and p_t with the class axis kept."""
    duel = _duel(scores, x, labels)
    lost = 1 / (1 + 1 / duel.odds)
    share = lost / jnp.where(duel.total > 0, duel.total, 1)
    return jnp.where(duel.hit, -lost, duel.weights * share), 1 / (1 + duel.odds)


@_errors.defjvp
def _errors_jvp(scores: Scores, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, labels), (dx, _) = primals, tangents
    e, p_t = _errors(scores, x, labels)
    hit = _hit(x, labels)
    dy = scores.tangent(x, dx)
    dy_t = jnp.sum(jnp.where(hit, dy, 0), -1, keepdims=True)
    s = jnp.sum(e * dy, -1, keepdims=True)
    mean = p_t * dy_t + jnp.sum(jnp.where(hit, 0, e * dy), -1, keepdims=True)
    dp_t = -p_t * s
    return (e, p_t), (jnp.where(hit, dp_t, e * (dy - mean)), dp_t)


class _Duel(NamedTuple):
    """One target against the rest; all but hit and weights have class axis 1."""

    hit: Array  # whether a class is the target
    target: Array  # x_t
    best: Array  # largest logit of the rest, or the lowest finite number
    weights: Array  # e^{y_j - y_best} of the rest, 0 at the target
    total: Array  # their sum: at least 1, or 0 if nothing opposes the target
    odds: Array  # r; NaN if any logit is NaN or +inf


def _duel(scores: Scores, x: Array, labels: Array) -> _Duel:
    hit = _hit(x, labels)
    target = _at(x, labels)
    rest = jnp.where(hit, -jnp.inf, x)
    best = jnp.max(rest, -1, keepdims=True)
    best = jnp.maximum(best, jnp.finfo(x.dtype).min)
    weights = scores.ratio(rest, best)
    total = jnp.sum(weights, -1, keepdims=True)
    odds = total * scores.ratio(best, target)
    odds = jnp.where(jnp.maximum(best, target) < jnp.inf, odds, jnp.nan)
    return _Duel(hit, target, best, weights, total, odds)


def _hit(x: Array, labels: Array) -> Array:
    classes = jax.lax.broadcasted_iota(labels.dtype, x.shape, x.ndim - 1)
    return classes == labels[..., None]


def _at(x: Array, labels: Array) -> Array:
    return jnp.take_along_axis(x, labels[..., None], -1)
