"""Upper bound of the distance to the minima of several sources, from gradients alone.

Where source i is the quadratic L_i = (w - w_i)ᵀ H_i (w - w_i) / 2 + const, its gradient
is g_i = H_i (w - w_i), so that with μ_i the smallest eigenvalue of H_i

    1/n Σ_i ‖w - w_i‖² = 1/n Σ_i ‖H_i⁻¹ g_i‖² <= 1/n Σ_i ‖g_i‖² / μ_i².

With one μ for all this is M/n Σ ‖g_i‖², M = max ‖H_i⁻¹‖². At a minimum of the mean loss
Σ_i g_i = 0 turns it into -2M/n Σ_{i<j} ⟨g_i, g_j⟩: the more gradients agree, the closer
the minima.

Reference: Chen et al., *Nexus*, arXiv:2604.09258, on closeness and the similarity of
gradients.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from basinax.landscape._stacked import check_rows, row_lengths


def closeness_bound(
    task_grads: PyTree[Float[Array, "n ..."]],
    curvature: Float[Array, "*n"] | float,
) -> Float[Array, ""]:
    """Bound the mean squared distance to the minima of n sources from above.

    It takes no products with Hessians, can be traced, and tells how the distance would
    scale; expect it to be several times larger than what `closeness` finds, as
    gradients rarely lie along the flattest direction.

    The bound holds for quadratics, and near minima. It is void where a Hessian has
    eigenvalues that are zero or negative, as those of networks do. Two ways out:

    - damped, for the minima of L_i(v) + λ/2 ‖v - w‖²: pass μ + λ;
    - pseudo-inverse, for positive semidefinite Hessians that map no direction of the
      gradients to zero: the smallest eigenvalue that is not zero bounds the distance to
      the nearest of the minima.

    Args:
        task_grads: tree of arrays (n, ...), the gradient of each source at w. None
            leaves are skipped.
        curvature: μ, a lower bound of the eigenvalues of all Hessians, or one for each,
            shape (n,); for instance from `eigenpairs(..., which="SA")`, whose values
            come from above and so must have converged.

    Returns:
        The bound, in at least float32; infinite if a curvature is zero or negative,
        except that a gradient of zero adds nothing. NaN if an entry is NaN.

    Raises:
        ValueError: for a tree without arrays, leaves that are not real floating point,
            leading axes that differ, no source at all, or a curvature that is neither
            one number nor one per source.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import closeness_bound
        >>> minima = jnp.array([[1.0, 0.0], [-1.0, 2.0]])
        >>> grads = -2 * minima  # of L_i = ‖w - w_i‖² at w = 0
        >>> float(closeness_bound(grads, 2.0))  # (1 + 5) / 2
        3.0

    Reference:
        arXiv:2604.09258.
    """
    check_rows(task_grads, 1, "closeness_bound")
    count = jnp.shape(jax.tree.leaves(task_grads)[0])[0]
    if jnp.shape(curvature) not in ((), (count,)):
        raise ValueError(
            f"curvature must be one number or one per source, {count}, got shape "
            f"{jnp.shape(curvature)}."
        )
    return _bound(task_grads, jnp.asarray(curvature))


@jax.jit
def _bound(stacked: PyTree, curvature: Array) -> Float[Array, ""]:
    lengths = row_lengths(stacked)
    curvature = jnp.broadcast_to(curvature.astype(lengths.dtype), lengths.shape)
    flat = curvature <= 0
    distance = jnp.where(flat, jnp.inf, lengths / jnp.where(flat, 1, curvature))
    return jnp.mean(jnp.where(lengths == 0, 0, distance) ** 2)
