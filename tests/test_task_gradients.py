"""Per-task gradients: rows of the Jacobian, heads, owners, and what is not computed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_tasks import network, task_losses

from basinax.optimizers import task_gradients
from basinax.optimizers._owners import resolve_owners

AXES = ["map", "unroll", "vmap"]


def assert_trees(found, wanted, rtol, what=""):
    assert jax.tree.structure(found) == jax.tree.structure(wanted), what
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype, what
        scale = float(jnp.max(jnp.abs(y.astype(float)), initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * scale, err_msg=what)


def split_jacobian(jacobian):
    """Return rows of the body, and of each head its own row."""
    body = {k: v for k, v in jacobian.items() if k != "heads"}
    heads = [
        jax.tree.map(lambda leaf, t=t: leaf[t], head)
        for t, head in enumerate(jacobian["heads"])
    ]
    nothing = jax.tree.map(lambda _: None, jacobian)
    return nothing | body, nothing | {"heads": heads}


@pytest.mark.parametrize("axis", AXES)
def test_rows_are_those_of_the_jacobian(axis, x64):
    params, owner, x = network()
    fn = task_gradients(task_losses, owner=owner, axis=axis)
    (losses, grads), plain, jacobian = jax.jit(
        lambda *a: (fn(*a), task_losses(*a), jax.jacrev(task_losses)(*a))
    )(params, x)
    np.testing.assert_allclose(losses, plain, rtol=1e-14)
    shared, private = split_jacobian(jacobian)
    # The same sums of at most 35 products, in another order.
    assert_trees(grads.shared, shared, 1e-14, "shared")
    assert_trees(grads.private, private, 1e-14, "private")


LOSSES = {
    "jitted": jax.jit(task_losses),
    "concatenated": lambda p, x: jnp.concatenate(
        [task_losses(p, x)[:2], task_losses(p, x)[2:]]
    ),
    "scaled after the stack": lambda p, x: 1.0 * task_losses(p, x),
    "reversed in a jit": lambda p, x: jax.jit(lambda v: v[::-1])(task_losses(p, x)),
    "one shared loss": lambda p, x: jnp.stack([task_losses(p, x)[0]] * 3),
    "constants": lambda p, x: jnp.stack([task_losses(p, x)[0], 1.0, jnp.float32(2)]),
    "array of numbers": lambda p, x: jnp.array([*task_losses(p, x)[:2], 1.0]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_static_index_sees_through_every_last_operation(name):
    params, _, x = network(jnp.float32)
    fn = task_gradients(LOSSES[name], axis="unroll")
    (_, grads), wanted = jax.jit(lambda *a: (fn(*a), jax.jacrev(LOSSES[name])(*a)))(
        params, x
    )
    assert_trees(grads.shared, wanted, 1e-6)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def wide_heads(tasks):
    """Draw a problem whose heads cost as much as its body."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = {"body": draw(32, 32), "heads": [draw(32, 32) for _ in range(tasks)]}
    owner = {"body": -1, "heads": list(range(tasks))}

    def losses_fn(params, x):
        h = jnp.tanh(x @ params["body"])
        return jnp.stack([jnp.mean((h @ w) ** 2) for w in params["heads"]])

    return losses_fn, params, owner, draw(64, 32)


def test_unrolled_tasks_leave_out_the_other_heads():
    tasks = 8
    losses_fn, params, owner, x = wide_heads(tasks)
    fn = task_gradients(losses_fn, owner=owner, axis="unroll")
    one_fn, one, _, _ = wide_heads(1)
    forward = flops(losses_fn, params, x)
    single = flops(
        lambda p, x: jax.value_and_grad(lambda q: one_fn(q, x)[0])(p), one, x
    )
    backward = single - flops(one_fn, one, x)
    assert flops(fn, params, x) <= 1.02 * (forward + tasks * backward)
    # Where the stack is hidden the zeros are multiplied: the bound means something.
    hidden = task_gradients(
        lambda p, x: 1.0 * losses_fn(p, x), owner=owner, axis="unroll"
    )
    assert flops(hidden, params, x) > 1.2 * (forward + tasks * backward)


def test_losses_are_traced_a_fixed_number_of_times():
    counts = []
    for tasks in (2, 8):
        losses_fn, params, owner, x = wide_heads(tasks)
        calls = []

        def counted(p, x, losses_fn=losses_fn, calls=calls):
            calls.append(None)
            return losses_fn(p, x)

        jax.jit(task_gradients(counted, owner=owner, axis="unroll")).lower(params, x)
        counts.append(len(calls))
    assert counts == [2, 2]


