"""GradDrop: in every coordinate, follow only the tasks that agree on a sign.

    P = ½ (1 + Σ_t g_t / Σ_t |g_t|),    U uniform on [0, 1)
    u = Σ_t (ℓ + (1-ℓ) keep_t) g_t,     keep_t = g_t > 0 if U < P, else g_t < 0

elementwise.  Where all gradients have one sign, P is 1 or 0 and all pass; a coordinate
in conflict takes the stronger side more often, so that u is the sum Σ_t g_t on average.
Chen, Ngiam, Huang, Luong, Kretzschmar, Chai and Anguelov, "Just Pick a Sign: Optimizing
Deep Multitask Models with Gradient Sign Dropout" (NeurIPS 2020, arXiv:2010.06808).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from basinax.optimizers._keys import as_key, next_key
from basinax.optimizers._layout import explicit_axes
from basinax.optimizers._stacked import count_tasks, take_apart
from basinax.optimizers._task_gramian import per_task
from basinax.optimizers._weighting import needed


class GradDropState(NamedTuple):
    """State of `grad_drop_aggregate`.

    Attributes:
        key: random key of the next update, or None.
    """

    key: Any


def grad_drop(
    stacked: PyTree[Float[Array, "T ..."]],
    *,
    key: Any = None,
    uniforms: PyTree[Float[Array, "..."]] | None = None,
    leak: Any = 0.0,
) -> PyTree[Float[Array, "..."]]:
    """Sum task gradients over one sign, drawn for each coordinate.

    Gradients that disagree do not cancel: one side waits.  The noise this adds is
    largest where tasks conflict most, which drives training out of points where their
    gradients balance without being zero.

    Args:
        stacked: tree of gradients with a leading task axis, shape (T, ...).
        key: random key, or int as its seed, from which each leaf draws its own numbers.
        uniforms: the numbers U themselves instead of `key`, a tree of shapes (...).
        leak: how much of the dropped gradients passes all the same: ℓ, between 0
            (nothing) and 1 (a plain sum); a number, or one for each task, shape (T,).

    Returns:
        A tree of shapes (...) in the dtypes of the gradients.  Gradients that are all
        zero give zero; a NaN makes its coordinate NaN.

    Raises:
        TypeError: `key` is no random key.
        ValueError: neither or both of `key` and `uniforms` are given, or the leaves do
            not stack the same number of tasks.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import grad_drop
        >>> grads = jnp.array([[1.0, 2.0, -3.0], [1.0, 0.5, 1.0]])
        >>> grad_drop(grads, uniforms=jnp.array([0.5, 0.5, 0.5])).tolist()
        [2.0, 2.5, -3.0]

    Reference:
        arXiv:2010.06808, algorithm 1 on the gradients of parameters.
    """
    if (key is None) == (uniforms is None):
        raise ValueError(
            "grad_drop draws from a random key or takes the numbers: pass one of key= "
            "and uniforms=."
        )
    leaves, treedef = jax.tree.flatten(stacked)
    if leaves:
        count_tasks(stacked, uniforms, None)
    if uniforms is None:
        key = as_key(key)
        chances = [_draw(key, index, x) for index, x in enumerate(leaves)]
    else:
        chances = treedef.flatten_up_to(uniforms)
    pairs = zip(leaves, chances, strict=True)
    return treedef.unflatten(_pick_sign(x, u, leak) for x, u in pairs)


def grad_drop_aggregate(
    *, leak: Any = 0.0, mask: Any = None, key: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Aggregate task gradients by `grad_drop`, as the first link of a chain.

    Like `aggregate` it takes stacked trees or `TaskGrads`, whose private part passes
    unchanged.

    Args:
        leak: how much of the dropped gradients passes, as in `grad_drop`.
        mask: tree (prefix) of booleans, or callable of the parameters returning one;
            leaves marked False pass unchanged.
        key: random key, or int as its seed, kept in the state and renewed at each
            update.  Without it, each `update` needs the extra argument `key`.

    Returns:
        A transformation with `GradDropState`.

    Raises:
        ValueError: in `update`, there is no key, or the leaves do not stack the same
            number of tasks.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.optimizers import grad_drop_aggregate
        >>> tx = optax.chain(grad_drop_aggregate(key=0), optax.adam(1e-3))
        >>> grads = jnp.array([[1.0, 2.0], [3.0, -2.0]])
        >>> updates, state = tx.update(grads, tx.init(jnp.zeros(2)))

    Reference:
        arXiv:2010.06808.
    """
    as_key(key)  # its errors belong here

    def init_fn(params: optax.Params) -> GradDropState:
        del params
        return GradDropState(as_key(key))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        key: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradDropState]:
        del extra_args
        parts = take_apart(updates, mask, params)
        if not jax.tree.leaves(parts.tasks):
            return parts.merge(parts.tasks), state
        count_tasks(parts.tasks, params, None)
        now, later = next_key(key, state.key)
        now = needed(now, "key", "grad_drop_aggregate")
        picked = grad_drop(parts.tasks, key=now, leak=leak)
        return parts.merge(picked), GradDropState(later)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _pick_sign(
    x: Float[Array, "T ..."], uniform: Float[Array, "..."], leak: Any
) -> Float[Array, "..."]:
    g = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    size = jnp.sum(jnp.abs(g), 0)
    purity = 0.5 * (1 + jnp.sum(g, 0) / jnp.where(size == 0, 1, size))
    # A NaN is on neither side, and multiplied by zero it is still NaN.
    keep = jnp.where((uniform < purity)[None], g > 0, g < 0)
    leak = jnp.asarray(leak, g.dtype)
    leak = per_task(leak, g) if leak.ndim else leak
    return jnp.sum(jnp.where(keep, 1, leak) * g, 0).astype(x.dtype)


def _draw(key: Array, index: int, x: Float[Array, "T ..."]) -> Float[Array, "..."]:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    layout = jax.typeof(x).sharding
    place = NamedSharding(layout.mesh, PartitionSpec(*layout.spec[1:]))
    return jax.random.uniform(
        jax.random.fold_in(key, index),
        x.shape[1:],
        dtype,
        out_sharding=place if explicit_axes([x]) else None,
    )
