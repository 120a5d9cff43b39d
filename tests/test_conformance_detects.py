"""Proof that the conformance suite can fail, and that it passes what is sound.

Every check has at least one transformation, broken on purpose, that it must catch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax.testing import CHECKS, Case, checks_for

RATE = 0.1


def transformation(update, init=lambda params: ()):
    """Wrap `update(updates, state, params)`; well-behaved about extra arguments."""

    def update_fn(updates, state, params=None, **extra_args):
        return update(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update_fn)


def per_leaf(function):
    """Build a stateless transformation from a function of one leaf."""
    return transformation(lambda u, s, p: (jax.tree.map(function, u), s))


def with_state(init, step):
    """Scale gradients, beside a state that plays no part in the update."""
    return transformation(
        lambda u, s, p: (jax.tree.map(lambda g: -RATE * g, u), step(s, u)), init
    )


# --- broken transformations ----------------------------------------------------------


def rejects_unknown_arguments():
    update = lambda u, s, p=None: (u, s)  # noqa: E731
    return optax.GradientTransformationExtraArgs(lambda p: (), update)


def needs_params_silently():
    add = lambda g, p: g + p  # noqa: E731
    return transformation(lambda u, s, p: (jax.tree.map(add, u, p), s))


def counts_in_python():
    calls = iter(range(1, 100))

    def update(updates, state, params):
        scale = 1.0 / next(calls)
        return jax.tree.map(lambda g: scale * g, updates), state

    return transformation(update)


def python_float_in_state():
    return with_state(lambda p: 0.0, lambda s, u: s + optax.tree.norm(u))


def weak_array_in_state():
    return with_state(lambda p: jnp.asarray(0.0), lambda s, u: s + optax.tree.norm(u))


def growing_state():
    return with_state(lambda p: jnp.zeros(1), lambda s, u: jnp.append(s, 0.0))


def state_changes_dtype():
    return with_state(lambda p: jnp.zeros((), jnp.int32), lambda s, u: s / 2)


def updates_in_float32():
    return per_leaf(lambda g: g.astype(jnp.float32))


def computes_in_float32():
    return per_leaf(lambda g: jnp.sin(g.astype(jnp.float32)).astype(g.dtype))


def takes_tuples_for_results():
    def update(updates, state, params):
        pairs = jax.tree.map(lambda g: (g, 2 * g), updates)
        first = lambda pair: pair[0]  # noqa: E731
        return jax.tree.map(first, pairs, is_leaf=lambda x: isinstance(x, tuple)), state

    return transformation(update)


def fills_absent_leaves():
    absent = lambda x: x is None or isinstance(x, optax.MaskedNode)  # noqa: E731
    fill = lambda x: jnp.zeros(()) if absent(x) else -RATE * x  # noqa: E731
    return transformation(lambda u, s, p: (jax.tree.map(fill, u, is_leaf=absent), s))


def counts_absent_leaves():
    def update(updates, state, params):
        absent = lambda x: x is None or isinstance(x, optax.MaskedNode)  # noqa: E731
        scale = 1.0 / max(1, len(jax.tree.leaves(updates, is_leaf=absent)))
        return jax.tree.map(lambda g: scale * g, updates), state

    return transformation(update)


def looks_at_first_leaf():
    return with_state(
        lambda p: jnp.zeros(()), lambda s, u: s + jax.tree.leaves(u)[0].sum()
    )


def scalars_become_vectors():
    return per_leaf(jnp.atleast_1d)


def divides_by_spread():
    return per_leaf(lambda g: g / jnp.std(g))


def normalises_whole_stack():
    return per_leaf(lambda g: g / (1e-6 + jnp.linalg.norm(g)))


def unguarded_norm():
    return per_leaf(lambda g: g / jnp.linalg.norm(g))


def hides_nan():
    return per_leaf(jnp.nan_to_num)


def ascends():
    return per_leaf(lambda g: RATE * g)


def forgets_matrices():
    return per_leaf(lambda g: -RATE * g if g.ndim < 2 else jnp.zeros_like(g))


def norm_by_callback():
    def unit(g):  # under vmap, g is the whole ensemble and so is the norm
        return np.asarray(g / np.linalg.norm(g), np.float32)

    return per_leaf(
        lambda g: jax.pure_callback(unit, g, g, vmap_method="broadcast_all")
    )


def params_in_state():
    return with_state(lambda p: p, lambda s, u: jax.tree.map(jnp.add, s, u))


def init_reads_values():
    total = lambda p: jnp.float32(sum(float(x.sum()) for x in jax.tree.leaves(p)))  # noqa: E731
    return with_state(total, lambda s, u: s)


def hides_params_from_map():
    def init(params):
        leaves = jax.tree.leaves(params)
        return jnp.zeros(leaves[0].shape if leaves else ())

    return with_state(init, lambda s, u: s)


def ambiguous_names_in_state():
    # A checkpoint stores both of these under the one name "block.norm".
    init = lambda p: {"block.norm": jnp.zeros(()), "block": {"norm": jnp.ones(())}}  # noqa: E731
    return with_state(init, lambda s, u: s)


def layout_lost_in_init():
    zeros = lambda p: jax.tree.map(lambda x: jnp.zeros(x.shape), p)  # noqa: E731
    return with_state(zeros, lambda s, u: s)


def contracts_sharded_axes():
    return per_leaf(lambda g: g @ g.T @ g if g.ndim == 2 else g)


def numbers_only(learning_rate=RATE):
    rate = learning_rate if isinstance(learning_rate, float) else RATE
    return optax.sgd(rate)


def schedules_lose_the_sign(learning_rate=RATE):
    if callable(learning_rate):
        return optax.scale_by_schedule(learning_rate)
    return optax.scale(-learning_rate)


def schedules_start_at_one(learning_rate=RATE):
    if callable(learning_rate):
        return optax.scale_by_schedule(lambda count: -learning_rate(count + 1))
    return optax.scale(-learning_rate)


BROKEN = {
    rejects_unknown_arguments: ["accepts_unknown_extra_args"],
    needs_params_silently: ["params_optional_or_asked_for"],
    counts_in_python: ["is_pure", "jit_matches_eager"],
    python_float_in_state: ["state_is_strongly_typed", "compiles_once"],
    weak_array_in_state: ["state_is_strongly_typed", "compiles_once"],
    growing_state: ["state_is_stable", "compiles_once"],
    state_changes_dtype: ["state_is_stable", "state_survives_control_flow"],
    updates_in_float32: ["keeps_dtype"],
    computes_in_float32: ["float64"],
    takes_tuples_for_results: ["containers"],
    fills_absent_leaves: ["none_leaves"],
    counts_absent_leaves: ["masked", "partition"],
    looks_at_first_leaf: ["empty_tree"],
    scalars_become_vectors: ["bare_leaf"],
    divides_by_spread: ["small_and_empty_leaves"],
    normalises_whole_stack: ["stacked_leaves"],
    unguarded_norm: ["zero_gradients", "multi_steps"],
    hides_nan: ["nan_surfaces"],
    ascends: ["converges_on_parabola"],
    forgets_matrices: ["converges_on_mixed_target"],
    norm_by_callback: ["vmap", "no_host_callbacks"],
    params_in_state: ["donation"],
    init_reads_values: ["abstract_init"],
    hides_params_from_map: ["map_params"],
    ambiguous_names_in_state: ["checkpoint_round_trip"],
    layout_lost_in_init: ["auto_mesh", "explicit_mesh"],
    contracts_sharded_axes: ["explicit_mesh"],
    numbers_only: ["inject_hyperparams"],
    schedules_lose_the_sign: ["constant_schedules"],
    schedules_start_at_one: ["schedules"],
}


TAKE_A_RATE = (numbers_only, schedules_lose_the_sign, schedules_start_at_one)


@pytest.mark.parametrize(
    ("make", "check"),
    [(make, check) for make, checks in BROKEN.items() for check in checks],
)
def test_broken_transformation_is_caught(make, check):
    # Called optimizers so that the convergence checks do not turn them around.
    case = Case(make.__name__, lambda learning_rate=RATE: make())
    if make in TAKE_A_RATE:
        case = case._replace(
            make=make,
            hyperparameters={"learning_rate": 0.05},
            schedules=("learning_rate",),
        )
    with pytest.raises(AssertionError, match=make.__name__):
        CHECKS[check](case)


def test_every_check_can_fail():
    assert {check for checks in BROKEN.values() for check in checks} == set(CHECKS)


# --- sound transformations -----------------------------------------------------------

FLAGS = ("eps_in_sqrt", "bias_correction")
SOUND = [
    Case(
        "sgd",
        functools.partial(optax.sgd, learning_rate=RATE, momentum=0.9),
        learning_rate=0.05,
        hyperparameters={"learning_rate": 0.05, "momentum": 0.8},
        schedules=("learning_rate",),
        stacked=True,
    ),
    Case(
        "adamw",
        functools.partial(optax.adamw, learning_rate=RATE, weight_decay=0.0),
        hyperparameters={"learning_rate": 0.05, "b1": 0.8, "weight_decay": 0.02},
        schedules=("learning_rate",),
        stacked=True,
    ),
    Case("rms", optax.scale_by_rms, is_optimizer=False, static_args=FLAGS),
]


@pytest.mark.parametrize(
    ("case", "check"),
    [
        pytest.param(case, check, id=f"{case.name}-{name}")
        for case in SOUND
        for name, check in checks_for(case).items()
        if not name.endswith("_mesh")  # test_meshes.py shows that these can pass
    ],
)
def test_sound_transformation_passes(case, check):
    check(case)


def test_known_defects_of_optax_are_found():
    """Optax 0.2.8: `sam` keeps its params, `prodigy` divides zero by zero."""
    if optax.__version__ != "0.2.8":
        pytest.skip("these defects are known for optax 0.2.8 only")
    sam = lambda: optax.contrib.sam(optax.sgd(RATE), optax.sgd(0.05))  # noqa: E731
    with pytest.raises(AssertionError, match="same buffer"):
        CHECKS["donation"](Case("sam", sam))
    with pytest.raises(AssertionError, match="NaN or infinity"):
        CHECKS["zero_gradients"](Case("prodigy", lambda: optax.contrib.prodigy(1.0)))
