"""Coherence: how much a step along the mean gradient helps the average example.

    α = ‖E g‖² / E ‖g‖² = E ⟨g_i, g_j⟩ / E ⟨g_i, g_i⟩,    m-coherence = n α

with i and j drawn independently. A small step along the mean gradient lowers the loss
of an example by α times as much, on average, as a step along its own gradient would.

Reference: Chatterjee and Zielinski, *Making coherence out of nothing at all: measuring
the evolution of gradient alignment*, arXiv:2008.01217.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from basinax.landscape._gradient_deviations import GradientDeviations, as_deviations


class Coherence(NamedTuple):
    """Agreement of n gradients.

    Attributes:
        alpha: ‖ḡ‖² over the mean of ‖g_i‖², in [0, 1].
        m_coherence: n times that: about the number of examples that a step for one of
            them helps. n if all gradients are the same, 1 if they are orthogonal, below
            1 if they cancel.
    """

    alpha: Float[Array, ""]
    m_coherence: Float[Array, ""]


def coherence(
    per_example_grads: PyTree[Float[Array, "n ..."]] | GradientDeviations,
) -> Coherence:
    """Measure how much per-example gradients agree, at a cost linear in their number.

    For n independent gradients of zero mean the m-coherence is about 1, whatever n is;
    it is the scale on which to compare batches of different sizes. 1/α is known as
    gradient diversity.

    For the coherence of each leaf use `jax.tree.map(coherence, per_example_grads)`. Of
    gradients that do not fit in memory pass `gradient_deviations(...)` instead.

    Args:
        per_example_grads: tree of arrays (n, ...), such as
            `jax.vmap(jax.grad(loss), (None, 0))(params, batch)`, or deviations. None
            leaves are skipped.

    Returns:
        The coherence of gradients of any size, in at least float32; 0 if all vanish,
        NaN if an entry is not finite.

    Raises:
        ValueError: for a tree without arrays, leaves that are not real floating point,
            leading axes that differ, or no gradient at all.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import coherence
        >>> same, orthogonal = jnp.ones((4, 3)), jnp.eye(4)
        >>> float(coherence(same).m_coherence), float(coherence(orthogonal).m_coherence)
        (4.0, 1.0)

    Reference:
        arXiv:2008.01217.
    """
    return _coherence(as_deviations(per_example_grads, 1, "coherence"))


@jax.jit
def _coherence(deviations: GradientDeviations) -> Coherence:
    (mean, lengths, _), _ = deviations.in_units()
    # Mean ‖g‖² = ‖ḡ‖² + mean ‖d‖².
    total = mean**2 + jnp.mean(lengths**2)
    alpha = mean**2 / jnp.where(total == 0, 1, total)
    return Coherence(alpha, len(lengths) * alpha)
