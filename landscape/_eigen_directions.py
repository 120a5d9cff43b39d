"""Eigenvectors of the curvature as directions: the steepest walls of the valley.

Along a unit eigenvector u of the Hessian the loss curves by its eigenvalue,

    d²/dt² L(w + t u) = uᵀ H u = λ    at t = 0,

whereas along a random unit vector the mean curvature is tr(H) / P.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import PRNGKeyArray, PyTree

from basinax.landscape._eigenpairs import eigenpairs
from basinax.landscape._lanczos import take


def eigen_directions(
    operator: Callable[[PyTree], PyTree],
    like: PyTree,
    num: int = 2,
    *,
    key: PRNGKeyArray,
    **options: Any,
) -> tuple[PyTree, ...]:
    """Find unit eigenvectors as directions for `line` and `plane`, best first.

    Axes that do not depend on a draw, and the only ones in which the curvature of the
    picture is known: a second difference along the first axis is the sharpness. They
    also suit networks with batch normalisation, where filter-normalised directions
    mislead. For the eigenvalues, residuals and convergence call `eigenpairs`, whose
    `vectors` are these directions stacked.

    Args:
        operator: symmetric linear function on trees shaped like `like`, for instance
            from `hessian`.
        like: tree of the parameters; only structure, shapes, dtypes and placement
            matter.
        num: number of directions.
        key: random key for the start vector.
        **options: those of `eigenpairs`, such as `which="SA"` for directions of
            negative curvature, `tol` or `max_matvecs`.

    Returns:
        A tuple of `num` orthonormal trees like the parameters in at least float32.
        Their signs are arbitrary.

    Raises:
        ValueError: for what `eigenpairs` refuses.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import eigen_directions, hessian
        >>> w = jnp.zeros(3)
        >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 5.0, 2.0]) * w**2)
        >>> first, second = eigen_directions(hessian(loss, w), w, key=jax.random.key(0))
        >>> jnp.abs(first).round(3).tolist(), jnp.abs(second).round(3).tolist()
        ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0])

    Reference:
        arXiv:1912.07145 (PyHessian), section 4.
    """
    vectors = eigenpairs(operator, like, num, key=key, **options).vectors
    return tuple(take(vectors, index) for index in range(num))
