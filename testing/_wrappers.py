"""Checks that a transformation survives JAX's transformations and optax's wrappers.

Tolerances are for float32: two compilations of the same update may fuse and reorder
their sums, which costs a few units in the last place of numbers of order one.
"""

import functools
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from basinax.testing._case import Case
from basinax.testing._trees import (
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


class _Step(NamedTuple):
    tx: optax.GradientTransformation
    run: Callable[..., tuple[Tree, Tree]]
    traces: list[None]  # one entry per compilation


# Two checks share it, in either order.
@functools.lru_cache(maxsize=4)
def _donating_step(case: Case) -> _Step:
    """Compile a training step that donates its parameters and its state."""
    tx, traces = case.make(), []
    update = case.updater(tx)

    def step(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        traces.append(None)
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return _Step(tx, jax.jit(step, donate_argnums=(0, 1)), traces)


def _copied(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, jax.Array) else leaf


def check_compiles_once(case: Case) -> None:
    """The second and third steps reuse the first step's compilation."""
    step = _donating_step(case)
    params = sample()
    initial = state = step.tx.init(params)
    before = {name: describe(leaf) for name, leaf in leaf_names(initial)}
    for seed in (1, 2, 3):
        # Copies, because whether it may donate is for another check to say.
        copies = jax.tree.map(_copied, (params, state))
        params, state = step.run(*copies, sample(seed))
    if len(step.traces) > 1:
        after = {name: describe(leaf) for name, leaf in leaf_names(state)}
        changed = [
            f"{name}: {before.get(name)} -> {after.get(name)}"
            for name in before | after
            if before.get(name) != after.get(name)
        ]
        raise AssertionError(
            f"three steps compiled {len(step.traces)} times; state leaves that changed "
            "type: " + ("; ".join(changed) or "none")
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
    final, _ = jax.eval_shape(lambda s, a: jax.lax.scan(step, s, a), state, active)
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
    step = _donating_step(case)
    params = sample()
    state = step.tx.init(params)
    owners: dict[int, str] = {}
    for name, leaf in [*leaf_names({"params": params}), *leaf_names({"state": state})]:
        if isinstance(leaf, jax.Array):
            other = owners.setdefault(id(leaf), name)
            assert other == name, f"{other} and {name} are the same buffer"
    for seed in (1, 2):
        params, state = step.run(params, state, sample(seed))


def check_abstract_init(case: Case) -> None:
    """`jax.eval_shape` of `init` has the types of the state.

    So that a state too large for one device can be planned before it is made.
    """
    tx = case.make()
    params = sample()
    shapes = jax.eval_shape(tx.init, params)
    assert_same_types(shapes, tx.init(params), "eval_shape of init")


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
    """Injected hyperparameters, which arrive as traced arrays, act like constants."""
    params, constants = sample(), dict(case.hyperparameters)
    plain, expected = case.compiled(**constants)
    factory = optax.inject_hyperparams(case.make, static_args=case.static_args)
    injected = factory(**constants)
    state = plain.init(params)
    injected_state: Any = injected.init(params)
    missing = constants.keys() - injected_state.hyperparams.keys()
    assert not missing, f"not injectable: {', '.join(sorted(missing))}"
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
