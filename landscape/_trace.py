"""Stochastic trace and Frobenius norm of a curvature operator.

For a random z with independent entries ±1, E[zᵀ A z] = tr A and E ‖A z‖² = ‖A‖_F², with

    Var[zᵀ A z] = 2 (‖A‖_F² - Σ_i A_ii²),

at one product per probe; both are exact for a diagonal operator.

Reference: Hutchinson, *A stochastic estimator of the trace of the influence matrix for
Laplacian smoothing splines*, Commun. Stat. Simul. Comput. 18, 1989.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from basinax.landscape._low_rank_trace import hutch_plus_plus, x_trace
from basinax.landscape._probes import (
    Estimate,
    check,
    check_method,
    length,
    make,
    mean,
    multiplied,
    on_host,
    quadratic_form,
    result_dtype,
)

# Products that each method cannot do without.
_LEAST = {"hutchinson": 1, "hutch++": 3, "xtrace": 4}


def trace(
    operator: Callable[[PyTree], PyTree],
    like: PyTree,
    *,
    key: PRNGKeyArray,
    num_probes: int,
    method: Literal["hutchinson", "hutch++", "xtrace"] = "hutchinson",
) -> Estimate:
    """Estimate the trace of a symmetric operator, with its standard error.

    The trace of the Hessian over the number of parameters is the mean curvature, which
    sets how much the loss rises under small isotropic noise.

    "hutchinson" draws and multiplies probes one at a time, so memory does not grow
    with their number; its relative error falls with the square root of it, and a few
    dozen give some percent. The other two first take out the largest eigenvalues and
    sample the rest, which pays from about 60 products on: on the Hessian of a small
    trained net 99 products gave 2.4 % by "hutchinson", 1.0 % by "hutch++" and 0.75 %
    by "xtrace". Both are exact when the products span the space.

    Args:
        operator: symmetric linear function on trees shaped like `like`, for instance
            from `hessian`. It is called once per probe from Python; wrap one of your
            own in `jax.jit`.
        like: tree of the parameters; only structure, shapes, dtypes and placement
            matter.
        key: random key; equal keys give equal probes.
        num_probes: number of products to spend. "hutch++" holds a third as many
            vectors the size of the parameters in at least float32, "xtrace" half.
        method: "hutchinson", the mean of zᵀ A z over random signs z; "hutch++", which
            splits its products into thirds; or "xtrace", which uses every probe twice.

    Returns:
        The estimate. The standard error is that of a mean for "hutchinson", where it
        is infinite for a single probe, and for "hutch++". For "xtrace" it accounts for
        the dependence of the samples, which the published one does not. From few probes
        it is itself uncertain: two standard errors cover the truth in 92 % of cases
        with ten samples. A NaN in any product makes both fields NaN.

    Raises:
        ValueError: for an unknown method, fewer than 1 ("hutchinson"), 3 ("hutch++") or
            4 ("xtrace") probes, a `like` that is empty, traced or not real floating
            point, or an operator that returns another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import hessian, trace
        >>> w = jnp.ones(3)
        >>> operator = hessian(lambda w: jnp.sum(jnp.array([1.0, 2.0, 3.0]) * w**2), w)
        >>> estimate = trace(operator, w, key=jax.random.key(0), num_probes=8)
        >>> float(estimate.value), float(estimate.standard_error)
        (12.0, 0.0)

    Reference:
        Hutchinson 1989; Meyer et al., *Hutch++*, 2021; Epperly, Tropp, Webber,
        *XTrace*, 2024.
    """
    check_method(method, tuple(_LEAST))
    check(like, num_probes, f"trace by {method}", _LEAST[method])
    if method == "hutch++":
        return hutch_plus_plus(operator, like, key, num_probes)
    if method == "xtrace":
        return x_trace(operator, like, key, num_probes)
    pairs = multiplied(operator, like, key, num_probes)
    return mean(on_host([quadratic_form(*pair) for pair in pairs]), result_dtype(like))


def root_mean_square(lengths: np.ndarray, dtype: jnp.dtype) -> Estimate:
    """Turn samples of ‖A z‖ into √(mean ‖A z‖²), with an error by the delta method."""
    peak, count = lengths.max(), len(lengths)
    unit = peak if 0 < peak < np.inf else 1.0  # so that squares stay in range
    squares = (lengths / unit) ** 2
    root = np.sqrt(squares.mean())
    with np.errstate(invalid="ignore"):  # of infinite samples
        deviation = squares.std(ddof=1) if count > 1 else np.inf
        error = deviation / np.sqrt(count) / (2 * root if root > 0 else 1)
    error = np.nan if np.isnan(root) else error
    return make(unit * root, unit * error, dtype)


def frobenius_norm(
    operator: Callable[[PyTree], PyTree],
    like: PyTree,
    *,
    key: PRNGKeyArray,
    num_probes: int,
    method: Literal["hutchinson"] = "hutchinson",
) -> Estimate:
    """Estimate ‖A‖_F = √(Σ λ²) of a symmetric operator, with its standard error.

    It weighs the few large eigenvalues more than the trace does, and over it says in
    how many directions the curvature is spread: (tr A)² / ‖A‖_F². Fifty probes give a
    few percent.

    Args:
        operator: symmetric linear function on trees shaped like `like`, for instance
            from `hessian`. It is called once per probe from Python.
        like: tree of the parameters; only structure, shapes, dtypes and placement
            matter.
        key: random key; equal keys give equal probes.
        num_probes: number of products to spend.
        method: "hutchinson", the mean of ‖A z‖² over random signs z.

    Returns:
        The root of the mean, which is unbiased before the root and low by
        `standard_error**2 / (2 * value)` after it, and its standard error by the delta
        method, that of the mean over twice the root. The error is infinite for a
        single probe; a NaN in any product makes both fields NaN.

    Raises:
        ValueError: for an unknown method, fewer than one probe, a `like` that is
            empty, traced or not real floating point, or an operator that returns
            another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import frobenius_norm
        >>> scale = jnp.array([3.0, -4.0])
        >>> norm = frobenius_norm(
        ...     lambda v: scale * v, scale, key=jax.random.key(0), num_probes=4
        ... )
        >>> float(norm.value), float(norm.standard_error)
        (5.0, 0.0)

    Reference: Hutchinson 1989, applied to A².
    """
    check_method(method, ("hutchinson",))
    check(like, num_probes, "frobenius_norm")
    pairs = multiplied(operator, like, key, num_probes)
    lengths = on_host([length(product) for _, product in pairs])
    return root_mean_square(lengths, result_dtype(like))
