"""The gradient of every task, for methods that weigh tasks against one another.

    J_t = ∂L_t/∂θ,        h_t = ∂L_t/∂φ_t        for each task t

with θ the parameters all tasks share and φ_t the head that only task t uses.  Heads
need no weighing: each follows its own loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from basinax.optimizers._owners import Owners, check_owners, resolve_owners
from basinax.optimizers._task_loop import (
    Axis,
    check_axis,
    check_losses,
    loss_of,
    over_tasks,
)


class TaskGrads(NamedTuple):
    """Gradients of T losses, in two trees like the parameters.

    Attributes:
        shared: for each shared leaf the gradients of all tasks, with a leading axis T;
            None for private leaves.
        private: for each private leaf the gradient of its own task's loss; None for
            shared leaves.
    """

    shared: PyTree
    private: PyTree


class TaskDiagnostics(NamedTuple):
    """What the perturbed evaluations tell about each task.

    Attributes:
        losses: losses at the perturbed points, shape (T,).
        sharpness: how far they rose above the clean ones, shape (T,).
        slopes: the differences p_t, shape (T, num_samples), in `samo_value_and_grad`
            with `local="spsa"`; else None.
    """

    losses: Float[Array, " T"]
    sharpness: Float[Array, " T"]
    slopes: Float[Array, "T n"] | None


def task_gradients(
    losses_fn: Callable[..., Any],
    *,
    owner: Any = None,
    axis: Axis = "map",
    has_aux: bool = False,
) -> Callable[..., tuple[Any, TaskGrads]]:
    """Differentiate each of T losses: one forward and T backward passes.

    The rows are those of `jax.jacrev`, without the T² blocks that heads make of it.

    A loss must not depend on the private leaves of other tasks; such derivatives are
    left out.  A NaN in the loss or the derivative of one task is a NaN in its row;
    unless `axis` is "unroll" it may reach the others through products 0·NaN.

    Args:
        losses_fn: function `(params, *args, **kwargs) -> losses`, of shape (T,), or
            `-> (losses, aux)`.
        owner: which task owns each leaf: a tree (prefix) of ints, or a callable of the
            parameters returning one; -1 for leaves that all tasks share and t for
            leaves that only task t uses.  None: all shared.
        axis: "map" goes through the tasks in a loop, in constant memory.  "unroll"
            repeats the program with static indices, which leaves out the heads of the
            other tasks if `losses_fn` ends in `jnp.stack`; compiling takes longer, and
            on CPUs convolutions are much faster outside loops.  "vmap" runs all tasks
            at once, with T times the memory.
        has_aux: whether `losses_fn` returns `(losses, aux)`.

    Returns:
        A function `(params, *args, **kwargs) -> (losses, TaskGrads)`, or
        `-> ((losses, aux), TaskGrads)`.

    Raises:
        TypeError: an owner is no int, or the losses are not real floating point.
        ValueError: `axis` is unknown, the losses are not (T,), or `owner` does not fit
            parameters or tasks.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import task_gradients
        >>> def losses_fn(params, x):
        ...     h = params["body"] * x
        ...     return jnp.stack([h * params["head0"], h * params["head1"]])
        >>> params = {"body": 2.0, "head0": 3.0, "head1": 5.0}
        >>> owner = {"body": -1, "head0": 0, "head1": 1}
        >>> losses, grads = task_gradients(losses_fn, owner=owner)(params, 1.0)
        >>> grads.shared["body"].tolist(), float(grads.private["head1"])
        ([3.0, 5.0], 2.0)
    """
    check_axis(axis)

    def fn(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, TaskGrads]:
        owners = resolve_owners(owner, params)
        tasks = evaluate(losses_fn, owners, params, args, kwargs, axis, has_aux)
        return tasks.value(has_aux), tasks.gradients()

    return fn


class Tasks(NamedTuple):
    """T losses at one point, with what their derivatives need.

    Attributes:
        losses_fn: the losses as a function of the two parts of the parameters.
        owners: owners of the leaves.
        axis: how to go through the tasks.
        shared: shared part of the parameters.
        private: private part of the parameters.
        losses: their values, shape (T,).
        aux: what the losses came with.
        pull: cotangent of the losses -> gradients of both parts.
    """

    losses_fn: Callable[[PyTree, PyTree], Array]
    owners: Owners
    axis: Axis
    shared: PyTree
    private: PyTree
    losses: Float[Array, " T"]
    aux: Any
    pull: Callable[[Array], tuple[PyTree, PyTree]]

    def value(self, has_aux: bool) -> Any:
        """Return what the differentiated function returned."""
        return (self.losses, self.aux) if has_aux else self.losses

    def gradient_of_mean(self) -> tuple[PyTree, PyTree]:
        """Differentiate the mean loss; return the shared and the private part."""
        return self.pull(jnp.full_like(self.losses, 1 / self.losses.size))

    def gradient(self, task: int | Array) -> tuple[PyTree, PyTree]:
        """Differentiate one loss."""
        if isinstance(task, int):
            # The compiler merges the forward pass with the one that was made already.
            one = loss_of(self.losses_fn, task)
            return jax.grad(one, (0, 1))(self.shared, self.private)
        tasks = jnp.arange(self.losses.size)
        return self.pull((tasks == task).astype(self.losses.dtype))

    def gradients(self) -> TaskGrads:
        """Differentiate each loss."""
        return self.collect(lambda task: (None, *self.gradient(task)))[1]

    def gradient_at(
        self, task: int | Array, shared: PyTree, private: PyTree
    ) -> tuple[Array, PyTree, PyTree]:
        """Evaluate and differentiate one loss elsewhere."""
        one = loss_of(self.losses_fn, task)
        value, grads = jax.value_and_grad(one, (0, 1))(shared, private)
        return value, *grads

    def diagnose(self, losses: Array, slopes: Array | None = None) -> TaskDiagnostics:
        """Compare losses at perturbed points with the clean ones."""
        sharpness = losses - self.losses.astype(losses.dtype)
        return TaskDiagnostics(losses, sharpness, slopes)

    def collect(
        self, gradients: Callable[[Any], tuple[Any, PyTree, PyTree]]
    ) -> tuple[Any, TaskGrads]:
        """Stack `gradients(task) -> (anything, shared, private)` over the tasks."""

        def cast(task: int | Array) -> tuple[Any, PyTree, PyTree]:
            out, *grads = gradients(task)
            return out, *cast_like(tuple(grads), (self.shared, self.private))

        size = self.losses.size
        out, *grads = over_tasks(cast, size, self.axis, self.owners, self.private)
        return out, TaskGrads(*grads)


def evaluate(
    losses_fn: Callable[..., Any],
    owners: Owners,
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axis: Axis,
    has_aux: bool,
) -> Tasks:
    """Evaluate the losses and get ready for their derivatives."""
    shared, private = owners.split(params)

    def with_aux(shared: PyTree, private: PyTree) -> tuple[Array, Any]:
        out: Any = losses_fn(owners.merge(shared, private), *args, **kwargs)
        if not has_aux:
            out = out, None
        elif not isinstance(out, tuple) or len(out) != 2:
            raise ValueError(
                "with has_aux=True losses_fn must return (losses, aux), got a "
                f"{type(out).__name__}."
            )
        losses, aux = out
        check_losses(losses)
        return losses, aux

    losses, pull, aux = jax.vjp(with_aux, shared, private, has_aux=True)
    check_owners(owners, losses.size)
    return Tasks(
        lambda *parts: with_aux(*parts)[0],
        owners,
        axis,
        shared,
        private,
        losses,
        aux,
        pull,
    )


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Cast every leaf to the dtype of its counterpart."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)
