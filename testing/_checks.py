"""Checks of calling convention, types, trees and values, one property each.

A check takes a `Case` and returns None, or raises an AssertionError that names the
leaf, dtype or step that broke the property.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from basinax.testing._case import Case
from basinax.testing._trees import (
    Tree,
    as_numpy,
    assert_close,
    assert_finite,
    assert_same_structure,
    assert_same_types,
    describe,
    is_weak,
    leaf_names,
    sample,
    zeros,
)


def _one_step(case: Case, params: Tree, grads: Tree) -> tuple[Tree, Tree]:
    """Initialise and update once under jit."""
    tx, update = case.compiled()
    return update(grads, tx.init(params), params)


# --- calling convention --------------------------------------------------------------


def check_accepts_unknown_extra_args(case: Case) -> None:
    """`update` ignores keyword arguments meant for other links of a chain.

    A plain `GradientTransformation` is never given any.
    """
    tx = optax.with_extra_args_support(case.make())
    params = sample()
    extra = case.extras(lambda _: jnp.float32(0.0))

    def update(grads: Tree, state: Tree) -> tuple[Tree, Tree]:
        return tx.update(grads, state, params, **extra, for_another_link=1.0)

    jax.eval_shape(update, sample(1), tx.init(params))


def check_params_optional_or_asked_for(case: Case) -> None:
    """Without `params`, `update` works or says in a ValueError that it needs them."""
    tx = case.make()
    update = case.updater(tx)
    try:
        jax.eval_shape(lambda g, s: update(g, s, None), sample(1), tx.init(sample()))
    except Exception as error:
        if not isinstance(error, ValueError) or "params" not in str(error):
            raise AssertionError(
                "without params there is no ValueError that mentions them, but "
                f"{type(error).__name__}: {error}"
            ) from error


def check_is_pure(case: Case) -> None:
    """`update` can be replayed: it changes no argument and remembers nothing."""
    tx = case.make()
    update = case.updater(tx)
    params, grads = sample(), sample(1)
    arguments = (grads, tx.init(params), params)
    before = jax.tree.map(as_numpy, arguments)
    # A new function each time, because JAX remembers the traces of the old ones.
    programs = [
        jax.make_jaxpr(lambda g, s, p: update(g, s, p))(*arguments) for _ in range(2)
    ]
    assert_close(jax.tree.map(as_numpy, arguments), before, "arguments after update")
    # Functions within a program print their addresses.
    first, second = (re.sub(r" at 0x\w+", "", str(program)) for program in programs)
    lines = zip(first.splitlines(), second.splitlines(), strict=False)
    changed = [f"{a.strip()} -> {b.strip()}" for a, b in lines if a != b]
    assert first == second, f"a second trace gives another program: {changed[:3]}"
    constants = [dict(enumerate(program.consts)) for program in programs]
    assert_close(constants[1], constants[0], "constants of a second trace")


# --- types ---------------------------------------------------------------------------


def check_state_is_strongly_typed(case: Case) -> None:
    """Every state leaf is a `jax.Array` whose dtype is not weak.

    A Python number or a weakly typed array changes its type in the first step, which
    costs a second compilation.
    """
    tx, update = case.compiled()
    params = sample()
    initial = tx.init(params)
    _, updated = update(sample(1), initial, params)
    for when, state in (("initial", initial), ("updated", updated)):
        wrong = [
            f"{name} is {describe(leaf)}"
            for name, leaf in leaf_names(state)
            if not isinstance(leaf, jax.Array) or is_weak(leaf)
        ]
        assert not wrong, f"{when} state: {'; '.join(wrong)}"


def check_state_is_stable(case: Case) -> None:
    """A step keeps the state's structure, shapes and dtypes, in every dtype."""
    tx = case.make()
    update = case.updater(tx)
    for dtype in case.dtypes:
        with jax.enable_x64(dtype == "float64"):
            params = sample(dtype=dtype)
            state = jax.eval_shape(tx.init, params)
            _, updated = jax.eval_shape(update, sample(1, dtype=dtype), state, params)
            assert_same_types(updated, state, f"state after a step in {dtype}")


def check_keeps_dtype(case: Case) -> None:
    """Updates have the dtype of their leaf, alone and beside float32 leaves."""
    tx = case.make()
    update = case.updater(tx)
    for dtype in case.dtypes:
        with jax.enable_x64(dtype == "float64"):
            params = sample(dtype=dtype)
            state = jax.eval_shape(tx.init, params)
            updates, _ = jax.eval_shape(update, params, state, params)
            assert_same_types(updates, params, f"updates in {dtype}")
    mixed = {}
    for half in ("bfloat16", "float16"):
        if half in case.dtypes:
            full = sample(0, {"bias": (3,), "scale": ()})
            mixed = {"half": sample(dtype=half), "full": full}
            state = jax.eval_shape(tx.init, mixed)
            updates, _ = jax.eval_shape(update, mixed, state, mixed)
            assert_same_types(updates, mixed, f"updates of float32 and {half} leaves")
    if "float16" in case.dtypes:  # the one whose range is small
        updates, _ = _one_step(case, mixed, mixed)
        assert_finite(updates, "updates of float32 and float16 leaves")


