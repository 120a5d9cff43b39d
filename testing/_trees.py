"""Sample trees, and comparisons of trees that name the leaf which differs."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any

# --- samples -------------------------------------------------------------------------

# Two leaves share a shape, so that code which batches equal shapes is exercised.
SHAPES = {"bias": (3,), "first": (4, 3), "second": (4, 3), "scale": ()}


def sample(
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    dtype: str = "float32",
) -> dict[str, jax.Array]:
    """Draw a dict of normal leaves; a pure function of its arguments."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape), dtype)
        for name, shape in shapes.items()
    }


def zeros(tree: Tree) -> Tree:
    """Return zeros in the shapes and dtypes of `tree`, in fresh buffers."""
    return jax.tree.map(jnp.zeros_like, tree)


def quadratic(params: Tree) -> jax.Array:
    """Half the squared distance of every leaf from one: a loss for any tree."""

    def of_leaf(leaf: jax.Array) -> jax.Array:
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        return 0.5 * jnp.sum(jnp.square(wide - 1.0))

    return sum(map(of_leaf, jax.tree.leaves(params)), start=jnp.float32(0.0))


# --- descriptions --------------------------------------------------------------------


def leaf_names(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Iterate over (readable path, leaf) pairs."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path) or "<root>", leaf


def describe(leaf: Any) -> str:
    """Write a leaf's type as `float32[4,3]`, marking weak types."""
    if not hasattr(leaf, "dtype"):
        return f"Python {type(leaf).__name__}"
    shape = ",".join(map(str, leaf.shape))
    return f"{leaf.dtype}[{shape}]{' (weak)' if is_weak(leaf) else ''}"


def is_weak(leaf: Any) -> bool:
    """Return whether JAX would let this leaf's dtype give way in promotions."""
    return bool(getattr(leaf, "weak_type", not hasattr(leaf, "dtype")))


def as_numpy(leaf: Any) -> np.ndarray:
    """Copy a leaf to NumPy: floats as float64, random keys as their data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.array(leaf)
    return (
        array.astype(np.float64) if jnp.issubdtype(leaf.dtype, jnp.inexact) else array
    )


# --- comparisons ---------------------------------------------------------------------


def assert_same_structure(actual: Tree, desired: Tree, what: str) -> None:
    """Assert that two trees have the same containers and the same None entries."""
    found, wanted = jax.tree.structure(actual), jax.tree.structure(desired)
    assert found == wanted, f"{what}: tree structure {found}, expected {wanted}"


def assert_same_types(actual: Tree, desired: Tree, what: str) -> None:
    """Assert equal structure and, leaf by leaf, equal shape, dtype and weak type."""
    assert_same_structure(actual, desired, what)
    wrong = [
        f"{name} is {describe(found)}, expected {describe(wanted)}"
        for (name, found), (_, wanted) in zip(
            leaf_names(actual), leaf_names(desired), strict=True
        )
        if describe(found) != describe(wanted)
    ]
    assert not wrong, f"{what}: " + "; ".join(wrong)


def assert_finite(tree: Tree, what: str) -> None:
    """Assert that no leaf holds NaN or infinity."""
    wrong = [n for n, leaf in leaf_names(tree) if not np.isfinite(as_numpy(leaf)).all()]
    assert not wrong, f"{what}: NaN or infinity in {', '.join(wrong)}"


def assert_close(
    actual: Tree, desired: Tree, what: str, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Assert equal structure, shapes and values; the default is exact equality."""
    assert_same_structure(actual, desired, what)
    pairs = zip(leaf_names(actual), leaf_names(desired), strict=True)
    for (name, found), (_, wanted) in pairs:
        assert jnp.shape(found) == jnp.shape(wanted), (
            f"{what}: {name} has shape {jnp.shape(found)}, expected {jnp.shape(wanted)}"
        )
        found, wanted = as_numpy(found), as_numpy(wanted)
        if not np.allclose(found, wanted, rtol=rtol, atol=atol, equal_nan=True):
            with np.errstate(invalid="ignore"):
                worst = np.max(np.abs(found - wanted))
            raise AssertionError(
                f"{what}: {name} is off by {worst:.3g}; "
                f"got\n{found}\nexpected\n{wanted}"
            )
