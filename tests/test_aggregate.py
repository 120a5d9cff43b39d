"""Aggregation: combination, normalization, groups, state and bad input."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from optax.experimental import aggregating
from stacked_trees import TASKS, gram, matrix, tree

from basinax.optimizers import TaskGrads, aggregate, famo, mgda_weights, random_weights
from basinax.testing._trees import assert_close, assert_same_types

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "samo.npz")


def flat(updates):
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(updates)])


def weights_from(gramian):
    """Depend on every entry, on the order of the tasks and on scale."""
    return gramian @ jnp.arange(1.0, 1 + len(gramian), dtype=gramian.dtype)


GRADS = tree()
PARAMS = jax.tree.map(lambda x: x[0], GRADS)


def update(tx, grads, params=None, **extra):
    return tx.update(grads, tx.init(params), params, **extra)


by_mgda = jax.jit(functools.partial(update, aggregate(mgda_weights, num_tasks=TASKS)))


# --- combination ---------------------------------------------------------------------


def test_complex_leaves_are_combined():
    grads = jnp.array([[1 + 2j], [3 - 1j]])
    updates, _ = update(aggregate(lambda g: jnp.full(2, 0.5)), grads)
    np.testing.assert_allclose(updates, [2 + 0.5j], rtol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_tasks_and_coordinates(axis_type):
    mesh = jax.make_mesh((2, 4), ("task", "data"), axis_types=(axis_type,) * 2)
    x = np.random.default_rng(0).standard_normal((2, 8, 3)).astype(np.float32)
    tx = aggregate(weights_from)
    expected = update(tx, jnp.asarray(x))[0]
    for spec in (jax.P("task", "data"), jax.P(None, "data"), jax.P("task")):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        found, _ = jax.jit(lambda x: update(tx, x))(placed)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_only_sums_travel_between_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    layout = NamedSharding(mesh, jax.P(None, None, "data"))
    x = jax.device_put(jnp.ones((2, 4, 16)), layout)
    tx = aggregate(weights_from)
    compiled = jax.jit(lambda x: update(tx, x)).lower(x).compile()
    assert "all-reduce" in compiled.as_text()
    assert "all-gather" not in compiled.as_text()
    assert compiled.output_shardings[0].is_equivalent_to(
        NamedSharding(mesh, jax.P(None, "data")), 2
    )


def test_update_is_the_weighted_sum():
    tx = aggregate(weights_from, num_tasks=TASKS)
    updates, state = jax.jit(functools.partial(update, tx))(GRADS, PARAMS)
    rows = matrix(GRADS)
    weights = rows @ rows.T @ np.arange(1.0, 4.0)
    np.testing.assert_allclose(flat(updates), rows.T @ weights, rtol=1e-5)
    assert_same_types(updates, PARAMS, "updates")
    found = optax.tree.get(state, "weights")
    np.testing.assert_allclose(found, weights, rtol=1e-5)
    np.testing.assert_allclose(
        optax.tree.get(state, "cosines"), np.asarray(gram(GRADS).cosines), rtol=1e-6
    )


def test_updates_are_those_of_the_authors(x64):
    name = "t3_random"
    case = {k: GOLDEN[f"comb/{name}/{k}"] for k in ("J", "losses")}
    rows, tasks = jnp.asarray(case["J"]), len(case["J"])

    def found(weighting, **extra):
        return update(aggregate(weighting, num_tasks=tasks), rows, **extra)[0]

    stored = lambda key: lambda gramian: jnp.asarray(GOLDEN[f"comb/{name}/{key}"])  # noqa: E731
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    close(tasks * found(stored("fairgrad2_w")), _golden(name, "fairgrad2"))
    close(tasks**2 * found(stored("mgda_w")), _golden(name, "mgda"))
    close(found(stored("base_imtlg_w")), _golden(name, "base_imtlg"))
    losses = jnp.asarray(case["losses"])
    close(found(famo(), losses=losses), _golden(name, "base_famo_step0"))
    inverse = lambda gramian, losses: 1 / losses  # noqa: E731
    close(found(inverse, losses=losses), _golden(name, "base_si"))


def _golden(name, key):
    return GOLDEN[f"comb/{name}/{key}"]


def test_min_norm_point_of_a_tree():
    updates, state = by_mgda(GRADS)
    products = matrix(GRADS) @ flat(updates)
    square = flat(updates) @ flat(updates)
    assert np.all(products >= square * (1 - 1e-4))
    np.testing.assert_allclose(np.sum(state.weights), 1, rtol=1e-5)


def test_permuted_tasks_give_the_same_update():
    permuted = jax.tree.map(lambda x: x[jnp.array([2, 0, 1])], GRADS)
    assert_close(
        by_mgda(permuted)[0], by_mgda(GRADS)[0], "updates", rtol=1e-4, atol=1e-5
    )


def test_chain_equals_aggregation_by_hand():
    adam = optax.adam(0.1)
    tx = optax.chain(aggregate(mgda_weights), optax.clip_by_global_norm(1.0), adam)

    @jax.jit
    def chained(grads, state):
        return tx.update(grads, state, PARAMS)

    @jax.jit
    def by_hand(grads, state):
        leaves, treedef = jax.tree.flatten(grads)
        rows = jnp.concatenate([x.reshape(TASKS, -1) for x in leaves], 1)
        weights = mgda_weights(jnp.matmul(rows, rows.T, precision="highest"))
        combined = [jnp.tensordot(weights, x, 1, precision="highest") for x in leaves]
        combined = treedef.unflatten(combined)
        norm = optax.tree.norm(combined)
        clipped = jax.tree.map(lambda x: x / jnp.maximum(norm, 1), combined)
        return adam.update(clipped, state, PARAMS)

    state, adam_state = tx.init(PARAMS), adam.init(PARAMS)
    for seed in range(3):
        updates, state = chained(tree(seed), state)
        expected, adam_state = by_hand(tree(seed), adam_state)
        assert_close(updates, expected, "updates", rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_are_kept(dtype):
    with jax.enable_x64(dtype == "float64"):
        mixed = {"x": tree(0, dtype), "y": tree(1)}
        updates, _ = update(aggregate(lambda g: jnp.full(3, 1 / 3)), mixed)
        assert_same_types(updates, jax.tree.map(lambda x: x[0], mixed), "updates")
        mean = jax.tree.map(lambda x: np.asarray(x, np.float64).mean(0), mixed)
        rounding = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            flat(updates), flat(mean), rtol=max(rounding, 1e-6), atol=1e-6
        )


# --- normalization -------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["l2", "loss", "loss+"])
def test_normalization_scales_the_rows_first(normalize):
    losses = jnp.array([0.5, 2.0, 40.0])
    norms = np.linalg.norm(matrix(GRADS), axis=1)
    divisor = (norms if normalize != "loss" else 1) * (
        np.asarray(losses) if normalize != "l2" else 1
    )
    by_hand = jax.tree.map(
        lambda x: x / jnp.asarray(divisor, x.dtype).reshape(-1, *(1,) * (x.ndim - 1)),
        GRADS,
    )
    tx = aggregate(weights_from, normalize=normalize, num_tasks=TASKS)
    updates, state = update(tx, GRADS, PARAMS, losses=losses)
    expected, _ = update(aggregate(weights_from), by_hand)
    assert_close(updates, expected, "updates", rtol=1e-4, atol=1e-5)
    # The weights kept are those of the gradients that came in.
    combined = matrix(GRADS).T @ np.asarray(state.weights, np.float64)
    np.testing.assert_allclose(flat(updates), combined, rtol=1e-4, atol=1e-5)


def test_normalization_ignores_zeros_and_reaches_all_sizes():
    grads = jnp.array([[3e-30, 4e-30], [0.0, 2e25], [0.0, 0.0]])
    tx = aggregate(lambda g: jnp.ones(3), normalize="l2")
    np.testing.assert_allclose(update(tx, grads)[0], [0.6, 1.8], rtol=1e-6)
    by_loss = aggregate(lambda g: jnp.ones(2), normalize="loss")
    grads, losses = jnp.array([[1.0], [1.0]]), jnp.array([0.0, 4.0])
    np.testing.assert_allclose(update(by_loss, grads, losses=losses)[0], [1.25])


# --- groups, heads and containers ----------------------------------------------------

FIRST = {"w": True, "b": False, "s": False, "e": False, "none": False}
SECOND = {name: not chosen for name, chosen in FIRST.items()}


def by_groups():
    groups = [{n: GRADS[n] for n in g if g[n]} for g in (FIRST, SECOND)]
    first, second = (update(aggregate(weights_from), g)[0] for g in groups)
    return first | second


def test_groups_are_weighed_separately():
    chain = optax.chain(
        aggregate(weights_from, mask=FIRST, num_tasks=TASKS),
        aggregate(weights_from, mask=lambda p: {n: n != "w" for n in p}),
    )
    updates, state = update(chain, GRADS, PARAMS)
    assert_close(updates, by_groups(), "groups")
    rows = matrix(GRADS["w"])
    weights = rows @ rows.T @ np.arange(1.0, 4.0)
    np.testing.assert_allclose(state[0].weights, weights, rtol=1e-5)


def test_optax_wrappers_make_groups_of_stacked_trees():
    masked = optax.chain(
        optax.masked(aggregate(weights_from), FIRST),
        optax.masked(aggregate(weights_from), SECOND),
        optax.sgd(1.0),
    )
    labels = {name: "first" if chosen else "second" for name, chosen in FIRST.items()}
    aggregations = dict.fromkeys(("first", "second"), aggregate(weights_from))
    parts = optax.chain(optax.partition(aggregations, labels), optax.sgd(1.0))
    expected = jax.tree.map(jnp.negative, by_groups())
    for tx in (masked, parts):
        assert_close(update(tx, GRADS, PARAMS)[0], expected, "wrapped", rtol=1e-6)


def test_heads_keep_their_gradients():
    head = jnp.array([7.0, -7.0])
    nothing = dict.fromkeys(GRADS)
    grads = TaskGrads(GRADS | {"head": None}, nothing | {"head": head})
    params = PARAMS | {"head": jnp.zeros(2)}
    tx = optax.chain(aggregate(weights_from), optax.scale(1.0))
    shared, _ = update(aggregate(weights_from), GRADS)
    updates, _ = update(tx, grads, params)
    assert_close(updates, shared | {"head": head}, "updates")
    groups = optax.chain(
        aggregate(weights_from, mask=FIRST | {"head": True}),
        aggregate(weights_from, mask=SECOND | {"head": False}),
    )
    updates, _ = update(groups, grads, params)
    assert_close(updates, by_groups() | {"head": head}, "updates of groups")


def test_only_heads_and_nothing_at_all():
    head = {"head": jnp.ones(2)}
    tx = aggregate(weights_from, num_tasks=TASKS)
    assert_close(update(tx, TaskGrads({"head": None}, head))[0], head, "heads")
    updates, state = update(tx, {"none": None})
    assert updates == {"none": None}
    assert_close(state, tx.init(None), "state")


# --- in optax ------------------------------------------------------------------------


def test_serves_as_an_aggregator_of_optax():
    clip = jax.vmap(lambda tree: optax.projections.projection_l2_ball(tree, 2.0))
    pre = optax.stateless(lambda grads, _: clip(grads))
    processed = aggregating.process(
        pre, aggregate(weights_from, num_tasks=TASKS), optax.sgd(0.1, 0.9)
    )
    chain = optax.chain(pre, aggregate(weights_from), optax.sgd(0.1, 0.9))
    state, chain_state = processed.init(PARAMS), chain.init(PARAMS)
    for seed in range(2):
        updates, state = processed.update(tree(seed), state, PARAMS)
        expected, chain_state = chain.update(tree(seed), chain_state, PARAMS)
        assert_close(updates, expected, "updates", rtol=1e-5, atol=1e-6)


def test_gradients_accumulate_before_or_after_but_not_around():
    tx = aggregate(weights_from)
    around = optax.MultiSteps(tx, 2).gradient_transformation()
    with pytest.raises((TypeError, ValueError)):
        update(around, GRADS, PARAMS)
    tail = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    chain = optax.chain(tx, tail)
    state = chain.init(PARAMS)
    for seed in (0, 1):
        updates, state = chain.update(tree(seed), state, PARAMS)
    combined = [update(tx, tree(seed))[0] for seed in (0, 1)]
    mean = jax.tree.map(lambda *x: -sum(x) / 2, *combined)
    assert_close(updates, mean, "mean of combined gradients", rtol=1e-5, atol=1e-5)


def test_keys_advance_and_can_be_given():
    tx = aggregate(random_weights(), num_tasks=TASKS, key=3)
    step = jax.jit(functools.partial(tx.update, params=None), donate_argnums=1)
    state = tx.init(PARAMS)
    seen = []
    for _ in range(3):
        _, state = step(GRADS, state)
        seen.append(tuple(np.asarray(state.weights)))
    assert len(set(seen)) == 3
    again = tx.update(GRADS, tx.init(PARAMS))[1]
    np.testing.assert_allclose(again.weights, seen[0], rtol=1e-6)
    kept = jax.random.key_data(state.key)
    given = [
        tx.update(GRADS, state, key=key)[1]
        for key in (9, jax.random.key(9), jax.random.key_data(jax.random.key(9)))
    ]
    for one in given:
        np.testing.assert_array_equal(one.weights, given[0].weights)
        np.testing.assert_array_equal(jax.random.key_data(one.key), kept)


def test_a_state_never_holds_the_callers_key():
    key = jax.random.key(0)
    tx = aggregate(random_weights(), key=key)
    step = jax.jit(tx.update, donate_argnums=1)
    for _ in range(2):
        step(GRADS, tx.init(PARAMS))
    assert not key.is_deleted()


def test_injected_hyperparameters_are_static():
    names = ("weighting", "num_tasks", "normalize", "mask", "key")
    injected = optax.inject_hyperparams(aggregate, static_args=names)
    tx = injected(weights_from, num_tasks=TASKS, key=0)
    plain = aggregate(weights_from, num_tasks=TASKS, key=0)
    assert_close(update(tx, GRADS)[0], update(plain, GRADS)[0], "updates")
    with pytest.raises(TypeError, match="static_args"):
        optax.inject_hyperparams(aggregate, static_args=("weighting", "key"))(
            weights_from, num_tasks=TASKS
        ).init(PARAMS)


# --- extremes and mistakes -----------------------------------------------------------


def test_one_task_and_zero_gradients():
    one = jax.tree.map(lambda x: x[:1], GRADS)
    updates, _ = update(aggregate(mgda_weights), one, PARAMS)
    assert_close(updates, PARAMS, "updates of one task", rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    normalized = aggregate(lambda g: g[0] + 1, num_tasks=TASKS, normalize="l2")
    for updates, state in (by_mgda(zero), update(normalized, zero)):
        np.testing.assert_array_equal(flat(updates), 0)
        assert np.isfinite(state.weights).all()
        np.testing.assert_array_equal(state.cosines, 0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_gradients_get_the_same_weights(scale):
    scaled = jax.tree.map(lambda x: x * jnp.float32(scale), GRADS)
    expected, found = (by_mgda(grads)[1] for grads in (GRADS, scaled))
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-3)
    np.testing.assert_allclose(found.cosines, expected.cosines, rtol=1e-5)


def test_nan_in_one_task_shows():
    grads = GRADS | {"b": GRADS["b"].at[1, 0].set(jnp.nan)}
    updates, state = by_mgda(grads)
    assert np.isnan(flat(updates)).all()
    assert np.isnan(state.cosines[1]).all()
    assert np.isfinite(state.cosines[0, 2])
    # Weights that do not look at gradients confine it to its entry.
    updates, _ = update(aggregate(lambda g: jnp.ones(TASKS)), grads)
    np.testing.assert_array_equal(np.isnan(updates["b"]), [True, False])
    assert np.isfinite(updates["w"]).all()


@pytest.mark.parametrize(
    ("message", "options", "grads", "extra"),
    [
        (r"'b'.* \(2,\) for a parameter of shape \(2,\)", {}, PARAMS, {}),
        ("leading axes differ: 2 in .*, 3 in", {}, GRADS | {"b": jnp.ones((2, 2))}, {}),
        ("num_tasks=2, but the updates stack 3", {"num_tasks": 2}, GRADS, {}),
        (r"losses have shape \(\)", {}, GRADS, {"losses": 1.0}),
        (r"losses have shape \(2,\)", {}, GRADS, {"losses": jnp.ones(2)}),
        ('normalize="loss" needs the task losses', {"normalize": "loss"}, GRADS, {}),
        ("mask must be a tree", {"mask": {"w": True}}, GRADS, {}),
    ],
)
def test_mistakes_are_named(message, options, grads, extra):
    with pytest.raises(ValueError, match=message):
        update(aggregate(weights_from, **options), grads, PARAMS, **extra)


def test_mistakes_in_arguments_are_named():
    with pytest.raises(ValueError, match=r"weighting returned shape \(3, 3\)"):
        update(aggregate(lambda g: g), GRADS)
    with pytest.raises(ValueError, match=r"has shape \(\)"):
        update(aggregate(weights_from), jnp.ones([]))
    with pytest.raises(ValueError, match="normalize='L2' is unknown"):
        aggregate(weights_from, normalize="L2")
    with pytest.raises(ValueError, match="num_tasks must be at least 1"):
        aggregate(weights_from, num_tasks=0)
    with pytest.raises(TypeError, match="num_tasks is a compile-time int"):
        aggregate(weights_from, num_tasks=2.0)
    with pytest.raises(TypeError, match="key is a random key"):
        aggregate(weights_from, key="seed")
