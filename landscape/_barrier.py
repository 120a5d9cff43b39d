"""What a path says about its ends: the barrier, and the mode-connectivity score.

With L(t) the loss along a path from a at t = 0 to b at t = 1,

    height = max_t [L(t) - ((1 - t) L(0) + t L(1))]
    mc = (L(0) + L(1)) / 2 - L(t*),   t* = argmax_t |(L(0) + L(1)) / 2 - L(t)|.

References: Frankle, Dziugaite, Roy, Carbin, *Linear mode connectivity and the lottery
ticket hypothesis* (ICML 2020, arXiv:1912.05671). Yang, Hodgkinson, Theisen, Zou,
Gonzalez, Ramchandran, Mahoney, *Taxonomizing local versus global structure in neural
network loss landscapes* (NeurIPS 2021, arXiv:2107.11228).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from basinax.landscape._vectors import check_concrete, wide_dtype


class Barrier(NamedTuple):
    """How high a path rises between its ends.

    Attributes:
        height: largest excess over the straight interpolation of both ends' losses;
            never negative, as the ends are on the path.
        position: the first t where it is reached; 0 where nothing exceeds.
        maximum: largest loss on the path, ends included.
        mode_connectivity: mc; negative for a barrier, near 0 for a flat path, positive
            where the path passes below both ends.
    """

    height: Float[Array, ""] | PyTree
    position: Float[Array, ""] | PyTree
    maximum: Float[Array, ""] | PyTree
    mode_connectivity: Float[Array, ""] | PyTree


def barrier(path: Any) -> Barrier:
    """Measure the barrier on a path.

    Only as fine as the positions: a hill between two of them is not seen. Along a curve
    that was found by minimisation it is an upper bound of the lowest barrier there is.

    The score mc tells of connection only where the losses at both ends are about equal.
    Where they are not, t* may be an end, and mc half of their difference.

    Args:
        path: result of `linear_path` or `bezier_path`, or anything with fields
            `positions` and `losses`. The positions must hold 0 and 1; what lies outside
            of [0, 1] is left out.

    Returns:
        The barrier in the dtype of the losses, at least float32. All four fields are
        NaN if a loss on the path is NaN, or that of an end is infinite, as a barrier of
        zero would hide it. An infinite loss in between is an infinite barrier. For
        losses that are a tree every field is such a tree.

    Raises:
        ValueError: if 0 or 1 is not among the positions, or losses do not fit them.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import Path, barrier
        >>> path = Path(jnp.array([0.0, 0.5, 1.0]), jnp.array([0.0, 4.0, 2.0]))
        >>> found = barrier(path)
        >>> float(found.height), float(found.position), float(found.maximum)
        (3.0, 0.5, 4.0)
        >>> float(found.mode_connectivity)
        -3.0

    Reference:
        arXiv:1912.05671, arXiv:2107.11228.
    """
    check_concrete((path.positions, path.losses), "barrier")
    t = np.asarray(path.positions, np.float64)
    if t.ndim != 1 or not (t == 0).any() or not (t == 1).any():
        raise ValueError(
            "barrier compares a path with its ends, so positions must hold 0 and 1; "
            f"got {t.tolist()}."
        )
    leaves, treedef = jax.tree.flatten(path.losses)
    for leaf in leaves:
        if jnp.shape(leaf) != t.shape:
            raise ValueError(
                f"losses must be one number per position, of shape {t.shape}, got "
                f"{jnp.shape(leaf)}."
            )
    found = [_barrier(t, leaf) for leaf in leaves]
    return Barrier(*(treedef.unflatten(values) for values in zip(*found, strict=True)))


def _barrier(t: Float[np.ndarray, "n"], losses: Any) -> list[Array]:
    """Measure one barrier, in float64 on the host."""
    inside = (t >= 0) & (t <= 1)
    values = np.asarray(losses, np.float64)[inside]
    t = t[inside]
    first, last = values[t == 0][0], values[t == 1][0]
    with np.errstate(invalid="ignore"):  # of infinite losses
        # Not (1 - t) L(0) + t L(1), which may round above both at an end.
        excess = values - np.where(t < 1, first + t * (last - first), last)
        deviation = 0.5 * (first + last) - values
        numbers = [
            excess.max(),
            t[excess.argmax()],
            values.max(),
            deviation[np.abs(deviation).argmax()],
        ]
    if np.isnan(numbers).any():
        numbers = [np.nan] * len(numbers)
    return [jnp.asarray(number, wide_dtype(losses)) for number in numbers]
