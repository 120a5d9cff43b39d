"""Repeat a computation for every task, and pick the loss of one task.

`losses_fn` returns all losses as one array.  With a static task index the other heads
should cost nothing, but the derivative of an index is an array of zeros with a single
one, and multiplications by those zeros stay in the program.  So the loss is traced,
and if its last operation stacks scalars the wanted one is taken from before the stack.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun
from jaxtyping import Array, PyTree

from basinax.optimizers._checks import check_choice
from basinax.optimizers._owners import Owners

Axis = Literal["map", "unroll", "vmap"]


def check_axis(axis: Any) -> None:
    """Refuse an unknown way to go through the tasks."""
    check_choice("axis", axis, ("map", "unroll", "vmap"))


def check_losses(losses: Any) -> None:
    """Refuse losses that are not (T,)."""
    shape = getattr(losses, "shape", None)
    if shape is None or len(shape) != 1 or not shape[0]:
        got = f"a {type(losses).__name__}" if shape is None else f"shape {shape}"
        raise ValueError(
            "losses_fn must return one loss per task, an array of shape (T,) with "
            f"T >= 1, got {got}; use jnp.stack([loss_1, ..., loss_T]), and has_aux "
            "if something else comes with them."
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(f"losses_fn must return real numbers, got {losses.dtype}.")


def loss_of(losses_fn: Callable[..., Array], task: int | Array) -> Callable[..., Array]:
    """Return the function that computes the loss of one task.

    Args:
        losses_fn: function of trees of arrays that returns shape (T,).
        task: index; an int prunes the other heads, a traced one cannot.
    """
    if isinstance(task, int):
        # Inside `jit` the loss is traced once, however many tasks ask for it.
        traced = jax.make_jaxpr(jax.jit(losses_fn))
        return lambda *trees: _entry(traced(*trees), 0, task, jax.tree.leaves(trees))
    return lambda *trees: row(losses_fn(*trees), task)


def row(x: Array, index: int | Array) -> Array:
    """Take x[index], for an index that may be traced, on any mesh."""
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _entry(closed: ClosedJaxpr, output: int, index: int, args: list[Any]) -> Array:
    """Evaluate entry `index` of one output without differentiating the others."""
    jaxpr = closed.jaxpr
    wanted = jaxpr.outvars[output]

    def evaluate(variables: list[Any]) -> list[Array]:
        part = _only(jaxpr, variables)
        return jaxpr_as_fun(ClosedJaxpr(part, closed.consts))(*args)

    for equation in jaxpr.eqns:
        if not any(variable is wanted for variable in equation.outvars):
            continue
        name, operands = equation.primitive.name, equation.invars
        if name == "stack" and equation.params["axis"] == 0:
            return evaluate([operands[index]])[0]
        if name == "concatenate":
            for operand in operands:
                size = operand.aval.shape[0]
                if index < size:
                    return evaluate([operand])[0][index]
                index -= size
        if name in ("jit", "pjit"):
            position = [v is wanted for v in equation.outvars].index(True)
            inner = equation.params["jaxpr"]
            return _entry(inner, position, index, evaluate(list(operands)))
    return evaluate([wanted])[0][index]


def _only(jaxpr: Jaxpr, outputs: list[Any]) -> Jaxpr:
    """Keep the equations that some outputs need."""
    needed = {variable for variable in outputs if isinstance(variable, Var)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            kept.append(equation)
            needed.update(v for v in equation.invars if isinstance(v, Var))
    info = jaxpr.debug_info._replace(result_paths=None)
    return jaxpr.replace(eqns=kept[::-1], outvars=outputs, debug_info=info)


def over_tasks(
    gradients: Callable[[Any], tuple[Any, PyTree, PyTree]],
    num_tasks: int,
    axis: Axis,
    owners: Owners,
    private: PyTree,
) -> tuple[Any, PyTree, PyTree]:
    """Stack what is computed for each task, and collect the gradients of the heads.

    Args:
        gradients: task index -> (anything, shared gradients, private gradients); the
            private ones of leaves that another task owns are not looked at.
        num_tasks: T.
        axis: "map" is a loop, "unroll" repeats the program with static indices, "vmap"
            computes all at once.
        owners: owners of the leaves.
        private: private part of the parameters.

    Returns:
        The first two outputs with a leading axis T, the third with each leaf from its
        owner.
    """
    if axis == "unroll":
        found = [gradients(task) for task in range(num_tasks)]
        heads = owners.map_private(
            lambda owner, *leaves: leaves[owner], *(grads for *_, grads in found)
        )
        stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
        out, shared = (jax.tree.map(stack, *(f[i] for f in found)) for i in (0, 1))
        return out, shared, heads
    tasks = jnp.arange(num_tasks)
    if axis == "vmap":
        out, shared, stacked = jax.vmap(gradients)(tasks)
        return out, shared, owners.map_private(lambda t, leaf: leaf[t], stacked)

    def step(heads: PyTree, task: Array) -> tuple[PyTree, tuple[Any, PyTree]]:
        out, shared, found = gradients(task)
        # Stacked, the heads of T tasks would be kept T times.
        heads = owners.map_private(
            lambda owner, new, old: jnp.where(owner == task, new, old), found, heads
        )
        return heads, (out, shared)

    start = jax.tree.map(jnp.zeros_like, private)
    heads, (out, shared) = jax.lax.scan(step, start, tasks)
    return out, shared, heads
