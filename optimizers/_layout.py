"""Run matrix kernels where the shards are cheap.

A matrix function needs the m×m Gram matrix of the short side.  Three facts decide what
that costs on a mesh:

* shards along the long side: one all-reduce forms the Gram matrix, everything m×m is
  local, and the last product is local again;
* shards along a batch axis: no communication at all;
* shards along the short side: every m×m product communicates.

So shards of a matrix axis move to the batch axis where its size divides, else to the
long side, and the result moves back.  On Explicit axes the sharding is part of the
type, so it is known at trace time; on Auto axes it is not, and only the Gram matrix is
pinned (replicated) while the compiler places the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec


def explicit_axes(arrays: Sequence[Any]) -> tuple[str, ...]:
    """List the Explicit mesh axes over which any of the arrays is sharded."""
    found: dict[str, None] = {}
    for array in arrays:
        sharding = jax.typeof(array).sharding
        kinds = dict(
            zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
        )
        for entry in sharding.spec:
            for name in entry if isinstance(entry, tuple) else (entry,):
                if kinds.get(name) == AxisType.Explicit:
                    found[name] = None
    return tuple(found)


def on_auto_axes(
    function: Callable[..., Any], arrays: Sequence[jax.Array], *rest: Any
) -> list[jax.Array]:
    """Call `function(axes, arrays, *rest)` with Explicit axes turned to Auto inside.

    Args:
        function: takes the mesh axes found on `arrays` (empty if none), the arrays and
            the rest; returns a list of arrays of the same shapes.
        arrays: sharded or not; the results get their shardings back.
        *rest: further operands, not sharded.

    Returns:
        The results, each sharded as its input.
    """
    axes = explicit_axes(arrays)
    if axes:
        shardings = [jax.typeof(a).sharding for a in arrays]
        inner: Any = jax.sharding.auto_axes(
            lambda arrays, *rest: function(axes, arrays, *rest), out_sharding=shardings
        )
        with jax.sharding.use_abstract_mesh(shardings[0].mesh):
            return inner(list(arrays), *rest)
    results = function((), list(arrays), *rest)
    # Auto axes are not in the type, and the compiler is free to drop the layout of an
    # input.  An elementwise operation with it keeps it; NaN in is NaN out anyway.
    return [jnp.where(jnp.isnan(a), a, r) for a, r in zip(arrays, results, strict=True)]


def on_wide_matrices(
    function: Callable[..., jax.Array], x: jax.Array, *rest: Any
) -> jax.Array:
    """Apply a function of wide matrices (*batch, short, long) to matrices like x.

    Args:
        function: takes matrices with at most as many rows as columns and the rest.
        x: matrices of either orientation, sharded or not.
        *rest: further operands, not sharded.

    Returns:
        The result in the orientation and sharding of `x`; `x` itself if it is empty.
    """

    def run(
        axes: tuple[str, ...], arrays: list[jax.Array], *rest: Any
    ) -> list[jax.Array]:
        (y,) = arrays
        tall = y.shape[-2] > y.shape[-1]
        wide = y.mT if tall else y
        stack = move_shards(wide.reshape(-1, *wide.shape[-2:]), axes)
        y = function(stack.reshape(wide.shape), *rest)
        y = move_shards(y.reshape(stack.shape), axes).reshape(wide.shape)
        return [y.mT if tall else y]

    return on_auto_axes(run, [x], *rest)[0] if x.size else x


def move_shards(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Place the shards of a stack of wide matrices (batch, short, long)."""
    if not axes:
        return x
    mesh = jax.sharding.get_abstract_mesh()
    pieces = 1
    for name in axes:
        pieces *= mesh.shape[name]
    if x.shape[0] % pieces == 0:
        spec = PartitionSpec(axes, None, None)
    elif x.shape[2] % pieces == 0:
        spec = PartitionSpec(None, None, axes)
    else:
        spec = PartitionSpec(None, None, None)
    return jax.lax.with_sharding_constraint(x, spec)


def replicate_matrix(x: jax.Array) -> jax.Array:
    """Keep both of the last two axes whole on every device; leave batch axes free."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    if not kinds or any(kind != AxisType.Auto for kind in kinds):
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*free, None, None))
