"""Steps along directions: what they may be, and where they lead.

    w + Σ_i a_i d_i

A direction is a tree like the parameters, in which None stands for a leaf that stays
put: integers, keys of random streams, or whatever the caller wants to hold.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from basinax.landscape._vectors import wide_dtype, widen


def moves(leaf: Any) -> bool:
    """Tell whether a leaf of the parameters is real floating point."""
    if leaf is None:
        return False
    try:
        return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    except TypeError as error:
        raise ValueError(
            f"parameters must be arrays or numbers, but one leaf is {leaf!r}; split "
            "such leaves off, as equinox.partition does, and put them back in the loss."
        ) from error


def is_none(x: Any) -> bool:
    """Make None a leaf, for `jax.tree.map`."""
    return x is None


def movable(params: PyTree) -> PyTree:
    """Put None in the place of every leaf that is not real floating point."""
    return jax.tree.map(lambda w: w if moves(w) else None, params)


def shifted(
    params: PyTree, directions: tuple[PyTree, ...], amounts: Float[Array, "d"]
) -> PyTree:
    """Compute w + Σ a_i d_i in at least float32.

    The sum is not rounded to the dtype of half-precision parameters, of which a plane
    would show the rounding. Leaves that are None in all directions stay as they are.
    """

    def shift(w: Any, *steps: Any) -> Any:
        if all(step is None for step in steps):
            return w
        dtype = wide_dtype(w)
        total = jnp.asarray(w, dtype)
        for index, step in enumerate(steps):
            if step is not None:
                total = total + amounts[index].astype(dtype) * step.astype(dtype)
        return total

    return jax.tree.map(shift, params, *directions, is_leaf=is_none)


def _leaves(direction: PyTree, params: PyTree, name: str) -> list[tuple[str, Any, Any]]:
    """Pair the leaves of both trees, the first with their paths."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    try:
        steps = jax.tree.structure(params).flatten_up_to(direction)
    except ValueError as error:
        raise ValueError(
            f"{name} must have the structure of the parameters: got "
            f"{jax.tree.structure(direction)}, need {jax.tree.structure(params)}."
        ) from error
    return [
        (f"{name}{jax.tree_util.keystr(path)}", w, step)
        for (path, w), step in zip(paths, steps, strict=True)
    ]


@jax.jit
def _peaks(leaves: list[Array]) -> Float[Array, "L"]:
    return jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in widen(leaves)])


def _is_zero(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.number) and not np.any(np.asarray(x))


def check_direction(direction: PyTree, params: PyTree, name: str) -> PyTree:
    """Raise ValueError unless a direction fits the parameters and leads somewhere.

    Args:
        direction: tree like the parameters, with None for leaves that stay put.
        params: the parameters.
        name: what the message calls the direction.

    Returns:
        The direction as arrays, with None for all leaves that stay put.
    """
    found, kept = [], []
    for place, w, step in _leaves(direction, params, name):
        if step is None or (not moves(w) and _is_zero(step)):
            kept.append(None)
            continue
        if not moves(w):
            raise ValueError(
                f"{place} is not zero, but the parameter there is "
                f"{jnp.result_type(w)} and cannot move; put None in its place."
            )
        if not jax.tree_util.all_leaves([step]) or jnp.shape(step) != jnp.shape(w):
            raise ValueError(
                f"{place} must have the shape of the parameter, {jnp.shape(w)}; got "
                f"{jax.tree.map(jnp.shape, step)}."
            )
        if jnp.issubdtype(jnp.result_type(step), jnp.complexfloating):
            raise ValueError(f"{place} must be real, got {jnp.result_type(step)}.")
        found.append(place)
        kept.append(jnp.asarray(step))
    peaks = _peaks([x for x in kept if x is not None]) if found else ()
    peaks = np.asarray(peaks, np.float64)
    for place, peak in zip(found, peaks, strict=True):
        if not np.isfinite(peak):
            raise ValueError(f"{place} holds NaN or infinity.")
    if not peaks.any():
        raise ValueError(f"{name} is zero everywhere, so there is nowhere to go.")
    return jax.tree.structure(params).unflatten(kept)