def check_float64(case: Case) -> None:
    """Where 64-bit types are enabled, float64 leaves are not computed in float32."""
    with jax.enable_x64(True):
        params = sample(dtype="float64")
        updates, _ = _one_step(case, params, sample(1, dtype="float64"))
        assert_same_types(updates, params, "updates in float64")
        for name, leaf in leaf_names(updates):
            values = as_numpy(leaf)
            # Signs and the like are exact in any dtype, and prove nothing.
            narrow = _survives(values, np.float32) and not _survives(values, np.float16)
            assert not narrow, f"updates in float64: {name} holds float32 numbers only"


def _survives(values: np.ndarray, dtype: type[np.floating]) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(values, values.astype(dtype).astype(np.float64))


# --- trees ---------------------------------------------------------------------------


class _Pair(NamedTuple):
    left: Any
    right: Any


def check_containers(case: Case) -> None:
    """Tuples, lists and NamedTuples in the parameters are containers, never leaves."""
    a = sample()
    params = (
        (a["first"], a["bias"]),
        [a["scale"]],
        _Pair(a["second"], {"x": a["bias"]}),
    )
    tx = case.make()
    state = jax.eval_shape(tx.init, params)
    updates, updated = jax.eval_shape(case.updater(tx), params, state, params)
    assert_same_types(updates, params, "updates of nested containers")
    assert_same_types(updated, state, "state for nested containers")


def check_none_leaves(case: Case) -> None:
    """None stands for 'no parameter here' and comes back as None."""
    params = {**sample(), "frozen": None, "block": {"first": None}}
    grads = {**sample(1), "frozen": None, "block": {"first": None}}
    updates, _ = _one_step(case, params, grads)
    assert_same_structure(updates, params, "updates with None leaves")
    assert_finite(updates, "updates with None leaves")


def check_empty_tree(case: Case) -> None:
    """A tree without parameters is initialised and updated without complaint."""
    tx = case.make()
    update = case.updater(tx)
    for params in ({}, (), []):
        updates, _ = update(params, tx.init(params), params)
        assert_same_structure(updates, params, f"updates of {params!r}")


def check_bare_leaf(case: Case) -> None:
    """Parameters may be one array rather than a tree, of zero, one or two axes."""
    tx = case.make()
    for params in sample().values():
        state = jax.eval_shape(tx.init, params)
        updates, _ = jax.eval_shape(case.updater(tx), params, state, params)
        assert_same_types(updates, params, f"updates of a bare {describe(params)}")


def check_small_and_empty_leaves(case: Case) -> None:
    """Leaves of one element, one row, one column or no element at all are fine."""
    shapes = {"scalar": (), "one": (1,), "single": (1, 1), "row": (1, 5)}
    shapes |= {
        "column": (5, 1),
        "nothing": (0,),
        "no_rows": (0, 3),
        "no_columns": (3, 0),
    }
    params = sample(0, shapes)
    updates, state = _one_step(case, params, sample(1, shapes))
    assert_same_types(updates, params, "updates of small leaves")
    assert_finite(updates, "updates of small leaves")
    assert_finite(state, "state for small leaves")


def check_stacked_leaves(case: Case) -> None:
    """A leaf with three axes is updated like the matrices along its first axis."""
    params, grads = sample(0, {"stack": (2, 4, 3)}), sample(1, {"stack": (2, 4, 3)})
    unstack = lambda tree: dict(enumerate(tree["stack"]))  # noqa: E731
    together, _ = _one_step(case, params, grads)
    separate, _ = _one_step(case, unstack(params), unstack(grads))
    assert_close(
        unstack(together), separate, "updates of a stack", rtol=1e-4, atol=1e-5
    )


# --- values --------------------------------------------------------------------------


def check_zero_gradients(case: Case) -> None:
    """Zero gradients give finite updates, at zero and at other parameters."""
    tx, update = case.compiled()
    for where, params in (("random", sample()), ("zero", zeros(sample()))):
        state = tx.init(params)
        for _ in range(2):
            updates, state = update(zeros(params), state, params)
            assert_finite(updates, f"updates at {where} params and zero gradients")
            assert_finite(state, f"state at {where} params and zero gradients")


def check_nan_surfaces(case: Case) -> None:
    """A NaN in the gradient of a leaf reaches that leaf's update.

    A NaN that vanishes hides a broken loss from every check that follows it.
    """
    tx, update = case.compiled()
    params, clean = sample(), sample(1)
    for name, leaf in clean.items():
        broken = {name: leaf.at[(0,) * leaf.ndim].set(jnp.nan)}
        if case.uses_gradients:
            updates, _ = update(clean | broken, tx.init(params), params)
        else:  # it takes them where the parameters are
            updates, _ = update(clean, tx.init(params), params | broken)
        assert not np.isfinite(as_numpy(updates[name])).all(), (
            f"a NaN in the gradient of {name} is hidden: the update is {updates[name]}"
        )
