"""Arguments that all losses share: logits, the axes of their classes, a mask."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

Axis = int | tuple[int, ...] | None


def check_logits(logits: Any, axis: Any) -> tuple[Array, tuple[int, ...]]:
    """Turn logits into an array and axis into non-negative axes, or refuse them."""
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"logits must be real floating point, got {logits.dtype}; cast integers "
            "with .astype(float)."
        )
    ndim = logits.ndim
    given = range(ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    axes = tuple(a + ndim if a < 0 else a for a in given)
    if not axes or len(set(axes)) != len(axes) or not set(axes) <= set(range(ndim)):
        raise ValueError(
            f"axis={axis} does not name one or several different axes of logits of "
            f"shape {logits.shape}."
        )
    if not all(logits.shape[a] for a in axes):
        raise ValueError(
            f"logits of shape {logits.shape} hold no class along axis={axis}."
        )
    return logits, axes


def class_mask(where: Any, logits: Array, axes: tuple[int, ...]) -> Array | None:
    """Broadcast a mask over classes, or over whole samples, to the logits.

    Args:
        where: None, or booleans that broadcast to the logits, or to the logits without
            their class axes.
        logits: the logits.
        axes: their class axes.

    Returns:
        Booleans in the shape of the logits, or None.
    """
    if where is None:
        return None
    where = jnp.asarray(where).astype(bool)
    shape = where.shape
    if where.ndim != logits.ndim and where.ndim == logits.ndim - len(axes):
        where = jnp.expand_dims(where, axes)
    pairs = zip(where.shape, logits.shape, strict=False)
    if where.ndim != logits.ndim or any(a not in (1, b) for a, b in pairs):
        raise ValueError(
            f"where of shape {shape} fits neither logits of shape {logits.shape} nor "
            f"their batch axes (class axes: {axes})."
        )
    return jnp.broadcast_to(where, logits.shape)


def classes_last(x: Array, axes: tuple[int, ...]) -> Float[Array, "*batch classes"]:
    """Move the class axes to the end and merge them into one."""
    if axes == (x.ndim - 1,):
        return x
    batch = batch_shape(x.shape, axes)
    order = tuple(a for a in range(x.ndim) if a not in axes) + axes
    return x.transpose(order).reshape(*batch, math.prod(x.shape[a] for a in axes))


def classes_back(
    rows: Float[Array, "*batch classes"], shape: tuple[int, ...], axes: tuple[int, ...]
) -> Array:
    """Undo `classes_last` for an array that had this shape."""
    if axes == (len(shape) - 1,):
        return rows
    order = tuple(a for a in range(len(shape)) if a not in axes) + axes
    moved = rows.reshape(tuple(shape[a] for a in order))
    return moved.transpose(tuple(order.index(a) for a in range(len(shape))))


def batch_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape without its class axes: one entry per sample."""
    return tuple(size for a, size in enumerate(shape) if a not in axes)


def wide(x: Array) -> Array:
    """Cast to at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def drop_classes(
    x: Float[Array, "*batch classes"], keep: Array, counts: Array
) -> Float[Array, "*batch classes"]:
    """Give dropped classes no weight, and harmless logits to samples that do not count.

    Harmless, because a loss that is replaced by 0 has the gradient 0 times its own.
    """
    return jnp.where(counts[..., None], jnp.where(keep, x, -jnp.inf), 0)
