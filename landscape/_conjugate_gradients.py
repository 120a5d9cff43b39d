"""Conjugate gradients on trees, which notice that a matrix is not positive.

    minimise  ½ ⟨x, A x⟩ - ⟨b, x⟩,   A = H + λ I

From x = 0, for a singular A with b in its range, the iteration converges to the
solution of least norm, and ‖x‖ grows with every step. Along a direction p with
⟨p, A p⟩ <= 0 there is no minimum, and the iteration ends.

Reference: Steihaug, *The conjugate gradient method and trust regions in large scale
optimization*, SIAM J. Numer. Anal. 20, 1983.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from basinax.landscape._vectors import inner, norm, widen


class Solution(NamedTuple):
    """What an iteration came to.

    Attributes:
        x: last iterate, in at least float32.
        residual: ‖b - A x‖ / ‖b‖, computed afresh, since the one that the iteration
            carries along drifts away by rounding; 0 for b = 0.
        indefinite: whether a direction of zero or negative curvature was met.
    """

    x: PyTree
    residual: Float[Array, ""]
    indefinite: Bool[Array, ""]


class _Iteration(NamedTuple):
    x: PyTree
    residual: PyTree
    direction: PyTree
    square: Float[Array, ""]
    indefinite: Bool[Array, ""]


def conjugate_gradients(
    operator: Callable[[PyTree], PyTree],
    b: PyTree,
    damping: Any,
    steps: int,
    tol: float,
) -> Solution:
    """Solve (H + λ) x = b by a Python loop over compiled steps.

    Args:
        operator: v -> H v, symmetric.
        b: right-hand side, a tree of concrete arrays.
        damping: λ.
        steps: largest number of products, but for one more that checks the result.
        tol: relative residual at which to stop.
    """
    unit, length = _unit(b)
    state = _start(unit)
    for _ in range(steps):
        # Half, so that the residual computed afresh passes as well.
        if not state.square > (tol / 2) ** 2 or state.indefinite:  # or NaN
            break
        product = operator(_like(state.direction, b))
        state = _advance(state, product, jnp.asarray(damping))
    product = operator(_like(state.x, b))
    return _finish(state, unit, length, product, jnp.asarray(damping))


def _like(x: PyTree, b: PyTree) -> PyTree:
    return optax.tree.cast_like(x, b)


@jax.jit
def _unit(b: PyTree) -> tuple[PyTree, Float[Array, ""]]:
    length = norm(b)
    safe = jnp.where(length == 0, 1, length)
    return jax.tree.map(lambda x: x / safe.astype(x.dtype), widen(b)), length


@jax.jit
def _start(b: PyTree) -> _Iteration:
    zero = jax.tree.map(jnp.zeros_like, b)
    return _Iteration(zero, b, b, inner(b, b), jnp.zeros((), bool))


@jax.jit
def _advance(
    state: _Iteration, product: PyTree, damping: Float[Array, ""]
) -> _Iteration:
    p = state.direction
    ap = _add(widen(product), damping, p)
    curvature = inner(p, ap)
    indefinite = curvature <= 0
    step = jnp.where(indefinite, 0, state.square / jnp.where(indefinite, 1, curvature))
    residual = _add(state.residual, -step, ap)
    square = inner(residual, residual)
    ratio = square / jnp.where(state.square == 0, 1, state.square)
    direction = _add(residual, ratio, p)
    return _Iteration(_add(state.x, step, p), residual, direction, square, indefinite)


@jax.jit
def _finish(
    state: _Iteration,
    b: PyTree,
    length: Float[Array, ""],
    product: PyTree,
    damping: Float[Array, ""],
) -> Solution:
    left = jax.tree.map(jnp.subtract, b, _add(widen(product), damping, state.x))
    x = jax.tree.map(lambda y: length.astype(y.dtype) * y, state.x)
    return Solution(x, norm(left), state.indefinite)


def _add(x: PyTree, factor: Array, y: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a + factor.astype(b.dtype) * b, x, y)
