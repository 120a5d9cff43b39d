"""Checks that a transformation survives JAX's transformations and optax's wrappers.

Tolerances are for float32: two compilations of the same update may fuse and reorder
their sums, which costs a few units in the last place of numbers of order one.
"""

import functools
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import optax
from conformance_case import (
    Case,
    Tree,
    assert_close,
    assert_same_types,
    describe,
    leaf_names,
    sample,
    zeros,
)

close = functools.partial(assert_close, rtol=1e-4, atol=1e-5)


# --- JAX transformations -------------------------------------------------------------


def check_jit_matches_eager(case: Case) -> None:
    """Two steps under `jax.jit` give what two eager steps give."""
    tx, compiled = case.compiled()
    eager = case.updater(case.make())
    params = sample()
    state = compiled_state = tx.init(params)
    for seed in (1, 2):
        updates, state = eager(sample(seed), state, params)
        compiled_updates, compiled_state = compiled(
            sample(seed), compiled_state, params
        )
        close(compiled_updates, updates, f"updates of step {seed} under jit")
    close(compiled_state, state, "state under jit")


def check_no_host_callbacks(case: Case) -> None:
    """A step never calls back into Python, which would stall an accelerator."""
    tx = case.make()
    params = sample()
    program = str(jax.make_jaxpr(case.updater(tx))(params, tx.init(params), params))
    found = re.findall(r"\b\w+_callback\b", program)
    assert not found, f"update uses {', '.join(sorted(set(found)))}"


def check_compiles_once(case: Case) -> None:
    """The second and third steps reuse the first step's compilation."""
    tx = case.make()
    update = case.updater(tx)
    traces = 0

    @jax.jit
    def step(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        nonlocal traces
        traces += 1
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = sample()
    initial = state = tx.init(params)
    for seed in (1, 2, 3):
        params, state = step(params, state, sample(seed))
    if traces > 1:
        before = {name: describe(leaf) for name, leaf in leaf_names(initial)}
        after = {name: describe(leaf) for name, leaf in leaf_names(state)}
        changed = [
            f"{name}: {before.get(name)} -> {after.get(name)}"
            for name in before | after
            if before.get(name) != after.get(name)
        ]
        raise AssertionError(
            f"three steps compiled {traces} times; state leaves that changed type: "
            + ("; ".join(changed) or "none")
        )


def check_state_survives_control_flow(case: Case) -> None:
    """The state can be carried by `jax.lax.scan` and returned by `jax.lax.cond`."""
    tx = case.make()
    update = case.updater(tx)
    params = sample()
    state = tx.init(params)

    def step(state: Tree, active: jax.Array) -> tuple[Tree, None]:
        updated = functools.partial(update, sample(1), state, params)
        kept = lambda: (sample(1), state)  # noqa: E731
        return jax.lax.cond(active, updated, kept)[1], None

    active = jnp.array([True, False])
    final, _ = jax.jit(lambda s, a: jax.lax.scan(step, s, a))(state, active)
    assert_same_types(final, state, "state after a scan")


def check_vmap(case: Case) -> None:
    """Mapping over an ensemble of parameters equals a loop over its members."""
    tx, alone = case.compiled()
    params = [sample(seed) for seed in (1, 2)]
    grads = [sample(seed) for seed in (3, 4)]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    state = jax.vmap(tx.init)(stack(params))
    together, _ = jax.jit(jax.vmap(case.updater(tx)))(
        stack(grads), state, stack(params)
    )
    one_by_one = [
        alone(g, tx.init(p), p)[0] for g, p in zip(grads, params, strict=True)
    ]
    close(together, stack(one_by_one), "updates under vmap")


def check_donation(case: Case) -> None:
    """A step may donate both its parameters and its state.

    This fails when `init` puts a parameter's own buffer into the state, or one buffer
    into two state leaves: both would be freed twice.
    """
    tx = case.make()
    update = case.updater(tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = sample()
    state = tx.init(params)
    owners: dict[int, str] = {}
    for name, leaf in [*leaf_names({"params": params}), *leaf_names({"state": state})]:
        if isinstance(leaf, jax.Array):
            other = owners.setdefault(id(leaf), name)
            assert other == name, f"{other} and {name} are the same buffer"
    for seed in (1, 2):
        params, state = step(params, state, sample(seed))


def check_abstract_init(case: Case) -> None:
    """`init` runs on shapes alone, with and without `jax.eval_shape`."""
    tx = case.make()
    params = sample()
    state = tx.init(params)
    shapes = jax.eval_shape(tx.init, params)
    assert_same_types(shapes, state, "eval_shape of init")
    abstract = tx.init(jax.eval_shape(lambda: params))
    assert_same_types(abstract, state, "init on ShapeDtypeStructs")


# --- optax wrappers ------------------------------------------------------------------


def check_map_params(case: Case) -> None:
    """`optax.tree.map_params` recognises every state leaf shaped like a parameter.

    Sharding specifications for the state are made with it; a leaf that it misses
    would be replicated.
    """
    tx = case.make()
    # Shapes that no table of coefficients has by accident.
    params = sample(0, {"bias": (17,), "kernel": (19, 23), "scale": ()})
    state = tx.init(params)
    marked = optax.tree.map_params(
        tx, lambda _: "parameter", state, transform_non_params=lambda _: "other"
    )
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim}
    missed = [
        name
        for (name, leaf), mark in zip(
            leaf_names(state), jax.tree.leaves(marked), strict=True
        )
        if mark == "other" and leaf.shape in shapes
    ]
    assert not missed, f"map_params misses {', '.join(missed)}"


def check_inject_hyperparams(case: Case) -> None:
    """Hyperparameters set in the injected state act like constants."""
    params, constants = sample(), dict(case.hyperparameters)
    plain, expected = case.compiled(**constants)
    injected = optax.inject_hyperparams(case.make, static_args=case.static_args)()
    state = plain.init(params)
    injected_state: Any = injected.init(params)
    defaults = injected_state.hyperparams
    missing = constants.keys() - defaults.keys()
    assert not missing, f"not injectable: {', '.join(sorted(missing))}"
    values = {name: jnp.float32(value) for name, value in constants.items()}
    injected_state = injected_state._replace(hyperparams=defaults | values)
    actual = jax.jit(case.updater(injected))
    for seed in (1, 2):
        updates, state = expected(sample(seed), state, params)
        found, injected_state = actual(sample(seed), injected_state, params)
        close(found, updates, f"injected updates of step {seed}")


def check_schedules(case: Case) -> None:
    """A schedule acts like its value injected at every step, from step zero on."""
    params = sample()
    schedules = {
        name: optax.linear_schedule(value, 0.5 * value, 2)
        for name, value in case.hyperparameters.items()
        if name in case.schedules
    }
    native = case.make(**schedules)
    factory = optax.inject_hyperparams(case.make, static_args=case.static_args)
    injected = factory(**schedules)
    state, injected_state = native.init(params), injected.init(params)
    actual = jax.jit(case.updater(native))
    expected = jax.jit(case.updater(injected))
    for seed in (1, 2, 3):
        found, state = actual(sample(seed), state, params)
        updates, injected_state = expected(sample(seed), injected_state, params)
        close(found, updates, f"scheduled updates of step {seed}")


def check_constant_schedules(case: Case) -> None:
    """A constant schedule acts like the constant."""
    params, constants = sample(), dict(case.hyperparameters)
    schedules = {n: optax.constant_schedule(constants[n]) for n in case.schedules}
    scheduled = case.make(**constants | schedules)
    plain, expected = case.compiled(**constants)
    actual = jax.jit(case.updater(scheduled))
    state, scheduled_state = plain.init(params), scheduled.init(params)
    for seed in (1, 2):
        updates, state = expected(sample(seed), state, params)
        found, scheduled_state = actual(sample(seed), scheduled_state, params)
        close(found, updates, f"updates of step {seed} with constant schedules")


def check_multi_steps(case: Case) -> None:
    """Under `optax.MultiSteps`, k gradients act like their mean on the k-th call.

    One of them is zero: while it waits, `MultiSteps` multiplies the update of what has
    accumulated so far by zero, which does not remove a NaN.
    """
    tx, alone = case.compiled()
    params = sample()
    gradients = [zeros(params), sample(1), sample(2)]
    accumulated = optax.MultiSteps(tx, len(gradients)).gradient_transformation()
    update = jax.jit(case.updater(accumulated))
    initial = state = accumulated.init(params)
    emitted = []
    for grads in gradients:
        updates, state = update(grads, state, params)
        emitted.append(updates)
    assert_same_types(state, initial, "state after accumulated steps")
    for waiting in emitted[:-1]:
        assert_close(waiting, zeros(params), "updates while gradients accumulate")
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients)
    expected, _ = alone(mean, tx.init(params), params)
    close(emitted[-1], expected, "updates of the accumulated mean")


