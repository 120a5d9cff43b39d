"""SAMO: heads, degenerate and broken input, options, mistakes and cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samo_problem import (
    AXES,
    LOCALS,
    compiled,
    on_bowls,
    owner_of_network,
    random_directions,
    same,
)
from small_tasks import (
    TASKS,
    bowl_problem,
    bowls,
    network,
    task_losses,
)

from basinax.benchmarks import _speed_samo
from basinax.optimizers import (
    samo_value_and_grad,
)


@pytest.fixture(autouse=True)
def _double(x64):
    """Enable float64 in every test here."""


# Heads.


@pytest.mark.parametrize("axis", AXES)
def test_head_follows_its_own_loss_alone(axis):
    params, _, x = network()
    fn = compiled(
        task_losses, owner=owner_of_network, local="exact", layerwise=False, axis=axis
    )
    numbers = {"rho": 0.3, "alpha": 0.0}
    _, grads, _ = fn(params, x, numbers=numbers)
    other = jax.tree.map(jnp.copy, params)
    other["heads"][1]["kernel"] *= 3
    _, changed, _ = fn(other, x, numbers=numbers)
    for task, equal in ((0, True), (1, False), (2, True)):
        pair = (tree.private["heads"][task]["kernel"] for tree in (grads, changed))
        assert np.array_equal(*pair) == equal
    assert all(head["kernel"] is None for head in grads.shared["heads"])
    assert grads.private["body"] == [None, None]


def head_losses(params):
    """Losses of two heads and no body: their gradient shows where they are."""
    return jnp.stack([0.5 * jnp.sum(params["a"] ** 2), 2.5 * jnp.sum(params["b"] ** 2)])


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("kind", [True, False, "raw"])
def test_heads_move_by_a_radius_of_their_own(kind, adaptive):
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[-6.0], [8.0]])}
    oracle = samo_value_and_grad(
        head_losses,
        rho=0.5,
        owner={"a": 0, "b": 1},
        perturb_private=kind,
        adaptive=adaptive,
        local="none",
    )
    _, grads = oracle(params)
    for name, scale in (("a", 1.0), ("b", 5.0)):
        w = params[name]
        a = jnp.abs(w) if adaptive else 1.0
        gradient = scale * w
        unit = a**2 * gradient / jnp.linalg.norm(a * gradient)
        mean = a**2 * gradient / 2
        step = {True: 0.5 * unit, False: 0.0, "raw": mean}[kind]
        same(grads.private[name], scale * (w + step))


# Degenerate and broken input.


@pytest.mark.parametrize("local", LOCALS)
def test_task_that_ignores_the_parameters(local):
    params, slopes = bowl_problem()

    def losses_fn(w):
        return jnp.stack([bowls(w, slopes)[0], 3.0, bowls(w, slopes)[2]])

    oracle = samo_value_and_grad(losses_fn, rho=0.3, local=local, diagnostics=True)
    extra = {"directions": random_directions(params, TASKS, 1)}
    _, grads, found = jax.jit(oracle)(params, **(extra if local == "spsa" else {}))
    assert all(jnp.all(leaf[1] == 0) for leaf in jax.tree.leaves(grads))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert found.sharpness[1] == 0
    if local == "spsa":
        assert jnp.all(found.slopes[1] == 0)


@pytest.mark.parametrize("local", LOCALS)
@pytest.mark.parametrize("layerwise", [True, False])
def test_flat_losses_leave_the_parameters_where_they_are(local, layerwise):
    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    losses_fn = lambda w: jnp.stack([jnp.sum(w["w"] ** 2), w["b"] ** 2])  # noqa: E731
    oracle = samo_value_and_grad(losses_fn, rho=0.3, local=local, layerwise=layerwise)
    directions = {"w": jnp.zeros((2, 1, 3)), "b": jnp.zeros((2, 1))}
    extra = {"directions": directions} if local == "spsa" else {}
    _, grads = jax.jit(oracle)(params, **extra)
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(grads))


def test_leaf_without_common_gradient_stays_put_layerwise():
    """Two tasks that cancel in one leaf: no length to give the local part."""
    losses_fn = lambda w: jnp.stack(  # noqa: E731
        [w["a"] ** 2 / 2 + w["b"], w["b"] ** 2 / 2 - w["b"]]
    )
    oracle = samo_value_and_grad(losses_fn, rho=0.5, local="exact", alpha=0.5)
    params = {"a": jnp.float64(2), "b": jnp.float64(0)}
    _, grads = oracle(params)
    np.testing.assert_allclose(grads.shared["a"], [2.5, 0], rtol=1e-14)
    np.testing.assert_allclose(grads.shared["b"], [1, -1], rtol=1e-14)


@pytest.mark.parametrize("local", LOCALS)
def test_broken_task_surfaces(local):
    params, slopes = bowl_problem()
    slopes["vector"] = slopes["vector"].at[1, 0].set(jnp.nan)
    key = {"key": jax.random.key(0)} if local == "spsa" else {}
    losses, epsilon, found = on_bowls(
        (params, slopes), {"rho": 0.3}, local=local, **key
    )
    np.testing.assert_array_equal(jnp.isnan(losses), [False, True, False])
    # The common gradient is broken, so nothing may look sound.
    assert all(jnp.all(jnp.isnan(leaf)) for leaf in jax.tree.leaves(epsilon))
    assert jnp.all(jnp.isnan(found.sharpness))


def test_without_common_part_a_broken_task_breaks_its_row_alone():
    losses_fn = lambda w: jnp.stack([w**2, jnp.sqrt(w - 1), w])  # noqa: E731
    oracle = samo_value_and_grad(
        losses_fn, rho=0.5, alpha=0, local="exact", layerwise=False, axis="unroll"
    )
    _, grads = jax.jit(oracle)(jnp.float64(1))
    np.testing.assert_allclose(grads.shared[jnp.array([0, 2])], [3, 1], rtol=1e-14)
    assert not jnp.isfinite(grads.shared[1])


@pytest.mark.parametrize("local", LOCALS)
def test_tiny_and_huge_losses_in_single_precision(local):
    for scale in (1e-30, 1e30):

        def losses_fn(w, scale=scale):
            return scale * jnp.stack([0.5 * jnp.sum(w**2), jnp.sum(w)])

        oracle = samo_value_and_grad(losses_fn, rho=0.5, local=local, alpha=0.5)
        directions = jnp.ones((2, 1, 2), jnp.float32)
        extra = {"directions": directions} if local == "spsa" else {}
        _, grads = oracle(jnp.array([3.0, 4.0], jnp.float32), **extra)
        epsilon = grads.shared[0] / scale - jnp.array([3.0, 4.0])
        np.testing.assert_allclose(jnp.linalg.norm(epsilon), 0.5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_weights_are_moved_in_single(dtype):
    seen = []

    def losses_fn(w):
        seen.append(w.dtype)
        return jnp.stack([0.5 * jnp.sum(w**2), jnp.sum(w)])

    params = jnp.ones(64, dtype)
    # Each entry moves by 1e-3/8, below half a unit in the last place of a half.
    oracle = samo_value_and_grad(losses_fn, rho=1e-3, local="none", diagnostics=True)
    _, grads, found = oracle(params)
    assert grads.shared.dtype == dtype
    assert seen == [jnp.dtype(dtype), jnp.float32]
    np.testing.assert_allclose(found.sharpness[1], 64 * 1e-3 / 8, rtol=1e-2)


# Options and mistakes.


def test_differences_come_from_the_losses_asked_for():
    params, slopes = bowl_problem()

    def linear(w, slopes):
        return bowls(w, slopes) - bowls(w, jax.tree.map(jnp.zeros_like, slopes))

    directions = random_directions(params, TASKS, 1)
    _, _, found = on_bowls(
        (params, slopes),
        {"rho": 0.3, "mu": 0.5},
        spsa_losses_fn=linear,
        directions=directions,
    )
    wanted = jax.tree.map(
        lambda b, z: jnp.sum((b * z[:, 0]).reshape(TASKS, -1), -1), slopes, directions
    )
    total = sum(jax.tree.leaves(wanted))
    np.testing.assert_allclose(found.slopes[:, 0], total, rtol=1e-11)


def test_sharpness_is_the_rise_of_each_loss():
    params, slopes = bowl_problem()
    losses, epsilon, found = on_bowls((params, slopes), {"rho": 0.3}, local="exact")
    for task in range(TASKS):
        moved = jax.tree.map(lambda w, e, t=task: w + e[t], params, epsilon)
        there = bowls(moved, slopes)[task]
        np.testing.assert_allclose(found.losses[task], there, rtol=1e-12)
    np.testing.assert_array_equal(found.sharpness, found.losses - losses)
    assert found.slopes is None


def test_aux_is_that_of_the_clean_pass():
    def losses_fn(w, x):
        return jnp.stack([jnp.sum(w**2), jnp.sum(w * x)]), {"seen": w}

    for axis in AXES:
        oracle = samo_value_and_grad(
            losses_fn, rho=0.3, local="exact", has_aux=True, axis=axis
        )
        (losses, aux), grads = jax.jit(oracle)(jnp.ones(2), x=jnp.ones(2))
        assert losses.tolist() == [2, 2]
        np.testing.assert_array_equal(aux["seen"], jnp.ones(2))
        assert grads.shared.shape == (2, 2)


def test_differentiation_treats_the_perturbation_as_constant():
    """Of one row with respect to the weights: the Hessian at the moved point."""
    oracle = samo_value_and_grad(
        lambda w: jnp.sum(w**3)[None], rho=0.5, local="exact", axis="unroll"
    )
    w = jnp.array([3.0, 4.0])
    found = jax.jacrev(lambda w: oracle(w)[1].shared[0])(w)
    moved = w + 0.5 * w**2 / jnp.linalg.norm(w**2)
    same(found, jnp.diag(6 * moved))


PAIR = {"a": jnp.ones(2), "b": jnp.ones(2)}
KEY = {"key": 0}


@pytest.mark.parametrize(
    ("options", "call", "error", "words"),
    [
        ({"rho": -1}, KEY, ValueError, "rho must be finite and >= 0"),
        ({"rho": float("nan")}, KEY, ValueError, "rho must be finite and >= 0"),
        ({"alpha": 1.5}, KEY, ValueError, "alpha must be between 0 and 1, got 1.5"),
        ({"mu": 0}, KEY, ValueError, "mu must be positive"),
        ({"num_samples": 0}, KEY, ValueError, "num_samples must be at least 1"),
        ({"num_samples": 2.0}, KEY, TypeError, "compile-time int, got float"),
        ({"local": "zeroth"}, KEY, ValueError, "local='zeroth'.*spsa, exact, none"),
        ({"axis": "scan"}, KEY, ValueError, "axis='scan'"),
        ({"perturb_private": "yes"}, KEY, ValueError, "perturb_private='yes'"),
        ({}, {}, ValueError, "either key= or directions=, got neither"),
        ({}, {"key": 0, "directions": PAIR}, ValueError, "got both"),
        ({}, {"directions": PAIR}, ValueError, r"\(2, 1\).*got shape \(2,\)"),
        ({}, {"directions": {"a": PAIR["a"]}}, ValueError, "directions must be a tree"),
        ({"local": "exact"}, {"directions": PAIR}, ValueError, "no use with local="),
        (
            {"local": "exact", "spsa_losses_fn": head_losses},
            {},
            ValueError,
            "spsa_losses_fn has no use",
        ),
        (
            {"spsa_losses_fn": lambda p: jnp.zeros(3)},
            KEY,
            ValueError,
            r"losses of shape \(2,\).*got \(3,\)",
        ),
        ({"owner": {"a": 0, "b": 2}}, KEY, ValueError, "owner names task 2"),
    ],
)
def test_mistakes_are_named(options, call, error, words):
    call = {k: jax.random.key(v) if k == "key" else v for k, v in call.items()}
    with pytest.raises(error, match=words):
        samo_value_and_grad(head_losses, **({"rho": 0.1} | options))(PAIR, **call)


# Cost.


def program(fn, *args):
    return jax.jit(fn).lower(*args).compile()


def flops(fn, *args):
    return program(fn, *args).cost_analysis()["flops"]


def wide_problem(tasks, width=32, rows=512):
    """Draw a network whose heads cost as much as its body."""
    params = {"body": jnp.ones((width, width), jnp.float32)}
    params["heads"] = [jnp.ones((width, width), jnp.float32) for _ in range(tasks)]

    def losses_fn(p, x):
        h = jnp.tanh(x @ p["body"])
        return jnp.stack([jnp.mean((h @ w) ** 2) for w in p["heads"]])

    owner = {"body": -1, "heads": list(range(tasks))}
    return losses_fn, params, owner, jnp.ones((rows, width), jnp.float32)


@pytest.mark.parametrize("local", LOCALS)
def test_unrolled_cost_is_that_of_the_passes(local):
    """1 + T + 2T forward and 1 + T backward passes for SPSA, unused heads left out."""
    tasks = 6
    losses_fn, params, owner, x = wide_problem(tasks)
    one_fn, one, _, _ = wide_problem(1)
    forward = flops(losses_fn, params, x)
    both = flops(jax.value_and_grad(lambda p, x: jnp.mean(losses_fn(p, x))), params, x)
    one_forward = flops(one_fn, one, x)
    one_both = flops(jax.value_and_grad(lambda p, x: one_fn(p, x)[0]), one, x)
    one_backward = one_both - one_forward
    wanted = {
        "spsa": both + 2 * tasks * one_forward + tasks * one_both,
        "exact": both + tasks * one_backward + tasks * one_both,
        "none": both + forward + tasks * one_backward,
    }[local]
    oracle = samo_value_and_grad(
        losses_fn, rho=0.1, owner=owner, local=local, axis="unroll"
    )
    key = jax.random.key(0)
    assert flops(lambda p, x: oracle(p, x, key=key), params, x) <= 1.15 * wanted


def test_loop_keeps_neither_directions_nor_points():
    """Temporaries of the loop do not grow with tasks or samples."""
    width = 64
    params = {"body": jnp.ones((width, width), jnp.float32)}
    x = jnp.ones((8, width), jnp.float32)

    def temporaries(tasks, **options):
        def losses_fn(p, x):
            value = jnp.mean(jnp.tanh(x @ p["body"]) ** 2)
            return jnp.arange(1.0, tasks + 1, dtype=jnp.float32) * value

        oracle = samo_value_and_grad(losses_fn, rho=0.1, **options)
        fn = lambda p, x, key: oracle(p, x, key=key)  # noqa: E731
        sizes = program(fn, params, x, jax.random.key(0)).memory_analysis()
        return sizes.temp_size_in_bytes

    leaf = 4 * width**2
    few, many = temporaries(4), temporaries(32)
    assert many - few < leaf
    assert temporaries(4, num_samples=32) - few < 4 * leaf
    # At once they do: the measure sees what is kept.
    assert temporaries(32, axis="vmap") - many > 28 * leaf


def test_speed_compares_every_method_with_its_passes(monkeypatch):
    monkeypatch.setattr(_speed_samo, "UNROLLED", 1)
    rows = _speed_samo.measure(rounds=1, tasks=(2,), rows=4, width=3)
    names = list(_speed_samo.PASSES)
    assert [row["method"] for row in rows] == names
    assert {row["axis"] for row in rows} == {"map"}
    spsa = rows[names.index("samo, spsa")]
    assert (spsa["forward"], spsa["backward"]) == (1 + 2 + 4, 3)
    assert all(row["ratio"] > 0 and row["gradients"] > 0 for row in rows)
    assert "f_mtl" in str(_speed_samo.table(rows, rounds=1))
