"""Mean of operators over batches: the operator of a set that does not fit in memory.

    C = Σ_k n_k C_k / Σ_k n_k,   n_k the examples in batch k.

The weights matter: where the last batch is shorter, an equal-weight mean is not the
operator of the whole set, and far from it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from basinax.landscape._sandwich import as_partial
from basinax.landscape._vectors import wide_dtype

Factory = Callable[..., Callable[[PyTree], PyTree]]

UNKNOWN = (
    "basinax cannot tell how many examples each batch holds, as the arrays of a "
    "batch differ in their leading axes; pass weights, one number per batch."
)


@jax.jit
def _weigh(share: Float[Array, ""], product: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: share.astype(wide_dtype(x)) * x.astype(wide_dtype(x)), product
    )


@jax.jit
def _add(total: PyTree, share: Float[Array, ""], product: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, total, _weigh(share, product))


def _looped(
    operators: list[Partial], shares: Float[Array, "K"], vector: PyTree
) -> PyTree:
    total = None
    for operator, share in zip(operators, shares, strict=True):
        product = operator(vector)
        total = _weigh(share, product) if total is None else _add(total, share, product)
    return total


def _streamed(
    factory: Factory,
    batches: Iterable[Sequence[PyTree]],
    weights: Sequence[float] | None,
    vector: PyTree,
) -> PyTree:
    total, weight = None, 0.0
    pairs = (
        ((batch, examples(batch)) for batch in batches)
        if weights is None
        else zip(batches, weights, strict=True)
    )
    for batch, count in pairs:
        if count is None:
            raise ValueError(UNKNOWN)
        product, share = factory(*batch)(vector), jnp.float32(count)
        total = _weigh(share, product) if total is None else _add(total, share, product)
        weight += count
    if not weight:
        raise ValueError("over_batches got no examples: every batch is missing.")
    return _weigh(jnp.asarray(1 / weight), total)


@jax.jit
def _scanned(
    shared: PyTree, stacked: PyTree, shares: Float[Array, "K"], vector: PyTree
) -> PyTree:
    def product(own: PyTree, share: Float[Array, ""]) -> PyTree:
        operator = jax.tree.map(
            lambda a, b: b if a is None else a,
            shared,
            own,
            is_leaf=lambda x: x is None,
        )
        return _weigh(share, operator(vector))

    def body(total: PyTree, batch: Any) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, product(*batch)), None

    first = jax.tree.map(lambda x: x[0], (stacked, shares))
    start = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding),
        jax.eval_shape(product, *first),
    )
    return jax.lax.scan(body, start, (stacked, shares))[0]


def count_stacked(batches: tuple[PyTree, ...]) -> int:
    """Count the batches in a tuple of stacked arrays."""
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(counts) != 1 or min(counts) in ((), (0,)):
        raise ValueError(
            "a tuple of stacked batches needs one leading axis in common, of "
            f"batches; got shapes {jax.tree.map(jnp.shape, batches)}. Batches of "
            "different sizes go in a list: [(x0, y0), (x1, y1)]."
        )
    return counts.pop()[0]


def examples(batch: Sequence[PyTree]) -> int | None:
    """Count examples, or return None if the arrays of a batch disagree."""
    counts = {jnp.shape(x)[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
    return counts.pop() if len(counts) == 1 else None


def shares_of(
    weights: Sequence[float] | None, batches: list[Sequence[PyTree]]
) -> Float[Array, "K"]:
    """Return the share of each batch in the mean; equal shapes make equal shares."""
    if weights is not None:
        return _normalised(weights, len(batches))
    shapes = [jax.tree.map(jnp.shape, batch) for batch in batches]
    if all(shape == shapes[0] for shape in shapes):
        return _normalised([1] * len(batches), len(batches))
    counts = [examples(batch) for batch in batches]
    if None in counts:
        raise ValueError(UNKNOWN)
    return _normalised(counts, len(batches))


def _normalised(weights: Any, count: int) -> Float[Array, "K"]:
    values = np.asarray(weights, np.float64)
    valid = values.shape == (count,) and np.all(values >= 0) and values.sum() > 0
    if not (valid and np.isfinite(values).all()):
        raise ValueError(
            "weights must be numbers of examples, one per batch, at least one of them "
            f"positive; got {values.tolist()} for {count} batches."
        )
    return jnp.asarray(values / values.sum())


def _stack(factory: Factory, batches: tuple[PyTree, ...], count: int) -> list[PyTree]:
    """Split the operators of all batches into common arrays and stacked ones.

    The factory is called outside compiled code, so whatever it closes over remains
    data. An operator holds arrays of three kinds: those of the batch, which are already
    stacked; those that no batch changes, such as parameters; and those computed by the
    factory, which have to be computed for every batch.

    Returns:
        Two operators with None in the place of each other's arrays.
    """

    def make(index: int) -> tuple[list[Any], Any, dict[int, int | None]]:
        batch = jax.tree.map(lambda x: x[index], batches)
        operator = factory(*batch)
        if not isinstance(operator, Partial):
            raise ValueError(
                "for stacked batches the factory must return an operator that carries "
                "its arrays as data, such as hessian(...) or another "
                f"jax.tree_util.Partial, but it returned {operator!r}; for plain "
                "functions pass a list of batches."
            )
        leaves, treedef = jax.tree.flatten(operator)
        ids = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(batch))}
        return leaves, treedef, {i: ids.get(id(leaf)) for i, leaf in enumerate(leaves)}

    whole = jax.tree.leaves(batches)
    leaves, treedef, sources = make(0)
    last, last_treedef, _ = make(count - 1)
    if last_treedef != treedef:
        raise ValueError(
            "for stacked batches the operators may differ in their arrays only, but "
            "the factory makes a new function, or another structure, per batch. Define "
            "the loss once and hand it the batch: hessian(loss, params, x, y) rather "
            "than hessian(lambda params: loss(params, x, y), params)."
        )
    made = {0: leaves, count - 1: last}
    stacked: list[Any] = [None] * len(leaves)
    for i, source in sources.items():
        if source is not None:
            stacked[i] = whole[source]
        elif count > 1 and last[i] is not leaves[i]:
            for k in range(count):
                made[k] = made.get(k) or make(k)[0]
            stacked[i] = jnp.stack([made[k][i] for k in range(count)])
    shared = [a if b is None else None for a, b in zip(leaves, stacked, strict=True)]
    return [treedef.unflatten(shared), treedef.unflatten(stacked)]


def over_batches(
    factory: Callable[..., Callable[[PyTree], PyTree]],
    batches: tuple[PyTree, ...] | Iterable[Sequence[PyTree]],
    *,
    weights: Sequence[float] | None = None,
) -> Partial:
    """Average operators over batches, so that the whole set need not fit in memory.

    For losses that are means over examples the result is the operator of the whole set,
    exactly, also if batches differ in size: each counts by its number of examples.

    What `batches` is decides how the mean is taken:

    - A tuple of stacked arrays, as in `(inputs, labels)` with inputs of shape
      (batches, batch size, ...), is looped over by `lax.scan` inside one compiled
      product. New parameters and batches reuse it. Shard the batches along their
      examples, if at all, not along the leading axis. On CPU, XLA runs convolutions
      inside such loops some 30 times slower; there use a list.
    - A list of batches, as in `[(x0, y0), (x1, y1)]`, is looped over in Python, one
      compiled product per batch; batches may differ in size, and each size compiles
      once.
    - Any other iterable, such as a data loader, is gone through anew for every product
      and must give the same batches every time. Such an operator stays on the host: it
      cannot enter `jax.jit`.

    `factory` is called outside compiled code, so it may close over parameters and need
    not be the same function object next time. Sums over batches are in at least
    float32, and so is the result, whatever the parameters are stored in.

    Args:
        factory: called as `factory(*batch)`, returns the operator of one batch; for a
            tuple of stacked arrays one of this package or another
            `jax.tree_util.Partial`. With `linearize=True` inside, the linearisation of
            every batch is kept, unless batches come from a data loader.
        batches: the batches, as above.
        weights: number of examples of each batch, or of whatever its loss is a mean
            over, such as tokens that are not padding. Default: the length of the
            leading axis of its arrays.

    Returns:
        A function from a tree shaped like the parameters to another; see `hessian`.

    Raises:
        ValueError: for no batches, an iterator that can only be gone through once,
            weights that do not fit, or batches of different shapes whose arrays
            disagree about the number of examples.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import hessian, over_batches
        >>> def loss(w, x):
        ...     return jnp.mean(x) * w**2
        >>> w = jnp.array(1.0)
        >>> batches = [(jnp.array([1.0, 1.0, 1.0]),), (jnp.array([5.0]),)]
        >>> operator = over_batches(lambda x: hessian(loss, w, x), batches)
        >>> float(operator(jnp.array(1.0)))  # twice the mean of all four
        4.0
    """
    if isinstance(batches, tuple):
        count = count_stacked(batches)
        shares = _normalised([1] * count if weights is None else weights, count)
        stacked = jax.tree.map(jnp.asarray, batches)
        return Partial(_scanned, *_stack(factory, stacked, count), shares)
    if isinstance(batches, Iterator):
        raise ValueError(
            "batches can be gone through only once, but every product needs all of "
            "them; pass a list, or an object whose __iter__ starts over."
        )
    if not isinstance(batches, list):
        return Partial(functools.partial(_streamed, factory, batches, weights))
    if not batches or not all(isinstance(batch, tuple | list) for batch in batches):
        raise ValueError(
            "a list of batches must hold at least one, each a tuple of the arguments "
            "of factory, such as [(x0, y0), (x1, y1)]."
        )
    shares = shares_of(weights, batches)
    return Partial(_looped, [as_partial(factory(*batch)) for batch in batches], shares)
