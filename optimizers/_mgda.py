"""MGDA: the shortest vector in the convex hull of the task gradients.

    w = argmin ‖Jᵀw‖²  over  w ≥ 0, Σ w = 1        (G w)_t ≥ wᵀGw for every task t

Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization"
(Comptes Rendus Mathématique 350, 2012); Sener and Koltun, "Multi-Task Learning as
Multi-Objective Optimization" (NeurIPS 2018, arXiv:1810.04650).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from basinax.optimizers._quadratic_program import minimise_on_simplex
from basinax.optimizers._unit_gramian import (
    check_gramian,
    rounding_of,
    unit_gramian,
    weigh,
)


def mgda_weights(gramian: Float[Array, "T T"]) -> Float[Array, " T"]:
    """Weigh tasks so that their combined gradient is as short as possible.

    The combination lowers every loss at the same rate, or tasks that are not part of it
    faster; where it is zero the parameters are Pareto stationary.  Long gradients get
    small weights: with losses of different units normalise the gradients first.  Where
    several weights give the shortest vector, these lie at the centre of them.

    Some fifteen factorizations of a T x T matrix; closed form for two tasks.

    Args:
        gramian: inner products of the task gradients, (T, T).

    Returns:
        Weights ≥ 0 with sum one, dtype of `gramian`; NaN if an entry is not finite.

    Raises:
        ValueError: if `gramian` is not a square matrix.
        TypeError: if it is not real floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import mgda_weights
        >>> gradients = jnp.array([[4.0, 0.0], [0.0, 2.0]])
        >>> weights = mgda_weights(gradients @ gradients.T)
        >>> [round(float(w), 3) for w in weights]
        [0.2, 0.8]

    Reference:
        arXiv:1810.04650, equation 3.
    """
    return _mgda_weights(check_gramian(gramian))


@jax.jit
def _mgda_weights(gramian: Array) -> Array:
    return weigh(_shortest, gramian, rounding_of(gramian))


def _shortest(gramian: Array, rounding: float) -> Array:
    if len(gramian) == 2:
        (a, cross), (_, b) = unit_gramian(gramian, 0.0)[0]
        span = (a - cross) + (b - cross)
        first = jnp.where(span > 0, (b - cross) / jnp.where(span > 0, span, 1), 0.5)
        first = jnp.clip(first, 0, 1)
        return jnp.stack([first, 1 - first])
    unit, _ = unit_gramian(gramian, rounding)
    return minimise_on_simplex(unit, jnp.zeros_like(unit[0]))
