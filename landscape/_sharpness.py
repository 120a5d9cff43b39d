"""Sharpness of one ascent step: how much the loss rises a short way up the gradient.

A perturbation d is measured in units of a diagonal T >= 0, d = T u with |u|_p <= rho:
T = 1 is the plain ball, T = |w| the adaptive one, in which scaling one layer of a ReLU
net up and the next one down changes nothing. The steepest ascent within it is

    l2:    d = rho T² g / |T g|_2          (SAM for T = 1, ASAM for T = |w|)
    linf:  d = rho T sign(g)

References: Foret, Kleiner, Mobahi, Neyshabur, *Sharpness-aware minimization* (ICLR
2021, arXiv:2010.01412). Kwon, Kim, Park, Choi, *ASAM* (ICML 2021, arXiv:2102.11600).
Andriushchenko, Croce, Müller, Hein, Flammarion, *A modern look at the relationship
between sharpness and generalization* (ICML 2023, arXiv:2302.07011).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from basinax.landscape import _vectors
from basinax.landscape._sandwich import as_partial, scalar
from basinax.landscape._vectors import check_vector, inner, widen

Norm = Literal["l2", "linf"]
Adaptive = bool | Literal["elementwise", "filter"]

# Smallest norm that logits are divided by; that of Andriushchenko et al.
_LOGIT_EPS = 1e-10


def sam_sharpness(
    loss_fn: Callable[..., Float[Array, ""]],
    params: PyTree,
    *args: PyTree,
    rho: Float[Array, ""] | float,
    adaptive: Adaptive = False,
    norm: Norm = "l2",
) -> Float[Array, ""]:
    """Measure the rise of the loss after one ascent step of length rho.

    This is what SAM minimises: L(w + d) - L(w), for small rho close to rho |T g|. It
    costs a gradient and a loss, and is a lower bound of `worst_case_sharpness`. It may
    be negative where the loss curves down within the step.

    Sharpness over batches of m examples, the m-sharpness of the literature, is the mean
    over batches: the function can be traced, so that `jax.lax.map` over a leading axis
    of batches does. Let the loss be deterministic. A rise below the rounding of the
    loss itself, 1e-7 L in float32, is noise.

    Args:
        loss_fn: scalar loss, called as `loss_fn(params, *args)`; as with `hessian`,
            compiled once per function object.
        params: tree of real floating-point arrays w.
        *args: further arguments, such as a batch.
        rho: radius, in units of the parameters, or relative to them if adaptive.
        adaptive: the scale T: False for 1, True or "elementwise" for |w|, "filter" for
            the norm of each filter (all but the last axis of a leaf with at least two;
            |w| elementwise in any other).
        norm: "l2" or "linf".

    Returns:
        The rise, in at least float32; 0 where the gradient vanishes and for rho = 0,
        both up to rounding; NaN if the loss or a gradient is.

    Raises:
        ValueError: for a negative or NaN rho, an unknown norm or scale, a loss that is
            not a scalar, and parameters that are empty or not real floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import sam_sharpness
        >>> loss = lambda w: jnp.sum(w**2)
        >>> w = jnp.array([3.0, 4.0])
        >>> rise = sam_sharpness(loss, w, rho=0.5)
        >>> round(float(rise), 4)  # 5.5² - 5²
        5.25

    Reference:
        arXiv:2010.01412, arXiv:2102.11600.
    """
    scale = check_ball(rho, adaptive, norm)
    check_vector(params, "params")
    loss = as_partial(loss_fn)
    value, gradient = value_and_grad(loss, params, args)
    ahead = _ascend(params, gradient, rho, adaptive=scale, norm=norm)
    return value_at(loss, ahead, args) - value


@functools.partial(jax.jit, static_argnames=("adaptive", "norm"))
def _ascend(
    params: PyTree, gradient: PyTree, rho: Float[Array, ""], adaptive: str, norm: str
) -> PyTree:
    scale = scale_of(params, adaptive)
    return shift(params, scale, steepest(multiply(scale, gradient), norm), rho)


def gradient_norm(
    loss_fn: Callable[..., Float[Array, ""]], params: PyTree, *args: PyTree
) -> Float[Array, ""]:
    """Compute the l2 norm of the gradient, without overflow or underflow.

    rho times it is the first-order sharpness over a ball of radius rho.

    Args:
        loss_fn: scalar loss, called as `loss_fn(params, *args)`.
        params: tree of real floating-point arrays.
        *args: further arguments, such as a batch.

    Returns:
        The norm, in at least float32.

    Raises:
        ValueError: if the loss is not a scalar, or `params` is empty or not real
            floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import gradient_norm
        >>> float(gradient_norm(lambda w: 0.5 * jnp.sum(w**2), jnp.array([3.0, 4.0])))
        5.0
    """
    check_vector(params, "params")
    return _norm(value_and_grad(as_partial(loss_fn), params, args)[1])


_norm = jax.jit(_vectors.norm)


def normalize_logits(
    model_fn: Callable[..., Float[Array, "*rows C"]],
) -> Callable[..., Float[Array, "*rows C"]]:
    """Wrap a model so that its logits have mean zero and norm one, row by row.

    Scaling the last layer changes cross-entropy and its curvature without changing a
    prediction. Sharpness of a loss on normalised logits does not see that scale:

        loss = lambda params, x, y: cross_entropy(normalize_logits(model)(params, x), y)

    Args:
        model_fn: returns logits with the classes on the last axis, called as
            `model_fn(params, *args)`.

    Returns:
        A function with the same arguments that returns (z - mean z) / |z - mean z|,
        where a norm below 1e-10 is replaced by 1e-10.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import normalize_logits
        >>> model = normalize_logits(lambda scale, x: scale * x)
        >>> [round(float(z), 3) for z in model(9.0, jnp.array([1.0, 3.0]))]
        [-0.707, 0.707]

    Reference:
        arXiv:2302.07011.
    """
    return Partial(_normalized, as_partial(model_fn))


def _normalized(model: Partial, *args: PyTree) -> Float[Array, "*rows C"]:
    z = model(*args)
    z = z - jnp.mean(z, -1, keepdims=True)
    square = jnp.sum(widen(z) ** 2, -1, keepdims=True)
    # The maximum before the root, whose derivative at zero would be infinite.
    return z / jnp.sqrt(jnp.maximum(square, _LOGIT_EPS**2)).astype(z.dtype)


# --- balls and trees -----------------------------------------------------------------


def check_ball(rho: Any, adaptive: Any, norm: Any) -> str:
    """Check the description of a ball; return the scale's name."""
    check_radius("rho", rho)
    if norm not in get_args(Norm):
        raise ValueError(f"norm={norm!r} is unknown; use one of l2, linf.")
    return check_adaptive(adaptive)


