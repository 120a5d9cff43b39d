"""Trees whose leaves carry a leading task axis: taken apart, checked, combined."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from basinax.optimizers._ascent import is_none, marks
from basinax.optimizers._layout import explicit_axes
from basinax.optimizers._task_gradients import TaskGrads


class Stacked(NamedTuple):
    """Updates taken apart into what is to be combined and what is not.

    Attributes:
        tasks: leaves (T, ...) to combine, None elsewhere.
        rest: the other leaves, None elsewhere.
    """

    tasks: PyTree
    rest: PyTree

    def merge(self, combined: PyTree) -> PyTree:
        """Put combined leaves in the place of the stacked ones."""
        return jax.tree.map(
            lambda leaf, other: other if leaf is None else leaf,
            combined,
            self.rest,
            is_leaf=is_none,
        )


def take_apart(updates: PyTree, mask: Any, params: PyTree) -> Stacked:
    """Find the leaves to combine.

    Args:
        updates: stacked tree, or `TaskGrads`, whose private part is not combined.
        mask: None, or a tree (prefix) of booleans or callable returning one; leaves
            marked False are not combined.
        params: parameters, for a callable mask; the updates stand in for None.
    """
    if isinstance(updates, TaskGrads):
        parts = Stacked(*updates)
    else:
        parts = Stacked(updates, jax.tree.map(lambda _: None, updates))
    if mask is None:
        return parts
    whole = parts.merge(parts.tasks)
    chosen = marks(mask, whole if params is None else params, "mask")
    tasks = jax.tree.map(
        lambda leaf, keep: leaf if keep else None, parts.tasks, chosen, is_leaf=is_none
    )
    rest = jax.tree.map(
        lambda leaf, task: leaf if task is None else None,
        whole,
        tasks,
        is_leaf=is_none,
    )
    return Stacked(tasks, rest)


def count_tasks(stacked: PyTree, params: PyTree, num_tasks: int | None) -> int:
    """Return T, the length of the leading axis of every leaf.

    Args:
        stacked: tree with at least one leaf.
        params: parameters, or None; compared where their structure fits.
        num_tasks: what T has to be, or None.

    Raises:
        ValueError: the leaves do not agree on T, or have no task axis.
    """
    leaves = jax.tree_util.tree_leaves_with_path(stacked)
    weights = _counterparts(stacked, params)
    need = "the gradients of all tasks stacked on a leading axis"
    for index, (path, leaf) in enumerate(leaves):
        name = f"updates{jax.tree_util.keystr(path)}"
        shape = jnp.shape(leaf)
        if weights is not None and shape[1:] != weights[index]:
            raise ValueError(
                f"{name} has shape {shape} for a parameter of shape {weights[index]}; "
                f"need {need} as task_gradients returns them, {('T', *weights[index])}."
            )
        if not shape or not shape[0]:
            raise ValueError(f"{name} has shape {shape}; need {need}, (T, ...).")
    found = {jnp.shape(leaf)[0]: path for path, leaf in leaves}
    if len(found) > 1:
        counts = ", ".join(
            f"{count} in updates{jax.tree_util.keystr(path)}"
            for count, path in found.items()
        )
        raise ValueError(f"leading axes differ: {counts}; need {need}.")
    (count,) = found
    if num_tasks not in (None, count):
        raise ValueError(f"num_tasks={num_tasks}, but the updates stack {count} tasks.")
    return count


def check_task_losses(losses: Any, num_tasks: int) -> Array | None:
    """Refuse losses that are not one per task."""
    if losses is None:
        return None
    if jnp.shape(losses) != (num_tasks,):
        raise ValueError(
            f"losses have shape {jnp.shape(losses)}; need one for each of the "
            f"{num_tasks} tasks, ({num_tasks},)."
        )
    return jnp.asarray(losses)


def combine(weights: Float[Array, " T"], stacked: PyTree) -> PyTree:
    """Compute Jᵀw leaf by leaf, in at least float32 and back to the leaf's dtype."""

    def weighted_sum(x: Array) -> Array:
        wide = jnp.promote_types(x.dtype, weights.dtype)
        layout = jax.typeof(x).sharding
        place = NamedSharding(layout.mesh, PartitionSpec(*layout.spec[1:]))
        combined = jax.lax.dot_general(
            weights.astype(wide),
            x.astype(wide),
            (((0,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=place if explicit_axes([x]) else None,
        )
        return combined.astype(x.dtype)

    return jax.tree.map(weighted_sum, stacked)


def _counterparts(tree: PyTree, params: PyTree) -> list[tuple[int, ...]] | None:
    """Return the shapes of the parameters of a tree's leaves, if they are known."""
    if params is None:
        return None
    try:
        params = jax.tree.structure(tree, is_leaf=is_none).flatten_up_to(params)
    except ValueError:
        return None
    pairs = zip(jax.tree.leaves(tree, is_leaf=is_none), params, strict=True)
    return [jnp.shape(param) for leaf, param in pairs if leaf is not None]
