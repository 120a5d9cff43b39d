"""Traces with a low-rank part taken out exactly: Hutch++ and XTrace.

Curvature has few large eigenvalues. A basis Q of the products A ω_1 ... A ω_s with
random ω catches them, and the trace splits into

    tr A = tr Qᵀ A Q + tr (I - Q Qᵀ) A (I - Q Qᵀ),

of which the first term is exact and only the second, small one is sampled. Hutch++
samples it with fresh signs. XTrace reuses each ω_i as the probe of a basis Q_i made
without it, and averages over i:

    t_i = tr Q_iᵀ A Q_i + ω_iᵀ (I - Q_i Q_iᵀ) A (I - Q_i Q_iᵀ) ω_i.

With A Ω = Q R and d_i the columns of R⁻ᵀ, Q_i Q_iᵀ = Q (I - d_i d_iᵀ / ‖d_i‖²) Qᵀ, so
everything follows from the small matrices R, W = Qᵀ Ω and H = Qᵀ A Q.

The t_i share their probes, so they move together, and their spread over √s, the error
XTrace was published with, is too small by a factor of 1.1 to 1.6. Let t_i^(-j) be t_i
made without probe j, for which leaving out two columns is as easy as one. Given all
other probes, t_i^(-j) and t_j^(-i) are independent with mean tr A, and t_i - t_i^(-j)
has mean zero given ω_j too. So only the product of the changes is left of

    c = Cov(t_i, t_j) = E[(t_i - t_i^(-j)) (t_j - t_j^(-i))],

and since the sample variance of the t_i has the mean Var(t_i) - c,

    Var(mean t) = E[sample variance / s + c],

without bias and without further products. A negative c is raised to zero.

References:
    Meyer, Musco, Musco, Woodruff, *Hutch++: optimal stochastic trace estimation*, SOSA
    2021. Epperly, Tropp, Webber, *XTrace: making the most of every sample in stochastic
    trace estimation*, SIAM J. Matrix Anal. Appl. 45, 2024.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Float, PRNGKeyArray, PyTree

from basinax.landscape import _lanczos as lanczos
from basinax.landscape._probes import (
    Estimate,
    make,
    mean,
    on_host,
    quadratic_form,
    result_dtype,
    signs,
    uniform,
)
from basinax.landscape._vectors import check_same, size


class Sketch(NamedTuple):
    """An orthonormal basis of random products.

    Attributes:
        basis: Q, a tree with a leading axis of slots; those of dependent products are
            zero.
        triangle: R, on the host; rows of dependent products are zero.
        rank: number of independent products.
    """

    basis: PyTree
    triangle: Float[np.ndarray, "s s"]
    rank: int


def sketch(
    operator: Callable[[PyTree], PyTree], like: PyTree, key: PRNGKeyArray, slots: int
) -> Sketch:
    """Orthonormalise the products of uniform probes, one by one."""
    basis = lanczos.allocate(like, slots)
    rows, lengths = [], []
    for index in range(slots):
        product = operator(uniform(key, index, like))
        check_same(product, like, "the operator's result")
        column = lanczos.absorb(basis, like, product, index)
        basis = column.basis
        rows.append(column.components)
        lengths.append(column.length)
    diagonal = on_host(lengths)
    rank = int(np.sum(diagonal != 0))  # counts NaN
    return Sketch(basis, on_host(rows).T + np.diag(diagonal), rank)


def projected(
    operator: Callable[[PyTree], PyTree], like: PyTree, basis: PyTree, slots: int
) -> Float[np.ndarray, "s s"]:
    """Compute H = Qᵀ A Q."""
    columns = []
    for index in range(slots):
        vector = optax.tree.cast_like(lanczos.take(basis, index), like)
        columns.append(lanczos.components(basis, operator(vector)))
    matrix = on_host(columns)
    return (matrix + matrix.T) / 2


@jax.jit
def remainder(basis: PyTree, vector: PyTree) -> PyTree:
    """Compute (I - Q Qᵀ) v in the dtypes of v."""
    return optax.tree.cast_like(lanczos.complement(basis, vector), vector)


def hutch_plus_plus(
    operator: Callable[[PyTree], PyTree],
    like: PyTree,
    key: PRNGKeyArray,
    num_probes: int,
) -> Estimate:
    """Spend a third of the products on Q, a third on H and the rest on the sample."""
    slots = min(num_probes // 3, size(like))
    sketch_key, sample_key = jax.random.split(key)
    found = sketch(operator, like, sketch_key, slots)
    exact = np.trace(projected(operator, like, found.basis, slots))
    dtype = result_dtype(like)
    if found.rank == size(like):
        return make(exact, exact * 0, dtype)
    samples = []
    for index in range(num_probes - 2 * slots):
        probe = remainder(found.basis, signs(sample_key, index, like))
        samples.append(quadratic_form(probe, operator(probe)))
    return mean(exact + on_host(samples), dtype)


def leave_out(
    triangle: Float[np.ndarray, "s s"],
    overlaps: Float[np.ndarray, "s s"],
    matrix: Float[np.ndarray, "s s"],
) -> tuple[Float[np.ndarray, "s"], float]:
    """Compute the estimates of XTrace and how much they move together.

    Args:
        triangle: R.
        overlaps: W = Qᵀ Ω.
        matrix: H = Qᵀ A Q.

    Returns:
        The t_i, whose mean is the estimate, and c, the covariance of two of them.
    """
    count = len(matrix)
    normals = np.linalg.inv(triangle).T
    normals /= np.linalg.norm(normals, axis=0)
    # A Ω lies in Q, so what a probe has outside of Q is known from R: there
    # ωᵀ (I - Q Qᵀ) A (I - Q Qᵀ) ω = -wᵀ (r - H w).
    pulls = triangle - matrix @ overlaps
    outside = -np.sum(overlaps * pulls, 0)
    without = np.empty((count, count))  # t_j without probe i, and t_i itself
    for i in range(count):
        first = normals[:, i, None]
        # Column j completes an orthonormal pair that spans d_i and d_j.
        second = normals - first * (first.T @ normals)
        lengths = np.linalg.norm(second, axis=0)
        second /= np.where(np.arange(count) == i, np.inf, lengths)
        # Without d_i and d_j the trace inside Q loses this much, and the probe j gains
        # the part u_j outside.
        lost = first.T @ matrix @ first + np.sum(second * (matrix @ second), 0)
        u = first * (first.T @ overlaps) + second * np.sum(second * overlaps, 0)
        form = outside + 2 * np.sum(u * pulls, 0) + np.sum(u * (matrix @ u), 0)
        without[i] = np.trace(matrix) - lost[0] + form
    single = np.diagonal(without)
    changes = single[None] - without
    return single, np.sum(changes * changes.T) / (count * (count - 1))


def x_trace(
    operator: Callable[[PyTree], PyTree],
    like: PyTree,
    key: PRNGKeyArray,
    num_probes: int,
) -> Estimate:
    """Spend half of the products on Q and half on H."""
    slots = min(num_probes // 2, size(like))
    found = sketch(operator, like, key, slots)
    matrix = projected(operator, like, found.basis, slots)
    dtype = result_dtype(like)
    if not np.isfinite(found.triangle).all() or not np.isfinite(matrix).all():
        return make(np.nan, np.nan, dtype)
    if found.rank == size(like):
        return make(np.trace(matrix), 0, dtype)
    if found.rank < slots:
        # Q holds the range of A but for eigenvalues too small to be told from noise.
        # At most P of them of that size remain, each at about |A ω| / √P times it.
        noise = lanczos.BREAKDOWN * lanczos.rounding_unit(found.basis)
        products = np.linalg.norm(found.triangle, axis=0)
        return make(
            np.trace(matrix), noise * products.max() * np.sqrt(size(like)), dtype
        )
    overlaps = on_host(
        [
            lanczos.components(found.basis, uniform(key, index, like))
            for index in range(slots)
        ]
    ).T
    single, covariance = leave_out(found.triangle, overlaps, matrix)
    variance = single.var(ddof=1) / slots + max(covariance, 0.0)
    return make(single.mean(), np.sqrt(variance), dtype)
