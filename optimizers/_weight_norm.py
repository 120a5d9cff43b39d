"""Training at a fixed weight norm.

    u' = c (θ + u) - θ,    c = ‖θ_0‖ / ‖θ + u‖

returns every step to the sphere on which training began.  How long a model takes from
fitting to generalising depends on its weight norm; on a small enough sphere the delay
all but vanishes.  Liu, Michaud and Tegmark, "Omnigrok: Grokking Beyond Algorithmic
Data" (ICLR 2023, arXiv:2210.01117).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from basinax.optimizers._blocks import AxesOf, Scope, check_scope, match, slice_axes


class KeepWeightNormState(NamedTuple):
    """State of `keep_weight_norm`.

    Attributes:
        rms: root mean square of each block's initial weights, which is the norm over
            the root of the number of weights and overflows later: a scalar for scope
            "global", a tree of scalars for "leaf", of arrays with the slice's axes kept
            at length 1 for "neuron".  In at least float32.
    """

    rms: Any


def keep_weight_norm(
    *, scope: Scope = "global", axes: AxesOf = None, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Rescale the weights after every step to the norm they had at `init`.

    Place it last in the chain, after learning rate and weight decay; what counts are
    the weights that `optax.apply_updates` makes.  To choose the norm, scale the initial
    parameters.  After `perp_grad` and `sgd` it makes Riemannian gradient descent on the
    sphere.  The norm is compared with that at `init` in every step, so rounding does
    not add up.

    A block that starts at zero stays there: with scope "leaf" or "neuron" mask out
    zero-initialised biases, and scalars, of which only the sign could change.  Where a
    step would lead exactly to zero, which has no direction, it is skipped.

    Args:
        scope: what shares one norm: "global" the whole tree (as the paper), "leaf" each
            array, "neuron" the weights of one output.
        axes: for scope "neuron", the axes of a slice, or a callable of (key path, leaf)
            that returns them.  Default: all but the last, for Flax's (..., in, out);
            for PyTorch's and Equinox's (out, in, ...) it is all but the first.
        mask: tree of booleans, or callable of the parameters returning one; leaves
            marked False pass unchanged and do not count in scope "global".  Nor do
            integer leaves.

    Returns:
        A transformation with `KeepWeightNormState`, inside `optax.MaskedState` if there
        is a mask.  A NaN or infinity in a block makes its updates NaN.

    Raises:
        ValueError: scope is unknown or axes do not fit; in `update`, params are missing
            or differ from the updates in structure or shape.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.optimizers import keep_weight_norm
        >>> tx = optax.chain(optax.sgd(1.0), keep_weight_norm())
        >>> params = jnp.array([3.0, 4.0])
        >>> updates, _ = tx.update(jnp.array([3.0, -4.0]), tx.init(params), params)
        >>> optax.apply_updates(params, updates)  # along (0, 8)
        Array([0., 5.], dtype=float32)

    Reference:
        arXiv:2210.01117, training with constrained weight norm.
    """
    check_scope(scope, axes)

    def init_fn(params: optax.Params) -> KeepWeightNormState:
        leaves = jax.tree.leaves(params)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            return jax.eval_shape(init_fn, params)
        if scope == "global":
            weights = [leaf for leaf in leaves if _is_weight(leaf)]
            return KeepWeightNormState(_polar(weights, None)[0])

        def rms(path: Any, leaf: jax.Array) -> jax.Array:
            return _polar([leaf], _slice(scope, axes, path, leaf))[0]

        return KeepWeightNormState(jax.tree_util.tree_map_with_path(rms, params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, KeepWeightNormState]:
        del extra_args
        flat, weights, treedef = match(updates, params, "keep_weight_norm")
        out = [u for _, u in flat]
        moving = [
            i for i, u in enumerate(out) if u is not None and _is_weight(weights[i])
        ]
        if scope == "global":
            blocks = [(moving, None, state.rms)] if moving else []
        else:
            references = treedef.flatten_up_to(state.rms)
            blocks = [
                ([i], _slice(scope, axes, flat[i][0], weights[i]), references[i])
                for i in moving
            ]
        for members, block_axes, rms in blocks:
            kept = _keep(
                [out[i] for i in members],
                [weights[i] for i in members],
                rms,
                block_axes,
            )
            for i, leaf in zip(members, kept, strict=True):
                out[i] = leaf
        return treedef.unflatten(out), state

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return tx if mask is None else optax.masked(tx, mask)


def _slice(
    scope: Scope, axes: AxesOf, path: Any, leaf: jax.Array
) -> tuple[int, ...] | None:
    """Return the axes of a block in one leaf, None for all of them."""
    if scope == "leaf":
        return None
    over, whole = slice_axes(axes, path, jnp.asarray(leaf))
    return None if whole else over


def _is_weight(leaf: Any) -> bool:
    """Return whether a leaf counts: integers pass unchanged."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


@functools.partial(jax.jit, static_argnames="axes")
def _keep(
    us: Sequence[Array],
    ws: Sequence[Array],
    rms: Array,
    axes: tuple[int, ...] | None,
) -> list[Array]:
    """Turn the updates of one block into updates that restore its norm."""
    wide = [w.astype(_work([w, u])) for w, u in zip(ws, us, strict=True)]
    moved = [w + u.astype(w.dtype) for w, u in zip(wide, us, strict=True)]
    length, directions = _polar(moved, axes)
    return [
        (jnp.where(length == 0, 0, rms.astype(w.real.dtype) * d - w)).astype(u.dtype)
        for w, u, d in zip(wide, us, directions, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="axes")
def _polar(
    xs: Sequence[Array], axes: tuple[int, ...] | None
) -> tuple[Array, list[Array]]:
    """Write a block as root mean square times directions of unit root mean square.

    Nothing is squared before its largest entry is scaled to about 1.  Directions of a
    zero block are zero.
    """
    keep = axes is not None
    xs = [x.astype(_work([x])) for x in xs]
    zero = jnp.float32(0)
    size = sum(x.size for x in xs)
    peaks = [jnp.max(jnp.abs(x), axes, keepdims=keep, initial=0) for x in xs]
    peak = functools.reduce(jnp.maximum, peaks, zero)
    if keep:  # one block for each slice
        size = size // max(peak.size, 1)
    # The reciprocal of the largest numbers is subnormal, which devices flush to zero.
    shrink = jnp.where(peak > 1, 0.25, 1).astype(peak.dtype)
    unit = jnp.where(peak == 0, 1, peak * shrink)
    xs = [x * shrink / unit for x in xs]
    squares = [jnp.sum(jnp.real(x * jnp.conj(x)), axes, keepdims=keep) for x in xs]
    root = jnp.sqrt(functools.reduce(jnp.add, squares, zero) / max(size, 1))
    divisor = jnp.where(root == 0, 1, root)
    directions = [(x / divisor).astype(x.dtype) for x in xs]
    return peak * root, directions


def _work(xs: Sequence[Array]) -> jnp.dtype:
    """Return the dtype of the arithmetic: at least float32."""
    dtypes = [jnp.result_type(x) for x in xs]
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))
