"""UPGrad: each task gradient projected onto the cone where nothing conflicts, summed.

    w = Σ_t argmin vᵀGv  over  v ≥ u_t e_t        (G w)_t ≥ 0 for every task t

u the preference, 1/T unless given.  Jᵀv is the projection of u_t g_t onto the dual cone
{x : ⟨x, g_i⟩ ≥ 0 for all i}, and a sum of elements of a cone lies in it.
Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization" (2024,
arXiv:2406.16232).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from basinax.optimizers._quadratic_program import minimise_nonnegative
from basinax.optimizers._unit_gramian import (
    check_gramian,
    cosine_gramian,
    rounding_of,
    weigh,
)


def upgrad_weights(
    gramian: Float[Array, "T T"], preference: Float[ArrayLike, " T"] | None = None
) -> Float[Array, " T"]:
    """Weigh tasks by the sum of their conflict-free projections.

    A step in this direction increases no loss to first order, and, unlike MGDA's, moves
    as far as the gradients are long.  Without conflict the weights are the preference.
    A good default where losses are comparable; T projections, each some fifteen
    factorizations of a T x T matrix, make it the most expensive weighting here.

    Args:
        gramian: inner products of the task gradients, (T, T).
        preference: weights u ≥ 0 of the tasks before projection, (T,); default 1/T.

    Returns:
        Weights ≥ u, dtype of `gramian`; NaN if an entry is not finite.

    Raises:
        ValueError: if `gramian` is not a square matrix, or the preference is not T
            numbers ≥ 0.
        TypeError: if `gramian` is not real floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import upgrad_weights
        >>> gradients = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
        >>> weights = upgrad_weights(gradients @ gradients.T)
        >>> [round(float(x), 3) for x in weights @ gradients]
        [0.25, 0.75]

    Reference:
        arXiv:2406.16232, sections 3 and 5.1.
    """
    gramian = check_gramian(gramian)
    return _upgrad_weights(gramian, _check_preference(preference, len(gramian)))


def _check_preference(preference: Any, tasks: int) -> Array:
    if preference is None:
        return jnp.full((tasks,), 1 / tasks)
    known = not isinstance(preference, Tracer)
    preference = jnp.asarray(preference)
    if preference.shape != (tasks,):
        raise ValueError(
            f"preference needs one number per task, {tasks}, got shape "
            f"{preference.shape}."
        )
    if known and not np.all(np.asarray(preference) >= 0):
        raise ValueError(f"preference must be >= 0, got {preference}.")
    return preference


@jax.jit
def _upgrad_weights(gramian: Array, preference: Array) -> Array:
    return weigh(_sum_of_projections, gramian, preference, rounding_of(gramian))


def _sum_of_projections(gramian: Array, preference: Array, rounding: float) -> Array:
    preference = preference.astype(gramian.dtype)
    cosines, norms = cosine_gramian(gramian, rounding)
    # With v = u_t e_t + u_t ‖g_t‖ D⁻¹ x the programs are free of scale and preference:
    # x ≥ 0 closest to minus the unit gradient of task t, in combinations of all.
    x = jax.vmap(minimise_nonnegative, (None, 0))(cosines, cosines)
    lengths = jnp.where(norms > 0, norms, jnp.inf)
    added = jnp.sum((preference * norms)[:, None] * x / lengths[None, :], 0)
    return preference + added
