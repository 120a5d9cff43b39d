"""Naive loss minimisation: how much of a descent step only scales the weights.

Once a network that is positively homogeneous in its weights classifies the training set
correctly, growing the weights lowers cross-entropy without changing any prediction. How
far the gradient g has turned to that direction is the cosine of -g with the weights w,

    cos = -⟨w, g⟩ / (‖w‖ ‖g‖),

and the share of the squared gradient norm that is radial, with one w per block b, is

    radial = Σ_b ⟨w_b, g_b⟩² / ‖w_b‖²  /  Σ_b ‖g_b‖².

Definitions 5 and 6 of Prieto, Barsbey, Mediano and Birdal, "Grokking at the Edge of
Numerical Stability" (ICLR 2025, arXiv:2501.04697).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from basinax.landscape._vectors import is_function, wide_dtype

Scope = Literal["leaf", "global", "neuron"]
Axes = int | Sequence[int] | None
AxesOf = Axes | Callable[[Any, Any], Axes]


class NLMAlignment(NamedTuple):
    """Alignment of the descent direction with the weights.

    Attributes:
        cosine: cosine of -g with w in [-1, 1], one per block: a tree of scalars for
            scope "leaf", of arrays with one number per neuron for "neuron", and one
            scalar for "global". Positive if a gradient step grows the weights, 0 where
            w or g vanish.
        global_cosine: the cosine of all leaves as one vector.
        radial_fraction: share of ‖g‖² along the weights of each block, in [0, 1].
    """

    cosine: PyTree
    global_cosine: Float[Array, ""]
    radial_fraction: Float[Array, ""]


class MonitorNLMState(NamedTuple):
    """State of `monitor_nlm`.

    Attributes:
        alignment: that of the last update, all float32; zeros before the first one.
    """

    alignment: NLMAlignment


def nlm_alignment(
    params: PyTree,
    grads: PyTree,
    *,
    scope: Scope = "leaf",
    axes: AxesOf = None,
    mask: Any = None,
) -> NLMAlignment:
    """Measure how far gradients point along the weights themselves.

    Take the raw gradient of the loss. In a bias-free ReLU net ⟨w, g⟩ is the same for
    every layer, Σ z·∂L/∂z over the logits z, by Euler's identity; a cosine that rises
    towards 1 after the training set is fitted says that steps do little but scale the
    logits. At random initialisation it is close to 0.

    Norms of any size are fine: weights and gradients are divided by their largest entry
    before they are squared. Sums are taken in at least float32.

    Args:
        params: tree of weights w.
        grads: tree of gradients g, structure and shapes of `params`.
        scope: what a block is: each leaf, the whole tree, or each neuron's weights.
        axes: for scope "neuron", the axes of a leaf that run over a neuron's inputs: an
            int, a sequence, or a callable of (path, leaf) returning one of these. None
            there or here means all but the last axis of a leaf with at least two, as
            in Flax's (..., in, out), and the whole of any other. For PyTorch's (out,
            in, ...) it is `lambda path, leaf: range(1, leaf.ndim) or None`.
        mask: booleans in a tree (prefix) like `params`, or a callable of params that
            returns one; leaves marked False are left out of every number and become
            `optax.MaskedNode` in `cosine`.

    Returns:
        The alignment, in the dtype of the leaves or float32 if that is wider. A NaN or
        infinity in a leaf makes its cosine and the two totals NaN.

    Raises:
        TypeError: on a leaf that is not real floating point.
        ValueError: on trees of different shapes, an unknown scope, axes that a leaf
            does not have, or axes with another scope than "neuron".

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import nlm_alignment
        >>> params = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}
        >>> grads = {"a": jnp.array([-2.0, 0.0]), "b": jnp.array([1.0, 0.0])}
        >>> result = nlm_alignment(params, grads)
        >>> float(result.cosine["a"]), float(abs(result.cosine["b"]))
        (1.0, 0.0)
        >>> round(float(result.radial_fraction), 4)  # 2² / (2² + 1²)
        0.8

    Reference:
        arXiv:2501.04697, NLM direction.
    """
    _check_scope(scope, axes)
    _check_shapes(params, grads)
    if mask is not None:
        mask = mask(params) if is_function(mask) else mask
        params, grads = (_select(tree, mask) for tree in (params, grads))
    named, treedef = jax.tree.flatten_with_path(params)
    blocks = [
        _block(w, g, *_check_leaf(w, g, path, scope, axes))
        for (path, w), g in zip(named, jax.tree.leaves(grads), strict=True)
    ]
    # Each block's numbers in units of the largest weight and gradient of the tree.
    top_w, top_g = (
        functools.reduce(
            jnp.maximum, (jnp.max(x, initial=0) for x in peaks), jnp.float32(0)
        )
        for peaks in ([b.peak_w for b in blocks], [b.peak_g for b in blocks])
    )
    wg = ww = gg = radial = jnp.float32(0)
    for b in blocks:
        w, g = _ratio(b.peak_w, top_w), _ratio(b.peak_g, top_g)
        wg += jnp.sum(b.wg * w * g)
        ww += jnp.sum(b.ww * w**2)
        gg += jnp.sum(b.gg * g**2)
        radial += jnp.sum(b.cosine**2 * b.gg * g**2)
    global_cosine = _cosine(wg, ww, gg)
    if scope == "global":
        return NLMAlignment(global_cosine, global_cosine, global_cosine**2)
    cosine = treedef.unflatten([b.cosine for b in blocks])
    return NLMAlignment(cosine, global_cosine, _ratio(radial, gg))


def monitor_nlm(
    *, scope: Scope = "leaf", axes: AxesOf = None, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Keep the alignment of each gradient with the weights in the optimizer's state.

    Updates pass through unchanged. Place it first in a chain, where it sees the raw
    gradient, and read it by `optax.tree.get(state, "global_cosine")`. A step costs
    three sums over the parameters.

    Args:
        scope: as in `nlm_alignment`.
        axes: as in `nlm_alignment`.
        mask: as in `optax.masked`: booleans in a tree (prefix) like the parameters, or
            a callable of params or updates that returns one; leaves marked False are
            not measured.

    Returns:
        A transformation with `MonitorNLMState`, inside `optax.MaskedState` if there is
        a mask. Its `update` needs `params`.

    Raises:
        ValueError: as `nlm_alignment`, and if `update` is called without `params`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.landscape import monitor_nlm
        >>> tx = optax.chain(monitor_nlm(), optax.sgd(0.1))
        >>> params = jnp.array([3.0, 4.0])
        >>> _, state = tx.update(-2 * params, tx.init(params), params)
        >>> round(float(optax.tree.get(state, "global_cosine")), 4)
        1.0

    Reference:
        arXiv:2501.04697, NLM direction.
    """
    _check_scope(scope, axes)
    align = functools.partial(nlm_alignment, scope=scope, axes=axes)

    def init_fn(params: optax.Params) -> MonitorNLMState:
        shapes = jax.eval_shape(align, params, params)
        zero = functools.partial(jnp.zeros_like, dtype=jnp.float32)
        return MonitorNLMState(jax.tree.map(zero, shapes))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MonitorNLMState]:
        del state, extra_args
        if params is None:
            raise ValueError(
                "monitor_nlm compares gradients with params, which are missing; call "
                "tx.update(grads, state, params)."
            )
        alignment = align(params, updates)
        single = lambda x: x.astype(jnp.float32)  # noqa: E731
        return updates, MonitorNLMState(jax.tree.map(single, alignment))

    monitor = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return monitor if mask is None else optax.masked(monitor, mask)


