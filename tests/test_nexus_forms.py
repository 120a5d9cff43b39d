"""The forms of Nexus: oracle, link, wrapper; devices; mistakes."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from walking_problem import D, K, close, draws, flat, loss, params, sources, walk

from basinax.optimizers import (
    nexus,
    nexus_multi_steps,
    nexus_params,
    nexus_value_and_grad,
    reptile,
)

# The forms


def test_forms_agree():
    """Bit for bit the oracle and the link; the wrapper to rounding."""
    batches, gamma = sources(), 0.1
    outer = optax.adamw(1e-2)
    link = optax.chain(nexus(gamma), outer)
    wrapped = nexus_multi_steps(outer, gamma, K)
    oracle = nexus_value_and_grad(loss, gamma)

    @jax.jit
    def by_oracle(p, state):
        updates, state = outer.update(oracle(p, batches)[1], state, p)
        return optax.apply_updates(p, updates), state

    @jax.jit
    def by_link(p, state):
        updates, state = link.update(p, state, p, value_fn=loss, microbatches=batches)
        return optax.apply_updates(p, updates), state

    @jax.jit
    def by_calls(p, state):
        def call(carry, batch):
            p, state = carry
            updates, state = wrapped.update(jax.grad(loss)(p, batch), state, p)
            return (optax.apply_updates(p, updates), state), None

        return jax.lax.scan(call, (p, state), batches)[0]

    one = two = three = params()
    states = [tx.init(one) for tx in (outer, link, wrapped)]
    for _ in range(20):
        one, states[0] = by_oracle(one, states[0])
        two, states[1] = by_link(two, states[1])
        three, states[2] = by_calls(three, states[2])
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(two)))
    close(three, one, rtol=1e-5)
    close(nexus_params(states[2]), one, rtol=1e-5)
    np.testing.assert_allclose(states[1][0].value, oracle(one, batches)[0], rtol=0.2)
    # It did something other than accumulate.
    assert not np.allclose(flat(one), flat(params()), atol=1e-2)


def test_multi_steps_walks():
    """Between outer steps the live parameters are the look-ahead points."""
    tx = nexus_multi_steps(optax.sgd(1.0), 0.5, 3, reduce="sum")
    w = jnp.array([10.0, 10.0])
    state = tx.init(w)
    seen = []
    for _ in range(3):
        updates, state = tx.update(jnp.array([3.0, 4.0]), state, w)
        w = optax.apply_updates(w, updates)
        seen.append(np.asarray(w))
    np.testing.assert_allclose(seen[0], [9.7, 9.6], rtol=1e-6)
    np.testing.assert_allclose(seen[1], [9.4, 9.2], rtol=1e-6)
    np.testing.assert_allclose(seen[2], [8.2, 7.6], rtol=1e-6)
    assert (int(state.mini_step), int(state.gradient_step)) == (0, 1)


def test_multi_steps_do_not_drift():
    """The slow parameters are the truth, whatever the rounding of the live ones."""
    tx = nexus_multi_steps(optax.sgd(0.0), 0.01, 2)
    w = start = draws(50, dtype=jnp.bfloat16)
    state = tx.init(w)
    update = jax.jit(tx.update)
    for seed in range(20):
        updates, state = update(draws(50, seed=seed, dtype=jnp.bfloat16), state, w)
        w = optax.apply_updates(w, updates)
    assert np.array_equal(nexus_params(state), start)
    assert np.array_equal(w, start)


def test_schedules_count_outer_steps():
    schedule = lambda count: jnp.where(count == 0, 0.0, 0.5)  # noqa: E731
    batches = sources()
    link = nexus(schedule)
    state = link.init(params())
    update = jax.jit(
        lambda s: link.update(
            params(), s, params(), value_fn=loss, microbatches=batches
        )
    )
    first, state = update(state)
    second, state = update(state)
    close(first, walk()(params(), batches, 0.0)[1])
    close(second, walk()(params(), batches, 0.5)[1])
    wrapped = nexus_multi_steps(optax.sgd(0.0), schedule, 2)
    w, state = jnp.ones(2), wrapped.init(jnp.ones(2))
    moves = []
    for _ in range(4):
        updates, state = wrapped.update(jnp.ones(2), state, w)
        w = optax.apply_updates(w, updates)
        moves.append(float(w[0]))
    np.testing.assert_allclose(moves, [1, 1, 1 - 0.5 / 2**0.5, 1], rtol=1e-6)


def test_traced_rate_compiles_once():
    traces = []

    def counted(p, s):
        traces.append(1)
        return loss(p, s)

    fn = nexus_value_and_grad(counted, 0.1)
    step = jax.jit(lambda p, s, gamma: fn(p, s, inner_learning_rate=gamma))
    for gamma in (0.1, 0.2, 0.3):
        step(params(), sources(), gamma)
    assert len(traces) == 1


def test_vmap_over_seeds():
    starts = jax.tree.map(lambda x: jnp.stack([x, x + 1]), params())
    fn = nexus_value_and_grad(loss, 0.1)
    both = jax.vmap(fn, (0, None))(starts, sources())
    second = fn(jax.tree.map(lambda x: x[1], starts), sources())
    close(jax.tree.map(lambda x: x[1], both), second)


def test_aux_and_keys():
    """Auxiliary outputs come in order, and every micro-batch has its own key."""

    def noisy(w, x, key):
        return x * jnp.sum(w), {"x": x, "draw": jax.random.uniform(key)}

    fn = nexus_value_and_grad(noisy, 0.1, has_aux=True)
    (value, aux), _ = fn(jnp.ones(2), jnp.arange(4.0), key=jax.random.key(0))
    assert aux["x"].tolist() == [0, 1, 2, 3]
    assert len(set(aux["draw"].tolist())) == 4
    again = fn(jnp.ones(2), jnp.arange(4.0), key=jax.random.key(0))[0][1]
    assert np.array_equal(aux["draw"], again["draw"])
    # Losses at the moving points: 0, 2, 3 * (2 - 0.14 ...), ...
    assert value < jnp.mean(2 * jnp.arange(4.0))
    tx = nexus(0.1)
    keyed = lambda w, x, key: x * jnp.sum(w) * jax.random.uniform(key)  # noqa: E731
    _, state = tx.update(
        jnp.ones(2),
        tx.init(jnp.ones(2)),
        jnp.ones(2),
        value_fn=keyed,
        microbatches=jnp.arange(4.0),
        key=jax.random.key(0),
    )
    assert state.value.dtype == jnp.float32


def test_adamw_does_not_mind_the_reduction():
    """Up to Adam's eps, and clipping a mean of unit directions at 1 does nothing."""
    batches = sources()
    ends = []
    for reduce, clip in itertools.product(("mean", "sum", "displacement"), (1.0, 1e9)):
        tx = optax.chain(
            nexus(0.1, reduce=reduce),
            optax.clip_by_global_norm(clip) if reduce == "mean" else optax.identity(),
            optax.adamw(1e-2),
        )
        p, state = params(), tx.init(params())
        for _ in range(2):
            updates, state = tx.update(p, state, p, value_fn=loss, microbatches=batches)
            p = optax.apply_updates(p, updates)
        ends.append(p)
    for end in ends[1:]:
        close(end, ends[0], rtol=1e-4)


