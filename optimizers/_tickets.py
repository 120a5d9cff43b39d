"""Grokking tickets: retrain only the weights that matter, from where they began.

    keep w if |w| > t,    t = the k-th smallest |w|,    k = int((1-ρ) N)

of a model that has generalised.  The sparse subnetwork, set back to its initial weights
and trained under the mask, generalises without the delay of the dense one.  Minegishi,
Iwasawa and Matsuo, "Bridging Lottery Ticket and Grokking: Understanding Grokking from
Inner Structure of Networks" (2023, arXiv:2310.19470).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from basinax.optimizers._checks import check_choice, is_function

TicketScope = Literal["global", "leaf"]


class KeepMaskedState(NamedTuple):
    """State of `keep_masked`.

    Attributes:
        mask: True where updates pass, booleans in the shapes of the parameters.
    """

    mask: Any


def magnitude_mask(
    params: PyTree,
    keep: float,
    *,
    scope: TicketScope = "global",
    mask: Any = None,
) -> PyTree[Bool[Array, "..."]]:
    """Mark the weights of largest magnitude.

    Score a trained model, set the kept weights back to their initial values and the
    others to zero, and train with `keep_masked`:

        ticket = magnitude_mask(trained, 0.4)
        params = jax.tree.map(lambda w, m: jnp.where(m, w, 0), initial, ticket)
        tx = optax.chain(optax.adamw(1e-3), keep_masked(ticket))

    Weights that tie with the threshold are dropped with it, as in the authors' code.
    The mask therefore depends on no order, but more than k weights can go: all of them
    if all are equal.

    Args:
        params: tree of trained weights.  None and integer leaves are never dropped.
        keep: fraction ρ of weights to keep, between 0 and 1; a compile-time number.
        scope: "global" has one threshold for the tree, "leaf" one for each array.
        mask: tree (prefix) of booleans, or callable of `params` returning one; leaves
            marked False are kept whole and do not count, for instance embeddings.

    Returns:
        A tree of booleans in the shapes of `params`.  NaN is kept, so that it shows.

    Raises:
        TypeError: `keep` is not a compile-time number.
        ValueError: `keep` is not between 0 and 1, or `scope` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import magnitude_mask
        >>> params = {"a": jnp.array([4.0, -3.0]), "b": jnp.array([1.0, 2.0])}
        >>> ticket = magnitude_mask(params, 0.5)
        >>> ticket["a"].tolist(), ticket["b"].tolist()
        ([True, True], [False, False])

    Reference:
        arXiv:2310.19470, magnitude pruning.
    """
    check_choice("scope", scope, get_args(TicketScope))
    try:
        keep = float(keep)
    except (TypeError, ValueError):
        raise TypeError(
            f"keep is a compile-time number, got {type(keep).__name__}."
        ) from None
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be between 0 and 1, got {keep}.")
    mask = True if mask is None else mask(params) if is_function(mask) else mask
    candidates = jax.tree.map(
        lambda chosen, tree: jax.tree.map(
            lambda w: bool(chosen) and jnp.issubdtype(jnp.result_type(w), jnp.inexact),
            tree,
        ),
        mask,
        params,
    )
    if scope == "leaf":
        threshold = lambda w: _threshold([w], keep)  # noqa: E731
    else:
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(candidates), strict=True)
        shared = _threshold([w for w, chosen in leaves if chosen], keep)
        threshold = lambda _: shared  # noqa: E731

    def kept(w: jax.Array, chosen: bool) -> jax.Array:
        if not chosen:
            return jnp.ones_like(w, bool)
        return ~(_magnitude(w) <= threshold(w))

    return jax.tree.map(kept, params, candidates)


def keep_masked(
    mask: PyTree | Callable[[Any], PyTree],
) -> optax.GradientTransformationExtraArgs:
    """Zero the updates outside a fixed mask.

    Placed last, it freezes what it masks whatever the chain before it adds: weights
    that were set to zero stay exactly zero.  Placed first, it keeps the optimizer's
    moments of masked weights at zero too, but weight decay still reaches them.

    Updates outside are replaced, not multiplied, so a NaN there does no harm.  The mask
    is part of the state: it is saved with a checkpoint and not compiled into the step.

    Args:
        mask: True where updates pass.  A tree of booleans like the parameters, each of
            its leaf's shape or a scalar for the whole leaf; or a callable that makes
            one from the parameters given to `init`.

    Returns:
        A transformation with `KeepMaskedState`.

    Raises:
        TypeError: in `init`, the mask is not boolean.
        ValueError: in `init`, the mask does not fit the parameters.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.optimizers import keep_masked
        >>> params = jnp.array([0.5, 0.0])
        >>> tx = optax.chain(optax.adamw(0.1), keep_masked(params != 0))
        >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
        >>> updates.round(3)
        Array([-0.1,  0. ], dtype=float32)

    Reference:
        arXiv:2310.19470, training under a fixed mask.
    """

    def init_fn(params: optax.Params) -> KeepMaskedState:
        leaves, treedef = jax.tree.flatten(params)
        if not leaves:  # nothing to mask; also how optax asks for a state's layout
            return KeepMaskedState(params)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            return jax.eval_shape(init_fn, params)
        chosen = mask(params) if is_function(mask) else mask
        try:
            masks = treedef.flatten_up_to(chosen)
        except ValueError as error:
            raise ValueError(
                f"the mask of structure {jax.tree.structure(chosen)} does not fit "
                f"parameters of structure {treedef}."
            ) from error
        return KeepMaskedState(treedef.unflatten(map(_like, masks, leaves)))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, KeepMaskedState]:
        del params, extra_args
        kept = jax.tree.map(lambda u, m: jnp.where(m, u, 0), updates, state.mask)
        return kept, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _threshold(leaves: list[jax.Array], keep: float) -> jax.Array:
    """Return the k-th smallest magnitude, or -1 if none is to be dropped."""
    k = int((1 - keep) * sum(jnp.size(w) for w in leaves))
    return _kth_smallest(leaves, k) if k else jnp.float32(-1)


@jax.jit
def _kth_smallest(leaves: list[jax.Array], k: int) -> jax.Array:
    """Find the largest t with fewer than k magnitudes below it, bit by bit.

    The bit patterns of non-negative floats are ordered like the numbers.  Counting
    leaves every array where it lies, while sorting would gather the tree.
    """
    magnitudes = [_magnitude(w) for w in leaves]
    dtype = functools.reduce(jnp.promote_types, [m.dtype for m in magnitudes])
    bits = jnp.finfo(dtype).bits
    integer = jnp.dtype(f"int{bits}")
    patterns = [
        jax.lax.bitcast_convert_type(m.astype(dtype), integer) for m in magnitudes
    ]

    def set_bit(i: jax.Array, t: jax.Array) -> jax.Array:
        candidate = t | jnp.left_shift(integer.type(1), bits - 2 - i.astype(integer))
        counts = [jnp.sum(p < candidate) for p in patterns]
        return jnp.where(functools.reduce(jnp.add, counts) < k, candidate, t)

    t = jax.lax.fori_loop(0, bits - 1, set_bit, integer.type(0))
    return jax.lax.bitcast_convert_type(t, dtype)


def _magnitude(w: jax.Array) -> jax.Array:
    magnitude = jnp.abs(w)
    return magnitude.astype(jnp.promote_types(magnitude.dtype, jnp.float32))


def _like(mask: Any, leaf: jax.Array) -> jax.Array:
    """Lay a mask out like its leaf, in a buffer of its own."""
    if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
        raise TypeError(f"a mask holds booleans, got {jnp.result_type(mask)}.")
    if jnp.ndim(mask) and jnp.shape(mask) != jnp.shape(leaf):
        raise ValueError(
            f"a mask of shape {jnp.shape(mask)} does not fit a parameter of shape "
            f"{jnp.shape(leaf)}."
        )
    return jnp.asarray(mask) & jnp.ones_like(leaf, bool)
