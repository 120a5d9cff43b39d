"""The loss on the straight line between two trees of parameters.

    L((1 - t) a + t b)

A hill in between, the barrier, is what separates two minima that are trained alone;
two runs that share their first steps often have none.

Reference: Goodfellow, Vinyals, Saxe, *Qualitatively characterizing neural network
optimization problems* (ICLR 2015, arXiv:1412.6544). Frankle, Dziugaite, Roy, Carbin,
*Linear mode connectivity and the lottery ticket hypothesis* (ICML 2020,
arXiv:1912.05671).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, ArrayLike, Float, PyTree

from basinax.landscape._path_point import check_ends, check_positions, on_line
from basinax.landscape._points import Batches, evaluate_points
from basinax.landscape._vectors import check_concrete


class Path(NamedTuple):
    """Losses along a path.

    Attributes:
        positions: t, 0 at the start and 1 at the end.
        losses: loss at every position, or a tree of such arrays if the loss function
            returned a tree.
    """

    positions: Float[Array, "n"]
    losses: PyTree[Float[Array, "n"]]


def linear_path(
    loss_fn: Callable[..., PyTree],
    start: PyTree,
    end: PyTree,
    *args: PyTree,
    positions: Float[ArrayLike, "n"] | None = None,
    batches: Batches | None = None,
    weights: Sequence[float] | None = None,
    recalibrate: Callable[..., PyTree] | None = None,
    chunk_size: int | None = None,
    progress: Callable[[int, int | None], Any] | None = None,
) -> Path:
    """Evaluate the loss along the straight line between two trees of parameters.

    Take it from a start to a minimum, between two minima, or between checkpoints; what
    it says about two minima is summed up by `barrier`.

    The line joins the parameters as they are. Swapping hidden units changes nothing
    about a network but moves it elsewhere, and no such relabelling is searched for
    here: a hill between two independent runs may be gone after it.

    Args:
        loss_fn: called as `loss_fn(params, *args, *batch)`, returns a real scalar or a
            tree of such, say loss and accuracy; compiled once per function object.
        start: parameters a. Floating-point leaves are interpolated in at least float32;
            others, such as counters, are those of the nearer end.
        end: parameters b, a tree like `start`.
        *args: further arguments, such as a batch.
        positions: values of t; by default 25 from 0 to 1. Positions outside [0, 1]
            extend the line beyond its ends.
        batches: batches to average over, as in `over_batches`.
        weights: number of examples of each batch, as in `over_batches`.
        recalibrate: called as `recalibrate(params, *args)` at every point, returns the
            parameters to evaluate. Networks with batch normalisation need it: the
            statistics of the ends, interpolated, fit no network in between.
        chunk_size: points evaluated at once; by default 1 on CPU, 16 elsewhere.
        progress: called as `progress(done, total)` on the host.

    Returns:
        Positions, and losses in at least float32. NaN where the loss is.

    Raises:
        ValueError: for trees that differ in structure or shapes or hold no
            floating-point numbers, positions that are no vector, or batches that do not
            fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import barrier, linear_path
        >>> double_well = lambda w: jnp.sum((w**2 - 1) ** 2)
        >>> path = linear_path(
        ...     double_well, -jnp.ones(1), jnp.ones(1), positions=jnp.linspace(0, 1, 5)
        ... )
        >>> path.losses.tolist()
        [0.0, 0.5625, 1.0, 0.5625, 0.0]
        >>> float(barrier(path).height)
        1.0

    Reference:
        arXiv:1412.6544, arXiv:1912.05671.
    """
    check_concrete((start, end, args), "linear_path")
    check_ends(start, end)
    coordinates, at = check_positions(positions, inside=False)
    losses = evaluate_points(
        on_line,
        loss_fn,
        coordinates,
        (start, end),
        args,
        batches=batches,
        weights=weights,
        recalibrate=recalibrate,
        chunk_size=chunk_size,
        progress=progress,
    )
    return Path(at, losses)
