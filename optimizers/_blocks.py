"""Blocks: which entries of a tree share one inner product and one norm.

Scope "leaf" takes every array by itself, "global" the whole tree as one vector, and
"neuron" every slice of an array by itself: the weights that feed one output.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from basinax.optimizers._checks import check_choice

Scope = Literal["leaf", "global", "neuron"]
Axes = int | tuple[int, ...] | None
AxesOf = Axes | Callable[[Any, jax.Array], Axes]


def check_scope(scope: str, axes: Any) -> None:
    """Refuse an unknown scope, and axes where no slices are taken."""
    check_choice("scope", scope, ("leaf", "global", "neuron"))
    if axes is not None and scope != "neuron":
        raise ValueError(
            f'axes={axes!r} chooses the slices of scope="neuron"; with scope={scope!r} '
            "leave it out."
        )


def slice_axes(
    axes: AxesOf, path: Any, leaf: jax.Array
) -> tuple[tuple[int, ...], bool]:
    """Return the axes of one leaf that form a slice, and whether that is all of them.

    Args:
        axes: int, tuple, or a callable of (key path, leaf) that returns one of these;
            None there or here means all but the last axis of a leaf with at least two,
            the fan-in of Flax's (..., in, out), and the whole of any other.
        path: key path of the leaf, for the callable and for messages.
        leaf: array.

    Raises:
        ValueError: an axis is out of range or named twice.
    """
    if callable(axes):
        axes = axes(path, leaf)
    if axes is None:
        axes = tuple(range(leaf.ndim - 1)) if leaf.ndim > 1 else tuple(range(leaf.ndim))
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -leaf.ndim <= axis < leaf.ndim for axis in axes):
        raise ValueError(
            f"axes={axes} is out of range for {jax.tree_util.keystr(path) or 'a leaf'} "
            f"of shape {leaf.shape}; give axes per leaf with a callable (path, leaf)."
        )
    positive = tuple(sorted({axis % leaf.ndim for axis in axes}))
    if len(positive) != len(axes):
        raise ValueError(f"axes={axes} names an axis of shape {leaf.shape} twice.")
    return positive, len(positive) == leaf.ndim


def match(updates: Any, params: Any, what: str) -> tuple[list[Any], list[Any], Any]:
    """Flatten updates and parameters side by side; None updates stay.

    Args:
        updates: tree of arrays and None.
        params: tree of the same structure and shapes.
        what: name of the transformation, for messages.

    Returns:
        [(path, update)], [parameter] and the structure that `unflatten` needs.

    Raises:
        ValueError: parameters are missing or do not fit.
    """
    if params is None:
        raise ValueError(
            f"{what} needs the parameters: call tx.update(grads, state, params)."
        )
    absent = lambda x: x is None  # noqa: E731
    flat, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=absent)
    try:
        weights = treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"{what} got updates and params of different structure: "
            f"{jax.tree.structure(updates)} and {jax.tree.structure(params)}."
        ) from error
    for (path, update), weight in zip(flat, weights, strict=True):
        if update is not None and jnp.shape(update) != jnp.shape(weight):
            raise ValueError(
                f"{what} got an update of shape {jnp.shape(update)} for a parameter "
                f"of shape {jnp.shape(weight)} at "
                f"{jax.tree_util.keystr(path) or 'the root'}."
            )
    return flat, weights, treedef