def _selected(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: tree[name] for name in ("bias", "first")}


def check_masked(case: Case) -> None:
    """`optax.masked` acts on the chosen leaves and passes the others through."""
    tx, alone = case.compiled()
    params, grads = sample(), sample(1)
    masked = optax.masked(tx, {n: n in _selected(params) for n in params})
    updates, _ = jax.jit(case.updater(masked))(grads, masked.init(params), params)
    chosen = _selected(params)
    expected, _ = alone(_selected(grads), tx.init(chosen), chosen)
    close(updates, grads | expected, "updates under masked")


def check_partition(case: Case) -> None:
    """`optax.partition` trains the chosen leaves and freezes the others."""
    tx, alone = case.compiled()
    params, grads = sample(), sample(1)
    chosen = _selected(params)

    # Labels are computed from updates too, so they may only look at names.
    def labels(tree: Tree) -> Tree:
        return {name: "train" if name in chosen else "freeze" for name in tree}

    parts = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)
    updates, _ = jax.jit(case.updater(parts))(grads, parts.init(params), params)
    expected, _ = alone(_selected(grads), tx.init(chosen), chosen)
    close(updates, zeros(grads) | expected, "updates under partition")


def check_checkpoint_round_trip(case: Case) -> None:
    """A state restored by orbax has the same types and values."""
    # Imported here so that the other checks need nothing but jax and optax.
    import orbax.checkpoint as ocp

    tx, update = case.compiled()
    params = sample()
    _, state = update(sample(1), tx.init(params), params)
    # Beside the parameters, because orbax refuses trees without leaves.
    saved = {"params": params, "state": state}
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        ocp.StandardCheckpointer() as checkpointer,
    ):
        path = pathlib.Path(folder) / "step"
        checkpointer.save(path, saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(path, target)
    assert_same_types(restored, saved, "restored checkpoint")
    assert_close(restored, saved, "restored checkpoint")