def temporaries(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_loop_needs_the_memory_of_one_task():
    sizes = {}
    for axis in ("map", "vmap"):
        for tasks in (4, 32):
            _, params, _, x = wide_heads(tasks)
            # All heads are the same here, so that only the number of tasks grows.
            shared = {"body": params["body"], "head": params["heads"][0]}

            def same(p, x, tasks=tasks):
                h = jnp.tanh(x @ p["body"])
                return jnp.arange(1.0, tasks + 1) * jnp.mean((h @ p["head"]) ** 2)

            fn = task_gradients(same, axis=axis)
            sizes[axis, tasks] = temporaries(fn, shared, x)
    row = 4 * 2 * 32 * 32
    assert sizes["map", 32] - sizes["map", 4] < row
    assert sizes["vmap", 32] - sizes["vmap", 4] > 28 * row


@pytest.mark.parametrize("axis", AXES)
def test_aux_is_passed_through(axis):
    params, owner, x = network(jnp.float32)

    def with_aux(params, x, *, factor):
        return factor * task_losses(params, x), {"mean": jnp.mean(x), "name": None}

    fn = task_gradients(with_aux, owner=owner, has_aux=True, axis=axis)
    plain = task_gradients(task_losses, owner=owner, axis=axis)
    ((losses, aux), grads), (plain, wanted) = jax.jit(
        lambda *a: (fn(*a, factor=2.0), plain(*a))
    )(params, x)
    np.testing.assert_allclose(losses, 2 * plain, rtol=1e-6)
    assert aux["mean"] == jnp.mean(x)
    assert_trees(grads, jax.tree.map(lambda g: 2 * g, wanted), 1e-6)


OWNERS = {
    "nothing": (None, (-1,) * 4),
    "one int": (-1, (-1,) * 4),
    "one task": (1, (1,) * 4),
    "prefix": ({"a": -1, "b": 2, "c": 0}, (-1, 2, 2, 0)),
    "numpy": ({"a": np.int64(-1), "b": np.int32(2), "c": 0}, (-1, 2, 2, 0)),
    "callable": (lambda p: jax.tree.map(jnp.ndim, p), (1, 0, 0, 2)),
    "callable prefix": (lambda p: dict.fromkeys(p, 1), (1,) * 4),
}


@pytest.mark.parametrize("name", OWNERS)
def test_owner_forms(name):
    owner, wanted = OWNERS[name]
    params = {"a": jnp.ones(2), "b": (0.0, 1.0), "c": jnp.ones((1, 1))}
    owners = resolve_owners(owner, params)
    assert owners.tasks == wanted
    merged = owners.merge(*owners.split(params))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert jax.tree.leaves(merged)[0] is params["a"]


@pytest.mark.parametrize("axis", AXES)
def test_none_masked_empty_and_scalar_leaves(axis):
    params = {
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(2),
        "head": jnp.ones(3),
    }
    owner = {"none": None, "masked": None, "empty": -1, "scalar": -1, "head": 1}

    def losses_fn(p):
        return jnp.stack([p["scalar"] ** 2, p["scalar"] * jnp.sum(p["head"])])

    fn = task_gradients(losses_fn, owner=owner, axis=axis)
    losses, grads = jax.jit(fn)(params)
    assert losses.tolist() == [4, 6]
    assert grads.shared["scalar"].tolist() == [4, 3]
    assert grads.shared["empty"].shape == (2, 0, 3)
    assert grads.shared["head"] is None
    assert grads.private["head"].tolist() == [2, 2, 2]
    assert grads.private["none"] is None
    assert grads.private["masked"] == optax.MaskedNode()


@pytest.mark.parametrize("axis", AXES)
def test_one_task_and_only_private_leaves(axis):
    fn = task_gradients(lambda w: jnp.stack([w["a"] ** 2]), owner=0, axis=axis)
    losses, grads = jax.jit(fn)({"a": jnp.float32(3)})
    assert losses.shape == (1,)
    assert grads.shared == {"a": None}
    assert grads.private["a"] == 6


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradients_keep_the_dtype_of_the_parameters(axis, dtype):
    params, owner, x = network(dtype)
    fn = task_gradients(task_losses, owner=owner, axis=axis)
    _, grads = jax.eval_shape(fn, params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}


def test_broken_task_does_not_reach_the_others_when_unrolled():
    def losses_fn(w):
        return jnp.stack([jnp.sum(w**2), jnp.sum(jnp.sqrt(w - 1)), jnp.sum(w)])

    fn = task_gradients(losses_fn, axis="unroll")
    losses, grads = jax.jit(fn)(jnp.ones(2))
    assert jnp.isfinite(losses).all()
    assert grads.shared[0].tolist() == [2, 2]
    assert not jnp.isfinite(grads.shared[1]).any()
    assert grads.shared[2].tolist() == [1, 1]
    for axis in ("map", "vmap"):
        rows = task_gradients(losses_fn, axis=axis)(jnp.ones(2))[1].shared
        assert not jnp.isfinite(rows[1]).any()


PAIR = {"a": jnp.ones(2), "b": jnp.ones(2)}


def pair_losses(p):
    return jnp.stack([jnp.sum(p["a"]), jnp.sum(p["b"])])


@pytest.mark.parametrize(
    ("losses_fn", "options", "error", "words"),
    [
        (pair_losses, {"axis": "scan"}, ValueError, "axis='scan'.*map, unroll, vmap"),
        (pair_losses, {"owner": {"a": 2, "b": -1}}, ValueError, "names task 2.*are 2"),
        (pair_losses, {"owner": {"a": -2, "b": 0}}, ValueError, "names task -2"),
        (pair_losses, {"owner": {"a": 0}}, ValueError, "owner does not fit"),
        (pair_losses, {"owner": {"a": 0.5, "b": 0}}, TypeError, "hold ints.*0.5"),
        (pair_losses, {"owner": {"a": True, "b": 0}}, TypeError, "hold ints.*True"),
        (lambda p: jnp.sum(p["a"]), {}, ValueError, r"shape \(T,\).*got shape \(\)"),
        (lambda p: jnp.zeros(0), {}, ValueError, r"got shape \(0,\)"),
        (lambda p: jnp.outer(p["a"], p["b"]), {}, ValueError, r"got shape \(2, 2\)"),
        (lambda p: [p["a"][0], p["b"][0]], {}, ValueError, "jnp.stack"),
        (lambda p: jnp.arange(2), {}, TypeError, "real numbers, got int"),
        (pair_losses, {"has_aux": True}, ValueError, r"\(losses, aux\)"),
    ],
)
@pytest.mark.parametrize("axis", ["map", "unroll"])
def test_mistakes_are_named(losses_fn, options, error, words, axis):
    with pytest.raises(error, match=words):
        task_gradients(losses_fn, **({"axis": axis} | options))(PAIR)
