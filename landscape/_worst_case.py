"""Worst-case sharpness: the largest rise of the loss within a ball.

    max_{|u|_p <= rho} L(w + T u) - L(w)

by projected gradient ascent in u, where the ball is round whatever T is and the
projection is exact. Steps are of fixed length along the steepest direction; with the
projection P and momentum a = 3/4,

    z = P(u + step · steepest(T ∇L)),   u⁺ = P(u + a (z - u) + (1 - a) (u - u⁻)),

starting at u = 0 with step 2 rho, so that the first iterate is the point of SAM. At
checkpoints that come ever closer the step is halved, and the search returns to the best
point, if too few steps were upwards.

References: Croce and Hein, *Reliable evaluation of adversarial robustness with an
ensemble of diverse parameter-free attacks* (ICML 2020, arXiv:2003.01690), in parameter
space as in Andriushchenko et al. (arXiv:2302.07011).
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PyTree

from basinax.landscape import _vectors
from basinax.landscape._draws import signs_like
from basinax.landscape._sandwich import as_partial
from basinax.landscape._sharpness import (
    Adaptive,
    Norm,
    check_ball,
    multiply,
    scale_of,
    shift,
    steepest,
    value_and_grad,
)
from basinax.landscape._vectors import check_vector, inner

# Of Croce and Hein: the share of upward steps that is enough, and the checkpoints.
_ENOUGH_RISES = 0.75
_FIRST_INTERVAL, _SHORTENING, _LAST_INTERVAL = 0.22, 0.03, 0.06
_MOMENTUM = 0.75


def worst_case_sharpness(
    loss_fn: Callable[..., Float[Array, ""]],
    params: PyTree,
    *args: PyTree,
    rho: Float[Array, ""] | float,
    steps: int = 20,
    adaptive: Adaptive = False,
    norm: Norm = "l2",
) -> Float[Array, ""]:
    """Measure the largest rise of the loss within a ball, by projected ascent.

    Never below 0 nor below `sam_sharpness`; in the l2 ball near rho |T g| + rho² λ / 2
    with λ the largest eigenvalue of T H T while rho is small. Like every search it
    returns a lower bound. Where the gradient is exactly zero it starts along a fixed
    pattern of signs, for at a minimum only the second term is left.

    The search runs in Python over compiled steps; a step costs a gradient. With an
    adaptive scale a weight that is zero stays zero.

    Args:
        loss_fn: scalar loss, called as `loss_fn(params, *args)`; as with `hessian`,
            compiled once per function object.
        params: tree of real floating-point arrays w.
        *args: further arguments, such as a batch.
        rho: radius, in units of the parameters, or relative to them if adaptive.
        steps: number of ascent steps.
        adaptive: as in `sam_sharpness`.
        norm: "l2" or "linf".

    Returns:
        The rise, in at least float32; NaN if the loss or a gradient was NaN anywhere on
        the way.

    Raises:
        ValueError: as `sam_sharpness`, and for fewer than one step.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import worst_case_sharpness
        >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([4.0, 1.0]) * w**2)
        >>> rise = worst_case_sharpness(loss, jnp.zeros(2), rho=0.5)
        >>> round(float(rise), 3)  # rho² λ / 2
        0.5

    Reference:
        arXiv:2302.07011, arXiv:2003.01690.
    """
    name = check_ball(rho, adaptive, norm)
    check_count("steps", steps)
    check_vector(params, "params")
    scale = _scale(params, adaptive=name)
    return ascend(as_partial(loss_fn), params, args, scale, rho, steps, norm)


_scale = jax.jit(scale_of, static_argnames="adaptive")


# --- the search ----------------------------------------------------------------------


class _Search(NamedTuple):
    """State of the ascent; losses are rises above L(w).

    Attributes:
        point: iterate u, in the ball of radius 1.
        previous: the iterate before.
        gradient: T ∇L at `point`.
        value: rise at `point`.
        best: highest point so far.
        best_gradient: T ∇L there.
        best_value: rise there.
        step: step length in units of the radius.
        rises: upward steps since the last checkpoint.
        best_then: best value at the last checkpoint.
        halved: whether the step was halved there.
    """

    point: PyTree
    previous: PyTree
    gradient: PyTree
    value: Float[Array, ""]
    best: PyTree
    best_gradient: PyTree
    best_value: Float[Array, ""]
    step: Float[Array, ""]
    rises: Int[Array, ""]
    best_then: Float[Array, ""]
    halved: Bool[Array, ""]


def _intervals(steps: int) -> list[int]:
    """Return for each step the length of the interval it closes, or 0."""
    ends, shares = [0], [0.0, _FIRST_INTERVAL]
    while (end := math.ceil(round(shares[-1] * steps, 9))) <= steps:
        ends.append(end)
        width = max(shares[-1] - shares[-2] - _SHORTENING, _LAST_INTERVAL)
        shares.append(shares[-1] + width)
    intervals = [0] * steps
    for begin, end in itertools.pairwise(ends):
        if end > begin:
            intervals[end - 1] = end - begin
    return intervals


def ascend(
    loss: Partial,
    params: PyTree,
    args: tuple,
    scale: PyTree,
    rho: Any,
    steps: int,
    norm: str,
) -> Float[Array, ""]:
    """Return the largest rise found within |u| <= rho, d = T u.

    Args:
        loss: scalar loss, called as `loss(params, *args)`.
        params: tree of weights.
        args: further arguments of the loss.
        scale: tree T that broadcasts to the parameters.
        rho: radius.
        steps: number of ascent steps.
        norm: "l2" or "linf".
    """
    base, gradient = value_and_grad(loss, params, args)
    search = _start(scale, base, gradient)
    for index, interval in enumerate(_intervals(steps)):
        momentum = 1.0 if index == 0 else _MOMENTUM
        point, moved = _advance(params, scale, search, rho, momentum, norm=norm)
        value, gradient = value_and_grad(loss, moved, args)
        search = _accept(search, point, value - base, scale, gradient, interval)
    return search.best_value


@jax.jit
def _start(scale: PyTree, base: Float[Array, ""], gradient: PyTree) -> _Search:
    gradient = multiply(scale, gradient)
    zero = jax.tree.map(jnp.zeros_like, gradient)
    # Ascent cannot leave a critical point by itself.
    flat = _vectors.norm(gradient) == 0
    none = base - base  # NaN if the loss is
    gradient = _where(flat, signs_like(gradient), gradient)
    return _Search(
        point=zero,
        previous=zero,
        gradient=gradient,
        value=none,
        best=zero,
        best_gradient=gradient,
        best_value=none,
        step=jnp.full_like(base, 2),
        rises=jnp.zeros((), jnp.int32),
        best_then=none,
        halved=jnp.zeros((), bool),
    )


@functools.partial(jax.jit, static_argnames="norm")
def _advance(
    params: PyTree,
    scale: PyTree,
    search: _Search,
    rho: Float[Array, ""],
    momentum: Float[Array, ""],
    norm: str,
) -> tuple[PyTree, PyTree]:
    """Return the next iterate u⁺ and w + T u⁺."""
    point, a = search.point, jnp.asarray(momentum)
    ahead = _project(_add(point, search.step, steepest(search.gradient, norm)), norm)
    drift = _subtract(point, search.previous)
    point = _add(_add(point, a, _subtract(ahead, point)), 1 - a, drift)
    point = _project(point, norm)
    return point, shift(params, scale, point, rho)


@jax.jit
def _accept(
    search: _Search,
    point: PyTree,
    value: Float[Array, ""],
    scale: PyTree,
    gradient: PyTree,
    interval: Int[Array, ""],
) -> _Search:
    """Note what was found at the new iterate; at a checkpoint decide about the step."""
    gradient = multiply(scale, gradient)
    higher = value > search.best_value
    best = _where(higher, point, search.best)
    best_gradient = _where(higher, gradient, search.best_gradient)
    best_value = jnp.maximum(value, search.best_value)  # which keeps a NaN
    rises = search.rises + (value > search.value)

    checkpoint = interval > 0
    idle = ~search.halved & (best_value <= search.best_then)
    halve = checkpoint & ((rises < _ENOUGH_RISES * interval) | idle)
    return _Search(
        point=_where(halve, best, point),
        # The momentum does not survive a jump back.
        previous=_where(halve, best, search.point),
        gradient=_where(halve, best_gradient, gradient),
        value=jnp.where(halve, best_value, value),
        best=best,
        best_gradient=best_gradient,
        best_value=best_value,
        step=jnp.where(halve, search.step / 2, search.step),
        rises=jnp.where(checkpoint, 0, rises),
        best_then=jnp.where(checkpoint, best_value, search.best_then),
        halved=jnp.where(checkpoint, halve, search.halved),
    )


def _project(u: PyTree, norm: str) -> PyTree:
    """Return the closest point of the unit ball."""
    if norm == "linf":
        return jax.tree.map(lambda x: jnp.clip(x, -1, 1), u)
    length = jnp.maximum(jnp.sqrt(inner(u, u)), 1)  # of iterates of order one
    return jax.tree.map(lambda x: x / length.astype(x.dtype), u)


def _add(x: PyTree, factor: Array, y: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a + factor.astype(b.dtype) * b, x, y)


def _subtract(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, x, y)


def _where(condition: Array, x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def check_count(name: str, value: int) -> None:
    """Refuse a count below one."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
