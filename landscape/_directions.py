"""Random directions in parameter space, in units in which networks can be compared.

A step of length 0.1 is long for small weights and short for large ones, and where a
normalisation layer follows, the size of weights means nothing at all. So a direction d
is scaled as its weights w are, filter by filter or tensor by tensor:

    d_f <- d_f ‖w_f‖ / ‖d_f‖        f: the weights of one output channel, or one tensor

with zeros for tensors of one axis: biases, and scales and statistics of normalisation.

Reference: Li, Xu, Taylor, Studer, Goldstein, *Visualizing the loss landscape of neural
nets* (NeurIPS 2018, arXiv:1712.09913).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from basinax.landscape._draws import normal_like
from basinax.landscape._moves import check_direction, is_none, moves
from basinax.landscape._vectors import (
    check_concrete,
    is_function,
    norm,
    wide_dtype,
    widen,
)

Normalize = Literal["filter", "layer"] | None
Mask = PyTree | Callable[[Any, Any], bool] | None

# Added to ‖d_f‖ by Li et al., so that an empty filter of d stays empty.
_TINY = 1e-10


def _length(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Compute norms over some axes, which remain with length one."""
    peak = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0)
    unit = jnp.where(peak > 0, peak, 1)
    return unit * jnp.sqrt(jnp.sum((x / unit) ** 2, axes, keepdims=True))


@functools.partial(jax.jit, static_argnames=("normalize", "filter_axis"))
def _normalized(
    direction: PyTree, weights: PyTree, normalize: Normalize, filter_axis: int
) -> PyTree:
    direction, weights = widen(direction), widen(weights)
    if normalize is None:
        length = norm(direction)
        length = jnp.where(length > 0, length, 1)
        return jax.tree.map(lambda d: d / length.astype(d.dtype), direction)
    peaks = [jnp.max(jnp.abs(d), initial=0) for d in jax.tree.leaves(direction)]
    peak = functools.reduce(jnp.maximum, peaks)
    # Brings the entries to the order of one, next to which the constant is nothing.
    unit = jnp.where((peak > 0) & (peak < 1), peak, 1)

    def scale(d: Array, w: Array) -> Array:
        d = d / unit.astype(d.dtype)
        axes = tuple(range(d.ndim))
        if normalize == "filter":
            axes = tuple(axis for axis in axes if axis != filter_axis % d.ndim)
        return d * (_length(w, axes) / (_length(d, axes) + _TINY))

    return jax.tree.map(scale, direction, weights)


def _spread(mask: Mask, params: PyTree) -> PyTree:
    """Give every leaf of the parameters its boolean."""
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    if is_function(mask):
        return jax.tree.map_with_path(lambda path, w: bool(mask(path, w)), params)
    for leaf in jax.tree.leaves(mask):
        if not isinstance(leaf, bool | np.bool_):
            raise ValueError(f"a mask holds booleans, but found {leaf!r}.")
    try:
        return jax.tree.map(
            lambda keep, part: jax.tree.map(lambda _: bool(keep), part), mask, params
        )
    except ValueError as error:
        raise ValueError(
            "mask must be a tree (prefix) like the parameters, or a function of (path, "
            f"leaf): got {jax.tree.structure(mask)} for {jax.tree.structure(params)}."
        ) from error


def _active(
    params: PyTree, normalize: Normalize, filter_axis: int, mask: Mask
) -> PyTree:
    """Check the options; return the parameters that may move, None for the others."""
    if normalize is not None and normalize not in ("filter", "layer"):
        raise ValueError(
            f"normalize={normalize!r} is unknown; use 'filter', 'layer' or None."
        )
    least = 0 if normalize is None else 2
    active = jax.tree.map(
        lambda keep, w: w if keep and moves(w) and jnp.ndim(w) >= least else None,
        _spread(mask, params),
        params,
    )
    if not any(map(np.size, jax.tree.leaves(active))):
        raise ValueError(
            "nothing is left to move: a direction needs real floating-point parameters "
            "that the mask does not exclude, and for normalize='filter' or 'layer' "
            "some of two or more axes, as the others are zeroed; got normalize="
            f"{normalize!r} and shapes {jax.tree.map(jnp.shape, params)}."
        )
    for path, w in jax.tree_util.tree_leaves_with_path(active):
        if normalize == "filter" and not -w.ndim <= filter_axis < w.ndim:
            raise ValueError(
                f"filter_axis={filter_axis} is out of range for "
                f"params{jax.tree_util.keystr(path)}, which has {w.ndim} axes."
            )
    return active


def _finish(
    raw: PyTree, params: PyTree, normalize: Normalize, filter_axis: int
) -> PyTree:
    """Normalise, and put zeros where a leaf could have moved but does not."""
    weights = jax.tree.map(
        lambda d, w: None if d is None else w, raw, params, is_leaf=is_none
    )
    made = _normalized(raw, weights, normalize, filter_axis)
    return jax.tree.map(
        lambda w, d: jnp.zeros_like(w, wide_dtype(w)) if d is None and moves(w) else d,
        params,
        made,
        is_leaf=is_none,
    )


