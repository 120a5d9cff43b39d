"""Closeness: how far the parameters are from the minima of each of several sources.

    1/n Σ_i ‖w - w_i‖²,   w_i a minimum of L_i near w

Small: the minimum of the mean loss lies where the minima of the sources meet. Large: it
is a compromise, and what is gained on one source is lost on others. Two estimates:

    newton   w_i = w - (H_i + λ)⁻¹ g_i, the minimum of the quadratic model of
             L_i(v) + λ/2 ‖v - w‖², by conjugate gradients on products H_i v;
    descent  w_i is where an optimizer on L_i alone arrives from w after some steps.

Reference: Chen et al., *Nexus*, arXiv:2604.09258.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, PyTree

from basinax.landscape._conjugate_gradients import conjugate_gradients
from basinax.landscape._operators import hessian
from basinax.landscape._sandwich import as_partial
from basinax.landscape._sharpness import check_radius, value_and_grad
from basinax.landscape._vectors import check_concrete, check_vector, norm, widen

Method = Literal["newton", "descent"]


class Closeness(NamedTuple):
    """Distances from w to the points w_i found for n sources.

    Attributes:
        mean_squared_distance: mean of ‖w - w_i‖² over the sources.
        distances: ‖w - w_i‖, shape (n,); infinite where the quadratic model was found
            to have no minimum.
        losses: L_i(w), shape (n,).
        losses_reached: L_i(w_i), shape (n,).
        gradient_norms: ‖∇L_i(w)‖, shape (n,).
        gradient_norms_reached: ‖∇L_i(w_i)‖, shape (n,).
        residuals: share of the gradient that is left, shape (n,): of the quadratic
            model for "newton", of the loss for "descent"; 0 where it vanished before.
        converged: whether that is at most `tol`, shape (n,).
    """

    mean_squared_distance: Float[Array, ""]
    distances: Float[Array, "n"]
    losses: Float[Array, "n"]
    losses_reached: Float[Array, "n"]
    gradient_norms: Float[Array, "n"]
    gradient_norms_reached: Float[Array, "n"]
    residuals: Float[Array, "n"]
    converged: Bool[Array, "n"]


def closeness(
    loss_fn: Callable[..., Float[Array, ""]],
    params: PyTree,
    batches: tuple[PyTree, ...] | Sequence[Sequence[PyTree]],
    *,
    method: Method = "newton",
    steps: int = 100,
    tol: float = 1e-3,
    damping: Float[Array, ""] | float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
) -> Closeness:
    """Measure the distance from the parameters to the minima of each source.

    "newton" answers where the minima would be if the losses were the quadratics that
    they look like at w: exact on those, and a local quantity. Networks have directions
    of zero and of negative curvature, where it is infinite or tiny curvatures dominate
    it; then give a `damping`, to be kept the same in all that is compared: directions
    flatter than it no longer count. Whether the model holds as far as w_i, see
    `losses_reached` and `gradient_norms_reached`, which are those of the real losses.

    "descent" answers how far training on one source would go from here: it needs no
    quadratics, but depends on the optimizer and the number of steps, and slow descent
    looks like closeness. Compare distances together with `losses_reached`.

    `closeness_bound` is an upper bound from gradients and the smallest curvature.

    Sources are worked on one after the other, from a Python loop over compiled steps
    that sources of equal shapes share.

    Args:
        loss_fn: scalar loss, called as `loss_fn(params, *batch)`; as with `hessian`,
            compiled once per function object.
        params: tree of real floating-point arrays w. Those in bfloat16 resolve neither
            small distances nor small gradients; cast them to float32 if the model lets.
        batches: tuple of trees of arrays with a leading axis of n sources; or a list of
            one tuple of arguments per source, whose sizes may differ.
        method: "newton" or "descent".
        steps: products with each Hessian at most, or steps of the optimizer.
        tol: share of the gradient that may be left in a source that has `converged`;
            "newton" stops there.
        damping: λ >= 0, in units of curvature; for "newton".
        optimizer: for "descent". Its state starts anew for each source; line searches,
            as in `optax.lbfgs()`, are given what they ask for. Compiled once per
            object, so make it once.

    Returns:
        The distances, in at least float32. Before convergence a distance by "newton" is
        too small. A NaN in a loss or gradient makes the numbers of its source NaN, and
        the mean.

    Raises:
        ValueError: for an unknown method, an option of the other one, "descent" without
            an optimizer, fewer than one step, a negative damping, batches that are not
            as described, a loss that is not a scalar, or parameters that are empty,
            traced or not real floating point.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.landscape import closeness
        >>> def loss(w, minimum):
        ...     return jnp.sum((w - minimum) ** 2)
        >>> minima = (jnp.array([[1.0, 0.0], [-1.0, 2.0]]),)
        >>> w = jnp.zeros(2)
        >>> float(closeness(loss, w, minima).mean_squared_distance)  # (1 + 5) / 2
        3.0
        >>> sgd = optax.sgd(0.25)
        >>> found = closeness(
        ...     loss, w, minima, method="descent", optimizer=sgd, steps=30
        ... )
        >>> round(float(found.mean_squared_distance), 4)
        3.0

    Reference:
        arXiv:2604.09258, closeness.
    """
    _check_method(method, optimizer, damping, steps)
    check_vector(params, "params")
    check_concrete((params, batches), "closeness")
    loss = as_partial(loss_fn)
    found = [
        _newton(loss, params, batch, steps, tol, damping)
        if optimizer is None
        else _descent(loss, params, batch, steps, tol, optimizer)
        for batch in _sources(batches)
    ]
    columns = [jnp.stack(column) for column in zip(*found, strict=True)]
    return Closeness(jnp.mean(columns[0] ** 2), *columns)


def _newton(
    loss: Partial, params: PyTree, batch: tuple, steps: int, tol: float, damping: Any
) -> tuple[Array, ...]:
    value, gradient = value_and_grad(loss, params, batch)
    operator = hessian(loss, params, *batch)
    solution = conjugate_gradients(operator, gradient, damping, steps, tol)
    point = _subtract(params, solution.x)
    reached, left = value_and_grad(loss, point, batch)
    distance = jnp.where(solution.indefinite, jnp.inf, _norm(solution.x))
    converged = (solution.residual <= tol) & ~solution.indefinite
    return (
        distance,
        value,
        reached,
        _norm(gradient),
        _norm(left),
        solution.residual,
        converged,
    )


def _descent(
    loss: Partial,
    params: PyTree,
    batch: tuple,
    steps: int,
    tol: float,
    optimizer: optax.GradientTransformation,
) -> tuple[Array, ...]:
    value, gradient = value_and_grad(loss, params, batch)
    point, state = params, optimizer.init(params)
    for _ in range(steps):
        point, state = _step(loss, point, state, batch, optimizer=optimizer)
    reached, left = value_and_grad(loss, point, batch)
    start, end = _norm(gradient), _norm(left)
    residual = jnp.where(end == 0, 0, end / jnp.where(start == 0, end, start))
    distance = _distance(point, params)
    return distance, value, reached, start, end, residual, residual <= tol


@functools.partial(jax.jit, static_argnames="optimizer")
def _step(
    loss: Partial,
    params: PyTree,
    state: Any,
    batch: tuple,
    optimizer: optax.GradientTransformation,
) -> tuple[PyTree, Any]:
    def value_fn(params: PyTree) -> Float[Array, ""]:
        return loss(params, *batch)

    value, gradient = jax.value_and_grad(value_fn)(params)
    updates, state = optax.with_extra_args_support(optimizer).update(
        gradient, state, params, value=value, grad=gradient, value_fn=value_fn
    )
    return optax.apply_updates(params, updates), state


_norm = jax.jit(norm)


@jax.jit
def _distance(x: PyTree, y: PyTree) -> Float[Array, ""]:
    return norm(jax.tree.map(jnp.subtract, widen(x), widen(y)))


@jax.jit
def _subtract(params: PyTree, x: PyTree) -> PyTree:
    moved = jax.tree.map(jnp.subtract, widen(params), x)
    return optax.tree.cast_like(moved, params)


def _sources(batches: Any) -> list[tuple]:
    """Take batches apart into one tuple of arguments per source."""
    if isinstance(batches, list):
        if batches and all(type(batch) in (tuple, list) for batch in batches):
            return [tuple(batch) for batch in batches]
        raise ValueError(
            "a list of batches must hold at least one, each a tuple of the arguments "
            "of loss_fn after the parameters, such as [(x0, y0), (x1, y1)]."
        )
    if not isinstance(batches, tuple):
        raise ValueError(
            "batches must be a tuple of the arguments of loss_fn after the parameters, "
            "such as (inputs, labels), each with a leading axis of sources; got a "
            f"{type(batches).__name__}."
        )
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(counts) != 1 or not all(counts) or (0,) in counts:
        raise ValueError(
            "the arrays of batches must have one leading axis in common, of at least "
            f"one source; got shapes {jax.tree.map(jnp.shape, batches)}."
        )
    ((count,),) = counts
    leaves, treedef = jax.tree.flatten(batches)
    return [treedef.unflatten(x[i] for x in leaves) for i in range(count)]


def _check_method(method: Any, optimizer: Any, damping: Any, steps: int) -> None:
    if method not in get_args(Method):
        raise ValueError(
            f"method must be one of {', '.join(get_args(Method))}, got {method!r}."
        )
    if (method == "descent") != (optimizer is not None):
        raise ValueError(
            'method="descent" needs an optimizer, such as optax.sgd(0.1), and '
            f'"newton" takes none; got method={method!r}, optimizer={optimizer}.'
        )
    check_radius("damping", damping)
    if method == "descent" and np.any(damping != 0):
        raise ValueError('damping belongs to method="newton".')
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
