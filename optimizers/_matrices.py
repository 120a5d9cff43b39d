"""See the leaves of a tree as stacks of matrices.

A leaf becomes (batch, fan_in, fan_out) through `optax.contrib.MuonDimensionNumbers`:
its reduction axes are flattened to fan_in, its output axes to fan_out, every other axis
is a batch axis.  Kernels want the short side first, hence `Matrices.wide`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from basinax.optimizers._checks import is_function


class Matrices(NamedTuple):
    """How one leaf is read as a stack of matrices.

    Attributes:
        order: permutation of the leaf's axes to (batch…, fan_in…, fan_out…).
        shape: the leaf's shape after that permutation.
        batch: number of matrices.
        fan_in: rows of each matrix.
        fan_out: columns of each matrix.
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]
    batch: int
    fan_in: int
    fan_out: int

    @property
    def short_long(self) -> tuple[int, int]:
        """Shape of each matrix, short side first."""
        return min(self.fan_in, self.fan_out), max(self.fan_in, self.fan_out)

    def wide(self, leaf: Array) -> Array:
        """Read the leaf as a stack (batch, short, long)."""
        stack = leaf.transpose(self.order).reshape(
            self.batch, self.fan_in, self.fan_out
        )
        return stack if self.fan_in <= self.fan_out else stack.mT

    def leaf(self, wide: Array) -> Array:
        """Undo `wide`."""
        stack = wide if self.fan_in <= self.fan_out else wide.mT
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return stack.reshape(self.shape).transpose(inverse)


def is_dimension_numbers(value: Any) -> bool:
    """Recognise `optax.contrib.MuonDimensionNumbers`, or anything shaped like it."""
    return hasattr(value, "reduction_axis") and hasattr(value, "output_axis")


def check_dimension_numbers(dimension_numbers: Any) -> None:
    """Refuse what can be refused before any leaf is seen."""
    for spec in jax.tree.leaves(dimension_numbers, is_leaf=is_dimension_numbers):
        if is_dimension_numbers(spec):
            reduction, output = _axes(spec.reduction_axis), _axes(spec.output_axis)
            if not reduction or not output or set(reduction) & set(output):
                raise ValueError(
                    "dimension_numbers need disjoint, non-empty reduction and output "
                    f"axes, got {spec}."
                )
        elif not callable(spec):
            raise TypeError(
                "dimension_numbers must be an optax.contrib.MuonDimensionNumbers, a "
                "tree (prefix) of them with None for 'not a matrix', or a callable of "
                f"params returning one; got a {type(spec).__name__}."
            )


def assign_dimension_numbers(dimension_numbers: Any, tree: Any) -> list[Any]:
    """Spread dimension numbers over the leaves of a tree.

    Args:
        dimension_numbers: None (2-D leaves are (in, out), more axes are an error), one
            value for every leaf with at least two axes, a tree (prefix) of values with
            None for "not a matrix", or a callable of the tree returning one of these.
        tree: tree of arrays.

    Returns:
        For each leaf of `tree`, in order, its value; `Ellipsis` where only the default
        applies.

    Raises:
        ValueError: if the tree prefix does not fit.
    """
    if is_function(dimension_numbers) and not is_dimension_numbers(dimension_numbers):
        dimension_numbers = dimension_numbers(tree)
        check_dimension_numbers(dimension_numbers)
    if dimension_numbers is None:
        return [...] * len(jax.tree.leaves(tree))
    found: list[Any] = []

    def spread(spec: Any, subtree: Any) -> None:
        found.extend([spec] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(
            spread,
            dimension_numbers,
            tree,
            is_leaf=lambda s: s is None or is_dimension_numbers(s),
        )
    except ValueError as error:
        raise ValueError(
            "dimension_numbers do not fit the tree they are applied to; give one value "
            f"or a tree prefix of {jax.tree.structure(tree)}. ({error})"
        ) from error
    return found


def as_matrices(leaf: Any, spec: Any, path: str) -> Matrices | None:
    """Decide how a leaf with at least two axes is read.

    Args:
        leaf: array, or anything with a shape.
        spec: dimension numbers, None for "not a matrix", Ellipsis for the default.
        path: where the leaf sits, for messages.

    Returns:
        The reading, or None if the leaf is not a matrix.

    Raises:
        ValueError: if the default meets three axes or more, or the axes do not fit.
    """
    shape = jnp.shape(leaf)
    if spec is None:
        return None
    if spec is ...:
        if len(shape) > 2:
            raise ValueError(
                f"leaf {path} has shape {shape}: which axes make the matrix? Pass "
                "dimension_numbers=optax.contrib.MuonDimensionNumbers(reduction_axis, "
                "output_axis), with -2 and -1 for matrices stacked on leading axes, "
                "or None for this leaf in a tree of them."
            )
        reduction, output = (0,), (1,)
    else:
        reduction = _normalized(spec.reduction_axis, shape, spec, path)
        output = _normalized(spec.output_axis, shape, spec, path)
    if (
        not reduction
        or not output
        or len({*reduction, *output}) < len(reduction + output)
    ):
        raise ValueError(
            f"leaf {path} of shape {shape}: reduction and output axes must be "
            f"non-empty, without repetition and disjoint, got {spec}."
        )
    batch = tuple(i for i in range(len(shape)) if i not in reduction + output)
    order = batch + reduction + output
    return Matrices(
        order,
        tuple(shape[i] for i in order),
        *(math.prod(shape[i] for i in axes) for axes in (batch, reduction, output)),
    )


def _axes(axes: Any) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _normalized(
    axes: Any, shape: tuple[int, ...], spec: Any, path: str
) -> tuple[int, ...]:
    for axis in _axes(axes):
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"leaf {path} of shape {shape} has no axis {axis} as in {spec}; axes "
                "counted from the end (-2, -1) fit leaves of any rank."
            )
    return tuple(axis % len(shape) for axis in _axes(axes))
