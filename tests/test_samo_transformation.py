"""The chainable SAMO: one meaning with the oracle, nothing computed twice, state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from basinax.optimizers import (
    aggregate,
    dwa,
    mean_weights,
    mgda_weights,
    random_weights,
    samo,
    samo_value_and_grad,
    task_gradients,
)
from basinax.testing._trees import assert_close, assert_same_types

rng = np.random.default_rng(0)
INPUTS = jnp.asarray(rng.standard_normal((8, 3)), jnp.float32)
PARAMS = {
    "body": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32),
    "heads": [jnp.asarray(rng.standard_normal(4), jnp.float32) for _ in range(2)],
}
OWNER = {"body": -1, "heads": [0, 1]}


def losses_fn(params):
    """Fit two targets by two heads on one body."""
    features = jnp.tanh(INPUTS @ params["body"])
    outputs = jnp.stack([features @ head for head in params["heads"]])
    targets = jnp.stack([jnp.sin(INPUTS[:, 0]), 3 * INPUTS[:, 1]])
    return jnp.mean((outputs - targets) ** 2, 1)


def mean_gradient(params):
    return jax.grad(lambda p: jnp.mean(losses_fn(p)))(params)


GRADS = jax.jit(mean_gradient)(PARAMS)
KEY = jax.random.key(1)


def stepper(tx, **extra):
    """Return a compiled `update` with the losses bound."""
    return jax.jit(functools.partial(tx.update, value_fn=losses_fn, **extra))


# --- one meaning ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"local": "exact", "axis": "unroll", "owner": OWNER, "alpha": 0.3},
        {"local": "none", "adaptive": True, "owner": OWNER},
    ],
    ids=["spsa", "exact", "none"],
)
def test_both_forms_give_the_same_bits(options):
    # One that draws, to see which key it gets.
    weighting = random_weights() if options.get("local") == "none" else mgda_weights
    tx = optax.chain(samo(weighting, rho=0.1, **options), optax.sgd(0.1, 0.9))
    by_hand = optax.chain(aggregate(weighting), optax.sgd(0.1, 0.9))
    oracle = samo_value_and_grad(losses_fn, rho=0.1, **options)
    perturb, weigh = jax.random.split(KEY)

    @jax.jit
    def step(params, state):
        grads = mean_gradient(params)
        return tx.update(grads, state, params, value_fn=losses_fn, key=KEY)

    @jax.jit
    def step_by_hand(params, state):
        losses, grads = oracle(params, key=perturb)
        return by_hand.update(grads, state, params, losses=losses, key=weigh)

    params, state, hand_state = PARAMS, tx.init(PARAMS), by_hand.init(PARAMS)
    for _ in range(2):
        updates, state = step(params, state)
        expected, hand_state = step_by_hand(params, hand_state)
        assert_close(updates, expected, "updates")
        params = optax.apply_updates(params, updates)


def test_the_incoming_gradient_is_reused():
    """Hand in another gradient: it must be the one climbed, and none computed."""
    other = jax.tree.map(lambda g: -g, GRADS)
    tx = samo(mean_weights, rho=0.2, local="none", axis="unroll")
    updates, _ = stepper(tx)(other, tx.init(PARAMS), PARAMS)
    norm = optax.tree.norm(other)
    below = jax.tree.map(lambda w, g: w + 0.2 * g / norm, PARAMS, other)
    expected = jax.jit(mean_gradient)(below)
    assert_close(updates, expected, "updates", rtol=1e-4, atol=1e-5)

    oracle = samo_value_and_grad(losses_fn, rho=0.2, local="none", axis="unroll")
    combine = aggregate(mean_weights)

    def chained(grads, params):
        return tx.update(grads, tx.init(params), params, value_fn=losses_fn)[0]

    def alone(params):
        return combine.update(oracle(params)[1], combine.init(params), params)[0]

    # As compiled: what nothing depends on is not computed.
    spent, whole, one = (
        jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
        for f, *args in (
            (chained, GRADS, PARAMS),
            (alone, PARAMS),
            (mean_gradient, PARAMS),
        )
    )
    assert spent < whole - 0.3 * one


def test_without_radius_it_is_an_aggregation():
    tx = samo(mgda_weights, rho=0.0, local="exact", owner=OWNER)
    updates, _ = stepper(tx)(GRADS, tx.init(PARAMS), PARAMS)
    combine = aggregate(mgda_weights)
    _, grads = task_gradients(losses_fn, owner=OWNER)(PARAMS)
    expected, _ = combine.update(grads, combine.init(PARAMS), PARAMS)
    assert_close(updates, expected, "updates", rtol=1e-5, atol=1e-6)


def test_radius_follows_its_schedule():
    schedule = optax.linear_schedule(0.4, 0.0, 2)
    common = {"local": "none", "num_tasks": 2}
    tx = samo(mean_weights, rho=schedule, **common)
    step, state = stepper(tx), tx.init(PARAMS)

    @jax.jit
    def fixed(rho):
        tx = samo(mean_weights, rho=rho, **common)
        return tx.update(GRADS, tx.init(PARAMS), PARAMS, value_fn=losses_fn)[0]

    for count in range(3):
        updates, state = step(GRADS, state, PARAMS)
        expected = fixed(schedule(count))
        assert_close(updates, expected, "updates", rtol=1e-5, atol=1e-6)
        assert int(state.count) == count + 1
    np.testing.assert_array_equal(state.sharpness, 0)


# --- state ---------------------------------------------------------------------------


def test_diagnostics_are_kept():
    tx = optax.chain(
        samo(dwa(2), rho=0.1, num_tasks=2, owner=OWNER, local="exact"), optax.sgd(0.1)
    )
    state = tx.init(PARAMS)
    updates, after = stepper(tx)(GRADS, state, PARAMS)
    assert_same_types(after, state, "state")
    assert_same_types(updates, PARAMS, "updates")
    get = functools.partial(optax.tree.get, after)
    np.testing.assert_allclose(get("losses"), losses_fn(PARAMS), rtol=1e-6)
    oracle = samo_value_and_grad(
        losses_fn, rho=0.1, owner=OWNER, local="exact", diagnostics=True
    )
    _, grads, seen = jax.jit(oracle)(PARAMS)
    np.testing.assert_allclose(get("sharpness"), seen.sharpness, rtol=1e-3, atol=1e-6)
    rows = np.asarray(grads.shared["body"]).reshape(2, -1)
    cosine = rows[0] @ rows[1] / np.prod(np.linalg.norm(rows, axis=1))
    np.testing.assert_allclose(get("cosines")[0, 1], cosine, rtol=1e-4)
    np.testing.assert_allclose(get("weights"), [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(get("history")[-1], losses_fn(PARAMS), rtol=1e-6)


def test_training_in_a_scan_fits_both_tasks():
    tx = optax.chain(
        samo(random_weights(), rho=0.02, owner=OWNER, local="exact", key=0),
        optax.adam(0.03),
    )

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(
                mean_gradient(params), state, params, value_fn=losses_fn
            )
            return (optax.apply_updates(params, updates), state), losses_fn(params)

        return jax.lax.scan(step, (params, tx.init(params)), length=150)[1]

    losses = train(PARAMS)
    assert np.all(losses[-1] < 0.2 * losses[0])


def test_keys_advance_and_directions_can_be_given():
    tx = samo(mean_weights, rho=0.1, key=3)
    step = stepper(tx)
    first, state = step(GRADS, tx.init(PARAMS), PARAMS)
    second, _ = step(GRADS, state, PARAMS)
    assert jnp.any(first["body"] != second["body"])
    directions = jax.tree.map(
        lambda w: jnp.asarray(rng.standard_normal((2, 1, *w.shape)), w.dtype), PARAMS
    )
    keyless = samo(mean_weights, rho=0.1)
    found, _ = stepper(keyless)(
        GRADS, keyless.init(PARAMS), PARAMS, directions=directions
    )
    oracle = samo_value_and_grad(losses_fn, rho=0.1)
    _, grads = jax.jit(oracle)(PARAMS, directions=directions)
    expected = jax.tree.map(lambda x: jnp.mean(x, 0), grads.shared)
    assert_close(found, expected, "updates", rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_directions_do_not_depend_on_the_layout(axis_type):
    weights = np.asarray(rng.standard_normal((8, 4)), np.float32)
    wells = jnp.array([0.5, -1.0]).reshape(2, 1, 1)
    value_fn = lambda w: jnp.sum((w[None] - wells) ** 4, (1, 2))  # noqa: E731
    tx = samo(mean_weights, rho=1.0, num_tasks=2, key=0)

    @jax.jit
    def step(w):
        grads = jax.grad(lambda w: jnp.mean(value_fn(w)))(w)
        return tx.update(grads, tx.init(w), w, value_fn=value_fn)

    expected, plain = step(jnp.asarray(weights))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        found, state = step(jax.device_put(weights, jax.P("data", "model")))
    assert_close(found, expected, "updates", rtol=1e-4, atol=1e-4)
    # A difference of losses of some hundred.
    assert_close(state.sharpness, plain.sharpness, "sharpness", rtol=1e-3)
    assert found.sharding.spec == jax.P("data", "model")


def test_other_losses_can_be_differenced():
    """The local part turns round with the sign of what is differenced."""
    tx = samo(mean_weights, rho=0.1, alpha=0.0, num_tasks=2)

    @jax.jit
    def sharpness(sign):
        _, state = tx.update(
            GRADS,
            tx.init(PARAMS),
            PARAMS,
            value_fn=losses_fn,
            spsa_value_fn=lambda p: sign * losses_fn(p),
            key=KEY,
        )
        return state.sharpness

    risen = [sharpness(sign) for sign in (1.0, -1.0)]
    assert np.all(risen[0] * risen[1] < 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_updates_have_the_dtype_of_the_gradient(dtype):
    with jax.enable_x64(dtype == "float64"):
        grads = jax.tree.map(lambda g: g.astype(dtype), GRADS)
        tx = samo(mean_weights, rho=0.1, local="none", owner=OWNER, num_tasks=2)
        state = tx.init(PARAMS)
        update = functools.partial(tx.update, value_fn=losses_fn)
        updates, after = jax.eval_shape(update, grads, state, PARAMS)
        assert_same_types(updates, grads, "updates")
        assert_same_types(after, state, "state")


# --- extremes and mistakes -----------------------------------------------------------


def test_zero_and_nan_gradients():
    tx = samo(mean_weights, rho=0.1, local="none", owner=OWNER)
    step = stepper(tx)
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    updates, _ = step(zero, tx.init(PARAMS), PARAMS)
    # Nothing to climb, so these are the clean gradients; heads are not averaged.
    _, clean = jax.jit(task_gradients(losses_fn, owner=OWNER))(PARAMS)
    mean = jnp.mean(clean.shared["body"], 0)
    assert_close(updates["body"], mean, "updates", rtol=1e-5, atol=1e-6)
    assert_close(updates["heads"], clean.private["heads"], "heads", 1e-5, 1e-6)
    bad = GRADS | {"body": GRADS["body"].at[0, 0].set(jnp.nan)}
    updates, _ = step(bad, tx.init(PARAMS), PARAMS)
    assert jnp.all(jnp.isnan(updates["body"]))


def test_mistakes_are_named():
    tx = samo(mean_weights, rho=0.1)
    state = tx.init(PARAMS)
    update = functools.partial(tx.update, GRADS, state)
    with pytest.raises(ValueError, match=r"value_fn is missing: call tx\.update"):
        update(PARAMS)
    with pytest.raises(ValueError, match="params is missing"):
        update(value_fn=losses_fn)
    with pytest.raises(ValueError, match="samo needs random numbers: pass"):
        update(PARAMS, value_fn=losses_fn)
    with pytest.raises(ValueError, match=r"shape \(T,\)"):
        update(PARAMS, value_fn=lambda p: jnp.sum(losses_fn(p)), key=0)
    three = samo(mean_weights, rho=0.1, num_tasks=3, key=0)
    with pytest.raises(ValueError, match="num_tasks=3, but the updates stack 2"):
        jax.eval_shape(stepper(three), GRADS, three.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="local='zeroth' is unknown"):
        samo(mean_weights, rho=0.1, local="zeroth")
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        samo(mean_weights, rho=0.1, alpha=2.0)
    with pytest.raises(ValueError, match="rho must be finite and >= 0"):
        samo(mean_weights, rho=-0.1)
    with pytest.raises(ValueError, match="dwa keeps numbers for each task"):
        samo(dwa(), rho=0.1).init(PARAMS)
