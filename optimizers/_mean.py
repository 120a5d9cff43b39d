"""Equal weights: the gradient of the mean loss, which every other weighting replaces.

w_t = 1/T
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from basinax.optimizers._unit_gramian import check_gramian, weigh


def mean_weights(gramian: Float[Array, "T T"]) -> Float[Array, " T"]:
    """Weigh all tasks alike.

    The baseline, and the right choice unless gradients are in conflict or differ in
    length by orders of magnitude.  Free.

    Args:
        gramian: inner products of the task gradients, (T, T); only its shape, dtype and
            finiteness matter.

    Returns:
        1/T for each task, dtype of `gramian`; NaN if an entry is not finite.

    Raises:
        ValueError: if `gramian` is not a square matrix.
        TypeError: if it is not real floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import mean_weights
        >>> [float(w) for w in mean_weights(jnp.eye(4))]
        [0.25, 0.25, 0.25, 0.25]

    Reference:
        Linear scalarization.
    """
    return weigh(
        lambda g: jnp.full((len(g),), 1 / len(g), g.dtype), check_gramian(gramian)
    )
