"""StableMax: softmax with a piecewise rational function in place of the exponential.

    StableMax(x)_i = s(x_i) / Σ_j s(x_j),    s(x) = 1 + x        for x ≥ 0,
                                             s(x) = 1 / (1 - x)  for x < 0.

Since log s = symlog, StableMax is softmax ∘ symlog: confidence grows with a power of
the logits, so scaling them up no longer pushes the other classes out of the sum.
Prieto et al., "Grokking at the Edge of Numerical Stability" (ICLR 2025,
arXiv:2501.04697).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from basinax.optimizers._class_axes import (
    Axis,
    check_logits,
    class_mask,
    classes_back,
    classes_last,
    drop_classes,
    wide,
)
from basinax.optimizers._symlog import quarter, slope, symlog_difference
from basinax.optimizers._target_vs_rest import (
    Scores,
    integer_label_cross_entropy,
    log_probabilities,
)


@jax.custom_jvp
def _ratio(x: Array, z: Array) -> Array:
    """Compute s(x) / s(z) without forming either, which might over- or underflow."""
    a, b = quarter(x), quarter(z)
    # s = 4a for x ≥ 0 and 1/(4a) otherwise, likewise for z and b.
    above = jnp.where(z >= 0, 1 / b, 16 * b)
    below = jnp.where(z >= 0, (1 / b) / 16, b)
    return jnp.where(x >= 0, a * above, (1 / a) * below)


@_ratio.defjvp
def _ratio_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, z), (dx, dz) = primals, tangents
    ratio = _ratio(x, z)
    return ratio, ratio * (slope(x) * dx - slope(z) * dz)


_SYMLOG = Scores(
    ratio=_ratio,
    difference=symlog_difference,
    tangent=lambda x, dx: slope(x) * dx,
)


def stablemax(
    logits: Float[Array, "*shape"], axis: Axis = -1, where: Any = None
) -> Float[Array, "*shape"]:
    """Turn logits into probabilities by s(x) / Σ s(x).

    Ordered like the logits, so predictions are those of softmax, but with heavy tails:
    no class falls below 1 / (C (1 + L)²) when all |logits| ≤ L.  Unlike softmax it
    depends on the sign of the logits: adding a constant changes the result.

    Args:
        logits: real floating point.
        axis: axis, or axes, over which the result sums to one; None for all.
        where: booleans, classes to keep (shape of `logits`) or samples to keep (shape
            without `axis`); the rest gets probability 0.

    Returns:
        Probabilities in the shape and dtype of `logits`, but at least float32.  -inf
        gives 0; NaN or +inf make their sample NaN.

    Raises:
        TypeError: if `logits` are not real floating point.
        ValueError: if shapes or axes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import stablemax
        >>> stablemax(jnp.array([0.0, 1.0, -1.0])) * 7  # s = 1, 2, 1/2
        Array([2., 4., 1.], dtype=float32)

    Reference:
        arXiv:2501.04697, Definition 4.
    """
    logits, axes = check_logits(logits, axis)
    return _stablemax(axes, logits, class_mask(where, logits, axes))


@functools.partial(jax.jit, static_argnums=0)
def _stablemax(axes: tuple[int, ...], logits: Array, where: Array | None) -> Array:
    x, where = _rows(axes, logits, where)
    best = jnp.maximum(jnp.max(x, -1, keepdims=True), jnp.finfo(x.dtype).min)
    weights = _ratio(x, jax.lax.stop_gradient(best))
    p = weights / jnp.sum(weights, -1, keepdims=True)
    p = p if where is None else jnp.where(where, p, 0)
    return classes_back(p, logits.shape, axes)


def _rows(
    axes: tuple[int, ...], logits: Array, where: Array | None
) -> tuple[Array, Array | None]:
    """Bring the classes last and give the dropped ones no weight."""
    x = wide(classes_last(logits, axes))
    if where is None:
        return x, None
    keep = classes_last(where, axes)
    return drop_classes(x, keep, jnp.any(keep, -1)), keep


def log_stablemax(
    logits: Float[Array, "*shape"], axis: Axis = -1, where: Any = None
) -> Float[Array, "*shape"]:
    """Compute log(stablemax(logits)), finite for all finite logits.

    Every entry is accurate relative to its own size, also that of a class whose
    probability rounds to 1.

    Args:
        logits: real floating point.
        axis: axis, or axes, over which probabilities sum to one; None for all.
        where: booleans, classes to keep (shape of `logits`) or samples to keep (shape
            without `axis`); the rest gets -inf.

    Returns:
        Log-probabilities in the shape and dtype of `logits`, but at least float32.
        -inf stays -inf; NaN or +inf make their sample NaN.

    Raises:
        TypeError: if `logits` are not real floating point.
        ValueError: if shapes or axes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import log_stablemax
        >>> [f"{x:.3g}" for x in log_stablemax(jnp.array([1e6, 0.0, -1e6]))]
        ['-1e-06', '-13.8', '-27.6']

    Reference:
        arXiv:2501.04697, Proposition 1.
    """
    logits, axes = check_logits(logits, axis)
    return _log_stablemax(axes, logits, class_mask(where, logits, axes))


@functools.partial(jax.jit, static_argnums=0)
def _log_stablemax(axes: tuple[int, ...], logits: Array, where: Array | None) -> Array:
    x, where = _rows(axes, logits, where)
    log_p = log_probabilities(_SYMLOG, x)
    log_p = log_p if where is None else jnp.where(where, log_p, -jnp.inf)
    return classes_back(log_p, logits.shape, axes)


def stablemax_cross_entropy(
    logits: Float[Array, "*shape"],
    labels: Num[Array, "*shape"],
    axis: Axis = -1,
    where: Any = None,
) -> Float[Array, "..."]:
    """Compute -Σ_j labels_j log_stablemax(logits)_j.

    For soft labels; the gradient is (p_j Σ_k labels_k - labels_j) / (1 + |x_j|).  With
    one class per sample `stablemax_cross_entropy_with_integer_labels` is the same
    function and faster.

    Args:
        logits: real floating point; class scores along `axis`.
        labels: shape of `logits`; weights of the classes, not normalized: they need
            not sum to one, and the loss is linear in them.  Differentiable.
        axis: axis, or axes, of the classes; None for all.
        where: booleans, classes to keep (shape of `logits`) or samples to keep (shape
            without `axis`).  Labels of dropped classes are ignored; a sample without
            any class has loss 0 and gradient 0.

    Returns:
        One loss per sample, not reduced, in the dtype of `logits` but at least
        float32.  Gradients have the dtype of `logits`.  A logit of -inf with label 0
        contributes nothing, with a positive label the loss is inf; NaN or +inf make the
        sample's loss and gradient NaN.

    Raises:
        TypeError: if `logits` are not real floating point.
        ValueError: if shapes or axes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import stablemax_cross_entropy
        >>> labels = jnp.array([[0.9, 0.1]])
        >>> stablemax_cross_entropy(jnp.array([[3.0, 0.0]]), labels).round(4)
        Array([0.3618], dtype=float32)

    Reference:
        arXiv:2501.04697, StableMax cross-entropy.
    """
    logits, axes = check_logits(logits, axis)
    labels = jnp.asarray(labels)
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels of shape {labels.shape} for logits of shape {logits.shape}: soft "
            "labels give one weight per logit; for class numbers use "
            "stablemax_cross_entropy_with_integer_labels."
        )
    return _soft(axes, logits, labels, class_mask(where, logits, axes))


@functools.partial(jax.jit, static_argnums=0)
def _soft(
    axes: tuple[int, ...], logits: Array, labels: Array, where: Array | None
) -> Array:
    x, where = _rows(axes, logits, where)
    log_p = log_probabilities(_SYMLOG, x)
    labels = classes_last(labels, axes).astype(x.dtype)
    counts = (labels != 0) | (log_p != -jnp.inf)  # 0 log 0 = 0
    counts = counts if where is None else counts & where
    return jnp.sum(jnp.where(counts, labels, 0) * jnp.where(counts, -log_p, 0), -1)


def stablemax_cross_entropy_with_integer_labels(
    logits: Float[Array, "..."],
    labels: Int[Array, "..."],
    axis: Axis = -1,
    where: Any = None,
) -> Float[Array, "..."]:
    """Compute -log_stablemax(logits)[label], accurate however confident.

    Use it in place of softmax cross-entropy to train on past perfect accuracy without
    weight decay.  Loss and gradient come from the odds against the target, so nothing
    is rounded away even when the logits reach 1e8, and no float64 is needed.  Costs as
    much as `optax.losses.softmax_cross_entropy_with_integer_labels`.

    Args:
        logits: real floating point; class scores along `axis`.
        labels: integers, the shape of `logits` without `axis`; -1 is the last class,
            as in NumPy.  A label that names no class gives a loss of NaN and a gradient
            of 0, so that a later `jnp.where` can drop the sample.
        axis: axis of the classes; several are read as one flattened axis, None as all.
        where: booleans, classes to keep (shape of `logits`) or samples to keep (shape
            of `labels`).  A dropped class is as if it were not there; a sample whose
            target is dropped has loss 0 and gradient 0.

    Returns:
        One loss per sample, not reduced, in the dtype of `logits` but at least
        float32.  Gradients have the dtype of `logits`.  A logit of -inf is a class of
        probability 0; NaN or +inf make the sample's loss and gradient NaN.

    Raises:
        TypeError: if `logits` are not real floating point, or `labels` not integers.
        ValueError: if shapes or axes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import stablemax_cross_entropy_with_integer_labels
        >>> logits = jnp.array([[1e6, -1e6], [0.0, 0.0]])
        >>> loss = stablemax_cross_entropy_with_integer_labels(
        ...     logits, jnp.array([0, 1])
        ... )
        >>> [f"{float(x):.3g}" for x in loss]
        ['1e-12', '0.693']

    Reference:
        arXiv:2501.04697, StableMax cross-entropy.
    """
    return integer_label_cross_entropy(_SYMLOG, logits, labels, axis, where)
