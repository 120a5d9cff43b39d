"""Averages of functions over the spectrum: stochastic Lanczos quadrature.

Lanczos from a unit vector v gives T = Vᵀ A V, and its eigenvalues θ_i with the squared
first entries w_i of its eigenvectors are the Gauss quadrature of the spectral measure
of v,

    vᵀ f(A) v ≈ Σ_i w_i f(θ_i),

exact for polynomials of degree 2 m - 1 after m steps. For v = z / √P with random signs
z the mean of vᵀ f(A) v is tr f(A) / P, the average of f over all eigenvalues. The
weights are those of the first row alone, not of the whole matrix of eigenvectors, and
they sum to one.

References:
    Golub and Meurant, *Matrices, moments and quadrature*, 1994. Ubaru, Chen, Saad,
    *Fast estimation of tr(f(A)) via stochastic Lanczos quadrature*, SIAM J. Matrix
    Anal. Appl. 38, 2017.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray, PyTree

from basinax.landscape._lanczos import absorb, allocate, check_memory, extend
from basinax.landscape._probes import (
    Estimate,
    check,
    check_method,
    mean,
    result_dtype,
    signs,
)
from basinax.landscape._vectors import size

# Products between looks at β: each look waits for the device.
_LOOK = 8


def gauss(
    coefficients: Float[np.ndarray, "steps 2"], length: int
) -> tuple[Float[np.ndarray, "length"], Float[np.ndarray, "length"]]:
    """Turn α and β of a chain into ascending nodes, and weights that sum to one.

    A chain that broke down after j steps has j nodes and its quadrature is exact; the
    last one is repeated with weight zero. NaN anywhere makes everything NaN.
    """
    alphas, betas = coefficients.T
    if not np.isfinite(coefficients).all():
        return np.full(length, np.nan), np.full(length, np.nan)
    broken = np.flatnonzero(betas == 0)
    order = broken[0] + 1 if len(broken) else len(alphas)
    off = np.diag(betas[: order - 1], 1)
    nodes, vectors = np.linalg.eigh(np.diag(alphas[:order]) + off + off.T)
    pad = (0, length - order)
    weights = vectors[0] ** 2 / np.sum(vectors[0] ** 2)
    return np.pad(nodes, pad, mode="edge"), np.pad(weights, pad)


def quadrature(
    operator: Callable[[PyTree], PyTree],
    like: PyTree,
    key: PRNGKeyArray,
    num_probes: int,
    num_steps: int,
    max_bytes: int | None = None,
) -> tuple[Float[np.ndarray, "probes steps"], Float[np.ndarray, "probes steps"]]:
    """Run one fully reorthogonalised chain per probe, all in the same memory.

    Args:
        operator: symmetric linear function on trees shaped like `like`.
        like: tree of the parameters, checked by the caller.
        key: random key.
        num_probes: number of chains.
        num_steps: products per chain; a chain ends early when it is exact.
        max_bytes: most memory for the basis.

    Returns:
        Nodes and weights, on the host in float64.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    steps = min(num_steps, size(like))
    check_memory(like, steps + 1, max_bytes, "take fewer num_steps and more num_probes")
    basis = allocate(like, steps + 1)
    nothing = jnp.zeros((), result_dtype(like))
    pairs = []
    for probe in range(num_probes):
        basis, vector, *_ = absorb(basis, like, signs(key, probe, like), 0)
        scale, coefficients = nothing, []
        for index in range(steps):
            step = extend(basis, like, operator(vector), index, scale)
            basis, vector, scale = step.basis, step.vector, step.scale
            coefficients.append(step.coefficients)
            if index % _LOOK == _LOOK - 1 and not step.coefficients[1] > 0:
                break
        chain = np.asarray(jax.device_get(coefficients), np.float64)
        pairs.append(gauss(chain, num_steps))
    nodes, weights = zip(*pairs, strict=True)
    return np.stack(nodes), np.stack(weights)


def averages(
    function: Callable[[np.ndarray], np.ndarray],
    nodes: Float[np.ndarray, "probes steps"],
    weights: Float[np.ndarray, "probes steps"],
) -> Float[np.ndarray, "probes"]:
    """Integrate a function against the measure of each probe."""
    with np.errstate(all="ignore"):  # a pole may lie at a node without weight
        values = np.asarray(function(nodes), np.float64)
        return np.sum(np.where(weights == 0, 0, weights * values), axis=1)


