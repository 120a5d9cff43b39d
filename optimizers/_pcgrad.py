"""PCGrad: each task gradient cleared of its conflicts with the others, summed.

    g ← g_i;  for j ≠ i in some order:  if ⟨g, g_j⟩ < 0:  g ← g - ⟨g, g_j⟩/‖g_j‖² g_j

Yu et al., "Gradient Surgery for Multi-Task Learning" (NeurIPS 2020, arXiv:2001.06782).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from basinax.optimizers._unit_gramian import check_gramian, unit_gramian, weigh


def pcgrad_weights(
    gramian: Float[Array, "T T"],
    order: Int[Array, "T _"] | None = None,
    *,
    key: Any = None,
    visit_self: bool = False,
) -> Float[Array, " T"]:
    """Weigh tasks by the sum of their gradients after pairwise projections.

    Each projection removes the conflict with one task and may bring back that with a
    task visited before, so that only for two tasks the result is free of conflict.
    Without any conflict it is the plain sum: note the factor T to the mean.

    T steps of O(T²) operations.

    Args:
        gramian: inner products of the task gradients, (T, T).
        order: row i lists the tasks that gradient i meets, in turn; (T, T) or
            (T, T - 1) integers.  i itself is passed over.
        key: in place of `order`, a key to draw an independent one per task.
        visit_self: whether a gradient, by then projected, also meets its own original
            where the order lists it, as in implementations that shuffle all tasks.

    Returns:
        Weights ≥ 0, dtype of `gramian`; NaN if an entry is not finite.

    Raises:
        ValueError: if `gramian` is not a square matrix, the order has another shape, or
            not exactly one of `order` and `key` is given.
        TypeError: if `gramian` is not real floating point or the order not integer.

    Example:
        >>> import jax
        >>> from basinax.optimizers import pcgrad_weights
        >>> gradients = jax.numpy.array([[1.0, 0.0], [-1.0, 1.0]])
        >>> weights = pcgrad_weights(gradients @ gradients.T, key=jax.random.key(0))
        >>> [round(float(x), 3) for x in weights @ gradients]
        [0.5, 1.5]

    Reference:
        arXiv:2001.06782, algorithm 1.
    """
    gramian = check_gramian(gramian)
    tasks = len(gramian)
    if (order is None) == (key is None):
        raise ValueError(
            "pcgrad_weights visits tasks in a random order: pass either key= or order=."
        )
    if order is None:
        draws = jax.random.uniform(key, (tasks, tasks))
        order = jnp.argsort(draws, axis=1)
    order = jnp.asarray(order)
    if order.shape not in {(tasks, tasks), (tasks, tasks - 1)}:
        raise ValueError(
            f"order must have one row per task, shape ({tasks}, {tasks}) or "
            f"({tasks}, {tasks - 1}), got {order.shape}."
        )
    if not jnp.issubdtype(order.dtype, jnp.integer) and order.size:
        raise TypeError(f"order must hold task numbers, got {order.dtype}.")
    return _pcgrad_weights(gramian, order.astype(jnp.int32), jnp.asarray(visit_self))


@jax.jit
def _pcgrad_weights(gramian: Array, order: Array, visit_self: Array) -> Array:
    return weigh(_project_in_turn, gramian, order, visit_self)


def _project_in_turn(gramian: Array, order: Array, visit_self: Array) -> Array:
    unit, _ = unit_gramian(gramian, 0.0)
    tasks = jnp.arange(len(unit))
    squares = jnp.diag(unit)

    def visit(coefficients: Array, met: Array) -> tuple[Array, None]:
        # Row i holds g = Σ_k coefficients[i, k] g_k, and met[i] is the task it meets.
        product = jnp.sum(coefficients * unit[met], 1)
        square = squares[met]
        conflict = (product < 0) & (square > 0) & ((met != tasks) | visit_self)
        share = jnp.where(conflict, -product / jnp.where(square > 0, square, 1), 0)
        return coefficients.at[tasks, met].add(share), None

    start = jnp.eye(len(unit), dtype=unit.dtype)
    coefficients, _ = jax.lax.scan(visit, start, order.T)
    return jnp.sum(coefficients, 0)
