"""Which task owns each parameter leaf: −1 for shared leaves, t for a head of task t."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from basinax.optimizers._checks import is_function

SHARED = -1


class Owners(NamedTuple):
    """The owners of the leaves of one tree.

    A part of the tree has its structure, with None for the leaves outside.

    Attributes:
        treedef: structure of the parameters.
        tasks: owner of each leaf, in order.
    """

    treedef: Any
    tasks: tuple[int, ...]

    def part(self, tree: PyTree, belongs: Callable[[int], bool]) -> PyTree:
        """Keep the leaves whose owner satisfies a condition."""
        leaves = self.treedef.flatten_up_to(tree)
        return self.treedef.unflatten(
            leaf if belongs(task) else None
            for leaf, task in zip(leaves, self.tasks, strict=True)
        )

    def split(self, tree: PyTree) -> tuple[PyTree, PyTree]:
        """Return the shared and the private part."""
        shared = self.part(tree, lambda task: task == SHARED)
        return shared, self.part(tree, lambda task: task != SHARED)

    def merge(self, shared: PyTree, private: PyTree) -> PyTree:
        """Undo `split`."""
        pairs = zip(
            self.tasks,
            self.treedef.flatten_up_to(shared),
            self.treedef.flatten_up_to(private),
            strict=True,
        )
        return self.treedef.unflatten(s if t == SHARED else p for t, s, p in pairs)

    def map_private(
        self, function: Callable[..., Any], private: PyTree, *rest: PyTree
    ) -> PyTree:
        """Apply `function(owner, leaf, ...)` to the private leaves."""
        trees = (self.treedef.flatten_up_to(tree) for tree in (private, *rest))
        return self.treedef.unflatten(
            None if task == SHARED else function(task, *leaves)
            for task, *leaves in zip(self.tasks, *trees, strict=True)
        )


def resolve_owners(owner: Any, params: PyTree) -> Owners:
    """Spread owners over the leaves of the parameters.

    Args:
        owner: None (all shared), one int, a tree (prefix) of ints, or a callable of the
            parameters returning one of these.
        params: tree of arrays.

    Raises:
        TypeError: an owner is not an int.
        ValueError: the tree of owners does not fit.
    """
    if is_function(owner):
        owner = owner(params)
    leaves, treedef = jax.tree.flatten(params)
    if owner is None:
        return Owners(treedef, (SHARED,) * len(leaves))
    tasks: list[int] = []

    def spread(task: Any, subtree: PyTree) -> None:
        tasks.extend([_owner(task)] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(spread, owner, params, is_leaf=lambda task: task is None)
    except ValueError as error:
        raise ValueError(
            "owner does not fit the parameters; give one int, or a tree prefix of ints "
            f"for {treedef}: -1 for leaves all tasks share, t for leaves of task t "
            f"alone. ({error})"
        ) from error
    return Owners(treedef, tuple(tasks))


def check_owners(owners: Owners, num_tasks: int) -> None:
    """Refuse owners that are no task."""
    wrong = sorted({t for t in owners.tasks if not SHARED <= t < num_tasks})
    if wrong:
        raise ValueError(
            f"owner names task {', '.join(map(str, wrong))}, but the losses are "
            f"{num_tasks}: use -1 for shared leaves and 0 to {num_tasks - 1} for the "
            "leaves of one task."
        )


def _owner(task: Any) -> int:
    if task is None:
        # An empty subtree of the parameters, or a leaf nobody claims.
        return SHARED
    try:
        if isinstance(task, bool):
            raise TypeError
        return operator.index(task)
    except TypeError:
        raise TypeError(
            f"owner must hold ints (-1 shared, t private to task t), got {task!r}."
        ) from None
