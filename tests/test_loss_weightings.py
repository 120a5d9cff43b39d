"""Weightings by losses and at random: authors' numbers, equations, bad input."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax.optimizers import (
    Weighting,
    aggregate,
    dwa,
    famo,
    random_weights,
    uncertainty,
)
from basinax.optimizers._weighting import as_weighting
from basinax.testing._trees import assert_close, assert_same_types

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "samo.npz")
JACOBIANS = sorted({k.split("/")[1] for k in GOLDEN.files if k.startswith("comb/")})
LOSSES = GOLDEN["seq/losses"]
BY_LOSSES = {"dwa": dwa(2), "famo": famo(), "uncertainty": uncertainty()}


def run(weighting, losses, num_tasks=None):
    """Return the weights and the states of successive calls."""
    state = weighting.init(num_tasks or losses.shape[-1])

    def step(state, loss):
        weights, state = weighting.update(state, gramian=None, losses=loss, key=None)
        return state, (weights, state)

    return jax.lax.scan(step, state, jnp.asarray(losses))[1]


# --- the authors' numbers ------------------------------------------------------------


def test_famo_follows_the_authors(x64):
    rate, decay = GOLDEN["seq/famo_hyper"]
    weights, states = run(famo(rate, decay), LOSSES)
    # Their logits are recorded before the update that the following losses cause.
    before, final = GOLDEN["seq/famo_logits"], GOLDEN["seq/famo_final_logits"]
    logits = np.concatenate([before, final[None]])
    np.testing.assert_allclose(states.logits, logits, rtol=1e-9, atol=1e-12)
    expected = GOLDEN["seq/famo_effective_task_weights"]
    np.testing.assert_allclose(weights[:-1], expected, rtol=1e-9)


def test_dwa_follows_the_authors(x64):
    weights, _ = run(dwa(window=3, temperature=2.0), LOSSES)
    expected = GOLDEN["seq/dwa_window3_temp2_weights"] / LOSSES.shape[1]
    # They average in float32; their weights sum to T.
    np.testing.assert_allclose(weights, expected, rtol=5e-7)


@pytest.mark.parametrize("name", JACOBIANS)
def test_updates_are_those_of_the_authors(x64, name):
    case = {k: GOLDEN[f"comb/{name}/{k}"] for k in ("J", "losses", "base_famo_step0")}
    losses, tasks = jnp.asarray(case["losses"]), len(case["J"])

    def update(weighting, key=None):
        state = weighting.init(tasks)
        weights, state = weighting.update(state, gramian=None, losses=losses, key=key)
        return np.asarray(weights) @ case["J"], state

    normals = GOLDEN[f"comb/{name}/base_rlw_normals"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    drawn, _ = update(random_weights(lambda key, shape: normals.reshape(shape)), key=0)
    close(drawn, GOLDEN[f"comb/{name}/base_rlw"])
    close(update(famo())[0], case["base_famo_step0"])
    weighted, state = update(uncertainty(optax.sgd(1.0)))
    close(weighted, GOLDEN[f"comb/{name}/base_uw"])
    close(-state.log_variances, GOLDEN[f"comb/{name}/base_uw_logsigma_grad"])


# --- equations -----------------------------------------------------------------------


def test_dwa_by_epochs_is_the_rule_of_the_paper(x64):
    window, temperature = 4, 1.5
    losses = np.random.default_rng(0).uniform(0.1, 2.0, (4 * window, 3))
    weights, _ = run(dwa(window, temperature, sliding=False), losses)
    means = losses.reshape(4, window, 3).mean(1)
    for epoch in range(4):
        expected = np.full(3, 1 / 3)
        if epoch >= 2:
            exponents = np.exp(means[epoch - 1] / means[epoch - 2] / temperature)
            expected = exponents / exponents.sum()
        found = weights[epoch * window : (epoch + 1) * window]
        np.testing.assert_allclose(found, np.tile(expected, (window, 1)), rtol=1e-12)


@pytest.mark.parametrize("sliding", [True, False])
def test_dwa_does_not_change_with_units_and_starts_equal(sliding):
    # Sliding windows meet the ones at the start, which have no units.
    losses = np.random.default_rng(1).uniform(0.1, 2.0, (12, 2))
    units = np.array([1.0, 1000.0])
    plain, _ = run(dwa(3, sliding=sliding), losses)
    scaled, _ = run(dwa(3, sliding=sliding), losses * units)
    np.testing.assert_allclose(scaled[6:], plain[6:], rtol=1e-5)
    np.testing.assert_array_equal(plain[: 4 if sliding else 6], 0.5)
    assert np.ptp(plain[6:], axis=1).min() > 1e-3


def test_famo_favours_the_task_that_falls_behind():
    falling = 0.9 ** np.arange(30)
    losses = np.stack([falling, np.ones(30)], 1)
    weights, states = run(famo(), losses)
    assert np.all(np.diff(states.logits[1:, 1] - states.logits[1:, 0]) > 0)
    lowest = run(famo(lowest=jnp.array([0.5, 0.0])), losses[:2] + np.array([0.5, 0.0]))[
        0
    ]
    np.testing.assert_allclose(lowest, weights[:2], rtol=1e-5)


def test_famo_weights_reach_small_losses():
    weights, _ = run(famo(), np.array([[1e-30, 1e-30], [0.0, 1.0]]))
    np.testing.assert_allclose(weights[0], [0.5, 0.5], rtol=1e-5)
    # 1e-8 stands for a loss of zero, and Adam's first step is of the size of its rate.
    share = np.array([np.exp(-0.025), 1e-8 * np.exp(0.025)])
    np.testing.assert_allclose(weights[1], share / share.sum(), rtol=1e-4)


def test_uncertainty_comes_to_rest_at_the_losses():
    losses = np.array([0.2, 1.0, 7.0])
    weights, states = run(uncertainty(optax.sgd(0.5)), np.tile(losses, (80, 1)))
    np.testing.assert_allclose(states.log_variances[-1], np.log(losses), atol=1e-4)
    np.testing.assert_allclose(weights[-1] * losses, 0.5, rtol=1e-4)
    np.testing.assert_allclose(weights[0], 0.5)


def test_uncertainty_descends_its_objective(x64):
    s, losses = jnp.array([0.3, -1.0]), jnp.array([2.0, 0.1])
    objective = lambda s: jnp.sum(0.5 * (jnp.exp(-s) * losses + s))  # noqa: E731
    weighting = uncertainty(optax.sgd(0.1))
    state = weighting.init(2)._replace(log_variances=s)
    weights, after = weighting.update(state, losses=losses)
    assert_close(after.log_variances, s - 0.1 * jax.grad(objective)(s), "s", 1e-12)
    by_losses = jax.grad(lambda x: jnp.sum(0.5 * (jnp.exp(-s) * x + s)))(losses)
    assert_close(weights, by_losses, "weights", rtol=1e-12)


def test_random_weights_are_a_softmax_of_normals():
    weighting = random_weights()
    draw = jax.vmap(
        lambda key: weighting.update((), gramian=jnp.eye(3), losses=None, key=key)[0]
    )
    weights = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    logs = np.log(weights)
    differences = logs[:, 0] - logs[:, 1]  # of two standard normals
    # Standard errors: √2/√n of the mean and 1/√(2n) of the relative deviation.
    assert abs(differences.mean()) < 5 * np.sqrt(2 / 4000)
    assert abs(differences.std() / np.sqrt(2) - 1) < 5 / np.sqrt(8000)


# --- states and bad input ------------------------------------------------------------


@pytest.mark.parametrize("name", BY_LOSSES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_shows_once_and_is_forgotten(name, bad):
    clean = np.random.default_rng(2).uniform(0.5, 2.0, (8, 2)).astype(np.float32)
    spoilt = np.insert(clean, 3, [bad, 1.0], axis=0)
    expected, states = run(BY_LOSSES[name], clean)
    weights, spoilt_states = run(BY_LOSSES[name], spoilt)
    assert np.isnan(weights[3]).all()
    np.testing.assert_array_equal(np.delete(weights, 3, 0), expected)
    last = lambda tree: jax.tree.map(lambda x: x[-1], tree)  # noqa: E731
    assert_close(last(spoilt_states), last(states), "state")


def test_famo_shows_losses_below_their_bound():
    weights, states = run(famo(lowest=1.0), np.array([[2.0, 3.0], [0.5, 3.0]]))
    assert np.isnan(weights[1]).all()
    assert not np.isnan(states.logits).any()


@pytest.mark.parametrize("name", BY_LOSSES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_states_keep_their_types(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        weighting = BY_LOSSES[name]
        state = weighting.init(2)
        losses = jnp.ones(2, dtype)
        _, after = weighting.update(state, gramian=None, losses=losses, key=None)
        assert_same_types(after, state, "state")


def test_one_task_has_all_the_weight():
    for name in ("dwa", "famo"):
        weights, _ = run(BY_LOSSES[name], LOSSES[:6, :1])
        np.testing.assert_allclose(weights, 1.0)


@pytest.mark.parametrize("name", BY_LOSSES)
def test_missing_arguments_are_asked_for(name):
    with pytest.raises(ValueError, match=f"{name}.*pass num_tasks="):
        aggregate(BY_LOSSES[name]).init(jnp.zeros(3))
    tx = aggregate(BY_LOSSES[name], num_tasks=2)
    with pytest.raises(ValueError, match=f"{name}.*pass losses="):
        tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)))


def test_missing_keys_and_bad_windows_are_refused():
    tx = aggregate(random_weights())
    with pytest.raises(ValueError, match=r"random_weights.*pass a random key or seed"):
        tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)))
    with pytest.raises(TypeError, match="window is a compile-time int"):
        dwa(2.5)
    with pytest.raises(ValueError, match="window must be at least 1"):
        dwa(0)


def test_functions_become_weightings():
    gramian, losses = jnp.eye(2), jnp.array([1.0, 4.0])

    def weights_of(function, **given):
        pair = as_weighting(function)
        given = {"losses": None, "key": None} | given
        return pair.update(pair.init(None), gramian=gramian, **given)[0].tolist()

    def by_loss(gramian, power, losses):
        return losses**power

    def optional(gramian, *, key=None):
        return jnp.full(2, 1.0 if key is None else 2.0)

    assert weights_of(jnp.diagonal) == [1.0, 1.0]
    assert weights_of(jax.jit(lambda g: g[0])) == [1.0, 0.0]
    square_root = functools.partial(by_loss, power=0.5)
    assert weights_of(square_root, losses=losses) == [1.0, 2.0]
    assert weights_of(optional) == [1.0, 1.0]
    assert weights_of(optional, key=jax.random.key(0)) == [2.0, 2.0]
    with pytest.raises(ValueError, match="by_loss needs the task losses"):
        weights_of(by_loss)
    with pytest.raises(TypeError, match="got str"):
        as_weighting("mgda")
    pair = Weighting(lambda num_tasks: (), by_loss)
    assert as_weighting(pair) is pair
