"""Convex quadratic programs with nonnegative variables, by an interior-point method.

    min ½ wᵀHw + bᵀw    over w ≥ 0, or over the simplex w ≥ 0, Σ w = 1

Mehrotra's predictor-corrector method follows the solutions of the optimality conditions
with w_i z_i = μ in place of w_i z_i = 0 to μ = 0, z = Hw + b - y the slack.  It needs
some ten to twenty factorizations whatever the data, ends at the centre of the solutions
where there are many, so that equal tasks get equal weights, and works in float32: with
s = √(w/z) the Newton matrix is I + diag(s) H diag(s), which no step makes singular.
Nocedal and Wright, "Numerical Optimization" (2006), section 16.6.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

STEPS = 40
BACK_OFF = 0.995  # share of the way to the boundary


class _Iterate(NamedTuple):
    w: Array
    y: Array
    z: Array
    steps: Array
    running: Array


def minimise_on_simplex(
    h: Float[Array, "T T"], b: Float[Array, " T"]
) -> Float[Array, " T"]:
    """Minimise ½ wᵀHw + bᵀw over the simplex.

    Args:
        h: positive semidefinite matrix.
        b: linear term.

    Returns:
        The minimiser, w ≥ 0 with sum one to rounding.
    """
    size = len(b)
    w = jnp.full((size,), 1 / size, h.dtype)
    slope = h @ w + b
    largest = jnp.max(jnp.abs(slope))
    largest = jnp.where(largest > 0, largest, 1)
    spread = jnp.max(slope) - jnp.min(slope)
    # Strictly feasible from the start, which the method then preserves.
    y = jnp.min(slope) - jnp.maximum(spread, 1e-3 * largest)
    return _interior_point(h, b, w, y, slope - y, simplex=True)


def minimise_nonnegative(
    h: Float[Array, "T T"], b: Float[Array, " T"]
) -> Float[Array, " T"]:
    """Minimise ½ wᵀHw + bᵀw over w ≥ 0, for H with ones on its diagonal.

    Args:
        h: positive definite matrix.
        b: linear term, entries of order one.

    Returns:
        The minimiser, w ≥ 0.
    """
    w = jnp.ones_like(b)
    z = jnp.maximum(h @ w + b, 1)
    return _interior_point(h, b, w, jnp.zeros((), h.dtype), z, simplex=False)


def _interior_point(
    h: Array, b: Array, w: Array, y: Array, z: Array, simplex: bool
) -> Array:
    size = len(b)
    info = jnp.finfo(h.dtype)
    smallest = float(info.tiny) / float(info.eps)
    identity = jnp.eye(size, dtype=h.dtype)
    ones = jnp.ones((size,), h.dtype)
    norms = jnp.sqrt(jnp.diag(h))
    # Covers the rounding errors of a factorization.  Only the steps see it.
    guarded = h + 2 * size * float(info.eps) * identity * jnp.diag(h)[None, :]

    def resolved(w: Array) -> Array:
        """Bound the norms that the objective is made of by the triangle inequality."""
        return jnp.dot(w, norms) + (0 if simplex else 1)

    def unfinished(w: Array, z: Array) -> Array:
        return jnp.dot(w, z) > (float(info.eps) * resolved(w)) ** 2

    def step(state: _Iterate) -> _Iterate:
        w, y, z, steps, _ = state
        gap = jnp.dot(w, z)
        residual = h @ w + b - y - z
        s = jnp.sqrt(w / z)
        factor = jnp.linalg.cholesky(identity + s[:, None] * guarded * s[None, :])

        def invert(right: Array) -> Array:
            """Apply (H + diag(z/w))⁻¹ to columns."""
            right = jax.lax.linalg.triangular_solve(
                factor, s[:, None] * right, left_side=True, lower=True
            )
            right = jax.lax.linalg.triangular_solve(
                factor, right, left_side=True, lower=True, transpose_a=True
            )
            return s[:, None] * right

        def direction(solved: Array, target: Array) -> tuple[Array, Array, Array]:
            dy = jnp.zeros_like(y)
            if simplex:
                dy = (1 - jnp.sum(w) - jnp.sum(solved)) / jnp.sum(per_y)
            dw = solved + dy * per_y
            return dw, dy, target - z * dw / w

        # Predictor: straight to w z = 0.
        columns = [-z - residual, ones] if simplex else [-z - residual]
        columns = invert(jnp.stack(columns, 1))
        per_y = columns[:, 1] if simplex else jnp.zeros_like(b)
        dw, _, dz = direction(columns[:, 0], -z)
        length = jnp.minimum(1, jnp.minimum(_to_boundary(w, dw), _to_boundary(z, dz)))
        ahead = jnp.dot(w + length * dw, z + length * dz)
        # Corrector: to w z = σ μ, with the second-order term of what the predictor may
        # do; with that of a step it may not take, the method stalls on rare programs.
        target = ((ahead / gap) ** 3 * gap / size - length**2 * dw * dz) / w - z
        dw, dy, dz = direction(invert((target - residual)[:, None])[:, 0], target)
        length = jnp.minimum(_to_boundary(w, dw), _to_boundary(z, dz))
        length = jnp.minimum(1, BACK_OFF * length)
        new_w = jnp.maximum(w + length * dw, smallest)
        new_z = jnp.maximum(z + length * dz, smallest)
        if simplex:
            new_w = new_w / jnp.sum(new_w)
        # Rounding can end the progress of a nearly singular problem.
        sane = jnp.all(jnp.isfinite(new_w) & jnp.isfinite(new_z))
        return _Iterate(
            jnp.where(sane, new_w, w),
            jnp.where(sane, y + length * dy, y),
            jnp.where(sane, new_z, z),
            steps + 1,
            sane & unfinished(new_w, new_z),
        )

    start = _Iterate(w, y, z, jnp.zeros((), jnp.int32), unfinished(w, z))
    end = jax.lax.while_loop(lambda s: s.running & (s.steps < STEPS), step, start)
    return _without_dust(end.w, end.z, norms, resolved(end.w), float(info.eps))


def _without_dust(
    w: Array, z: Array, norms: Array, resolved: Array, rounding: float
) -> Array:
    """Set to zero what the method only left positive."""
    small = (w * norms <= rounding * resolved) | (w <= rounding)
    return jnp.where(small & (w * norms**2 < z) & (norms > 0), 0, w)


def _to_boundary(x: Array, dx: Array) -> Array:
    """Return the largest step that keeps x + step dx nonnegative."""
    ratio = -x / jnp.where(dx < 0, dx, -1)
    return jnp.min(jnp.where(dx < 0, ratio, jnp.inf))
