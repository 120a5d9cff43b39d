"""SAMO: sharpness-aware gradients of many tasks, at T + 1 backward passes.

    g = ∇ (1/T) Σ L_t,    p_t = [L_t(θ + μz_t) − L_t(θ − μz_t)] / 2μ,    ĝ_t = p_t z_t
    l_t = ĝ_t ‖g‖ / ‖ĝ_t‖  for each tensor,    q_t = α g + (1−α) l_t
    ε_t = ρ q_t / ‖q_t‖,                       J_t = ∇L_t(θ + ε_t, φ_t + ρ ∇φ_t/‖∇φ_t‖)

Each task is perturbed along a mix of the common gradient and an estimate of its own
from two forward passes.  "SAMO: A Lightweight Sharpness-Aware Approach for Multi-Task
Optimization with Joint Global-Local Perturbation" (ICCV 2025, arXiv:2507.07883).
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from basinax.optimizers._ascent import ascent, check_radius, shifted
from basinax.optimizers._checks import check_choice
from basinax.optimizers._owners import SHARED, resolve_owners
from basinax.optimizers._scaling import unit_scale
from basinax.optimizers._spsa import draw_direction, spsa_gradient
from basinax.optimizers._task_gradients import (
    TaskGrads,
    Tasks,
    cast_like,
    evaluate,
)
from basinax.optimizers._task_loop import Axis, check_axis, loss_of, row


def samo_value_and_grad(
    losses_fn: Callable[..., Any],
    *,
    rho: Any,
    alpha: Any = 0.5,
    local: Literal["spsa", "exact", "none"] = "spsa",
    mu: Any = 1e-3,
    num_samples: int = 1,
    layerwise: bool = True,
    owner: Any = None,
    perturb_private: bool | Literal["raw"] = True,
    adaptive: bool = False,
    axis: Axis = "map",
    has_aux: bool = False,
    spsa_losses_fn: Callable[..., Any] | None = None,
    diagnostics: bool = False,
) -> Callable[..., Any]:
    """Differentiate each of T losses where a perturbation made for its task puts it.

    Put an aggregation of task gradients behind it, and any optimizer behind that.
    `local="none"` is SAM on the mean loss; `alpha=0, local="exact", layerwise=False`
    is SAM on each loss; with one task both are SAM.

    With one sample and `layerwise=True` only the sign of the difference p_t survives
    the normalization, and the direction is otherwise random: its expected cosine with
    the task's gradient in D dimensions is √(2/πD).  Raise `num_samples`, or pay T more
    backward passes for `local="exact"`, if the local part should know its task.  `mu`
    is a distance per coordinate: the point moves by μ√D, which has to stay small beside
    the weights.

    ================ ===================== ================
    local            forward passes        backward passes
    ================ ===================== ================
    "spsa"           1 + T + 2T·samples    1 + T
    "exact"          1 + T                 1 + 2T
    "none"           2                     1 + T
    ================ ===================== ================

    Passes per task run through one head with `axis="unroll"`, through all otherwise.
    Directions are drawn again from the key wherever they are used, not stored.  All
    devices of a mesh draw the same; inside `shard_map`, average the losses over the
    devices that share parameters within `losses_fn` and give all the same key.

    Weights in half precision are perturbed in float32, where the step does not round
    away, and reach `losses_fn` as float32; cast inside it to compute in less.

    A non-finite gradient of any loss makes the common part and so all rows NaN.
    Where a gradient, a difference or a whole task is zero, so is its perturbation.

    Args:
        losses_fn: function `(params, *args, **kwargs) -> losses`, of shape (T,), or
            `-> (losses, aux)`.  No loss may depend on private leaves of other tasks.
        rho: radius ρ of the perturbation of all shared leaves together, and of each
            task's private leaves; may be traced.  0 gives the clean gradients.
        alpha: weight of the common part, between 0 and 1.  A Python 1 leaves out the
            passes for the local part.
        local: how the task's own direction is found: from differences of losses, as its
            exact gradient, or not at all, which ignores `alpha`.
        mu: distance per coordinate of the differences (authors: 0.01).
        num_samples: directions per task; their estimates are averaged.
        layerwise: whether to give the local part, leaf by leaf, the norm of the common
            one.
        owner: which task owns each leaf, as in `task_gradients`.
        perturb_private: whether private leaves move up the gradient of their loss, by a
            radius of their own; "raw" moves them by the gradient of the mean loss as
            it is (elementwise times w² if adaptive), as one of the authors' trainers.
        adaptive: whether lengths are measured relative to |w|, as in ASAM.
        axis: how to go through the tasks, as in `task_gradients`.
        has_aux: whether `losses_fn` returns `(losses, aux)`; aux, such as updated batch
            statistics, is that of the clean pass.
        spsa_losses_fn: the losses that are differenced, without aux; for a model in
            evaluation mode.  Default: those of `losses_fn`.
        diagnostics: whether to return a `TaskDiagnostics` as well.

    Returns:
        A function `(params, *args, key=..., **kwargs) -> (losses, TaskGrads)` of the
        clean losses, or `-> ((losses, aux), TaskGrads)`, with `TaskDiagnostics` as a
        last element if asked for.  In place of `key` (with `local="spsa"`; otherwise
        it is ignored) `directions=` gives the z: a tree like the parameters whose
        shared leaves have leading axes (T, num_samples), and private ones are ignored.
        `mean_gradient=`, where the gradient of the mean loss is already known, saves a
        backward pass.

    Raises:
        TypeError: as in `task_gradients`, or `num_samples` is no int.
        ValueError: an option is unknown or out of range; in the call, neither or both
            of `key` and `directions`; otherwise as in `task_gradients`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.optimizers import samo_value_and_grad
        >>> losses_fn = lambda w: jnp.stack([w @ w, jnp.sum(w)])
        >>> fn = jax.jit(samo_value_and_grad(losses_fn, rho=0.1))
        >>> losses, grads = fn(jnp.array([3.0, 4.0]), key=jax.random.key(0))
        >>> losses.tolist(), grads.shared.shape
        ([25.0, 7.0], (2, 2))

    Reference:
        arXiv:2507.07883.
    """
    check_radius(rho)
    check_axis(axis)
    check_choice("local", local, ("spsa", "exact", "none"))
    _check_numbers(alpha, mu, num_samples)
    if perturb_private not in (True, False, "raw"):
        raise ValueError(
            f"perturb_private={perturb_private!r} is unknown; use True, False or 'raw'."
        )
    if spsa_losses_fn is not None and local != "spsa":
        raise ValueError(f"spsa_losses_fn has no use with local={local!r}.")
    # A weight of one that is known now saves the passes.
    estimate = "none" if _is_known(alpha, 1) else local

    def fn(
        params: PyTree,
        *args: Any,
        key: PRNGKeyArray | None = None,
        directions: PyTree = None,
        mean_gradient: PyTree = None,
        **kwargs: Any,
    ) -> Any:
        owners = resolve_owners(owner, params)
        tasks = evaluate(losses_fn, owners, params, args, kwargs, axis, has_aux)
        shared = tasks.shared
        direction = _directions(tasks, local, key, directions, num_samples)
        if mean_gradient is None:
            common, common_private = tasks.gradient_of_mean()
        else:
            common, common_private = owners.split(mean_gradient)
        heads = tasks.private
        if perturb_private:
            raw = perturb_private == "raw"
            heads = perturbed_heads(tasks, common_private, rho, adaptive, raw)

        def spsa_losses(shared: PyTree, private: PyTree) -> Array:
            if spsa_losses_fn is None:
                return tasks.losses_fn(shared, private)
            losses = spsa_losses_fn(owners.merge(shared, private), *args, **kwargs)
            if jnp.shape(losses) != tasks.losses.shape:
                raise ValueError(
                    f"spsa_losses_fn must return losses of shape {tasks.losses.shape}, "
                    f"without aux, got {jax.tree.map(jnp.shape, losses)}."
                )
            return losses

        def perturbed_gradient(task: Any) -> tuple[Any, PyTree, PyTree]:
            slopes = None
            if estimate == "spsa":
                one = loss_of(spsa_losses, task)
                slopes, own = spsa_gradient(
                    lambda shared: one(shared, tasks.private),
                    shared,
                    lambda sample: direction(task, sample),
                    mu,
                    num_samples,
                )
            else:
                own, _ = tasks.gradient(task)
            q = joint_direction(common, own, alpha, layerwise=layerwise)
            epsilon = ascent(q, shared, rho, adaptive=adaptive)
            loss, *grads = tasks.gradient_at(task, shifted(shared, epsilon), heads)
            return (loss, slopes), *grads

        if estimate == "none":
            # One point for all tasks: one more forward pass is enough.
            epsilon = ascent(common, shared, rho, adaptive=adaptive)
            point = owners.merge(shifted(shared, epsilon), heads)
            there = evaluate(losses_fn, owners, point, args, kwargs, axis, has_aux)
            grads = cast_like(there.gradients(), TaskGrads(shared, tasks.private))
            losses, slopes = there.losses, None
        else:
            (losses, slopes), grads = tasks.collect(perturbed_gradient)
        found = tasks.value(has_aux), grads
        return (*found, tasks.diagnose(losses, slopes)) if diagnostics else found

    return fn


def joint_direction(
    common: PyTree, local: PyTree, alpha: Any, *, layerwise: bool = True
) -> PyTree:
    """Mix the common gradient with one task's own: q = α g + (1−α) l.

    Args:
        common: tree g.
        local: tree of the same structure, the task's own direction.
        alpha: weight of the common part.
        layerwise: whether to give each leaf of `local` the norm it has in `common`;
            a leaf that is zero in either then adds nothing.

    Returns:
        The tree q, in at least float32.
    """

    def mix(g: Array, own: Array) -> Array:
        wide = jnp.promote_types(g.dtype, jnp.float32)
        g, own = g.astype(wide), own.astype(wide)
        if layerwise:
            own = with_norm_of(g, own)
        if _is_known(alpha, 0):
            return own
        a = jnp.asarray(alpha, wide)
        return a * g + (1 - a) * own

    return jax.tree.map(mix, common, local)


def with_norm_of(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute y ‖x‖ / ‖y‖: zero where y is, NaN where an entry of y is not finite."""
    if not y.size:
        return y
    (x, x_scale), (y, y_scale) = unit_scale(x, None), unit_scale(y, None)
    x_norm, y_norm = (jnp.sqrt(jnp.sum(jnp.square(z))) for z in (x, y))
    ratio = x_norm / jnp.where(y_norm == 0, 1, y_norm)
    # Infinite only if x is; times zero, that is NaN, like a NaN of y.
    factor = (x_scale * ratio).astype(y.dtype)
    return jnp.where(jnp.isfinite(y_scale), factor * y, jnp.nan)


