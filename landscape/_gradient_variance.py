"""Variance of gradients across sources, tasks, micro-batches or examples.

    tr S = Σ_i ‖g_i - ḡ‖² / (n - 1)

Reference: Balles, Romero and Hennig, *Coupling adaptive batch sizes with learning
rates*, UAI 2017, arXiv:1612.05086.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from basinax.landscape._gradient_deviations import GradientDeviations, as_deviations


class GradientVariance(NamedTuple):
    """Spread of n gradients about their mean.

    Attributes:
        total: tr S, in units of the squared gradient.
        relative: tr S / ‖ḡ‖²; infinite where only the mean vanishes, 0 if all do.
        mean_norm: ‖ḡ‖.
    """

    total: Float[Array, ""]
    relative: Float[Array, ""]
    mean_norm: Float[Array, ""]


def gradient_variance(
    task_grads: PyTree[Float[Array, "n ..."]] | GradientDeviations,
    *,
    unbiased: bool = True,
) -> GradientVariance:
    """Measure how much gradients differ, summed over all parameters.

    Unlike a cosine it has a size, which is what remains at a minimum of the mean loss:
    there (biased) it is the mean squared gradient norm of the sources, which bounds how
    far their own minima are, see `closeness_bound`.

    For the variance in each leaf use `jax.tree.map(gradient_variance, task_grads)`; it
    adds up to that of the tree. For products with the matrix S see
    `gradient_covariance`.

    Args:
        task_grads: tree of arrays (n, ...), n >= 2, such as `grads.shared` of
            `TaskGrads`, or `gradient_deviations(...)`. None leaves are skipped.
        unbiased: divide by n - 1, which estimates the variance of the distribution that
            the sources are a sample of; False divides by n, for sources that are all
            there are.

    Returns:
        The variance, in at least float32; NaN if an entry is not finite. `relative` is
        that of gradients of any size, while `total`, a square, may leave the range.

    Raises:
        ValueError: for a tree without arrays, leaves that are not real floating point,
            leading axes that differ, or fewer than two gradients.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import gradient_variance
        >>> result = gradient_variance(jnp.array([[2.0, 1.0], [2.0, -1.0]]))
        >>> float(result.total), float(result.relative), float(result.mean_norm)
        (2.0, 0.5, 2.0)
    """
    deviations = as_deviations(task_grads, 2, "gradient_variance")
    return _variance(deviations, unbiased=unbiased)


@functools.partial(jax.jit, static_argnames="unbiased")
def _variance(deviations: GradientDeviations, unbiased: bool) -> GradientVariance:
    (mean, lengths, _), unit = deviations.in_units()
    total = jnp.sum(lengths**2) / (len(lengths) - unbiased)
    square = mean**2
    infinite = jnp.where(total > 0, jnp.inf, total)  # which keeps a NaN
    relative = jnp.where(
        square == 0, infinite, total / jnp.where(square == 0, 1, square)
    )
    return GradientVariance(total * unit * unit, relative, deviations.mean_norm)