class _Block(NamedTuple):
    """Sums over the blocks of one leaf, in units of each block's largest entries."""

    cosine: Array
    wg: Array
    ww: Array
    gg: Array
    peak_w: Array
    peak_g: Array


@functools.partial(jax.jit, static_argnames=("over", "dtype"))
def _block(w: Array, g: Array, over: tuple[int, ...], dtype: jnp.dtype) -> _Block:
    w, g = w.astype(dtype), g.astype(dtype)
    peak_w, peak_g = (
        jnp.max(jnp.abs(x), over, keepdims=True, initial=0) for x in (w, g)
    )
    w, g = _ratio(w, peak_w), _ratio(g, peak_g)
    wg, ww, gg = (jnp.sum(x, over) for x in (w * g, w * w, g * g))
    peaks = (jnp.squeeze(peak, over) for peak in (peak_w, peak_g))
    return _Block(_cosine(wg, ww, gg), wg, ww, gg, *peaks)


def _ratio(x: Array, total: Array) -> Array:
    """Divide by a bound on |x|; 0 where both are 0, NaN where it is not finite."""
    # The reciprocal of the largest numbers is subnormal, which devices flush to zero.
    shrink = jnp.where(total > 1, 0.25, 1).astype(total.dtype)
    return x * shrink / jnp.where(total == 0, 1, total * shrink)


def _cosine(wg: Array, ww: Array, gg: Array) -> Array:
    norms = jnp.sqrt(ww) * jnp.sqrt(gg)
    return jnp.clip(-wg / jnp.where(norms == 0, 1, norms), -1, 1)


def _select(tree: PyTree, mask: PyTree) -> PyTree:
    absent = lambda subtree: jax.tree.map(lambda _: optax.MaskedNode(), subtree)  # noqa: E731
    return jax.tree.map(lambda keep, x: x if keep else absent(x), mask, tree)


def _check_scope(scope: Any, axes: AxesOf) -> None:
    if scope not in get_args(Scope):
        raise ValueError(
            f"scope={scope!r} is unknown; use one of {', '.join(get_args(Scope))}."
        )
    if axes is not None and scope != "neuron":
        raise ValueError(f"axes belong to scope='neuron', got scope={scope!r}.")


def _check_shapes(params: PyTree, grads: PyTree) -> None:
    need, got = (jax.tree.map(jnp.shape, tree) for tree in (params, grads))
    # Flattened, because not every kind of node compares by its contents.
    if jax.tree.flatten(got) != jax.tree.flatten(need):
        raise ValueError(
            f"grads must be shaped like the parameters: got {got}, need {need}."
        )


def _check_leaf(
    w: Any, g: Any, path: Any, scope: Scope, axes: AxesOf
) -> tuple[tuple[int, ...], jnp.dtype]:
    """Return the axes that a block of this leaf spans, and the dtype of its sums."""
    name = jax.tree_util.keystr(path) or "the leaf"
    for leaf in (w, g):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{name} is {jnp.result_type(leaf)}, not real floating point; leave it "
                "out by `mask`."
            )
    ndim = jnp.ndim(w)
    axes = axes(path, w) if callable(axes) else axes
    if axes is None:
        axes = range(ndim - 1 if scope == "neuron" and ndim >= 2 else ndim)
    over = (axes,) if isinstance(axes, int) else tuple(axes)
    inside = all(-ndim <= axis < ndim for axis in over)
    if not inside or len({axis % ndim for axis in over}) < len(over):
        raise ValueError(
            f"axes={over} do not fit {name} of shape {jnp.shape(w)}; each must be an "
            "axis of it, named once. A callable (path, leaf) gives axes per leaf."
        )
    return over, jnp.promote_types(wide_dtype(w), wide_dtype(g))
