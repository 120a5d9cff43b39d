"""Extreme eigenpairs of a curvature operator: Lanczos with thick restarts.

Lanczos projects A onto a Krylov space, T = Vᵀ A V. With T s = θ s the Ritz pair
(θ, u = V s) has a residual that needs no further product,

    ‖A u - θ u‖ = |β_m s_m|,

and an eigenvalue of A lies within that distance of θ. When the basis is full, its best
Ritz vectors and the residual direction v_{m+1} become the new basis, in which T is
diagonal but for one row β_m s_m: memory stays bounded and nothing useful is lost. T is
small and is solved on the host in float64.

Reference: Wu and Simon, *Thick-restart Lanczos method for large symmetric eigenvalue
problems*, SIAM J. Matrix Anal. Appl. 22, 2000.
"""

import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from basinax.landscape._lanczos import (
    allocate,
    check_memory,
    combine,
    compress,
    extend,
    rounding_unit,
    start,
)
from basinax.landscape._vectors import (
    check_concrete,
    check_vector,
    random_bits,
    size,
)

# What to sort by, best first.
_RANKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "LA": lambda values: -values,
    "SA": lambda values: values,
    "LM": lambda values: -np.abs(values),
}

# Error of a chain's best Ritz value, in units of its spread, at which it is trusted to
# be the best there is.
_SETTLED = 0.02


class Eigenpairs(NamedTuple):
    """Eigenpairs of a symmetric operator, best first.

    Attributes:
        values: eigenvalues; for a Hessian in units of the loss per squared parameter.
        vectors: unit eigenvectors: a tree shaped like the parameters with a leading
            axis k on every leaf, in at least float32. Their signs are arbitrary.
        residuals: ‖A u - λ u‖ per pair in exact arithmetic, in units of `values`;
            rounding in the operator adds to it.
        matvecs: number of products spent.
        converged: whether each residual is below the tolerance.
    """

    values: Float[Array, "k"]
    vectors: PyTree
    residuals: Float[Array, "k"]
    matvecs: int
    converged: Bool[Array, "k"]


class _Ritz(NamedTuple):
    """Eigenpairs of the projected matrix; `order` lists them best first."""

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    limits: np.ndarray
    converged: np.ndarray
    ranks: np.ndarray
    order: np.ndarray


def _solve(
    projected: np.ndarray,
    block: int,
    beta: float,
    ignored: float,
    which: str,
    tol: float,
    eps: float,
) -> _Ritz:
    """Diagonalise T, whose first `block` rows are decoupled from the others.

    `ignored` is a bound of what the decoupling left out; every residual owns up to it.
    """
    count = len(projected)
    values, vectors = np.empty(count), np.zeros((count, count))
    for part in (slice(0, block), slice(block, count)):
        values[part], vectors[part, part] = np.linalg.eigh(projected[part, part])
    residuals = np.hypot(beta * vectors[-1], ignored)
    # A residual below rounding means nothing, so no tolerance asks for less.
    limits = np.maximum(tol * np.abs(values), eps * np.abs(values).max())
    ranks = _RANKS[which](values)
    order = np.argsort(ranks, kind="stable")
    return _Ritz(values, vectors, residuals, limits, residuals <= limits, ranks, order)


def _finished(
    ritz: _Ritz, k: int, block: int, beta: float, tol: float, copies: bool
) -> bool:
    """Decide whether the k best Ritz pairs are the wanted eigenpairs."""
    wanted = ritz.order[:k]
    if len(wanted) < k or not ritz.converged[wanted].all():
        return False
    if beta > 0 and block == 0:
        return not copies
    # A chain that broke down has exhausted an invariant subspace, which holds each of
    # its eigenvalues once. A new chain, orthogonal to it, may hold further copies but
    # nothing better than the best of the latest one; so that decides, once it is known
    # well on the scale of its chain.
    chain = ritz.values[block:]
    best = ritz.order[ritz.order >= block][0]
    error = ritz.residuals[best]
    slack = tol * np.abs(ritz.values[wanted[-1]])
    better = ritz.ranks[best] - error < ritz.ranks[wanted[-1]] - slack
    settled = error <= _SETTLED * np.ptp(chain) or ritz.converged[best]
    return bool(settled and (not better or best == wanted[-1]))


