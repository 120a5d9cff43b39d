"""Softmax collapse: how often the loss has rounded to zero.

With m = max_j z_j, next to the largest term of the softmax's normaliser

    Σ_j e^{z_j - m} = 1 + Σ_{j ≠ argmax} e^{z_j - m}

every other term is absorbed by rounding once their sum is at most u, half the spacing
of numbers above 1 (2⁻²⁴ in float32): a lead of ln((C-1)/u) over C-1 equal logits, 21.3
for 113 classes. The loss and the gradient on the correct class are then exactly 0, and
training can stop before the model generalises. Definition 3 of Prieto, Barsbey,
Mediano and Birdal, "Grokking at the Edge of Numerical Stability" (ICLR 2025,
arXiv:2501.04697).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

_DTYPES = ("bfloat16", "float16", "float32", "float64")


class SoftmaxCollapse(NamedTuple):
    """Fractions of samples (of entries for `underflow`), float32 scalars.

    The last five repeat the arithmetic of an ordinary implementation in `dtype`, one
    rounding per operation. They are None where that arithmetic does not exist, for
    float64 while 64-bit types are disabled; those that need labels are None without.

    Attributes:
        absorbed: Σ_{j ≠ argmax} e^{z_j - m} <= u. It is computed in at least float32
            and does not depend on the order of summation.
        absorbed_sum: Σ_j e^{z_j - m} == 1 as summed in `dtype` (half precision
            accumulates in float32 and rounds once). For leads between ln(1/u) and
            ln((C-1)/u) it depends on the order of summation, hence on the device.
        zero_loss: the cross-entropy log Σ_j e^{z_j - m} - (z_y - m) is exactly 0.
        zero_target_grad: the gradient p_y - 1 on the correct class is exactly 0.
        zero_grad: all of p - onehot(y) is exactly 0, a much later event.
        underflow: fraction of entries with e^{z_j - m} == 0.
    """

    absorbed: Float[Array, ""]
    absorbed_sum: Float[Array, ""] | None
    zero_loss: Float[Array, ""] | None
    zero_target_grad: Float[Array, ""] | None
    zero_grad: Float[Array, ""] | None
    underflow: Float[Array, ""] | None


def softmax_collapse(
    logits: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    dtype: Any = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    phi: Callable[[Array], Array] | None = None,
) -> SoftmaxCollapse:
    """Measure how many samples softmax cross-entropy no longer learns from.

    Use it when the training accuracy is 100 % and the test accuracy stands still: a
    fraction near one says that rounding, not the data, has ended training. Ask about a
    wider `dtype` to see whether that would help.

    `absorbed` and `absorbed_sum` look at the largest logit whatever the label says, so
    a confidently wrong sample counts there; it does not count in the fields that look
    at labels. A sample whose logits hold a NaN, or overflow in `dtype`, counts as not
    collapsed. With a single class every sample is collapsed.

    Args:
        logits: floating-point scores with the classes on `axis`; every other axis
            counts samples.
        labels: integer classes, the shape of `logits` without `axis`. A label outside
            0..C-1 counts as not collapsed; take such samples out by `where`.
        dtype: floating-point type to ask about, to which the logits are rounded first;
            bfloat16, float16, float32 or float64. Default that of the logits.
        axis: axis of the classes.
        where: booleans that broadcast to the shape of `logits`, False for classes that
            do not exist. A sample without any class left is not counted.
        phi: elementwise map applied to the rounded logits, for losses of the form
            softmax ∘ φ: symlog, sign(x) log(1 + |x|), asks the question of StableMax.

    Returns:
        The fractions; 0 if there are no samples.

    Raises:
        TypeError: if logits are not floating point, labels not integers, or `dtype` is
            none of the four.
        ValueError: if the shape of `labels` does not fit.

    Example:
        A lead of 17.5 among three classes: each wrong class alone would be absorbed,
        their sum 2 e⁻¹⁷·⁵ = 5.0e-8 < 2⁻²⁴ as well.

        >>> import jax.numpy as jnp
        >>> from basinax.landscape import softmax_collapse
        >>> logits = jnp.array([[17.5, 0.0, 0.0], [1.0, 0.0, 0.0]])
        >>> result = softmax_collapse(logits, jnp.array([0, 0]))
        >>> float(result.absorbed), float(result.zero_loss), float(result.zero_grad)
        (0.5, 0.5, 0.0)
        >>> float(softmax_collapse(logits, dtype="float64").absorbed)
        0.0

    Reference:
        arXiv:2501.04697, Definition 3, with round-to-nearest's threshold u.
    """
    z, dtype, exists = _check(logits, dtype, axis, where)
    y = None if labels is None else _check_labels(labels, z.shape[:-1])
    return _measure(z, y, exists, dtype, phi)


@functools.partial(jax.jit, static_argnames=("dtype", "phi"))
def _measure(
    z: Float[Array, "*samples C"],
    y: Int[Array, "*samples"] | None,
    exists: Bool[Array, "*samples C"],
    dtype: np.dtype,
    phi: Callable[[Array], Array] | None,
) -> SoftmaxCollapse:
    available = jax.dtypes.canonicalize_dtype(dtype) == dtype
    # Widening changes no value, so `absorbed` needs no float64 to ask about it.
    held = dtype if available else z.dtype

    def rounded(x: Array) -> Array:
        # XLA may keep more digits than a cast leaves; the barrier forbids it.
        return jax.lax.optimization_barrier(x.astype(held))

    z = rounded(z) if phi is None else rounded(phi(rounded(z)))
    z = jnp.where(exists, z, -jnp.inf)
    largest = jnp.max(z, -1, keepdims=True, initial=-jnp.inf)
    counted = jnp.any(exists, -1)

    wide = jnp.promote_types(held, jnp.float32)
    terms = jnp.exp(z.astype(wide) - largest.astype(wide))
    classes = jnp.arange(z.shape[-1]).reshape((1,) * (z.ndim - 1) + (-1,))
    argmax = jnp.argmax(z, -1, keepdims=True) if z.shape[-1] else largest
    others = jnp.sum(jnp.where(classes == argmax, 0, terms), -1)
    unit_roundoff = float(jnp.finfo(dtype).eps) / 2
    overflows = ~jnp.isfinite(jnp.squeeze(largest, -1))
    absorbed = _fraction((others <= unit_roundoff) & ~overflows, counted)
    if not available:
        return SoftmaxCollapse(absorbed, None, None, None, None, None)

    shifted = rounded(z - largest)
    terms = rounded(jnp.exp(shifted))
    total = rounded(jnp.sum(terms, -1))
    absorbed_sum = _fraction(total == 1, counted)
    underflow = _fraction(terms == 0, exists)
    if y is None:
        return SoftmaxCollapse(absorbed, absorbed_sum, None, None, None, underflow)

    target = classes == jnp.expand_dims(y, -1)
    # Where no class is the target, -inf makes the loss infinite and p_y zero.
    pick = lambda x: jnp.max(x, -1, initial=-jnp.inf, where=target)  # noqa: E731
    loss = rounded(rounded(jnp.log(total)) - pick(shifted))
    p = rounded(terms / total[..., None])
    gradient = rounded(p - target.astype(held))
    return SoftmaxCollapse(
        absorbed,
        absorbed_sum,
        zero_loss=_fraction(loss == 0, counted),
        zero_target_grad=_fraction(rounded(pick(p) - 1) == 0, counted),
        zero_grad=_fraction(jnp.all((gradient == 0) | ~exists, -1), counted),
        underflow=underflow,
    )


def _fraction(hit: Bool[Array, "..."], counted: Bool[Array, "..."]) -> Float[Array, ""]:
    number = jnp.sum(counted, dtype=jnp.float32)
    return jnp.sum(hit & counted, dtype=jnp.float32) / jnp.maximum(number, 1)


def _check(
    logits: ArrayLike, dtype: Any, axis: int, where: ArrayLike | None
) -> tuple[Float[Array, "..."], np.dtype, Bool[Array, "..."]]:
    """Return logits with classes last, the dtype in question and the class mask."""
    z = jnp.asarray(logits)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise TypeError(f"logits must be real floating point, got {z.dtype}.")
    dtype = jnp.dtype(z.dtype if dtype is None else dtype)
    if dtype.name not in _DTYPES:
        raise TypeError(f"dtype={dtype} is not one of {', '.join(_DTYPES)}.")
    if where is None:
        exists = jnp.ones_like(z, bool)
    else:
        exists = jnp.broadcast_to(jnp.asarray(where, bool), z.shape)
    return jnp.moveaxis(z, axis, -1), dtype, jnp.moveaxis(exists, axis, -1)


def _check_labels(labels: ArrayLike, shape: tuple[int, ...]) -> Array:
    y = jnp.asarray(labels)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integer classes, got {y.dtype}; for one-hot rows pass "
            "labels.argmax(axis)."
        )
    if y.shape != shape:
        raise ValueError(
            f"labels have shape {y.shape}, but the logits without their class axis "
            f"have shape {shape}."
        )
    return y
