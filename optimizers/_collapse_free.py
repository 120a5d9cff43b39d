"""Softmax cross-entropy that does not collapse in floating point.

The same function as `optax.losses.softmax_cross_entropy_with_integer_labels`, computed
from the odds against the target, so that confident samples keep their tiny losses and
gradients.  Prieto et al., "Grokking at the Edge of Numerical Stability" (ICLR 2025,
arXiv:2501.04697) show that training stalls when they are lost to rounding.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from basinax.optimizers._class_axes import Axis
from basinax.optimizers._target_vs_rest import Scores, integer_label_cross_entropy

_IDENTITY = Scores(
    ratio=lambda x, z: jnp.exp(x - z),
    difference=lambda x, z: x - z,
    tangent=lambda _, dx: dx,
)


def collapse_free_cross_entropy_with_integer_labels(
    logits: Float[Array, "..."],
    labels: Int[Array, "..."],
    axis: Axis = -1,
    where: Any = None,
) -> Float[Array, "..."]:
    """Compute softmax cross-entropy that stays positive when the target is far ahead.

    A replacement of `optax.losses.softmax_cross_entropy_with_integer_labels` at about
    the same cost.  In float32 the usual form returns exactly 0, and a gradient of
    exactly 0 on the target, once the target leads by about 17; this one follows the
    true values to a lead of 87, where e^-87 is the smallest normal number (708 in
    float64).  Use it to train past perfect accuracy without weight decay, or to tell
    collapse from other causes of a stall.

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
        >>> from basinax.optimizers import (
        ...     collapse_free_cross_entropy_with_integer_labels,
        ... )
        >>> logits = jnp.array([[30.0, 0.0, 0.0]])
        >>> loss = collapse_free_cross_entropy_with_integer_labels(
        ...     logits, jnp.array([0])
        ... )
        >>> [f"{float(x):.3e}" for x in loss]
        ['1.872e-13']

    Reference:
        arXiv:2501.04697, softmax collapse (Definition 3).
    """
    return integer_label_cross_entropy(_IDENTITY, logits, labels, axis, where)