def _ignored_by_locking(
    ritz: _Ritz, k: int, block: int, beta: float, ignored: float
) -> float | None:
    """Bound what would be ignored if the k best Ritz vectors were locked.

    Locked vectors U are left alone while a new chain searches their complement. Its
    projected matrix lacks Uᵀ A v, whose norm is at most ‖A U - U θ‖.

    Returns:
        The bound, or None while it is too large for the tolerance or while the latest
        chain has nothing to contribute.
    """
    wanted, latest = ritz.order[:k], ritz.order[ritz.order >= block]
    if len(wanted) < k or latest[0] not in wanted:
        return None
    total = float(np.hypot(ignored, np.linalg.norm(beta * ritz.vectors[-1, wanted])))
    return total if total <= 0.7 * ritz.limits[wanted].min() else None


def _restart(
    projected: np.ndarray, ritz: _Ritz, kept: int, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rewrite T in place for a basis of the best Ritz vectors and v_{m+1}.

    Returns:
        Which Ritz vectors are kept, and the new basis in terms of the old one.
    """
    keep = np.sort(ritz.order[:kept])  # the decoupled ones stay first
    weights = np.zeros((len(projected), kept + 1))
    weights[:-1, :kept] = ritz.vectors[:, keep]
    weights[-1, kept] = 1
    projected[:] = 0
    projected[range(kept), range(kept)] = ritz.values[keep]
    projected[kept, :kept] = projected[:kept, kept] = beta * ritz.vectors[-1, keep]
    return keep, weights


def _check_sizes(k: int, dimension: int, limit: int, basis_size: int | None) -> None:
    if not 1 <= k <= dimension:
        raise ValueError(
            f"k must lie between 1 and the number of parameters, {dimension}; got {k}."
        )
    if limit < k:
        raise ValueError(
            f"max_matvecs must be at least k = {k}, one product per pair; got {limit}."
        )
    need = min(k + 2, dimension)
    if basis_size is not None and basis_size < need:
        raise ValueError(
            f"basis_size must be at least {need}, that is k + 2 or all parameters; "
            f"got {basis_size}."
        )


def eigenpairs(
    operator: Callable[[PyTree], PyTree],
    like: PyTree,
    k: int,
    *,
    key: PRNGKeyArray,
    which: Literal["LA", "SA", "LM"] = "LA",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    basis_size: int | None = None,
    copies: bool = False,
    max_bytes: int | None = None,
) -> Eigenpairs:
    """Find the k most extreme eigenpairs of a symmetric operator.

    The largest eigenvalue of the Hessian is the sharpness that bounds the stable
    learning rate. On small trained networks it takes 5 to 10 products, the five
    largest take 13 to 20, and the most negative one, which is small and meets a
    tolerance relative to itself, 30 to 70. The loop runs in Python over compiled steps
    and stops as soon as the residuals allow. The error of an eigenvalue is at most its
    residual, and of the order of the square where the eigenvalue stands alone, so the
    default tolerance usually gives six digits.

    An eigenvalue of multiplicity above one is found once, as by every Krylov method
    with one start vector, unless the operator has so few distinct eigenvalues that a
    Krylov space is exhausted; then the search goes on in its complement and finds the
    copies too. With `copies=True` it always does.

    Args:
        operator: symmetric linear function on trees shaped like `like`, for instance
            from `hessian`. It is called once per step from Python; wrap one of your
            own in `jax.jit`, or let it stream batches in an ordinary loop.
        like: tree of the parameters; only structure, shapes, dtypes and placement
            matter.
        k: number of pairs.
        key: random key for the start vector.
        which: "LA" for the largest, "SA" for the smallest (most negative), "LM" for
            those of largest magnitude.
        tol: largest residual relative to |λ|. Anything below the rounding of the
            arithmetic, eps · max|λ|, is raised to it.
        max_matvecs: most products to spend; the default is 200 or 10 per pair.
        basis_size: most vectors to hold, each the size of the parameters in at least
            float32; half as many more are needed during a restart. Smaller saves
            memory and costs products. The default is 32, or 2 k + 16 if larger, and
            never above the number of parameters.
        copies: once the pairs have converged, search on from a random vector orthogonal
            to them until that finds nothing better, so that repeated eigenvalues are
            returned as often as they occur. Each search costs about as much as the
            first one. Networks with symmetries can have such; generic ones do not.
        max_bytes: refuse to start if all vectors held at once, in basis and restart,
            would take more memory than this.

    Returns:
        The pairs, best first, with residuals and convergence flags. If an operator
        returns NaN or infinity everything is NaN and nothing is converged.

    Raises:
        ValueError: for an unknown `which`, sizes out of range, too little memory, a
            `like` that is empty, traced or not real floating point, or an operator that
            returns another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import eigenpairs, hessian
        >>> w = jnp.zeros(4)
        >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([5.0, -2.0, 3.0, 1.0]) * w**2)
        >>> top = eigenpairs(hessian(loss, w), w, 2, key=jax.random.key(0))
        >>> [round(float(value), 3) for value in top.values], top.converged.tolist()
        ([5.0, 3.0], [True, True])
    """
    if which not in _RANKS:
        raise ValueError(f"which must be one of {tuple(_RANKS)}, got {which!r}.")
    check_vector(like, "like")
    check_concrete(like, "eigenpairs")
    dimension = size(like)
    limit = max(200, 10 * k) if max_matvecs is None else max_matvecs
    _check_sizes(k, dimension, limit, basis_size)
    capacity = min(dimension, basis_size or max(32, 2 * k + 16))
    kept = k + (capacity - k) // 2
    advice = "lower basis_size, to k + 2 at the least, which costs products"
    check_memory(like, capacity + kept + 2, max_bytes, advice)

    basis = allocate(like, capacity + 1)
    dtype = jnp.result_type(*jax.tree.leaves(basis))
    eps = rounding_unit(basis)
    basis, vector = start(basis, like, random_bits(key, like), 0)
    scale = jnp.zeros((), dtype)
    projected = np.zeros((capacity + 1, capacity + 1))
    count, block, ignored = 0, 0, 0.0
    for matvecs in itertools.count(1):
        step = extend(basis, like, operator(vector), count, scale)
        basis, vector, scale = step.basis, step.vector, step.scale
        alpha, beta = map(float, jax.device_get(step.coefficients))
        if not np.isfinite([alpha, beta]).all():
            nan = jnp.full((capacity + 1, k), jnp.nan, dtype)
            return Eigenpairs(
                nan[0], combine(basis, nan), nan[0], matvecs, jnp.zeros(k, bool)
            )
        projected[count, count] = alpha
        count += 1
        last = count == dimension or matvecs == limit
        # Solving T at every step would come to dominate for large bases.
        if last or beta == 0 or count == capacity or count % (1 + count // 32) == 0:
            part = projected[:count, :count]
            ritz = _solve(part, block, beta, ignored, which, tol, eps)
            if last or _finished(ritz, k, block, beta, tol, copies):
                break
            if copies and beta > 0:
                bound = _ignored_by_locking(ritz, k, block, beta, ignored)
                if bound is not None:
                    ignored, beta = bound, 0.0
                    part = projected[: count + 1, : count + 1]
                    weights = np.zeros((capacity + 1, k + 1))
                    _, weights[: count + 1] = _restart(part, ritz, k, beta)
                    basis = compress(basis, jnp.asarray(weights, dtype))
                    count = k
        block = block if beta > 0 else count
        if count == capacity:
            keep, weights = _restart(projected, ritz, kept, beta)
            basis = compress(basis, jnp.asarray(weights, dtype))
            count, block = kept, int(np.sum(keep < block))
        elif beta > 0:
            projected[count, count - 1] = projected[count - 1, count] = beta
        if beta == 0:
            bits = random_bits(jax.random.fold_in(key, matvecs), like)
            basis, vector = start(basis, like, bits, count)

    wanted = ritz.order[:k]
    weights = np.zeros((capacity + 1, k))
    weights[:count] = ritz.vectors[:, wanted]
    return Eigenpairs(
        jnp.asarray(ritz.values[wanted], dtype),
        combine(basis, jnp.asarray(weights, dtype)),
        jnp.asarray(ritz.residuals[wanted], dtype),
        matvecs,
        jnp.asarray(ritz.converged[wanted]),
    )
