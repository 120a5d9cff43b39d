"""The subject of the conformance checks, their sample trees and their comparisons.

A `Case` says how to build a transformation and what it claims; the checks in
`conformance` turn each claim into an assertion.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any
LossFn = Callable[[Tree], jax.Array]
Update = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


class Case(NamedTuple):
    """A transformation under test, and what it promises.

    Attributes:
        name: identifies the case in test reports.
        make: builds the transformation; called without arguments, or with numeric
            keyword overrides (always `learning_rate` where `is_optimizer`). A
            `functools.partial` of the public factory is the usual choice.
        is_optimizer: True if the transformation carries its own learning rate and
            sign; False if it only transforms a direction, in which case the
            convergence checks put `optax.sgd` after it.
        learning_rate: initial rate with which the convergence checks succeed; they
            lower it linearly to zero.
        hyperparameters: numeric keyword arguments of `make`, with values that differ
            from its defaults.
        schedules: those of `hyperparameters` that also accept a schedule.
        static_args: arguments that `optax.inject_hyperparams` must leave alone.
        extra_args: the keyword arguments of `update` that the transformation cannot
            do without, given the loss; None if it needs none.
        dtypes: parameter dtypes it supports.
        stacked: True if a leaf with three axes is a stack of independent matrices.
        reaches_every_point: False if it confines the parameters to a set, so that the
            targets of the convergence checks may lie outside; its own tests then show
            that the nearest point of the set is found.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    is_optimizer: bool = True
    learning_rate: float = 0.3
    hyperparameters: Mapping[str, float] = {}
    schedules: tuple[str, ...] = ()
    static_args: tuple[str, ...] = ()
    extra_args: Callable[[LossFn], dict[str, Any]] | None = None
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32", "float64")
    stacked: bool = False
    reaches_every_point: bool = True
    uses_gradients: bool = True
    like: str = ""

    def __hash__(self) -> int:
        return hash(self.name)

    def compiled(self, **overrides: Any) -> tuple[optax.GradientTransformation, Update]:
        """Return `make(**overrides)` and its jitted updater.

        Checks that need nothing special share it, since compiling is nearly all of
        what they cost.
        """
        return _compiled(self, tuple(sorted(overrides.items())))

    def as_optimizer(
        self, learning_rate: optax.ScalarOrSchedule | None = None
    ) -> optax.GradientTransformation:
        """Return something whose updates descend, whatever the case is."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        if self.is_optimizer:
            return self.make(learning_rate=rate)
        return optax.chain(self.make(), optax.sgd(rate))

    def extras(self, loss_fn: LossFn) -> dict[str, Any]:
        """Return the extra keyword arguments that `update` cannot do without."""
        return self.extra_args(loss_fn) if self.extra_args else {}

    def updater(
        self, tx: optax.GradientTransformation, loss_fn: LossFn | None = None
    ) -> Update:
        """Return `update(grads, state, params)` of `tx` with its extra arguments.

        The extra arguments are closed over rather than passed, because they may be
        functions, which `jax.jit` does not accept as arguments.
        """
        extra = self.extras(loss_fn or quadratic)

        def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
            return tx.update(grads, state, params, **extra)

        return update


@functools.cache
def _compiled(
    case: Case, overrides: tuple[tuple[str, Any], ...]
) -> tuple[optax.GradientTransformation, Update]:
    tx = case.make(**dict(overrides))
    return tx, jax.jit(case.updater(tx))


# --- sample trees --------------------------------------------------------------------

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


# --- comparisons ---------------------------------------------------------------------


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
            worst = np.nanmax(np.abs(found - wanted))
            raise AssertionError(
                f"{what}: {name} is off by {worst:.3g}; "
                f"got\n{found}\nexpected\n{wanted}"
            )