def test_reptile_interpolates():
    batches, w = sources(), params()
    end = w
    for k in range(K):
        g = jax.grad(loss)(end, jax.tree.map(lambda x, k=k: x[k], batches))
        end = jax.tree.map(lambda p, g: p - 0.1 * g, end, g)
    tx = reptile(0.1, 0.5)
    updates, _ = tx.update(w, tx.init(w), w, value_fn=loss, microbatches=batches)
    close(updates, jax.tree.map(lambda a, b: 0.5 * (a - b), end, w), rtol=1e-4)


def test_custom_direction():
    sign = lambda g: jax.tree.map(jnp.sign, g)  # noqa: E731
    fn = nexus_value_and_grad(lambda w, s: jnp.sum(s * w), 0.1, normalize=sign)
    _, gradient = fn(jnp.ones(2), jnp.array([[3.0, -4.0], [1.0, 2.0]]))
    np.testing.assert_allclose(gradient, [1, 0], atol=1e-7)


# Devices


@pytest.mark.parametrize("local", [False, True])
def test_synced_under_shard_map(local):
    """Averaging before normalising makes the number of devices irrelevant."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = draws(3, 16, 2, seed=4)

    def batch_loss(w, x):
        return jnp.mean(jnp.logaddexp(x @ w, 0))

    w = jnp.array([1.0, -2.0])
    fn = nexus_value_and_grad(batch_loss, 0.3, axis_name=None if local else "data")

    def per_device(w, x):
        found = fn(w, x)
        return jax.tree.map(lambda y: jax.lax.pmean(y, "data"), found)

    spec = jax.sharding.PartitionSpec(None, "data")
    none = jax.sharding.PartitionSpec()
    sharded = jax.shard_map(
        per_device, mesh=mesh, in_specs=(none, spec), out_specs=none, check_vma=False
    )
    got = jax.jit(sharded)(w, x)
    whole = nexus_value_and_grad(batch_loss, 0.3)(w, x)
    if local:  # another algorithm: noisier gradients are normalised one by one
        assert np.linalg.norm(got[1] - whole[1]) > 0.02
    else:
        close(got, whole)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_sharded_equals_one_device(axis_type):
    kind = getattr(jax.sharding.AxisType, axis_type)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    x, w = draws(3, 16, 8, seed=4), draws(8, 4, seed=5)

    def batch_loss(w, x):
        return jnp.mean(jnp.logaddexp(x @ w["w"], 0))

    fn = jax.jit(nexus_value_and_grad(batch_loss, 0.3))
    spec = jax.sharding.PartitionSpec
    place = lambda y, *axes: jax.device_put(  # noqa: E731
        y, jax.sharding.NamedSharding(mesh, spec(*axes))
    )
    with jax.set_mesh(mesh):
        got = fn({"w": place(w)}, place(x, None, "data"))
    close(jax.device_get(got), fn({"w": w}, x))


# Mistakes


def wrong(match, error=ValueError):
    return pytest.raises(error, match=re.escape(match))


def test_mistakes():
    fn = nexus_value_and_grad(loss, 0.1)
    with wrong("same leading axis"):
        fn(params(), (jnp.ones((2, D, D)), jnp.ones((3, D))))
    with wrong("at least one micro-batch"):
        fn(params(), (jnp.ones((0, D, D)), jnp.ones((0, D))))
    with wrong("of no leaves"):
        fn(params(), None)
    with wrong("is int32", TypeError):
        fn({"a": jnp.ones(3), "b": jnp.ones(2, int)}, sources())
    with wrong("must be a scalar, got shape (2,)"):
        nexus_value_and_grad(lambda w, _: w, 0.1)(jnp.ones(2), jnp.ones(3))
    for rate in (-0.1, float("nan"), float("inf"), np.ones(2)):
        with wrong("finite scalar >= 0"):
            nexus_value_and_grad(loss, rate)
        with wrong("finite scalar >= 0"):
            nexus(rate)
        with wrong("finite scalar >= 0"):
            nexus_multi_steps(optax.sgd(1.0), rate, 2)
    with wrong("is a schedule", TypeError):
        nexus_value_and_grad(loss, optax.constant_schedule(0.1))
    with wrong("normalize must be"):
        nexus(0.1, normalize="layer")
    with wrong("reduce must be"):
        nexus(0.1, reduce="max")
    with wrong("eps must be positive"):
        nexus(0.1, eps=0.0)


def test_missing_arguments():
    tx, w = nexus(0.1), jnp.ones(2)
    with wrong("value_fn and microbatches is missing"):
        tx.update(w, tx.init(w), w)
    with wrong("params is missing"):
        tx.update(w, tx.init(w), value_fn=loss, microbatches=w)
    wrapped = nexus_multi_steps(optax.sgd(1.0), 0.1, 2)
    with wrong("they are missing"):
        wrapped.update(w, wrapped.init(w))
    for count in (0, 2.5, True):
        with wrong("every_k must be a positive int"):
            nexus_multi_steps(optax.sgd(1.0), 0.1, count)
    with wrong("is int32", TypeError):
        wrapped.init(jnp.ones(2, int))
    with wrong("holds 0 states"):
        nexus_params(optax.sgd(1.0).init(w))
