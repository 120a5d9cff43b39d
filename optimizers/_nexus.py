"""Nexus: gradients along a short walk over the micro-batches, for a common minimum.

    acc_0 = 0,   acc_k = acc_{k-1} + N(∇L_k(θ - γ acc_{k-1})),   G = acc_K / K,

with N(g) = g / (‖g‖₂ + eps).  It costs what accumulating K gradients costs, and for
γ = 0 it is that, up to N.  Averaged over orders of the micro-batches, and without N, to
first order in γ,

    E G = mean_k g_k - γ (K-1)/4 ∇ mean_{i≠j} <g_i, g_j>,

so the walk favours points where the gradients of the micro-batches agree.  The
accumulator is a sum of directions; it is never recovered from a difference of
parameters, which rounding in bfloat16 would leave nothing of.

Reference: *Nexus*, arXiv:2604.09258; Nichol, Achiam, Schulman, *On First-Order
Meta-Learning Algorithms*, arXiv:1803.02999 (the expansion for raw gradients).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from basinax.optimizers._scaling import power_of_two

Normalize = Literal["global", "per_leaf"] | Callable[[PyTree], PyTree] | None
Reduce = Literal["mean", "sum", "displacement"]

# Added to norms: far below any gradient that matters, and enough to make a zero
# gradient a zero direction.
EPS = 1e-12


def unit_direction(gradient: PyTree, eps: float = EPS) -> PyTree:
    """Compute g / (‖g‖₂ + eps) over a whole tree.

    Where squares would overflow or vanish they are taken in units of the largest entry.

    Args:
        gradient: tree of floating-point arrays in the dtype to compute in.
        eps: ε > 0, in units of the gradient.
    """
    leaves = jax.tree.leaves(gradient)
    if not leaves:
        return gradient

    def sum_of_squares(inverse: Array) -> Array:
        squares = [jnp.sum(jnp.square(g * inverse.astype(g.dtype))) for g in leaves]
        return functools.reduce(jnp.add, squares)

    def in_units_of_the_largest() -> tuple[Array, Array]:
        peaks = [jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves]
        peak = functools.reduce(jnp.maximum, peaks).astype(direct.dtype)
        _, inverse = power_of_two(peak)
        return sum_of_squares(inverse).astype(direct.dtype), inverse

    direct = sum_of_squares(jnp.ones((), jnp.float32))
    one, info = jnp.ones_like(direct), jnp.finfo(direct.dtype)
    in_range = (direct > float(info.tiny / info.eps**2)) & jnp.isfinite(direct)
    squares, inverse = jax.lax.cond(
        in_range, lambda: (direct, one), in_units_of_the_largest
    )
    factor = 1 / (jnp.sqrt(squares) + eps * inverse)
    return jax.tree.map(
        lambda g: g * inverse.astype(g.dtype) * factor.astype(g.dtype), gradient
    )


def direction(gradient: PyTree, normalize: Normalize, eps: float = EPS) -> PyTree:
    """Compute N(g)."""
    if normalize == "global":
        return unit_direction(gradient, eps)
    if normalize == "per_leaf":
        return jax.tree.map(lambda g: unit_direction(g, eps), gradient)
    return gradient if normalize is None else normalize(gradient)


def look_ahead(params: PyTree, acc: PyTree, gamma: Array) -> PyTree:
    """Compute θ - γ acc in the wider of their dtypes."""

    def point(p: Array, a: Array) -> Array:
        dtype = jnp.promote_types(p.dtype, a.dtype)
        return p.astype(dtype) - gamma.astype(dtype) * a.astype(dtype)

    return jax.tree.map(point, params, acc)


def add_direction(
    acc: PyTree, gradient: PyTree, normalize: Normalize, eps: float
) -> PyTree:
    """Compute acc + N(g), with N in at least float32."""
    wide = jax.tree.map(
        lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), gradient
    )
    step = direction(wide, normalize, eps)
    return jax.tree.map(lambda a, u: a + u.astype(a.dtype), acc, step)


def reduced(acc: PyTree, reduce: Reduce, count: int, gamma: Array) -> PyTree:
    """Turn the sum of K directions into the pseudo-gradient."""
    if reduce == "mean":
        return jax.tree.map(lambda a: a / count, acc)
    if reduce == "displacement":
        return jax.tree.map(lambda a: gamma.astype(a.dtype) * a, acc)
    return acc


def nexus_value_and_grad(
    loss_fn: Callable[..., Any],
    inner_learning_rate: Any,
    *,
    normalize: Normalize = "global",
    reduce: Reduce = "mean",
    has_aux: bool = False,
    eps: float = EPS,
    accumulator_dtype: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    unroll: int = 1,
) -> Callable[..., Any]:
    """Return a function like `jax.value_and_grad` over K micro-batches, walking.

    For models trained on several sources, or with gradient accumulation: it replaces
    the mean of the K gradients, and its result goes into any optimizer.  A call costs K
    gradients, and one copy of the parameters above them, the accumulator.  The walk
    starts anew from `params` at every call and leaves them untouched.

    Take γ so that γ K is between 1e-4 and 3e-2 of the norm of the parameters, and draw
    the order of the micro-batches anew for every call; the walk favours the later ones.
    Two things to know before trusting a result:

    - With γ = 0 and `normalize` other than None, this is accumulation of unit
      gradients, which weighs sources by 1/‖g_k‖: on quadratics with equal curvature it
      leads to the geometric median of the minima, not to their mean.  Run it as a
      control, as what the walk adds is the difference to it.
    - Unit directions do not shrink near a minimum: G is at most 1 long ("mean",
      "global"), clipping it at 1 never acts, and without a decaying outer learning rate
      the end is exact only to about γ.

    Args:
        loss_fn: `loss_fn(params, microbatch)`, a scalar, or (scalar, aux) with
            `has_aux`; given `key`, `loss_fn(params, microbatch, key)`.
        inner_learning_rate: γ >= 0, in units of the parameters if normalised (an
            independent replication used 0.05), else a learning rate.  A number or a
            scalar array; for a schedule pass its value at the call.
        normalize: "global", one norm over all leaves; "per_leaf"; None for raw
            gradients, as in Reptile and Fish; or a function from gradients to
            directions, which replaces N.
        reduce: what G is: "mean", acc/K; "sum", acc; "displacement", γ acc, the way
            walked.  AdamW, Muon and sign methods do not mind which.
        has_aux: whether the loss returns (loss, aux).
        eps: ε > 0, added to norms: gradients far below it count as zero.
        accumulator_dtype: dtype of acc; at least float32 per leaf if None.  Where it is
            wider than a parameter, the loss gets θ - γ acc in it too, because a step
            below half a unit in the last place would vanish; a loss that computes in
            half precision casts for itself.
        axis_name: axis of `jax.shard_map` or `jax.vmap` over which every inner gradient
            is averaged before it is normalised, so that the result does not depend on
            the number of devices.  Averaging the result instead is another, local
            algorithm.  Under automatic sharding nothing is needed.
        unroll: as in `jax.lax.scan`; on CPU convolutions are slow in loops, and K here
            lets them out of it.

    Returns:
        A function `fn(params, microbatches, *, inner_learning_rate=None, key=None)`,
        where every leaf of `microbatches` has a leading axis K.  It returns the mean
        of the losses along the walk, with aux stacked along a leading axis K if
        `has_aux`, and G in the accumulator's dtype.  That mean is usually below the
        loss at `params`: evaluate that apart to compare with other optimizers.  A
        micro-batch with zero gradient adds nothing; one with NaN makes G NaN.

    Raises:
        TypeError: a parameter is not real floating point, or γ is a schedule.
        ValueError: an unknown option; γ or eps negative or NaN; no micro-batches, or
            leaves that differ in K; a loss that is not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import nexus_value_and_grad
        >>> loss_fn = lambda w, centre: 0.5 * jnp.sum((w - centre) ** 2)
        >>> centres = jnp.array([[4.0, 0.0], [0.0, 3.0]])
        >>> fn = nexus_value_and_grad(loss_fn, 0.1)
        >>> loss, gradient = fn(jnp.zeros(2), centres)
        >>> [round(float(g), 3) for g in gradient]  # the second at (0.1, 0)
        [-0.483, -0.5]

    Reference:
        arXiv:2604.09258, algorithm 1, in the form that needs no second copy.
    """
    if callable(inner_learning_rate):
        raise TypeError(
            "inner_learning_rate is a schedule, but this function counts no steps: "
            "give a number here and the schedule's value at the call, "
            "fn(params, microbatches, inner_learning_rate=schedule(i))."
        )
    check_options(normalize, reduce, eps)
    check_rate(inner_learning_rate)
    default = inner_learning_rate

    def scalar_loss(params: PyTree, microbatch: PyTree, *key: Array) -> Any:
        result = loss_fn(params, microbatch, *key)
        value = result[0] if has_aux else result
        if jnp.shape(value):
            raise ValueError(
                f"the loss must be a scalar, got shape {jnp.shape(value)}; take the "
                "mean over the micro-batch."
            )
        return result

    gradient_fn = jax.value_and_grad(scalar_loss, has_aux=has_aux)

    def nexus_fn(
        params: PyTree,
        microbatches: PyTree,
        *,
        inner_learning_rate: Any = None,
        key: Array | None = None,
    ) -> tuple[Any, PyTree]:
        rate = default if inner_learning_rate is None else inner_learning_rate
        check_rate(rate)
        check_params(params)
        count = count_microbatches(microbatches)
        gamma = jnp.asarray(rate)

        def inner_step(acc: PyTree, inputs: tuple[PyTree, Array]) -> tuple[PyTree, Any]:
            microbatch, number = inputs
            keys = () if key is None else (jax.random.fold_in(key, number),)
            point = look_ahead(params, acc, gamma)
            value, gradient = gradient_fn(point, microbatch, *keys)
            if axis_name is not None:
                gradient = jax.lax.pmean(gradient, axis_name)
            return add_direction(acc, gradient, normalize, eps), value

        acc = zero_accumulator(params, accumulator_dtype)
        inputs = (microbatches, jnp.arange(count))
        acc, values = jax.lax.scan(inner_step, acc, inputs, unroll=unroll)
        losses, *aux = values if has_aux else (values,)
        loss = jnp.mean(losses)
        if axis_name is not None:
            loss = jax.lax.pmean(loss, axis_name)
        gradient = reduced(acc, reduce, count, gamma)
        return (loss, aux[0]) if has_aux else loss, gradient

    return nexus_fn


def zero_accumulator(params: PyTree, dtype: Any = None) -> PyTree:
    """Make acc_0, placed like the parameters."""

    def zeros(leaf: Any) -> Float[Array, "*s"]:
        wide = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
        return jnp.zeros_like(leaf, dtype=wide if dtype is None else dtype)

    return jax.tree.map(zeros, params)


def count_microbatches(microbatches: PyTree) -> int:
    """Return K, or raise ValueError where leaves disagree or there are none."""
    sizes = {
        jax.tree_util.keystr(path): (*jnp.shape(leaf), 0)[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(microbatches)
    }
    count = max(sizes.values(), default=0)
    if count == 0 or set(sizes.values()) != {count}:
        raise ValueError(
            "every leaf of microbatches needs the same leading axis, of at least one "
            f"micro-batch; got sizes {sizes or 'of no leaves'}."
        )
    return count


def check_options(normalize: Normalize, reduce: Reduce, eps: float) -> None:
    """Raise ValueError for options that mean nothing."""
    if not (normalize in ("global", "per_leaf", None) or callable(normalize)):
        raise ValueError(
            "normalize must be 'global', 'per_leaf', None or a function of the "
            f"gradients, got {normalize!r}."
        )
    if reduce not in ("mean", "sum", "displacement"):
        raise ValueError(
            f"reduce must be 'mean', 'sum' or 'displacement', got {reduce!r}."
        )
    if not isinstance(eps, Tracer) and not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}.")


def check_rate(rate: Any) -> None:
    """Refuse what is known now to be no inner learning rate."""
    if isinstance(rate, Tracer):
        return
    value = np.asarray(rate, np.float64)
    if value.ndim or not 0 <= value < np.inf:
        raise ValueError(
            "inner_learning_rate must be a finite scalar >= 0 (0 accumulates "
            f"directions without walking), got {rate}."
        )


def check_params(params: PyTree) -> None:
    """Raise TypeError for a leaf that has no gradient."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"parameter {jax.tree_util.keystr(path)} is {dtype}, but the walk "
                "moves all parameters: take out what is not real floating point and "
                "let the loss close over it."
            )
