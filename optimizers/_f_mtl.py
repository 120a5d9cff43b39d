"""F-MTL: per-task SAM, with clean and flat parts of the gradients kept apart.

    S_t = ∇_θ L_t(θ + ρ g_t/‖g_t‖, φ_t + ρ_φ h_t/‖h_t‖),        F_t = S_t − g_t
    update = A(g_1, …, g_T) + A(F_1, …, F_T)

for g_t, h_t the gradients of L_t in θ and φ_t and any aggregation A.  A linear A
undoes the split; one that resolves conflicts then resolves them among the losses and
among their sharpnesses separately.  Phan et al., "Improving multi-task learning via
seeking task-based flat regions" (2022, arXiv:2211.13723).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from basinax.optimizers._ascent import ascent, check_radius, shifted
from basinax.optimizers._owners import resolve_owners
from basinax.optimizers._samo import perturbed_heads
from basinax.optimizers._task_gradients import TaskGrads, evaluate
from basinax.optimizers._task_loop import Axis, check_axis, row


class FlatTaskGrads(NamedTuple):
    """Gradients of T losses in two parts that are aggregated one by one and added.

    Attributes:
        loss: gradients g_t, h_t at the parameters.
        flat: what SAM adds to them: F_t, and the same for the heads.
    """

    loss: TaskGrads
    flat: TaskGrads


def f_mtl_value_and_grad(
    losses_fn: Callable[..., Any],
    *,
    rho: Any,
    rho_private: Any = None,
    owner: Any = None,
    adaptive: bool = False,
    axis: Axis = "map",
    has_aux: bool = False,
    diagnostics: bool = False,
) -> Callable[..., Any]:
    """Differentiate T losses at their clean and their perturbed points.

    For aggregations that are not linear (MGDA, CAGrad, PCGrad): aggregate `grads.loss`
    and `grads.flat` separately and add the two.  For a linear one the sum is the
    aggregation of the perturbed gradients, which `samo_value_and_grad` with `alpha=0`,
    `local="exact"`, `layerwise=False` gives without the split.  It costs T + 1 forward
    and 2T backward passes, and keeps 2T gradients.

    Args:
        losses_fn: function `(params, *args, **kwargs) -> losses`, of shape (T,), or
            `-> (losses, aux)`.
        rho: radius of the perturbation of the shared leaves; 0 makes the flat part 0.
        rho_private: radius for each task's private leaves; default `rho`.
        owner: which task owns each leaf, as in `task_gradients`.
        adaptive: whether lengths are measured relative to |w|, as in ASAM.
        axis: how to go through the tasks, as in `task_gradients`.
        has_aux: whether `losses_fn` returns `(losses, aux)`; aux is that of the clean
            pass.
        diagnostics: whether to return a `TaskDiagnostics` as well.

    Returns:
        A function `(params, *args, **kwargs) -> (losses, FlatTaskGrads)` of the clean
        losses, or `-> ((losses, aux), FlatTaskGrads)`, with `TaskDiagnostics` as a last
        element if asked for.  The private gradients of both parts add up to the SAM
        gradient of each head.

    Raises:
        TypeError: as in `task_gradients`.
        ValueError: a radius is negative or NaN; otherwise as in `task_gradients`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.optimizers import f_mtl_value_and_grad
        >>> losses_fn = lambda w: jnp.stack([w @ w, jnp.sum(w)])
        >>> fn = f_mtl_value_and_grad(losses_fn, rho=0.5)
        >>> losses, grads = fn(jnp.array([3.0, 4.0]))
        >>> [round(float(x), 3) for x in grads.flat.shared[0]]
        [0.6, 0.8]

    Reference:
        arXiv:2211.13723, equations of the decomposed aggregation.
    """
    check_radius(rho)
    check_axis(axis)
    radius = rho if rho_private is None else rho_private
    check_radius(radius, "rho_private")

    def fn(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        owners = resolve_owners(owner, params)
        tasks = evaluate(losses_fn, owners, params, args, kwargs, axis, has_aux)
        clean = tasks.gradients()
        heads = perturbed_heads(tasks, clean.private, radius, adaptive)

        def flat(task: int | Array) -> tuple[Array, PyTree, PyTree]:
            g = jax.tree.map(lambda rows: row(rows, task), clean.shared)
            epsilon = ascent(g, tasks.shared, rho, adaptive=adaptive)
            loss, *grads = tasks.gradient_at(
                task, shifted(tasks.shared, epsilon), heads
            )
            # In the wide dtype of the perturbed gradients; rounded afterwards.
            return loss, *jax.tree.map(jnp.subtract, tuple(grads), (g, clean.private))

        losses, grads = tasks.collect(flat)
        found = tasks.value(has_aux), FlatTaskGrads(clean, grads)
        return (*found, tasks.diagnose(losses)) if diagnostics else found

    return fn
