"""Radial and tangential part of a gradient, in one pass where that is exact.

    g_r = (⟨w, g⟩ / ⟨w, w⟩) w,    g_⊥ = g - g_r

for a block: one array, slices of one, or several arrays as one vector.  As written this
loses all digits when g is nearly parallel to w, and its squares leave the range of
float32 at 1e±19.  Two projections after scaling cure both; the inner products of the
first pass tell whether they are needed.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

Arrays = Sequence[Array]

# A tangential part below this multiple of rounding is rounding: the gradient is radial.
RADIAL = 8.0


class _Split(NamedTuple):
    """Numbers that turn w and g into the two parts of a block.

    With W = shift·w, where shift is a power of two that makes W about as large as g,

        g_⊥ = (g - c W) - d W,        g_r = (c + d) W

    where c is the coefficient of the projection and d what its rounding left over.
    """

    shift: Array
    c: Array
    d: Array
    ratio: Array
    """‖g‖ / ‖g_⊥‖, zero where g is parallel to w."""


class _Products(NamedTuple):
    """Inner products of a block of g·2^g_exponent and w·2^w_exponent."""

    ww: Array
    wg: Array
    gg: Array
    w_exponent: Array
    g_exponent: Array


@functools.partial(jax.jit, static_argnames=("axes", "rescale"))
def project(
    gs: Arrays,
    ws: Arrays,
    axes: tuple[int, ...] | None,
    rescale: bool,
    max_rescale: Any,
    radial: Any,
) -> list[Array]:
    """Project the arrays of one block together."""
    work = functools.reduce(
        jnp.promote_types, [x.dtype for x in (*gs, *ws)], jnp.dtype(jnp.float32)
    )
    real = jnp.finfo(work).dtype
    for g, w in zip(gs, ws, strict=True):
        if jnp.iscomplexobj(w) and not jnp.iscomplexobj(g):
            raise TypeError("a complex weight got a real gradient; make it complex.")
    kinds = [work if jnp.issubdtype(g.dtype, jnp.complexfloating) else real for g in gs]
    wide_g = [g.astype(kind) for g, kind in zip(gs, kinds, strict=True)]
    wide_w = [w.astype(kind) for w, kind in zip(ws, kinds, strict=True)]
    split = jax.lax.platform_dependent(
        wide_g,
        wide_w,
        # A condition costs an accelerator a round trip to the host.
        cpu=functools.partial(_split, axes=axes, lazy=True),
        default=functools.partial(_split, axes=axes, lazy=False),
    )
    ratio = split.ratio
    grow = ratio if rescale else jnp.where(ratio == 0, 0, jnp.ones_like(ratio))
    if max_rescale is not None:
        grow = jnp.minimum(grow, jnp.asarray(max_rescale, real))

    def one(g: Array, w: Array) -> Array:
        w = w * split.shift
        out = ((g - split.c * w) - split.d * w) * grow
        if radial is not None:
            out = out + jnp.asarray(radial, real) * ((split.c + split.d) * w)
        return out

    return [
        one(g, w).astype(like.dtype)
        for g, w, like in zip(wide_g, wide_w, gs, strict=True)
    ]


def _split(
    gs: Arrays, ws: Arrays, axes: tuple[int, ...] | None, *, lazy: bool
) -> _Split:
    """Find the coefficients; if lazy, scale and project again only where it matters."""
    if not lazy:
        return _project_twice(_scaled_products(gs, ws, axes), gs, ws, axes)
    plain = _products(gs, ws, axes)
    in_range = _in_range(plain, sum(w.size for w in ws))
    c = plain.wg / jnp.where(plain.ww > 0, plain.ww, 1)
    rest = plain.gg - c * plain.wg
    # While g is closer to g_⊥ than to w, ‖g_⊥‖² by Pythagoras does not cancel and one
    # projection is orthogonal to rounding.
    steep = jnp.all(2 * rest >= plain.gg)
    one = jnp.ones_like(c)
    once = _Split(one, c, 0 * one, _ratio(plain.gg, rest, rest <= 0))

    def twice(gs: Arrays, ws: Arrays) -> _Split:
        products = jax.lax.cond(
            in_range,
            lambda *_: plain,
            functools.partial(_scaled_products, axes=axes),
            gs,
            ws,
        )
        return _project_twice(products, gs, ws, axes)

    return jax.lax.cond(in_range & steep, lambda *_: once, twice, gs, ws)


def _project_twice(
    products: _Products, gs: Arrays, ws: Arrays, axes: tuple[int, ...] | None
) -> _Split:
    ww, wg, gg, w_exponent, g_exponent = products
    one, divisor = jnp.ones_like(ww), jnp.where(ww > 0, ww, 1)
    # Bring w to the size of g, as far as one normal number can.
    exponent = w_exponent - g_exponent
    limit = -jnp.finfo(ww.dtype).minexp
    shift = jnp.clip(exponent, -limit, limit)
    unit = jnp.ldexp(one, exponent - shift)
    shift = jnp.ldexp(one, shift)
    c = wg / divisor * unit
    # Rounded as in the projection itself, so that d is what that leaves over.
    left = [
        _shift(g - c * (w * shift), g_exponent) for g, w in zip(gs, ws, strict=True)
    ]
    d = _inner([_shift(w, w_exponent) for w in ws], left, axes) / divisor
    rest = _inner(left, left, axes) - d * d * ww
    # Written so that NaN is not taken for parallel.
    parallel = rest <= (RADIAL * jnp.finfo(ww.dtype).eps) ** 2 * gg
    ratio = jnp.where(ww > 0, _ratio(gg, rest, parallel), 1)
    return _Split(shift, c, d * unit, ratio)


def _ratio(gg: Array, rest: Array, zero: Array) -> Array:
    """Return √(gg / rest), zero where told; the root must not see 0 when derived."""
    square = jnp.where(zero, 1, gg / jnp.where(zero, 1, rest))
    return jnp.where(zero, 0, jnp.sqrt(square))


def _products(gs: Arrays, ws: Arrays, axes: tuple[int, ...] | None) -> _Products:
    ww, wg, gg = _inner(ws, ws, axes), _inner(ws, gs, axes), _inner(gs, gs, axes)
    zero = (0 * ww).astype(jnp.int32)  # laid out like the products
    return _Products(ww, wg, gg, zero, zero)


def _scaled_products(gs: Arrays, ws: Arrays, axes: tuple[int, ...] | None) -> _Products:
    w_exponent, g_exponent = _exponent(ws, axes), _exponent(gs, axes)
    ws = [_shift(w, w_exponent) for w in ws]
    gs = [_shift(g, g_exponent) for g in gs]
    scaled = _products(gs, ws, axes)
    return scaled._replace(w_exponent=w_exponent, g_exponent=g_exponent)


def _shift(x: Array, exponent: Array) -> Array:
    return x * jnp.ldexp(jnp.ones((), jnp.finfo(x.dtype).dtype), exponent)


def _in_range(products: _Products, size: int) -> Array:
    """Say whether squares that underflowed do not matter and none overflowed."""
    limits = jnp.finfo(products.ww.dtype)
    least, most = size * limits.tiny / limits.eps, limits.eps * limits.max
    ww, gg = products.ww, products.gg
    return jnp.all((ww > least) & (ww < most) & (gg > least) & (gg < most))


def _inner(xs: Arrays, ys: Arrays, axes: tuple[int, ...] | None) -> Array:
    """Compute the real inner product of a block, one for each slice."""

    def one(x: Array, y: Array) -> Array:
        return jnp.sum(jnp.real(jnp.conj(x) * y), axes, keepdims=axes is not None)

    return functools.reduce(jnp.add, map(one, xs, ys))


def _exponent(xs: Arrays, axes: tuple[int, ...] | None) -> Array:
    """Return the power of two that brings a block to unit size."""

    def peak(x: Array) -> Array:
        parts = jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag))
        return jnp.max(parts, axes, keepdims=axes is not None)

    size = jax.lax.stop_gradient(functools.reduce(jnp.maximum, map(peak, xs)))
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(size), size, 1))
    limit = -jnp.finfo(size.dtype).minexp  # so that the power is a normal number
    return -jnp.clip(exponent, -limit, limit)
