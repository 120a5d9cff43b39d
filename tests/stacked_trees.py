"""Gradients stacked on a task axis, and their Jacobian in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from basinax.optimizers._task_gramian import task_gramian

TASKS = 3
gram = jax.jit(task_gramian)


def tree(seed=0, dtype="float32"):
    """Draw stacked gradients of leaves with zero, one and two axes, and of none."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((TASKS, *shape)), dtype)  # noqa: E731
    return {"w": draw(4, 2), "b": draw(2), "s": draw(), "e": draw(0), "none": None}


def matrix(stacked):
    """Write the Jacobian of a stacked tree, in float64."""
    leaves = jax.tree.leaves(stacked)
    rows = [np.asarray(x, np.float64).reshape(len(x), -1) for x in leaves]
    return np.concatenate(rows, 1)
