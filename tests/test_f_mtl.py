"""F-MTL: clean and flat parts, and when the split makes no difference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import TASKS, bowl_problem, bowls, network, norms, task_losses

from basinax.optimizers import (
    f_mtl_value_and_grad,
    samo_value_and_grad,
    task_gradients,
)

AXES = ["map", "unroll", "vmap"]


@pytest.fixture(autouse=True)
def _double(x64):
    """Enable float64 in every test here."""


def same(found, wanted, rtol=1e-12):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = float(jnp.max(jnp.abs(y), initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * scale + 1e-300)


@pytest.mark.parametrize(
    ("axis", "adaptive"), [("map", True), ("unroll", False), ("vmap", False)]
)
def test_parts_are_the_gradients_and_what_sam_adds(axis, adaptive):
    params, owner, x = network()
    options = {"owner": owner, "axis": axis, "adaptive": adaptive}

    @jax.jit
    def run():
        split = f_mtl_value_and_grad(
            task_losses, rho=0.3, rho_private=0.2, diagnostics=True, **options
        )
        plain = task_gradients(task_losses, owner=owner)
        return split(params, x), plain(params, x), [sam(t) for t in range(TASKS)]

    def sam(task):
        loss = lambda p: task_losses(p, x)[task]  # noqa: E731
        gradient = jax.grad(loss)(params)
        parts = [{n: tree[n] for n in ("body", "bias")} for tree in (params, gradient)]
        moved = sam_point(*parts, 0.3, adaptive) | {"heads": list(params["heads"])}
        head = params["heads"][task], gradient["heads"][task]
        moved["heads"][task] = sam_point(*head, 0.2, adaptive)
        return jax.value_and_grad(loss)(moved)

    (losses, grads, found), (values, clean), wanted = run()
    np.testing.assert_allclose(losses, values, rtol=1e-14)
    same(grads.loss, clean)
    total = jax.tree.map(jnp.add, grads.loss, grads.flat)
    for task, (value, there) in enumerate(wanted):
        for name in ("body", "bias"):
            row = jax.tree.map(lambda leaf, t=task: leaf[t], total.shared[name])
            same(row, there[name])
        same(total.private["heads"][task], there["heads"][task])
        np.testing.assert_allclose(found.losses[task], value, rtol=1e-13)
        np.testing.assert_allclose(found.sharpness[task], value - losses[task])


def sam_point(w, g, rho, adaptive):
    """Move up by ρ A² g / ‖A g‖, as the formula is written."""
    a = jax.tree.map(jnp.abs if adaptive else jnp.ones_like, w)
    ag = jax.tree.map(jnp.multiply, a, g)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(ag)))
    return jax.tree.map(lambda w, a, ag: w + rho * a * ag / norm, w, a, ag)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), rho=st.floats(0, 10))
def test_flat_part_of_bowls_is_the_perturbation(seed, rho):
    with jax.enable_x64(True):
        problem = bowl_problem(seed=seed)
        flat = ON_BOWLS(*problem, rho)
        np.testing.assert_allclose(norms(flat.shared), rho, rtol=1e-10, atol=1e-12)


@jax.jit
def ON_BOWLS(params, slopes, rho):
    return f_mtl_value_and_grad(bowls, rho=rho)(params, slopes)[1].flat


@pytest.mark.parametrize("axis", AXES)
def test_linear_aggregation_undoes_the_split(axis):
    params, slopes = bowl_problem()
    weights = jnp.array([0.2, 1.3, -0.7])
    split = f_mtl_value_and_grad(bowls, rho=0.5, axis=axis)
    direct = samo_value_and_grad(
        bowls, rho=0.5, alpha=0, local="exact", layerwise=False, axis=axis
    )

    def combine(tree):
        return jax.tree.map(lambda rows: jnp.tensordot(weights, rows, 1), tree.shared)

    (_, grads), (_, rows) = jax.jit(
        lambda: (split(params, slopes), direct(params, slopes))
    )()
    total = jax.tree.map(jnp.add, combine(grads.loss), combine(grads.flat))
    same(total, combine(rows))


def test_radius_zero_has_no_flat_part():
    params, owner, x = network()
    fn = f_mtl_value_and_grad(task_losses, rho=0, owner=owner)
    _, grads = jax.jit(fn)(params, x)
    for part, clean in zip(grads.flat, grads.loss, strict=True):
        sizes = jax.tree.map(lambda g: float(jnp.max(jnp.abs(g))), clean)
        found = jax.tree.map(lambda g: float(jnp.max(jnp.abs(g))), part)
        for flat, size in zip(*map(jax.tree.leaves, (found, sizes)), strict=True):
            # Two compilations of one gradient.
            assert flat <= 1e-15 * max(size, 1)
    heads = f_mtl_value_and_grad(task_losses, rho=0.3, rho_private=0, owner=0)
    _, grads = jax.jit(heads)(params, x)
    assert all(jnp.abs(g).max() < 1e-14 for g in jax.tree.leaves(grads.flat.private))


@pytest.mark.parametrize("axis", AXES)
def test_zero_gradients_and_tasks_that_ignore_the_parameters(axis):
    def losses_fn(w):
        return jnp.stack([jnp.sum(w["a"] ** 2), 3.0, jnp.sum(w["b"] ** 2)])

    params = {"a": jnp.zeros(2), "b": jnp.ones(2)}
    fn = f_mtl_value_and_grad(losses_fn, rho=0.5, owner={"a": -1, "b": 2}, axis=axis)
    _, grads = jax.jit(fn)(params)
    for part in grads:
        assert jnp.all(part.shared["a"] == 0)
    np.testing.assert_allclose(grads.flat.private["b"], np.sqrt(0.5), rtol=1e-14)


def test_aux_and_half_precision():
    def losses_fn(w):
        return jnp.stack([jnp.sum(w**2), jnp.sum(w)]), w.dtype

    fn = f_mtl_value_and_grad(losses_fn, rho=0.01, has_aux=True)
    (losses, aux), grads = fn(jnp.ones(4, jnp.bfloat16))
    assert losses.dtype == aux == jnp.bfloat16
    assert grads.loss.shared.dtype == grads.flat.shared.dtype == jnp.bfloat16
    # The step of 0.005 is below half a unit in the last place of 1.
    np.testing.assert_allclose(grads.flat.shared[0].astype(float), 0.01, rtol=2**-8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rho": -1}, "rho must be finite and >= 0"),
        ({"rho": 1, "rho_private": -1}, "rho_private must be finite and >= 0"),
        ({"rho": 1, "axis": "scan"}, "axis='scan'"),
        ({"rho": 1, "owner": 1}, "owner names task 1"),
    ],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        f_mtl_value_and_grad(lambda w: jnp.sum(w)[None], **options)(jnp.ones(2))
