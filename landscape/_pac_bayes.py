"""PAC-Bayes sharpness: how much noise on the weights the loss tolerates.

    sigma = sup { s : E[ L(w + s T z) - L(w) ] <= increase },  z ~ N(0, 1)

and 1 / sigma² enters PAC-Bayes bounds on the test error. The mean is taken over the
same draws for every s, so that it is a smooth function of s; bisection finds its root.

References: Dziugaite and Roy, *Computing nonvacuous generalization bounds* (UAI 2017,
arXiv:1703.11008). Jiang, Neyshabur, Mobahi, Krishnan, Bengio, *Fantastic generalization
measures and where to find them* (ICLR 2020, arXiv:1912.02178).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from basinax.landscape._average_case import check_draws, paired_rises
from basinax.landscape._probes import mean
from basinax.landscape._sandwich import as_partial
from basinax.landscape._sharpness import check_radius, value_at
from basinax.landscape._vectors import widen

# sigma is sought in [2⁻⁴⁰, 2⁴⁰].
_DOUBLINGS = 40
# Relative step of the difference quotient for the standard error.
_STEP = 0.1


class PacBayesSharpness(NamedTuple):
    """Result of `pac_bayes_sharpness`.

    Attributes:
        sigma: largest tolerated standard deviation.
        standard_error: that of `sigma`, from the spread over the draws.
        sharpness: 1 / sigma².
    """

    sigma: Float[Array, ""]
    standard_error: Float[Array, ""]
    sharpness: Float[Array, ""]


def pac_bayes_sharpness(
    loss_fn: Callable[..., Float[Array, ""]],
    params: PyTree,
    *args: PyTree,
    key: PRNGKeyArray,
    increase: float = 0.1,
    num_draws: int = 20,
    magnitude_aware: bool = False,
    epsilon: float = 1e-3,
    tol: float = 1e-3,
) -> PacBayesSharpness:
    """Find the largest weight noise that raises the loss by at most `increase`.

    Unlike the other measures it has no radius to choose. `loss_fn` may be an error
    rate, as in the papers, or a loss. Some ten to twenty values of sigma are tried, at
    two evaluations per draw each, from a Python loop over compiled calls.

    Args:
        loss_fn: called as `loss_fn(params, *args)`; any scalar function.
        params: tree of real floating-point arrays w.
        *args: further arguments, such as a batch.
        key: random key; equal keys give equal draws.
        increase: tolerated rise, in units of the loss.
        num_draws: number of antithetic pairs of draws.
        magnitude_aware: whether the noise of w_i has variance
            sigma² w_i² + epsilon² rather than sigma².
        epsilon: floor of the noise, only if magnitude aware.
        tol: relative accuracy to which sigma is bisected.

    Returns:
        sigma, its standard error and 1 / sigma². sigma is infinite if 2⁴⁰ is tolerated
        and 0 if 2⁻⁴⁰ is not; the standard error is then NaN, as it is where the rise
        does not grow with sigma. A rise that is NaN or infinite is not tolerated, but
        everything is NaN if the loss is NaN without noise.

    Raises:
        ValueError: if `increase`, `epsilon` or `tol` is negative or zero, and as
            `average_sharpness`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import pac_bayes_sharpness
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> result = pac_bayes_sharpness(loss, jnp.zeros(500), key=jax.random.key(0))
        >>> exact = (2 * 0.1 / 500) ** 0.5  # from sigma² tr H / 2 = 0.1
        >>> bool(abs(result.sigma - exact) < 4 * result.standard_error + 1e-3 * exact)
        True

    Reference:
        arXiv:1912.02178.
    """
    for name, value in (("increase", increase), ("epsilon", epsilon), ("tol", tol)):
        check_radius(name, value)
        if value == 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    check_draws(params, num_draws, "pac_bayes_sharpness")
    loss = as_partial(loss_fn)
    base = value_at(loss, params, args)

    def rises(sigma: float) -> np.ndarray:
        scale, length = _unit_scale(params), sigma
        if magnitude_aware:
            scale, length = _magnitudes(params, sigma, epsilon), 1.0
        return paired_rises(loss, params, args, base, scale, length, key, num_draws)

    def tolerated(sigma: float) -> bool:
        return bool(rises(sigma).mean() <= increase)

    if np.isnan(base):
        return _result(np.nan, np.nan, base)
    low = high = 2.0**-4
    while tolerated(high):
        low, high = high, high * 4
        if high > 2.0**_DOUBLINGS:
            return _result(np.inf, np.nan, base)
    while low == high or not tolerated(low):
        low, high = low / 4, low
        if high < 2.0**-_DOUBLINGS:
            return _result(0.0, np.nan, base)
    while high > low * (1 + tol):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if tolerated(middle) else (low, middle)

    above, below = rises(low * (1 + _STEP)).mean(), rises(low * (1 - _STEP)).mean()
    slope = (above - below) / (2 * _STEP * low)
    error = float(mean(rises(low), jnp.float32).standard_error)
    return _result(low, error / slope if slope > 0 else np.nan, base)


@jax.jit
def _unit_scale(params: PyTree) -> PyTree:
    return jax.tree.map(lambda w: jnp.ones((1,) * w.ndim, w.dtype), widen(params))


@jax.jit
def _magnitudes(params: PyTree, sigma: float, epsilon: float) -> PyTree:
    return jax.tree.map(lambda w: jnp.hypot(sigma * w, epsilon), widen(params))


def _result(sigma: float, error: float, base: Array) -> PacBayesSharpness:
    with np.errstate(divide="ignore"):
        numbers = (sigma, error, np.divide(1.0, np.square(sigma)))
    return PacBayesSharpness(*(jnp.asarray(x, base.dtype) for x in numbers))
