"""Where `optax.contrib.sam` falls short, and what ours does instead.

Its transparent mode alternates ascent and descent over successive updates; its opaque
mode loops inside one update, with a `grad_fn` among the extra arguments. Each test
names the behaviour that was found in optax 0.2.8.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from basinax import optimizers as bx
from basinax.benchmarks import _speed_sam

RATE, RHO = 0.1, 0.5
CURVATURE = jnp.array([4.0, 1.0, 0.25])
START = jnp.array([1.0, -2.0, 3.0])


def loss_fn(w):
    return 0.5 * jnp.sum(CURVATURE * w**2)


def sam_gradient(w):
    """Evaluate H(w + ρ Hw / ‖Hw‖) in float64."""
    h, w = np.float64(CURVATURE), np.float64(w)
    return h * (w + RHO * h * w / np.linalg.norm(h * w))


def stepper(tx, loss_fn=loss_fn, **extra):
    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(
            gradient, state, params, value_fn=loss_fn, value=value, **extra
        )
        return optax.apply_updates(params, updates), state, updates

    return step


def test_1_the_loop_holds_clean_parameters_and_counts_whole_steps():
    """Transparent mode shows perturbed parameters every other step, counts half-steps
    in schedules, holds a copy of the parameters and restores them up to rounding."""
    rate = optax.piecewise_constant_schedule(RATE, {3: 0.1})
    tx = optax.chain(bx.sam(RHO), optax.sgd(rate))
    state, params, step = tx.init(START), START, stepper(tx)
    assert all(leaf.size == 1 for leaf in jax.tree.leaves(state))  # counters only
    expected = np.float64(START)
    for count in range(5):
        params, state, _ = step(params, state)
        expected = expected - rate(count) * sam_gradient(expected)
        np.testing.assert_allclose(params, expected, rtol=3e-6)
        assert optax.tree.get(state, "SAMState").count == count + 1


def test_2_every_update_moves_the_parameters():
    """With `sync_period=1` every transparent step undoes the one before."""
    step = stepper(tx := optax.chain(bx.sam(RHO), optax.sgd(RATE)))
    params, state, losses = START, tx.init(START), [loss_fn(START)]
    for _ in range(10):
        params, state, _ = step(params, state)
        losses.append(loss_fn(params))
    assert np.all(np.diff(losses) < 0)


def test_3_a_zero_gradient_is_no_nan():
    """It is, and arithmetic selection spreads it from the branch not taken."""
    tx = optax.chain(bx.sam(RHO), optax.sgd(RATE, momentum=0.9))
    zero = jnp.zeros_like(START)
    with jax.debug_nans(True):
        params, _, updates = stepper(tx)(zero, tx.init(zero))
    np.testing.assert_array_equal(updates, zero)
    np.testing.assert_array_equal(params, zero)


def test_4_random_keys_may_be_part_of_the_state():
    """Its arithmetic selection fails on key leaves, as those of add_noise."""
    noise = optax.add_noise(0.01, 0.55, key=jax.random.key(0))
    tx = optax.chain(bx.sam(RHO), noise, optax.sgd(RATE))
    state, step = tx.init(START), stepper(tx)
    _, state, first = step(START, state)
    _, state, second = step(START, state)
    assert not np.array_equal(first, second)
    np.testing.assert_allclose(first, -RATE * sam_gradient(START), atol=0.1)


def test_5_other_extra_arguments_reach_the_other_links():
    """Opaque mode raises a TypeError on `value`, which reduce_on_plateau needs."""
    plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    tx = optax.chain(bx.sam(RHO), optax.sgd(RATE), plateau)
    state, step = tx.init(START), stepper(tx, lambda w: 1 + 0 * loss_fn(w))
    for _ in range(4):
        _, state, _ = step(START, state)
    assert optax.tree.get(state, "scale") < 1
    search = optax.scale_by_backtracking_linesearch(5)
    tx = optax.chain(bx.sam(RHO), optax.sgd(1.0), search)
    gradient = jax.grad(loss_fn)(START)
    params, _, _ = stepper(tx, grad=gradient)(START, tx.init(START))
    assert loss_fn(params) < loss_fn(START)


def test_6_what_follows_acts_on_the_descent_gradient():
    """A clip in front of opaque mode lets the descent gradient through unclipped; in
    front of ours it does too, but ours is a link that others can follow."""
    limit = 1e-3
    after = optax.chain(bx.sam(RHO), optax.clip_by_global_norm(limit), optax.sgd(1.0))
    before = optax.chain(optax.clip_by_global_norm(limit), bx.sam(RHO), optax.sgd(1.0))
    wanted = sam_gradient(START)
    _, _, updates = stepper(after)(START, after.init(START))
    length = np.linalg.norm(wanted)
    np.testing.assert_allclose(updates, -limit * wanted / length, rtol=1e-5)
    # A global clip keeps the direction, hence the perturbation.
    _, _, updates = stepper(before)(START, before.init(START))
    np.testing.assert_allclose(updates, -wanted, rtol=1e-5)


def test_7_a_subset_of_the_parameters():
    """Inside `partition` or `masked` its grad_fn gets placeholders and crashes."""
    params = {"body": START, "head": jnp.array([0.5, 2.0, -1.0])}
    both = lambda p: loss_fn(p["body"]) + jnp.sum(p["body"] * p["head"])  # noqa: E731
    mask = {"body": True, "head": False}
    parts = optax.partition({"slow": optax.sgd(0.01), "fast": optax.sgd(1.0)}, mask_to)
    tx = optax.chain(bx.sam(RHO, mask=mask), parts)
    _, _, updates = stepper(tx, both)(params, tx.init(params))

    clean = jax.grad(both)(params)["body"]
    ahead = params | {"body": START + RHO * clean / jnp.linalg.norm(clean)}
    wanted = jax.grad(both)(ahead)
    np.testing.assert_allclose(updates["body"], -0.01 * wanted["body"], rtol=1e-5)
    np.testing.assert_allclose(updates["head"], -wanted["head"], rtol=1e-5)

    # Inside, a loss that fills the placeholders in works; any other is told why not.
    inside = optax.masked(bx.sam(RHO), mask)
    state = inside.init(params)
    gradient = jax.grad(both)(params)
    filled = lambda p: both({**p, "head": params["head"]})  # noqa: E731
    updates, _ = inside.update(gradient, state, params, value_fn=filled)
    np.testing.assert_allclose(updates["body"], wanted["body"], rtol=1e-5)
    np.testing.assert_array_equal(updates["head"], gradient["head"])
    with pytest.raises(ValueError, match=r"MaskedNode.*Put sam in front"):
        inside.update(gradient, state, params, value_fn=both)


def mask_to(params):
    return {name: {"body": "slow", "head": "fast"}[name] for name in params}


def batch_loss(w, x):
    return jnp.mean(jnp.square(jnp.tanh(x @ w) - 0.5))


BATCH = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)
whole = functools.partial(batch_loss, x=BATCH)
micro = BATCH.reshape(4, 2, 3)
on_batch = jax.jit(bx.sam_value_and_grad(batch_loss, rho=RHO))


def accumulate(tx, value_fn_of):
    state = tx.init(START)
    update = jax.jit(
        lambda x, state: tx.update(
            jax.grad(batch_loss)(START, x), state, START, value_fn=value_fn_of(x)
        )
    )
    for x in micro:
        updates, state = update(x, state)
    return updates


def test_8_accumulated_gradients_have_a_stated_meaning():
    """Under MultiSteps the ascent takes all microbatches, the descent the last one."""
    large_batch = -RATE * on_batch(START, BATCH)[1]
    around = optax.MultiSteps(optax.chain(bx.sam(RHO), optax.sgd(RATE)), len(micro))
    around = around.gradient_transformation()
    found = accumulate(around, lambda _: whole)
    np.testing.assert_allclose(found, large_batch, rtol=1e-5)
    last_only = accumulate(around, lambda x: functools.partial(batch_loss, x=x))
    assert np.linalg.norm(last_only - large_batch) > 1e-3

    behind = optax.MultiSteps(optax.sgd(RATE), len(micro)).gradient_transformation()
    tx = optax.chain(bx.sam(RHO), behind)
    found = accumulate(tx, lambda x: functools.partial(batch_loss, x=x))
    each = jnp.stack([on_batch(START, x)[1] for x in micro])
    np.testing.assert_allclose(found, -RATE * jnp.mean(each, 0), rtol=1e-5)
    assert np.linalg.norm(found - large_batch) > 1e-3


def test_9_ascent_in_step_or_per_device():
    """It averages over devices in one fixed place. (Auxiliary outputs, the value,
    statistics and the adaptive form, which it lacks, are tested in test_sam.)"""
    devices = 4
    mesh = jax.make_mesh(
        (devices,), ("d",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def averaged(loss_fn, **options):
        oracle = jax.value_and_grad(loss_fn, **options)
        return lambda *args: jax.lax.pmean(oracle(*args), "d")

    in_step = bx.sam_value_and_grad(batch_loss, rho=RHO, value_and_grad=averaged)
    alone = bx.sam_value_and_grad(batch_loss, rho=RHO)
    per_device = lambda *args: jax.lax.pmean(alone(*args), "d")  # noqa: E731

    def run(oracle):
        # Parameters vary formally, so that gradients are those of one device.
        local = lambda w, x: oracle(jax.lax.pcast(w, "d", to="varying"), x)  # noqa: E731
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
        return jax.jit(mapped)(START, BATCH)

    for found, wanted in zip(run(in_step), on_batch(START, BATCH), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    each = jnp.stack([on_batch(START, x)[1] for x in micro])
    np.testing.assert_allclose(run(per_device)[1], jnp.mean(each, 0), rtol=1e-5)


def test_speed_of_a_step():
    rows = _speed_sam.measure(sizes=(3, 4, 2), batches=(2, 5), rounds=2)
    assert [row["optimizer"] for row in rows] == 2 * list(_speed_sam.steps())
    assert [row["ratio"] for row in rows if row["optimizer"] == "sgd"] == [1.0, 1.0]
    assert all(row["ratio"] > 0 for row in rows)
    assert "3-4-2" in str(_speed_sam.table(rows, rounds=2))


def test_the_steps_that_are_timed_agree():
    """Ours in both forms and theirs are one method; its normalisation has no guard."""
    rng = np.random.default_rng(0)
    params = [{"w": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)}]
    params[0]["b"] = jnp.zeros(2)
    batch = (BATCH, jnp.asarray(rng.integers(0, 2, len(BATCH))))
    found = {}
    for name, (tx, step) in _speed_sam.steps().items():
        after, _ = jax.jit(step)(params, tx.init(params), batch)
        found[name] = np.asarray(after[0]["w"])
    plain = found.pop("sgd")
    assert np.abs(found["sam + sgd"] - plain).max() > 1e-4
    for name, weights in found.items():
        np.testing.assert_allclose(weights, found["sam + sgd"], rtol=1e-5, err_msg=name)
