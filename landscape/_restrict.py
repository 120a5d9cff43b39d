"""The block of an operator that belongs to some of the parameters.

    C restricted to a block = P C P,

P the projection that zeroes all other entries.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import PyTree

from basinax.landscape._sandwich import as_partial
from basinax.landscape._vectors import is_function


@jax.jit
def _project(mask: PyTree, tree: PyTree) -> PyTree:
    """Zero what the mask excludes, also NaN."""
    mask = mask(tree) if isinstance(mask, Partial) else mask

    def select(keep: Any, subtree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.where(keep, x, jnp.zeros_like(x)), subtree)

    return jax.tree.map(select, mask, tree)


def _restricted(operator: Partial, mask: PyTree, vector: PyTree) -> PyTree:
    return _project(mask, operator(_project(mask, vector)))


def _by_path(choose: Partial, tree: PyTree) -> PyTree:
    return jax.tree.map_with_path(lambda path, x: bool(choose(path, x)), tree)


def restrict(
    operator: Callable[[PyTree], PyTree],
    mask: PyTree | Callable[[Any, Any], bool],
) -> Partial:
    """Restrict an operator to a block of the parameters: v -> P C P v.

    With one layer selected this is the layer's diagonal block of the curvature.
    Changing a mask of arrays or booleans recompiles nothing.

    Vectors keep the shape of all parameters. They are read and returned as zero outside
    the block, so `trace` is that of the block, and the eigenvectors of `eigenpairs`
    vanish outside it, up to their residuals. The entries outside count as eigenvalues
    0, however: the smallest eigenvalue of a positive block is reported as 0, and a
    spectral density has a peak there. A product costs as much as one of the whole
    operator. To save that, or to see the block's spectrum alone, differentiate with
    respect to the block only, as in
    `hessian(lambda block, rest, x: loss({**rest, **block}, x), block, rest, x)`.

    Args:
        operator: linear function on trees.
        mask: a tree (prefix) like the parameters of booleans or boolean arrays that
            broadcast to them, True for what belongs to the block; or a function of
            (path, leaf) that returns a boolean, where a path is that of
            `jax.tree_util.tree_map_with_path` and of a leaf only shape and dtype count.

    Returns:
        A function on trees of the same shape, symmetric if `operator` is.

    Raises:
        ValueError: if the mask holds anything but booleans.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import dense, hessian, restrict
        >>> w = {"a": jnp.array(1.0), "b": jnp.array(2.0)}
        >>> whole = hessian(lambda w: w["a"] ** 2 * w["b"], w)
        >>> dense(whole, w).tolist()
        [[4.0, 2.0], [2.0, 0.0]]
        >>> dense(restrict(whole, {"a": True, "b": False}), w).tolist()
        [[4.0, 0.0], [0.0, 0.0]]
        >>> block = restrict(whole, lambda path, leaf: path[0].key == "a")
        >>> float(block(w)["a"])
        4.0
    """
    if is_function(mask):
        return Partial(
            _restricted, as_partial(operator), Partial(_by_path, Partial(mask))
        )
    for path, leaf in jax.tree.leaves_with_path(mask):
        if jnp.result_type(leaf) != jnp.bool_:
            raise ValueError(
                "a mask holds booleans, or boolean arrays, in a tree (prefix) like the "
                f"parameters, but mask{jax.tree_util.keystr(path)} is {leaf!r}."
            )
    return Partial(_restricted, as_partial(operator), mask)
