"""Curves of low loss between two minima, found by minimising along them.

A curve φ from a to b with one control point c (see `path_point` for its formula) is
pulled down by stochastic gradient steps on

    min_c E[L(φ(t))],  t uniform on [0, 1],

whose gradient in c is v(t) ∇L(φ(t)), with v(t) the weight of c: a step costs one
gradient of the loss. The positions t_k are those of a lattice of golden ratio with a
random shift, so that each is uniform and any few in a row are spread over the curve.

Reference: Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, *Loss surfaces, mode
connectivity, and fast ensembling of DNNs* (NeurIPS 2018, arXiv:1802.10026).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from basinax.landscape._path_point import (
    ON_CURVE,
    Kind,
    check_alike,
    check_ends,
    check_kind,
    check_positions,
    mix,
)
from basinax.landscape._points import Batches, evaluate_points, weighted_batches
from basinax.landscape._sandwich import as_partial, scalar
from basinax.landscape._vectors import check_concrete, widen

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
# One object for all calls, as the compiled step is looked up by it.
_ADAM = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))
_LEARNING_RATE = 0.01


class CurvedPath(NamedTuple):
    """Losses along a curve, and the curve.

    Attributes:
        positions: t, 0 at the start and 1 at the end.
        losses: loss at every position, or a tree of such arrays if the loss function
            returned a tree.
        control: control point c, a tree like the ends.
        training_losses: loss at the random position and batch of every step, before it.
    """

    positions: Float[Array, "n"]
    losses: PyTree[Float[Array, "n"]]
    control: PyTree
    training_losses: Float[Array, "steps"]


def bezier_path(
    loss_fn: Callable[..., PyTree],
    start: PyTree,
    end: PyTree,
    *args: PyTree,
    key: PRNGKeyArray | None = None,
    kind: Kind = "bezier",
    control: PyTree | None = None,
    num_steps: int = 1000,
    learning_rate: float | None = None,
    optimizer: optax.GradientTransformation | None = None,
    positions: Float[ArrayLike, "n"] | None = None,
    batches: Batches | None = None,
    weights: Sequence[float] | None = None,
    recalibrate: Callable[..., PyTree] | None = None,
    chunk_size: int | None = None,
    progress: Callable[[int, int | None], Any] | None = None,
) -> CurvedPath:
    """Find a curve of low loss between two trees of parameters and measure it.

    Two minima with a barrier on the straight line between them can often be joined by
    a bend along which the loss stays low. `barrier` of the result is an upper bound of
    the lowest barrier there is; more steps may still lower it.

    Other quantities along a curve once found, such as test loss or accuracy, come from
    a second call with their function, `control=found.control` and `num_steps=0`.

    Steps are compiled and looped over in Python. Equal keys give equal curves.

    Args:
        loss_fn: called as `loss_fn(params, *args, *batch)`, returns a real scalar;
            compiled once per function object. With `num_steps=0` also a tree of
            scalars.
        start: parameters a. Leaves that are no floating-point numbers, such as
            counters, stay out of the search.
        end: parameters b, a tree like `start`. It may equal `start`: the curve is then
            a loop.
        *args: further arguments, such as a batch.
        key: random key of the positions and batches drawn; needed unless `num_steps`
            is 0.
        kind: "bezier" for a quadratic Bezier curve, "polygon" for two segments.
        control: where the search for c begins, for instance that of an earlier call;
            by default the midpoint, from which the curve is the straight line.
        num_steps: number of steps, one gradient of the loss each.
        learning_rate: peak rate of Adam, which is used by default: 0.01, falling to
            zero along half a cosine. About the most a parameter moves in a step, in its
            own units.
        optimizer: another optax optimizer, with its own learning rate. Keep the object
            and pass it again, or every call compiles anew.
        positions: values of t in [0, 1] to evaluate at; by default 25 from 0 to 1.
        batches: batches, as in `over_batches`. A step takes one: of a tuple or list at
            random, with a chance in proportion to its weight; of another iterable the
            next, from its first again after its last. The losses of the result average
            over all.
        weights: number of examples of each batch, as in `over_batches`.
        recalibrate: called as `recalibrate(params, *args)` at every point, in steps as
            well, returns the parameters to evaluate; see `linear_path`.
        chunk_size: points evaluated at once; by default 1 on CPU, 16 elsewhere.
        progress: called as `progress(done, total)` on the host, in evaluations of the
            loss: steps, then points times batches.

    Returns:
        The losses in at least float32, the control point in the dtypes of the ends and
        the course of the search. NaN in the loss or its gradient makes c NaN.

    Raises:
        ValueError: as for `linear_path`; for positions outside [0, 1], complex
            parameters, an unknown kind, a negative number of steps, steps without a
            key, a learning rate beside an optimizer, a loss that is not one number, or
            batches that can be gone through only once.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import barrier, bezier_path, linear_path
        >>> ring = lambda w: (jnp.sum(w**2) - 1) ** 2  # minimal on a circle
        >>> a, b = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> round(float(barrier(linear_path(ring, a, b)).height), 4)
        0.25
        >>> curve = bezier_path(ring, a, b, key=jax.random.key(0), num_steps=300)
        >>> bool(barrier(curve).height < 0.01)
        True

    Reference:
        arXiv:1802.10026.
    """
    check_concrete((start, end, control, args, key), "bezier_path")
    check_kind(kind)
    check_ends(start, end)
    if control is not None:
        check_alike(control, start, "control", "start")
    coordinates, at = check_positions(positions, inside=True)
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}.")
    count = weighted_batches(batches, weights)[1]
    total = None if count is None else num_steps + count * len(coordinates)
    loss, calibrate = as_partial(loss_fn), recalibrate and as_partial(recalibrate)
    bend, seen = _free(start, end, control), []
    if num_steps:
        key = _check_search(bend, key, learning_rate, optimizer, batches)
        # Numpy's generator, as that of jax would be compiled for every number of steps.
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
        shift, rates = rng.uniform(), _rates(learning_rate, optimizer, num_steps)
        drawn = _drawn(batches, weights, rng)
        optimizer = optimizer or _ADAM
        state = optimizer.init(bend)
        for index, rate, batch in zip(range(num_steps), rates, drawn, strict=False):
            t = (shift + index * _GOLDEN_RATIO) % 1
            moving = bend, state, t, rate
            bend, state, value = _step(
                loss, calibrate, (start, end), *moving, args, batch, optimizer, kind
            )
            seen.append(value)
            if progress is not None:
                progress(index + 1, total)
    found = _whole(start, end, bend)
    losses = evaluate_points(
        ON_CURVE[kind],
        loss,
        coordinates,
        (start, end, found),
        args,
        batches=batches,
        weights=weights,
        recalibrate=calibrate,
        chunk_size=chunk_size,
        progress=progress and (lambda done, _: progress(num_steps + done, total)),
    )
    return CurvedPath(at, losses, found, jnp.asarray(jax.device_get(seen)))


def _rates(
    learning_rate: float | None,
    optimizer: optax.GradientTransformation | None,
    num_steps: int,
) -> Any:
    """Return what the updates of every step are multiplied by."""
    if optimizer is not None:
        return np.ones(num_steps)
    peak = _LEARNING_RATE if learning_rate is None else learning_rate
    return 0.5 * peak * (1 + np.cos(np.pi * np.arange(num_steps) / num_steps))


def _check_search(
    bend: PyTree,
    key: PRNGKeyArray | None,
    learning_rate: float | None,
    optimizer: optax.GradientTransformation | None,
    batches: Batches | None,
) -> PRNGKeyArray:
    """Return the key, which a search needs."""
    if key is None:
        raise ValueError(
            "bezier_path draws positions and batches at random, so it needs "
            "key=jax.random.key(0), or num_steps=0 to evaluate without a search."
        )
    if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(bend)):
        raise ValueError("bezier_path searches real parameters only, got complex ones.")
    if optimizer is not None and learning_rate is not None:
        raise ValueError(
            "learning_rate is that of the default optimizer; got an optimizer as well, "
            "so give the rate to that one."
        )
    if learning_rate is not None and not learning_rate >= 0:
        raise ValueError(f"learning_rate must be at least 0, got {learning_rate}.")
    if isinstance(batches, Iterator):
        raise ValueError(
            "batches can be gone through only once, but the search and the evaluation "
            "each need them; pass a list, or an object whose __iter__ starts over."
        )
    return key


def _drawn(
    batches: Batches | None, weights: Sequence[float] | None, rng: np.random.Generator
) -> Iterator[tuple[PyTree, ...]]:
    """Yield the batch of every step, without end."""
    if batches is None or isinstance(batches, tuple | list):
        pairs = list(weighted_batches(batches, weights)[0])
        shares = np.array([share for _, share in pairs])
        chances = np.cumsum(shares / shares.sum())
        while True:
            # Rounding may leave the last sum below one.
            index = np.searchsorted(chances[:-1], rng.uniform(), side="right")
            yield pairs[index][0]
    while True:
        empty = True
        for batch, _ in weighted_batches(batches, weights)[0]:
            empty = False
            yield batch
        if empty:
            raise ValueError("batches are empty: there is nothing to minimise.")


@jax.jit
def _free(start: PyTree, end: PyTree, control: PyTree | None) -> PyTree:
    """Return c in at least float32, with None for what is not floating-point."""

    def free(a: Any, b: Any, c: Any) -> Any:
        if a is None or not jnp.issubdtype(jnp.result_type(a, b), jnp.inexact):
            return None
        dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
        if control is not None:
            return jnp.asarray(c, dtype)
        return 0.5 * jnp.asarray(a, dtype) + 0.5 * jnp.asarray(b, dtype)

    like = start if control is None else control
    return jax.tree.map(free, start, end, like, is_leaf=lambda x: x is None)


@functools.partial(jax.jit, static_argnames=("optimizer", "kind"))
def _step(
    loss: Partial,
    recalibrate: Partial | None,
    ends: tuple[PyTree, PyTree],
    bend: PyTree,
    state: Any,
    t: Float[Array, ""],
    rate: Float[Array, ""],
    args: tuple[PyTree, ...],
    batch: tuple[PyTree, ...],
    optimizer: optax.GradientTransformation,
    kind: str,
) -> tuple[PyTree, Any, Float[Array, ""]]:
    def value(bend: PyTree) -> Float[Array, ""]:
        params = mix(*ends, bend, jnp.asarray(t), kind)
        if recalibrate is not None:
            params = recalibrate(params, *args)
        return widen(scalar(loss(params, *args, *batch), "loss_fn"))

    found, gradient = jax.value_and_grad(value)(bend)
    updates, state = optimizer.update(gradient, state, bend)
    bend = jax.tree.map(lambda c, u: c + (rate * u).astype(c.dtype), bend, updates)
    return bend, state, found


@jax.jit
def _whole(start: PyTree, end: PyTree, bend: PyTree) -> PyTree:
    """Return c in the dtypes of the ends, with what is not floating-point."""

    def whole(a: Any, b: Any, c: Any) -> Any:
        return a if c is None else c.astype(jnp.result_type(a, b))

    return jax.tree.map(whole, start, end, bend, is_leaf=lambda x: x is None)
