"""Average-case sharpness: the mean rise of the loss under Gaussian weight noise.

    S = E[ L(w + rho T z) - L(w) ],  z ~ N(0, 1);   for small rho  rho²/2 tr(T H T).

Each draw is used with both signs, (L(w + d) + L(w - d)) / 2 - L(w), which cancels the
first order exactly. One-sided draws would have to average it out, and for small rho it
is far larger than what is to be measured.

Reference: Andriushchenko, Croce, Müller, Hein, Flammarion, *A modern look at the
relationship between sharpness and generalization* (ICML 2023, arXiv:2302.07011).
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from basinax.landscape._draws import normal_like
from basinax.landscape._probes import Estimate, mean, on_host
from basinax.landscape._sandwich import as_partial
from basinax.landscape._sharpness import (
    Adaptive,
    check_adaptive,
    check_radius,
    scale_of,
    shift,
    value_at,
)
from basinax.landscape._vectors import check_concrete, check_vector


def average_sharpness(
    loss_fn: Callable[..., Float[Array, ""]],
    params: PyTree,
    *args: PyTree,
    rho: Float[Array, ""] | float,
    key: PRNGKeyArray,
    num_draws: int = 20,
    adaptive: Adaptive = False,
) -> Estimate:
    """Estimate the mean rise of the loss under Gaussian noise, with its standard error.

    The noise has standard deviation rho in every direction, so its norm is about
    rho √P for P parameters; rho is not comparable with the radius of
    `worst_case_sharpness`. It takes two evaluations of the loss per draw and no
    gradient, from a Python loop over compiled calls.

    Below rho²/2 |tr| ~ 1e-6 L the rise is lost in the rounding of float32; then take
    `trace` of the Hessian.

    Args:
        loss_fn: loss, called as `loss_fn(params, *args)`; any scalar function, such as
            an error rate. As with `hessian`, compiled once per function object.
        params: tree of real floating-point arrays w.
        *args: further arguments, such as a batch.
        rho: standard deviation of the noise, times the scale if adaptive.
        key: random key; equal keys give equal draws.
        num_draws: number of antithetic pairs.
        adaptive: the scale T, as in `sam_sharpness`.

    Returns:
        The estimate; its standard error is infinite for one draw. A NaN in any loss
        makes both fields NaN.

    Raises:
        ValueError: for a negative or NaN rho, an unknown scale, fewer than one draw, a
            loss that is not a scalar, or parameters that are empty, traced or not real
            floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import average_sharpness
        >>> w = jnp.zeros(1000)
        >>> rise = average_sharpness(
        ...     lambda w: 0.5 * jnp.sum(w**2), w, rho=0.1, key=jax.random.key(0)
        ... )
        >>> bool(abs(rise.value - 5) < 4 * rise.standard_error)  # rho² tr H / 2
        True

    Reference:
        arXiv:2302.07011.
    """
    check_radius("rho", rho)
    scale_name = check_adaptive(adaptive)
    check_draws(params, num_draws, "average_sharpness")
    loss = as_partial(loss_fn)
    scale = _scale(params, adaptive=scale_name)
    base = value_at(loss, params, args)
    samples = paired_rises(loss, params, args, base, scale, rho, key, num_draws)
    return mean(samples, base.dtype)


def paired_rises(
    loss: Partial,
    params: PyTree,
    args: tuple,
    base: Float[Array, ""],
    scale: PyTree,
    length: Any,
    key: PRNGKeyArray,
    num_draws: int,
) -> np.ndarray:
    """Return (L(w + d) + L(w - d)) / 2 - L(w) of each draw, in float64."""
    keys = (jax.random.fold_in(key, index) for index in range(num_draws))
    draws = (normal_like(draw, params) for draw in keys)
    pairs = [
        [
            value_at(loss, moved, args)
            for moved in _both_ways(params, scale, draw, length)
        ]
        for draw in draws
    ]
    with np.errstate(invalid="ignore"):  # of infinite losses
        return on_host(pairs).mean(axis=1) - float(base)


@jax.jit
def _both_ways(
    params: PyTree, scale: PyTree, draw: PyTree, length: Float[Array, ""]
) -> tuple[PyTree, PyTree]:
    return shift(params, scale, draw, length), shift(params, scale, draw, -length)


def check_draws(params: PyTree, num_draws: int, caller: str) -> None:
    """Raise ValueError unless a loop over draws can start."""
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}.")
    check_vector(params, "params")
    check_concrete(params, caller)


_scale = jax.jit(scale_of, static_argnames="adaptive")