def normalize_direction(
    direction: PyTree,
    params: PyTree,
    normalize: Normalize = "filter",
    *,
    filter_axis: int = -1,
    mask: Mask = None,
) -> PyTree:
    """Scale a direction as the parameters are scaled.

    See `random_directions`, which draws directions and does this to them, for what the
    choices mean. Used on its own it makes steps along a gradient, or from one network
    to another, comparable to random ones.

    Args:
        direction: tree like the parameters, with None for leaves that stay put.
        params: tree of parameters w.
        normalize: "filter", "layer" or None.
        filter_axis: axis that counts filters.
        mask: what may move, as in `random_directions`.

    Returns:
        A tree like the parameters in at least float32, with None for leaves that are
        not floating point. A filter or a tensor in which the direction or the
        parameters are zero becomes zero.

    Raises:
        ValueError: for a direction that does not fit the parameters, is zero or not
            finite, and for what `random_directions` refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import normalize_direction
        >>> kernel = jnp.array([[3.0, 0.0], [4.0, 0.0]])  # a column is a filter
        >>> direction = jnp.array([[2.0, 1.0], [0.0, 1.0]])
        >>> normalize_direction(direction, kernel).tolist()
        [[5.0, 0.0], [0.0, 0.0]]

    Reference:
        arXiv:1712.09913, section 4.
    """
    active = _active(params, normalize, filter_axis, mask)
    direction = check_direction(direction, params, "direction")
    raw = jax.tree.map(
        lambda w, d: None if w is None else d, active, direction, is_leaf=is_none
    )
    check_direction(raw, params, "what normalize and mask leave of the direction")
    return _finish(raw, params, normalize, filter_axis)


def random_directions(
    params: PyTree,
    key: PRNGKeyArray,
    normalize: Normalize = "filter",
    *,
    num: int = 2,
    filter_axis: int = -1,
    mask: Mask = None,
) -> tuple[PyTree, ...]:
    """Draw random directions, by default scaled filter by filter.

    They are the axes of the usual pictures of loss surfaces, to be handed to `line` and
    `plane`. With "filter" or "layer" a coordinate of 1 is a step as long as the weights
    themselves, in every filter or tensor. Networks can then be compared whose weights
    differ in size, if that size does not matter: multiply a layer that feeds a
    normalisation by ten, and its surface stays the same. None gives unit vectors, along
    which the second difference is a curvature in the units of `eigenpairs`.

    What such a picture can say is limited. Nearly all directions are flat: on unit
    vectors the mean curvature is tr(H) / P, in trained networks hundreds of times below
    the largest eigenvalue, so that valley walls stay out of sight. With batch
    normalisation the scale of weights, and with it that of the picture, is an accident
    of training. `eigen_directions` shows the steepest walls in either case.

    A filter is what belongs to one index of `filter_axis`. That is the last axis of
    Flax kernels, (in, out) or (height, width, in, out), and the first of torch's
    (`filter_axis=0`). In an embedding table (tokens, features) the last axis makes a
    feature a filter.

    Args:
        params: tree of parameters w. Leaves that are not real floating point stay put.
        key: random key.
        normalize: what to scale by: "filter", "layer" for whole tensors, or None for
            directions of unit length over all leaves. "filter" and "layer" zero
            tensors with less than two axes; None moves those too, so mask statistics
            of normalisation layers.
        num: number of directions; they are independent, not orthogonal.
        filter_axis: axis that counts filters.
        mask: what may move: a tree (prefix) like the parameters of booleans, or a
            function of (path, leaf) that returns one. The rest is zeroed.

    Returns:
        A tuple of `num` trees like the parameters in at least float32, with None for
        leaves that are not floating point. Filters or tensors of zeros stay zero.

    Raises:
        ValueError: for an unknown `normalize`, a `num` below one, a filter axis that
            a leaf does not have, a mask that does not fit, parameters of which nothing
            can move, and traced ones.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import random_directions
        >>> kernel = jnp.array([[3.0, 0.6], [4.0, 0.8]])
        >>> params = {"kernel": kernel, "bias": jnp.ones(2)}
        >>> first, second = random_directions(params, jax.random.key(0))
        >>> jnp.linalg.norm(first["kernel"], axis=0).round(3).tolist()
        [5.0, 1.0]
        >>> first["bias"].tolist()
        [0.0, 0.0]

    Reference:
        arXiv:1712.09913, section 4.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}.")
    check_concrete(params, "random_directions")
    active = _active(params, normalize, filter_axis, mask)
    return tuple(
        _finish(
            normal_like(jax.random.fold_in(key, index), active),
            params,
            normalize,
            filter_axis,
        )
        for index in range(num)
    )
