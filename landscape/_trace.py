"""Stochastic trace of a curvature operator.

For a random z with independent entries ±1, E[zᵀ A z] = tr A and

    Var[zᵀ A z] = 2 (‖A‖_F² - Σ_i A_ii²),

at one product per probe; the estimate is exact for a diagonal operator.

Reference: Hutchinson, *A stochastic estimator of the trace of the influence matrix for
Laplacian smoothing splines*, Commun. Stat. Simul. Comput. 18, 1989.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from basinax.landscape._vectors import (
    check_concrete,
    check_same,
    check_vector,
    inner,
    random_bits,
)

_METHODS = ("hutchinson",)


class Estimate(NamedTuple):
    """A stochastic estimate and its uncertainty.

    Attributes:
        value: mean over the probes.
        standard_error: sample standard deviation over the square root of the number
            of probes, in units of `value`; infinite for a single probe, which says
            nothing about its own spread.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]


@jax.jit
def _signs(bits: PyTree, like: PyTree) -> PyTree:
    """Turn random integers into ±1 in the dtypes of the parameters."""
    return jax.tree.map(
        lambda b, x: 1 - 2 * (b & 1).astype(jnp.result_type(x)), bits, like
    )


@jax.jit
def _quadratic_form(probe: PyTree, product: PyTree) -> Float[Array, ""]:
    check_same(product, probe, "the operator's result")
    return inner(probe, product)


def trace(
    operator: Callable[[PyTree], PyTree],
    like: PyTree,
    *,
    key: PRNGKeyArray,
    num_probes: int,
    method: Literal["hutchinson"] = "hutchinson",
) -> Estimate:
    """Estimate the trace of a symmetric operator, with its standard error.

    The trace of the Hessian over the number of parameters is the mean curvature, which
    sets how much the loss rises under small isotropic noise. The relative error falls
    with the square root of the number of probes: a few dozen give some percent.

    Probes are drawn and multiplied one at a time, so memory does not grow with their
    number.

    Args:
        operator: symmetric linear function on trees shaped like `like`, for instance
            from `hessian`. It is called once per probe from Python; wrap one of your
            own in `jax.jit`.
        like: tree of the parameters; only structure, shapes, dtypes and placement
            matter.
        key: random key; equal keys give equal probes.
        num_probes: number of probes, hence of products.
        method: "hutchinson", the mean of zᵀ A z over random signs z.

    Returns:
        The estimate. A NaN in any product makes both fields NaN.

    Raises:
        ValueError: for an unknown method, fewer than one probe, a `like` that is
            empty, traced or not real floating point, or an operator that returns
            another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import hessian, trace
        >>> w = jnp.ones(3)
        >>> operator = hessian(lambda w: jnp.sum(jnp.array([1.0, 2.0, 3.0]) * w**2), w)
        >>> estimate = trace(operator, w, key=jax.random.key(0), num_probes=8)
        >>> float(estimate.value), float(estimate.standard_error)
        (12.0, 0.0)
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}, got {method!r}.")
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, got {num_probes}.")
    check_vector(like, "like")
    check_concrete(like, "trace")
    samples = []
    for index in range(num_probes):
        bits = random_bits(jax.random.fold_in(key, index), like)
        probe = _signs(bits, like)
        samples.append(_quadratic_form(probe, operator(probe)))
    dtype = samples[0].dtype
    values = np.asarray(jax.device_get(samples), np.float64)
    with np.errstate(invalid="ignore"):  # of infinite samples
        deviation = values.std(ddof=1) if num_probes > 1 else np.inf
    return Estimate(
        jnp.asarray(values.mean(), dtype),
        jnp.asarray(deviation / np.sqrt(num_probes), dtype),
    )
