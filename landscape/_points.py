"""The loss at many points of parameter space, from one compiled program.

Lines, planes and paths are all a function from a few coordinates to parameters,

    w(a) = point(a, operands),        ℓ_a = Σ_k n_k L(w(a), batch k) / Σ_k n_k,

evaluated at many a. Operands are data, never constants of the program, so that other
parameters of the same shapes reuse it. Points are made inside it, in chunks: memory is
that of two chunks, whatever the number of points. The loops over chunks and batches are
Python's, which lets in data loaders and progress; a compiled loop is no faster unless
the loss takes well below a millisecond, and up to twice slower for convolutions on CPU.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, PyTree

from basinax.landscape._over_batches import (
    UNKNOWN,
    count_stacked,
    examples,
    shares_of,
)
from basinax.landscape._sandwich import as_partial
from basinax.landscape._vectors import widen

Point = Callable[[Float[Array, "d"], PyTree], PyTree]
Batches = tuple[PyTree, ...] | Iterable[Sequence[PyTree]]

# Points evaluated at once where the caller leaves it open.
_CHUNK = {"cpu": 1}
_CHUNK_ELSEWHERE = 16


def _losses(value: PyTree) -> PyTree:
    """Check what the loss function returned and widen it."""
    leaves = jax.tree_util.tree_leaves_with_path(value, is_leaf=lambda x: x is None)
    for path, leaf in leaves or [((), None)]:
        found = "nothing"
        if leaf is not None:
            shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
            if shape == () and jnp.issubdtype(dtype, jnp.floating):
                continue
            found = f"an array of shape {shape} and type {dtype}"
        place = f" at {jax.tree_util.keystr(path)}" if path else ""
        raise ValueError(
            "loss_fn must return one real floating-point number, or a tree of such, "
            f"but returned {found}{place}; reduce over examples inside it."
        )
    return widen(value)


@functools.partial(jax.jit, static_argnames="point")
def _chunk(
    point: Point,
    loss: Partial,
    recalibrate: Partial | None,
    coordinates: Float[Array, "c d"],
    operands: PyTree,
    args: tuple[PyTree, ...],
    batch: tuple[PyTree, ...],
) -> PyTree:
    def at(coordinate: Float[Array, "d"]) -> PyTree:
        params = point(coordinate, operands)
        if recalibrate is not None:
            params = recalibrate(params, *args)
        return _losses(loss(params, *args, *batch))

    if len(coordinates) == 1:  # not a batch of one, which is slower for convolutions
        return jax.tree.map(lambda x: x[None], at(coordinates[0]))
    return jax.vmap(at)(coordinates)


def weighted_batches(
    batches: Batches | None, weights: Sequence[float] | None
) -> tuple[Iterator[tuple[tuple[PyTree, ...], float]], int | None]:
    """Return pairs of batch and weight, and their number as far as it is known."""
    if batches is None:
        if weights is not None:
            raise ValueError("weights are those of batches; got weights, no batches.")
        return iter([((), 1.0)]), 1
    if isinstance(batches, tuple):
        leaves, treedef = jax.tree.flatten(batches)
        batches = [
            treedef.unflatten(x[k] for x in leaves)
            for k in range(count_stacked(batches))
        ]
    if isinstance(batches, list):
        if not batches or not all(isinstance(batch, tuple | list) for batch in batches):
            raise ValueError(
                "a list of batches must hold at least one, each a tuple of the further "
                "arguments of loss_fn, such as [(x0, y0), (x1, y1)]."
            )
        shares = np.asarray(shares_of(weights, batches), np.float64).tolist()
        pairs = zip(map(tuple, batches), shares, strict=True)
        return pairs, len(batches)
    number = len(batches) if isinstance(batches, Sized) else None
    if weights is None:
        return ((tuple(batch), _examples(batch)) for batch in batches), number
    pairs = zip(batches, weights, strict=True)
    return ((tuple(batch), float(weight)) for batch, weight in pairs), number


def _examples(batch: Sequence[PyTree]) -> float:
    count = examples(batch)
    if count is None:
        raise ValueError(UNKNOWN)
    return float(count)


def _platform(tree: PyTree) -> str:
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            return next(iter(leaf.devices())).platform
    return jax.default_backend()


def _one_ahead(launched: Iterator[PyTree]) -> Iterator[PyTree]:
    """Fetch each result while the next is computed: two are in memory at most."""
    previous = next(launched)
    for result in launched:
        yield jax.device_get(previous)
        previous = result
    yield jax.device_get(previous)


def evaluate_points(
    point: Point,
    loss_fn: Callable[..., PyTree],
    coordinates: Float[ArrayLike, "n d"],
    operands: PyTree,
    args: tuple[PyTree, ...] = (),
    *,
    batches: Batches | None = None,
    weights: Sequence[float] | None = None,
    recalibrate: Callable[..., PyTree] | None = None,
    chunk_size: int | None = None,
    progress: Callable[[int, int | None], Any] | None = None,
) -> PyTree:
    """Evaluate a loss at the points that belong to coordinates.

    Args:
        point: maps one row of `coordinates` and `operands` to parameters. A function
            of module level: it is compared by identity, and what it closed over would
            be a constant of the program.
        loss_fn: called as `loss_fn(params, *args, *batch)`, returns one real number or
            a tree of such. Compiled once per function object and shapes.
        coordinates: one row of d numbers per point.
        operands: tree of all that the points depend on, such as parameters and
            directions.
        args: further arguments of the loss and of `recalibrate`.
        batches: batches to average over, as in `over_batches`. They are gone through
            once, with all points at each, so a data loader need not start over.
        weights: number of examples of each batch, as in `over_batches`.
        recalibrate: called as `recalibrate(params, *args)` at every point, returns the
            parameters to evaluate, for instance with new statistics of normalisation
            layers.
        chunk_size: points evaluated at once, by `jax.vmap`; a last shorter chunk is
            filled up. Default: 1 on CPU, 16 elsewhere.
        progress: called as `progress(done, total)` after every chunk, in evaluations of
            the loss: points times batches. The total is None if `batches` has no
            length.

    Returns:
        What the loss returned, in at least float32, with a leading axis n of points.

    Raises:
        ValueError: for no point, a chunk size below one, batches or weights that do not
            fit, or a loss that returns anything but real numbers.
    """
    rows = np.asarray(coordinates, np.float64)
    number = len(rows)
    if not number:
        raise ValueError("there is no point to evaluate the loss at.")
    if chunk_size is None:
        chunk_size = _CHUNK.get(_platform((operands, args)), _CHUNK_ELSEWHERE)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    chunk_size = min(chunk_size, number)
    chunks = -(-number // chunk_size)
    filled = np.concatenate(
        [rows, np.repeat(rows[-1:], chunks * chunk_size - number, 0)]
    )
    pairs, count = weighted_batches(batches, weights)
    loss = as_partial(loss_fn)
    calibrate = None if recalibrate is None else as_partial(recalibrate)

    total, weight = None, 0.0
    for index, (batch, share) in enumerate(pairs):
        parts = []
        launched = (
            _chunk(point, loss, calibrate, chunk, operands, args, batch)
            for chunk in np.split(filled, chunks)
        )
        for part in _one_ahead(launched):
            parts.append(part)
            if progress is not None:
                done = index * number + min(len(parts) * chunk_size, number)
                progress(done, None if count is None else count * number)
        losses = jax.tree.map(lambda *x: np.concatenate(x)[:number], *parts)
        total = _add(total, share, losses)
        weight += share
    if not weight:
        raise ValueError("batches are empty: there is nothing to take the mean of.")
    return jax.tree.map(
        lambda x, like: jnp.asarray(x / weight, like.dtype), total, losses
    )


def _add(total: PyTree | None, share: float, losses: PyTree) -> PyTree:
    """Sum on the host in float64: these are a few numbers per point."""
    weighed = jax.tree.map(lambda x: share * x.astype(np.float64), losses)
    return weighed if total is None else jax.tree.map(np.add, total, weighed)
