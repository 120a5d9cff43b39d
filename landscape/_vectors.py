"""Parameter trees as vectors of a real inner-product space.

A vector here is a tree with the structure and shapes of the parameters, and

    <x, y> = Σ_leaves Σ_i x_i y_i

is accumulated in at least float32, whatever the parameters are stored in. Leaves are
never concatenated, which would gather sharded parameters on every device. None is an
empty subtree and stays None.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt16


def size(tree: PyTree) -> int:
    """Count the numbers in a tree: the dimension of its vector space."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def is_function(choice: Any) -> bool:
    """Tell a function from a tree that can be called, as Equinox modules can."""
    return callable(choice) and (
        isinstance(choice, Partial) or jax.tree_util.all_leaves([choice])
    )


def wide_dtype(leaf: ArrayLike) -> jnp.dtype:
    """Return the dtype in which a leaf is accumulated."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def widen(tree: PyTree) -> PyTree:
    """Cast every leaf to at least float32."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, wide_dtype(leaf)), tree)


def inner(x: PyTree, y: PyTree) -> Float[Array, ""]:
    """Compute <x, y>; `optax.tree.vdot` ravels, which Explicit meshes reject."""
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), widen(x), widen(y))
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def norm(x: PyTree) -> Float[Array, ""]:
    """Compute ‖x‖; a tree of 1e-25 has squares that float32 rounds to zero."""
    x = widen(x)
    peaks = [jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(x)]
    peak = functools.reduce(jnp.maximum, peaks)
    unit = jnp.where(peak > 0, peak, 1)
    scaled = jax.tree.map(lambda leaf: leaf / unit.astype(leaf.dtype), x)
    return unit * jnp.sqrt(inner(scaled, scaled))


def placement(leaf: ArrayLike, stacked: bool = False) -> Sharding | None:
    """Return where an array like `leaf` should live, or None where that is open.

    An uncommitted array follows the data it meets, so only committed leaves bind.

    Args:
        leaf: array or number.
        stacked: whether the new array has a further, unsharded leading axis.
    """
    if not isinstance(leaf, jax.Array) or not leaf.committed:
        return None
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding) and stacked:
        spec = PartitionSpec(None, *sharding.spec)
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    known = isinstance(sharding, NamedSharding | SingleDeviceSharding)
    return sharding if known else None


@functools.cache
def _bits_at(place: Sharding | None) -> Callable[..., UInt16[Array, "..."]]:
    def bits(key: PRNGKeyArray, index: Int[Array, ""], shape: tuple[int, ...]) -> Array:
        return jax.random.bits(jax.random.fold_in(key, index), shape, jnp.uint16)

    return jax.jit(bits, static_argnames="shape", out_shardings=place)


def random_bits(key: PRNGKeyArray, like: PyTree) -> PyTree:
    """Draw 16 random bits per number, placed like the parameters.

    One compiled call per leaf: the generator takes a quarter of a second to compile
    for every leaf of a program that holds several, but leaves of equal shape share it
    here. Signs and start vectors are both made from these bits.

    Args:
        key: random key.
        like: tree that sets structure, shapes and placement.

    Returns:
        A tree of unsigned 16-bit integers.
    """
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten(
        _bits_at(placement(leaf))(key, index, shape=jnp.shape(leaf))
        for index, leaf in enumerate(leaves)
    )


def check_vector(tree: PyTree, name: str) -> None:
    """Raise ValueError unless a tree holds real floating-point arrays only.

    Args:
        tree: tree to check; None subtrees are fine.
        name: what the message calls the tree.
    """
    if not size(tree):
        raise ValueError(
            f"{name} holds no numbers, so there is no curvature to measure; pass the "
            "tree of trainable arrays."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{name} must hold real floating-point arrays only, but "
                f"{name}{jax.tree_util.keystr(path)} is {dtype}; take such leaves out "
                "of the parameters and hand them to the loss as a further argument."
            )


def check_concrete(tree: PyTree, caller: str) -> None:
    """Raise ValueError if a tree is being traced by `jax.jit` or its kin.

    Args:
        tree: tree to check.
        caller: name of the function that loops in Python over compiled steps.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"{caller} was called with traced arrays, but it loops in Python over "
            "compiled steps and needs concrete ones; call it outside jit, grad, vmap."
        )


def check_same(tree: PyTree, like: PyTree, name: str) -> None:
    """Raise ValueError unless two trees agree in structure and shapes.

    Args:
        tree: tree to check.
        like: tree that sets structure and shapes.
        name: what the message calls `tree`.
    """
    got, need = (jax.tree.map(jnp.shape, t) for t in (tree, like))
    if got != need:
        raise ValueError(
            f"{name} must be shaped like the parameters: got {got}, need {need}."
        )