def check_adaptive(adaptive: Any) -> str:
    """Return "none", "elementwise" or "filter"."""
    if isinstance(adaptive, bool):
        return "elementwise" if adaptive else "none"
    if adaptive not in ("elementwise", "filter"):
        raise ValueError(
            f"adaptive={adaptive!r} is unknown; use False, True, elementwise or filter."
        )
    return adaptive


def check_radius(name: str, value: Any) -> None:
    """Refuse a length that is known now to be negative or NaN."""
    if isinstance(value, Tracer):
        return
    if np.ndim(value) or not np.asarray(value) >= 0:
        raise ValueError(f"{name} must be one number >= 0, got {value}.")


# These two hold all that depends on the loss, so that it is compiled once for every
# measure, and the rest once for every loss.
@jax.jit
def value_at(loss: Partial, params: PyTree, args: tuple) -> Float[Array, ""]:
    """Evaluate a loss in at least float32."""
    return widen(scalar(loss(params, *args), "loss_fn"))


@jax.jit
def value_and_grad(
    loss: Partial, params: PyTree, args: tuple
) -> tuple[Float[Array, ""], PyTree]:
    """Evaluate a loss and its gradient, both in at least float32."""
    value, gradient = jax.value_and_grad(lambda p: value_at(loss, p, args))(params)
    return value, widen(gradient)


def scale_of(params: PyTree, adaptive: str) -> PyTree:
    """Return the diagonal T, with leaves that broadcast to the parameters."""

    def scale(w: Array) -> Array:
        if adaptive == "none":
            return jnp.ones((1,) * w.ndim, w.dtype)
        if adaptive == "elementwise" or w.ndim < 2:
            return jnp.abs(w)
        inputs = tuple(range(w.ndim - 1))
        peak = jnp.max(jnp.abs(w), inputs, keepdims=True, initial=0)
        peak = jnp.where(peak > 0, peak, 1)
        return peak * jnp.sqrt(jnp.sum((w / peak) ** 2, inputs, keepdims=True))

    return jax.tree.map(scale, widen(params))


def multiply(x: PyTree, y: PyTree) -> PyTree:
    """Multiply two trees elementwise."""
    return jax.tree.map(jnp.multiply, x, y)


def shift(params: PyTree, scale: PyTree, u: PyTree, length: Any) -> PyTree:
    """Compute w + length T u in at least float32 and round it to the dtype of w."""

    def move(w: Array, t: Array, x: Array) -> Array:
        wide = w.astype(x.dtype) + jnp.asarray(length, x.dtype) * t * x
        return wide.astype(w.dtype)

    return jax.tree.map(move, params, scale, u)


def steepest(gradient: PyTree, norm: str) -> PyTree:
    """Return the u in the unit ball along which a linear function rises most.

    Zero for a zero gradient.
    """
    if norm == "linf":
        return jax.tree.map(jnp.sign, gradient)
    return unit(gradient)


def unit(tree: PyTree) -> PyTree:
    """Divide by the l2 norm, or return zeros for a tree of zeros."""
    peaks = [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(tree)]
    peak = functools.reduce(jnp.maximum, peaks)
    peak = jnp.where(peak == 0, 1, peak)
    # In units of the largest entry, whose squares neither overflow nor vanish.
    scaled = jax.tree.map(lambda x: x / peak.astype(x.dtype), tree)
    length = jnp.sqrt(inner(scaled, scaled))
    length = jnp.where(length == 0, 1, length)
    return jax.tree.map(lambda x: x / length.astype(x.dtype), scaled)