def log_determinant(
    operator: Callable[[PyTree], PyTree],
    like: PyTree,
    damping: float = 0.0,
    *,
    key: PRNGKeyArray,
    num_probes: int,
    num_steps: int = 32,
    method: Literal["lanczos"] = "lanczos",
) -> Estimate:
    """Estimate log det(A + δ I) of a positive semidefinite operator.

    The volume of the Laplace posterior: with A a Gauss-Newton or Fisher matrix and δ
    the precision of the prior, the evidence contains minus half of it.

    Args:
        operator: symmetric linear function on trees shaped like `like`. It is called
            `num_probes * num_steps` times from Python.
        like: tree of the parameters; only structure, shapes, dtypes and placement
            matter.
        damping: δ >= 0, in units of the eigenvalues.
        key: random key; equal keys give equal probes.
        num_probes: number of random vectors; the standard error falls with its root.
        num_steps: Lanczos steps per vector, and the number of vectors the size of the
            parameters that are held. The quadrature error, which the standard error
            does not know of, falls geometrically, at the rate 1 - O(√(δ / λ_max)).
        method: "lanczos", the only one.

    Returns:
        The estimate. It is NaN where a Ritz value lies below -δ, because then A + δ I
        has no positive determinant to take the logarithm of: a Hessian needs damping
        above its most negative eigenvalue. A singular A without damping gives minus
        infinity or, by rounding, NaN.

    Raises:
        ValueError: for negative damping, an unknown method, fewer than one probe or
            step, a `like` that is empty, traced or not real floating point, or an
            operator that returns another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import log_determinant
        >>> scale = jnp.array([1.0, 2.0, 3.0])
        >>> found = log_determinant(
        ...     lambda v: scale * v, scale, 1.0, key=jax.random.key(0), num_probes=2
        ... )
        >>> round(float(jnp.exp(found.value)), 3)  # (1 + 1) (2 + 1) (3 + 1)
        24.0

    Reference: Ubaru, Chen, Saad 2017.
    """
    check_method(method, ("lanczos",))
    check(like, num_probes, "log_determinant")
    if not damping >= 0:
        raise ValueError(f"damping must be at least 0, got {damping}.")
    nodes, weights = quadrature(operator, like, key, num_probes, num_steps)
    samples = size(like) * averages(lambda x: np.log(x + damping), nodes, weights)
    return mean(samples, result_dtype(like))


def effective_dimension(
    operator: Callable[[PyTree], PyTree],
    like: PyTree,
    damping: float,
    *,
    key: PRNGKeyArray,
    num_probes: int,
    num_steps: int = 32,
    method: Literal["lanczos"] = "lanczos",
) -> Estimate:
    """Estimate Σ λ / (λ + δ), the number of directions that the data determine.

    Of all parameters, those along which the curvature exceeds δ count as one, those
    along which it is far below as nothing. Meant for positive semidefinite operators;
    on a Hessian choose δ well above its most negative eigenvalue, as there is a pole
    at -δ.

    Args:
        operator: symmetric linear function on trees shaped like `like`. It is called
            `num_probes * num_steps` times from Python.
        like: tree of the parameters; only structure, shapes, dtypes and placement
            matter.
        damping: δ > 0, in units of the eigenvalues.
        key: random key; equal keys give equal probes.
        num_probes: number of random vectors; the standard error falls with its root.
        num_steps: Lanczos steps per vector, and the number of vectors the size of the
            parameters that are held. The quadrature error, which the standard error
            does not know of, falls geometrically, at the rate 1 - O(√(δ / λ_max)).
        method: "lanczos", the only one.

    Returns:
        The estimate, between 0 and the number of parameters for a semidefinite A.

    Raises:
        ValueError: for damping that is not positive, an unknown method, fewer than one
            probe or step, a `like` that is empty, traced or not real floating point,
            or an operator that returns another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import effective_dimension
        >>> scale = jnp.array([1.0, 3.0, 0.0])
        >>> found = effective_dimension(
        ...     lambda v: scale * v, scale, 1.0, key=jax.random.key(0), num_probes=2
        ... )
        >>> round(float(found.value), 4)  # 1 / 2 + 3 / 4 + 0
        1.25

    Reference: MacKay, *Bayesian model comparison and backprop nets*, 1991.
    """
    check_method(method, ("lanczos",))
    check(like, num_probes, "effective_dimension")
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}.")
    nodes, weights = quadrature(operator, like, key, num_probes, num_steps)
    samples = size(like) * averages(lambda x: x / (x + damping), nodes, weights)
    return mean(samples, result_dtype(like))
