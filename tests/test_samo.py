"""SAMO: directions, estimates, joint perturbations, and special cases that are SAM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
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
    norms,
    perturbations,
    task_losses,
)

from basinax.optimizers import (
    sam_value_and_grad,
    samo_value_and_grad,
    task_gradients,
)
from basinax.optimizers._samo import joint_direction, with_norm_of
from basinax.optimizers._spsa import draw_direction, spsa_gradient


@pytest.fixture(autouse=True)
def _double(x64):
    """Enable float64 in every test here."""


# Directions and estimates.


def test_directions_are_standard_normal_and_independent():
    like = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64)), "c": jnp.zeros(4096)}
    draw = jax.jit(lambda key: draw_direction(key, like))
    first, second = draw(jax.random.key(0)), draw(jax.random.key(1))
    samples = [leaf.ravel() for tree in (first, second) for leaf in tree.values()]
    for sample in samples:
        # The seeds are fixed; a false generator fails by orders of magnitude.
        assert scipy.stats.kstest(sample, "norm").pvalue > 1e-4
    correlations = np.corrcoef(samples) - np.eye(len(samples))
    assert np.abs(correlations).max() < 5 / np.sqrt(4096)
    same(draw(jax.random.key(0)), first, rtol=0)


def test_directions_have_at_least_single_precision():
    like = {"half": jnp.zeros(3, jnp.bfloat16), "double": jnp.zeros(3), "none": None}
    found = jax.eval_shape(lambda key: draw_direction(key, like), jax.random.key(0))
    assert found["half"].dtype == jnp.float32
    assert found["double"].dtype == jnp.float64
    assert found["none"] is None


def test_directions_differ_across_tasks_samples_and_keys():
    params, slopes = bowl_problem()
    # Equal losses: only the directions can make the differences differ.
    slopes = jax.tree.map(jnp.zeros_like, slopes)
    fn = compiled(bowls, num_samples=2)
    call = functools.partial(fn, params, slopes, numbers={"rho": 0.1})
    slopes = [call(key=jax.random.key(k))[2].slopes for k in (0, 0, 1)]
    assert slopes[0].shape == (TASKS, 2)
    np.testing.assert_array_equal(slopes[0], slopes[1])
    everything = np.concatenate([slopes[0].ravel(), slopes[2].ravel()])
    assert len(set(everything.tolist())) == everything.size


@pytest.mark.slow
def test_same_directions_in_a_scan_on_every_axis_and_without_jit():
    # One shape: a generator takes long to compile.
    twins = ("matrix", "twin")
    problem = [{n: tree[n] for n in twins} for tree in bowl_problem()]

    def run(axis):
        oracle = samo_value_and_grad(bowls, rho=0.1, diagnostics=True, axis=axis)
        return oracle(*problem, key=jax.random.key(3))

    def step(carry, _):
        return carry, run("map")

    looped = lambda: jax.lax.scan(step, 0, length=2)[1]  # noqa: E731
    *others, scanned = jax.jit(lambda: (*map(run, AXES), looped()))()
    others += [jax.tree.map(lambda leaf, i=i: leaf[i], scanned) for i in (0, 1)]
    with jax.disable_jit():
        _, wanted, diagnostics = run("unroll")
    for _, grads, found in others:
        # Sums in another order; the differences lose three digits, 1e-16/mu.
        same(grads.shared, wanted.shared, 1e-11)
        np.testing.assert_allclose(found.slopes, diagnostics.slopes, rtol=1e-9)


def test_opposite_direction_gives_the_same_estimate():
    params, _, x = network()
    directions = random_directions(params, TASKS, 1)
    fn = compiled(task_losses, owner=owner_of_network, num_samples=1)
    numbers = {"rho": 0.1}
    plain = fn(params, x, numbers=numbers, directions=directions)
    opposite = jax.tree.map(jnp.negative, directions)
    flipped = fn(params, x, numbers=numbers, directions=opposite)
    same(flipped[:2], plain[:2], rtol=0)
    np.testing.assert_array_equal(flipped[2].slopes, -plain[2].slopes)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), mu=st.floats(1e-3, 1e3))
def test_difference_is_the_directional_derivative_of_a_quadratic(seed, mu):
    with jax.enable_x64(True):
        params, slopes = bowl_problem(seed=seed)
        directions = random_directions(params, TASKS, 2, seed)
        _, _, found = on_bowls(
            (params, slopes),
            {"rho": 0.1, "mu": mu},
            num_samples=2,
            directions=directions,
        )
        products = jax.tree.map(
            lambda w, b, z: jnp.sum(
                ((w[None] + b)[:, None] * z).reshape(TASKS, 2, -1), -1
            ),
            params,
            slopes,
            directions,
        )
        wanted = sum(jax.tree.leaves(products))
        # Losses of size mu² + 1/mu², rounded, over 2 mu.
        atol = 1e-13 * (mu + 1 / mu)
        np.testing.assert_allclose(found.slopes, wanted, rtol=1e-12, atol=atol)


def test_mean_of_estimates_is_the_gradient_at_the_rate_of_its_error():
    curvature = jnp.linspace(-1.0, 2.0, 8)
    point = jnp.linspace(1.0, 2.0, 8)
    loss = lambda w: 0.5 * jnp.sum(curvature * w**2)  # noqa: E731
    gradient, key = curvature * point, jax.random.key(0)

    def error(samples):
        draw = lambda s: draw_direction(jax.random.fold_in(key, s), point)  # noqa: E731
        run = jax.jit(lambda: spsa_gradient(loss, point, draw, 1e-3, samples)[1])
        # The covariance of p z is g gᵀ + ‖g‖² I.
        variance = (gradient**2 + jnp.sum(gradient**2)) / samples
        return jnp.sum((run() - gradient) ** 2) / jnp.sum(variance)

    for samples in (100, 10000):
        # About chi-square over its 8 degrees of freedom; and no bias left at 10,000.
        assert 0.1 < error(samples) < 4


def test_loop_over_samples_is_their_mean():
    params, slopes = bowl_problem()
    directions = random_directions(params, TASKS, 3)
    loss = lambda w: bowls(w, slopes)[0]  # noqa: E731
    pick = lambda s: jax.tree.map(lambda z: z[0, s], directions)  # noqa: E731
    p, mean = jax.jit(lambda: spsa_gradient(loss, params, pick, 0.1, 3))()
    assert p.shape == (3,)
    wanted = jax.tree.map(
        lambda *z: sum(p[s] * z[s] for s in range(3)) / 3, *map(pick, range(3))
    )
    same(mean, wanted)


# The joint direction.

SIZES = st.sampled_from([1e-30, 1e-3, 1.0, 1e30])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), size=SIZES, own=SIZES, dtype=st.sampled_from("fd"))
def test_local_part_has_the_norm_of_the_common_one(seed, size, own, dtype):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x = (size * rng.standard_normal((4, 3))).astype(dtype)
        y = (own * rng.standard_normal((4, 3))).astype(dtype)
        found = np.asarray(with_norm_of(x, y), np.float64)
        wide = [np.asarray(a, np.float64) for a in (x, y)]
        wanted = wide[1] * (np.linalg.norm(wide[0]) / np.linalg.norm(wide[1]))
        rtol = 1e-6 if dtype == "f" else 1e-14
        np.testing.assert_allclose(found, wanted, rtol=rtol)


def test_layerwise_norms_of_degenerate_parts():
    one, zero = jnp.ones((2, 3)), jnp.zeros((2, 3))
    assert jnp.all(with_norm_of(one, zero) == 0)
    assert jnp.all(with_norm_of(zero, one) == 0)
    assert jnp.all(jnp.isnan(with_norm_of(one, one.at[0, 0].set(jnp.nan))))
    assert jnp.all(jnp.isnan(with_norm_of(one.at[0, 0].set(jnp.inf), one)))
    assert with_norm_of(jnp.zeros((0, 2)), jnp.zeros((0, 2))).shape == (0, 2)
    assert with_norm_of(jnp.float64(-3), jnp.float64(-2)) == -3


def test_joint_direction_mixes_leaf_by_leaf():
    g = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    own = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([-7.0])}
    found = joint_direction(g, own, 0.25)
    same(found, {"a": jnp.array([0.75, 4.75]), "b": jnp.array([-0.5])})
    raw = joint_direction(g, own, 0.25, layerwise=False)
    same(raw, {"a": jnp.array([0.75, 2.5]), "b": jnp.array([-5.0])})


@pytest.mark.parametrize("samples", [1, 3])
def test_scale_of_the_differences_does_not_matter_layerwise(samples):
    """Of the losses that are differenced alone; powers of two are exact."""
    params, _, x = network()
    directions = random_directions(params, TASKS, samples)
    results = [
        compiled(
            task_losses, owner=owner_of_network, num_samples=samples, spsa_losses_fn=fn
        )(params, x, numbers={"rho": 0.1}, directions=directions)
        for fn in (task_losses, scaled_losses)
    ]
    same(results[1][:2], results[0][:2], rtol=1e-15)
    np.testing.assert_allclose(results[1][2].slopes, 8 * results[0][2].slopes)


def scaled_losses(params, x):
    return 8 * task_losses(params, x)


@pytest.mark.parametrize("local", LOCALS)
@pytest.mark.parametrize(
    "layerwise", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_scaling_all_losses_scales_the_rows_alone(local, layerwise):
    params, _, x = network()
    extra = {"directions": random_directions(params, TASKS, 1)}
    plain, scaled = (
        compiled(fn, owner=owner_of_network, local=local, layerwise=layerwise)(
            params,
            x,
            numbers={"rho": 0.1, "alpha": 0.3},
            **(extra if local == "spsa" else {}),
        )
        for fn in (task_losses, scaled_losses)
    )
    same(scaled[:2], jax.tree.map(lambda leaf: 8 * leaf, plain[:2]), rtol=1e-13)


# Special cases and lengths, read off losses whose gradient shows the perturbation.


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("local", LOCALS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), rho=st.floats(0, 10), alpha=st.floats(0, 1))
def test_length_is_the_radius_for_every_task(local, adaptive, seed, rho, alpha):
    with jax.enable_x64(True):
        problem = bowl_problem(seed=seed)
        directions = random_directions(problem[0], TASKS, 1, seed)
        extra = {"directions": directions} if local == "spsa" else {}
        _, epsilon, _ = on_bowls(
            problem,
            {"rho": rho, "alpha": alpha},
            local=local,
            adaptive=adaptive,
            **extra,
        )
        if adaptive:
            epsilon = jax.tree.map(
                lambda e, w: e / jnp.abs(w[None]), epsilon, problem[0]
            )
        # Rows of order ten, minus weights and slopes; over weights down to 1e-3.
        np.testing.assert_allclose(norms(epsilon), rho, rtol=1e-10, atol=1e-11)


def step_up(w, g, rho):
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(g)))
    return jax.tree.map(lambda a, b: a + rho * b / norm, w, g)


@pytest.mark.parametrize("options", [{"local": "none"}, {"local": "exact"}, {}])
def test_alpha_one_is_sam_on_the_mean_loss(options):
    """Known while tracing, and traced; with `local="none"` whatever alpha is."""
    params, slopes = bowl_problem()
    mean = lambda w: jnp.mean(bowls(w, slopes))  # noqa: E731
    moved = step_up(params, jax.grad(mean)(params), 0.7)
    wanted = jax.tree.map(lambda a, b: jnp.stack([a - b] * TASKS), moved, params)
    extra = {} if options else {"directions": random_directions(params, TASKS, 1)}
    alpha = 0.2 if options.get("local") == "none" else 1.0
    traced = {"rho": 0.7, "alpha": alpha}
    _, epsilon, _ = on_bowls((params, slopes), traced, **options, **extra)
    same(epsilon, wanted)
    oracle = samo_value_and_grad(bowls, rho=0.7, alpha=alpha, **options)
    _, grads = jax.jit(oracle)(params, slopes, **extra)
    same(perturbations(params, slopes, grads.shared), wanted)


@pytest.mark.parametrize("axis", AXES)
def test_alpha_zero_with_exact_gradients_is_sam_on_each_loss(axis):
    params, _, x = network()
    options = {"local": "exact", "layerwise": False, "axis": axis}

    @jax.jit
    def both():
        oracle = samo_value_and_grad(task_losses, rho=0.3, alpha=0, **options)
        rows = []
        for task in range(TASKS):
            one = lambda w, task=task: task_losses(w, x)[task]  # noqa: E731
            rows.append(sam_value_and_grad(one, rho=0.3)(params)[1])
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        return oracle(params, x)[1].shared, stacked

    same(*both())
    traced = compiled(task_losses, **options)
    found = traced(params, x, numbers={"rho": 0.3, "alpha": 0.0})[1].shared
    same(found, both()[1])


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_task_with_exact_gradients_is_sam(adaptive):
    params, _, x = network(tasks=1)
    oracle = samo_value_and_grad(task_losses, rho=0.3, local="exact", adaptive=adaptive)
    one = lambda w: task_losses(w, x)[0]  # noqa: E731
    sam = sam_value_and_grad(one, rho=0.3, adaptive=adaptive)
    (losses, grads), (loss, gradient) = jax.jit(
        lambda: (oracle(params, x), sam(params))
    )()
    assert losses == loss[None]
    same(grads.shared, jax.tree.map(lambda leaf: leaf[None], gradient))


@pytest.mark.parametrize(
    "axis",
    [pytest.param(a, marks=pytest.mark.slow if a != "map" else ()) for a in AXES],
)
@pytest.mark.parametrize("local", LOCALS)
def test_radius_zero_gives_the_jacobian(axis, local):
    params, owner, x = network()
    oracle = samo_value_and_grad(
        task_losses, rho=0, owner=owner, axis=axis, local=local, diagnostics=True
    )
    plain = task_gradients(task_losses, owner=owner, axis=axis)
    extra = {"directions": random_directions(params, TASKS, 1)}
    extra = extra if local == "spsa" else {}
    (losses, grads, diagnostics), (values, wanted) = jax.jit(
        lambda: (oracle(params, x, **extra), plain(params, x))
    )()
    np.testing.assert_array_equal(losses, values)
    same(grads, wanted, 1e-15)
    np.testing.assert_allclose(diagnostics.sharpness, 0, atol=1e-14)


def test_permuted_tasks_permute_the_rows():
    params, slopes = bowl_problem()
    order = jnp.array([2, 0, 1])
    directions = random_directions(params, TASKS, 1)
    shuffle = lambda tree: jax.tree.map(lambda leaf: leaf[order], tree)  # noqa: E731
    numbers = {"rho": 0.3}
    plain = on_bowls((params, slopes), numbers, directions=directions)
    found = on_bowls((params, shuffle(slopes)), numbers, directions=shuffle(directions))
    np.testing.assert_allclose(found[0], plain[0][order], rtol=1e-14)
    same(found[1], shuffle(plain[1]))
    np.testing.assert_allclose(found[2].slopes, plain[2].slopes[order], rtol=1e-10)