def perturbed_heads(
    tasks: Tasks, gradient: PyTree, rho: Any, adaptive: bool, raw: bool = False
) -> PyTree:
    """Move each head up its gradient: by ρ, or if `raw` by the gradient itself."""
    heads = tasks.private
    if raw:

        def step(w: Array, g: Array) -> Array:
            return jnp.square(w) * g if adaptive else g

        return shifted(heads, jax.tree.map(step, heads, gradient))
    for task in sorted(set(tasks.owners.tasks) - {SHARED}):
        own, weights = (
            tasks.owners.part(tree, lambda owner, task=task: owner == task)
            for tree in (gradient, tasks.private)
        )
        heads = shifted(heads, ascent(own, weights, rho, adaptive=adaptive))
    return heads


def _directions(
    tasks: Tasks, local: str, key: Any, directions: PyTree, num_samples: int
) -> Callable[[Any, Any], PyTree]:
    """Return the function of task and sample that draws or looks up a direction."""
    shared, owners = tasks.shared, tasks.owners
    if local != "spsa":
        if directions is not None:
            raise ValueError(f"directions have no use with local={local!r}.")
        return lambda *_: None
    if (key is None) == (directions is None):
        raise ValueError(
            "local='spsa' perturbs along random directions: pass either key= or "
            f"directions=, got {'neither' if key is None else 'both'}."
        )
    if key is not None:

        def draw(task: Any, sample: Any) -> PyTree:
            own = jax.random.fold_in(jax.random.fold_in(key, task), sample)
            return draw_direction(own, shared)

        return draw
    leading = (tasks.losses.size, num_samples)
    try:
        given, _ = owners.split(directions)
        jax.tree.map(lambda z, w: _check_direction(z, w, leading), given, shared)
    except ValueError as error:
        raise ValueError(
            "directions must be a tree like the parameters whose shared leaves have "
            f"leading axes (tasks, samples) = {leading}: {error}"
        ) from error

    def look_up(task: Any, sample: Any) -> PyTree:
        def one(z: Any, w: Array) -> Array:
            wide = jnp.promote_types(w.dtype, jnp.float32)
            return row(row(jnp.asarray(z, wide), task), sample)

        return jax.tree.map(one, given, shared)

    return look_up


def _check_direction(z: Any, w: Any, leading: tuple[int, int]) -> None:
    if jnp.shape(z) != leading + jnp.shape(w):
        raise ValueError(f"got shape {jnp.shape(z)} for a leaf of {jnp.shape(w)}.")


def _is_known(value: Any, number: int) -> bool:
    return isinstance(value, int | float) and value == number


def _check_numbers(alpha: Any, mu: Any, num_samples: Any) -> None:
    if not isinstance(alpha, Tracer) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}.")
    if not isinstance(mu, Tracer) and not mu > 0:
        raise ValueError(f"mu must be positive, got {mu}.")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(
            f"num_samples is a compile-time int, got {type(num_samples).__name__}."
        )
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
