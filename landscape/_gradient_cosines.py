"""Angles between the gradients of several sources, tasks or micro-batches.

    cos_st = ⟨g_s, g_t⟩ / (‖g_s‖ ‖g_t‖)

At a stationary point of the mean loss Σ_t g_t = 0, so that -2 Σ_{s<t} ⟨g_s, g_t⟩ equals
Σ_t ‖g_t‖²: the inner products tell how far the sources are from agreement, but of the
cosines only a constant is left, -1 for two sources and -1/(T - 1) on average over T of
equal norm. Hence the norms are returned beside the cosines.

Reference: Yu et al., *Gradient surgery for multi-task learning*, NeurIPS 2020,
arXiv:2001.06782.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from basinax.landscape._stacked import check_rows, unit_rows


class GradientCosines(NamedTuple):
    """Angles between T gradients, and their lengths.

    Attributes:
        cosines: shape (T, T), symmetric; 1 on the diagonal, and 0 in the row and column
            of a gradient that vanishes, its diagonal entry included.
        norms: length of each gradient, shape (T,).
        mean: mean cosine of the T (T - 1) pairs.
        conflict: share of the pairs whose cosine is negative.
    """

    cosines: Float[Array, "T T"]
    norms: Float[Array, "T"]
    mean: Float[Array, ""]
    conflict: Float[Array, ""]


def gradient_cosines(task_grads: PyTree[Float[Array, "T ..."]]) -> GradientCosines:
    """Compute the cosines between all pairs of gradients, all leaves as one vector.

    For gradients of many tasks pass the shared part, `grads.shared` of `TaskGrads`; for
    sources, `jax.vmap(jax.grad(loss), (None, 0))(params, batches)`. For the cosines of
    each leaf use `jax.tree.map(gradient_cosines, grads)`.

    Cosines say nothing about size, see `gradient_variance`; near a minimum of the mean
    loss they must be negative on average, however well the sources agree.

    Args:
        task_grads: tree of arrays (T, ...), T >= 2. None leaves are skipped.

    Returns:
        The cosines, in at least float32, of gradients of any size. A gradient with an
        entry that is not finite has NaN in its row and column, hence in the mean.

    Raises:
        ValueError: for a tree without arrays, leaves that are not real floating point,
            leading axes that differ, or fewer than two gradients.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import gradient_cosines
        >>> grads = {"w": jnp.array([[3.0], [0.0]]), "b": jnp.array([[0.0], [2.0]])}
        >>> result = gradient_cosines(grads)
        >>> result.cosines.tolist(), result.norms.tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [3.0, 2.0])

    Reference:
        arXiv:2001.06782.
    """
    check_rows(task_grads, 2, "gradient_cosines")
    return _cosines(task_grads)


@jax.jit
def _cosines(stacked: PyTree) -> GradientCosines:
    rows, scale = unit_rows(stacked)
    gram = functools.reduce(jnp.add, map(_inner_products, jax.tree.leaves(rows)))
    lengths = jnp.sqrt(jnp.diagonal(gram))
    safe = jnp.where(lengths == 0, 1, lengths)
    cosines = jnp.clip(gram / (safe[:, None] * safe[None, :]), -1, 1)
    itself = jnp.eye(len(scale), dtype=bool)
    # Not x / √x² but 1, unless it is 0 or no number.
    cosines = jnp.where(itself, (lengths / safe)[None, :], cosines)
    cosines = (cosines + cosines.T) / 2  # a blocked product differs in the last bit
    pairs = cosines.size - len(scale)
    mean = jnp.sum(cosines, where=~itself) / pairs
    # So that a NaN does not pass for agreement.
    negative = jnp.where(jnp.isnan(cosines), cosines, cosines < 0)
    conflict = jnp.sum(negative, where=~itself) / pairs
    return GradientCosines(cosines, scale * lengths, mean, conflict)


def _inner_products(rows: Float[Array, "T ..."]) -> Float[Array, "T T"]:
    mesh = jax.typeof(rows).sharding.mesh
    typed = AxisType.Explicit in mesh.axis_types
    axes = tuple(range(1, rows.ndim))
    # On an Explicit mesh a contraction over sharded axes must name its result.
    return jax.lax.dot_general(
        rows,
        rows,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=NamedSharding(mesh, PartitionSpec()) if typed else None,
    )
