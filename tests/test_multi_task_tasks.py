"""Multi-task problems: honest data, owners of leaves, methods, measurements."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")

from basinax.benchmarks import (
    _multi_task,
    _multi_task_images,
    _multi_task_methods,
    _multi_task_train,
    _tasks,
    _two_digits,
)
from basinax.benchmarks._multi_task_methods import METHODS, single
from basinax.benchmarks._multi_task_train import Plan
from basinax.benchmarks._tasks import Options
from basinax.optimizers import mean_weights

PLAN = Plan(steps=4, rate=1e-2)


@pytest.fixture(scope="module")
def digits():
    return _two_digits.problem()


def small_problem(tasks=2, features=5, examples=40):
    def deal(seed):
        rng = np.random.default_rng(seed)

        def examples_of(number):
            x = rng.standard_normal((number, features)).astype(np.float32)
            return _multi_task.Examples(x, rng.integers(0, 3, (number, tasks)))

        return _multi_task.Deal(examples_of(examples), examples_of(10), examples_of(20))

    return _multi_task.multi_task(
        "small",
        "small",
        "made here",
        tasks=[f"task {t}" for t in range(tasks)],
        classes=3,
        sizes=(features, 6),
        batch_size=8,
        deal=deal,
    )


@pytest.fixture(scope="module")
def small():
    return small_problem()


@pytest.fixture(scope="module")
def params(small):
    return jax.jit(small.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def data(small):
    return _multi_task.on_device(small.deal(0).train)


# Images in one another -----------------------------------------------------------


def test_overlay_keeps_the_brighter_pixel():
    left = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    right = np.array([[[9.0, 1.0], [1.0, 1.0]]])
    wanted = [[1.0, 2.0, 0.0], [3.0, 9.0, 1.0], [0.0, 1.0, 1.0]]
    np.testing.assert_array_equal(_multi_task_images.overlay(left, right, 1)[0], wanted)
    right[0, 0, 0] = 3.0  # now the first image is brighter
    assert _multi_task_images.overlay(left, right, 1)[0, 1, 1] == 4.0


def test_both_labels_of_a_composite_belong_to_its_images():
    images = _multi_task_images.Images(np.eye(4, dtype=np.float32), np.arange(4))
    rng = np.random.default_rng(0)
    fields, labels = _multi_task_images.compose(images, 50, 2, rng)
    corners = fields.reshape(50, 4, 4)
    left, right = corners[:, :2, :2], corners[:, 2:, 2:]
    np.testing.assert_array_equal(left.reshape(50, 4).argmax(1), labels[:, 0])
    np.testing.assert_array_equal(right.reshape(50, 4).argmax(1), labels[:, 1])


def test_exactly_the_asked_share_of_labels_is_replaced():
    before = np.full((200, 2), -1)
    after = _multi_task_images.spoil(before, 0.3, 10, np.random.default_rng(0))
    changed = after >= 0
    np.testing.assert_array_equal(changed.sum(axis=0), [60, 60])
    assert 0 < (changed[:, 0] & changed[:, 1]).sum() < 60  # the tasks apart
    assert set(after[changed].tolist()) == set(range(10))
    assert (before == -1).all()


def test_two_digits_have_the_announced_sizes_and_noise(digits):
    noisy, clean = digits.deal(0), _two_digits.problem(noise=0.0).deal(0)
    sizes = [part.inputs.shape for part in noisy]
    assert sizes == [(2000, 121), (1000, 121), (3000, 121)]
    for part in noisy:
        assert part.inputs.min() == 0.0
        assert part.inputs.max() == 1.0
    # The same images; a tenth of the random labels are right by chance.
    for a, b in zip(noisy, clean, strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
    wrong = (noisy.train.labels != clean.train.labels).mean(axis=0)
    np.testing.assert_allclose(wrong, 0.27, atol=0.02)
    np.testing.assert_array_equal(noisy.test.labels, clean.test.labels)
    np.testing.assert_array_equal(noisy.validation.labels, clean.validation.labels)


def test_a_deal_is_determined_by_its_seed(digits):
    first, again, other = digits.deal(3), digits.deal(3), digits.deal(4)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.train.inputs, other.train.inputs)


def test_held_out_pairs_are_made_of_other_digits():
    parts = _two_digits.sources(0)
    assert tuple(len(part.labels) for part in parts) == (1200, 298, 299)
    rows = [{row.tobytes() for row in part.inputs} for part in parts]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


# Networks and losses -------------------------------------------------------------


def test_every_head_belongs_to_its_task(small, params):
    owner = _multi_task.owner(params)
    assert {leaf for head in owner["heads"][0].values() for leaf in [head]} == {0}
    assert set(owner["heads"][1].values()) == {1}
    assert set(jax.tree.leaves(owner["trunk"])) == {-1}


def test_losses_are_those_of_each_head(small, params, data):
    losses, rows = jax.jit(
        lambda p: (small.losses(p, data), jax.jacrev(small.losses)(p, data))
    )(params)
    h = jax.nn.gelu(data[0] @ params["trunk"]["layers"][0]["kernel"])
    for task in range(2):
        head = params["heads"][task]
        logits = h @ head["kernel"] + head["bias"][None]
        cost = optax.losses.softmax_cross_entropy_with_integer_labels
        np.testing.assert_allclose(
            losses[task], jnp.mean(cost(logits, data[1][:, task])), rtol=1e-5
        )
        right = jnp.mean(jnp.argmax(logits, 1) == data[1][:, task])
        np.testing.assert_allclose(small.accuracies(params, data)[task], right)
        other = rows["heads"][1 - task]["kernel"][task]
        np.testing.assert_array_equal(other, 0)
    assert float(jnp.abs(rows["heads"][0]["kernel"][0]).max()) > 0


@pytest.mark.parametrize(
    ("values", "reference", "higher", "wanted"),
    [
        ([0.9, 0.4], [0.8, 0.5], None, 100 * (-0.1 / 0.8 + 0.1 / 0.5) / 2),
        ([0.9, 0.4], [0.8, 0.5], [True, False], 100 * (-0.1 / 0.8 - 0.1 / 0.5) / 2),
        ([0.7, 0.7], [0.7, 0.7], None, 0.0),
    ],
)
def test_delta_m(values, reference, higher, wanted):
    assert _multi_task.delta_m(values, reference, higher) == pytest.approx(wanted)


def test_delta_m_of_a_published_row():
    # SAMO with FairGrad on Cityscapes against its single-task reference.
    ours, reference = [0.7437, 0.9314, 0.0129, 26.30], [0.7401, 0.9316, 0.0125, 27.77]
    found = _multi_task.delta_m(ours, reference, [True, True, False, False])
    assert found == pytest.approx(-0.64, abs=0.01)


def test_the_mean_loss_is_an_ordinary_task():
    options = Options(width=8, depth=1)
    task, problem = _tasks.load("two-digits", options), _two_digits.problem(options)
    start = task.init(jax.random.key(0))
    batch = task.batch(task.data, jax.random.key(1))
    assert batch[0].shape == (100, 121)
    loss, metrics, losses = jax.jit(
        lambda p: (
            task.loss(p, batch),
            task.metrics(p, batch),
            problem.losses(p, batch),
        )
    )(start)
    np.testing.assert_allclose(loss, jnp.mean(losses), rtol=1e-6)
    np.testing.assert_allclose(loss, metrics.loss, rtol=1e-6)
    assert abs(float(loss) - task.chance) < 0.3
    assert task.splits.test[1].shape == (1, 3000, 2)


# Methods -------------------------------------------------------------------------


def train(problem, name, data, rho=0.1, seed=0):
    return _multi_task_train.train(
        problem, METHODS[name], data, seed=seed, rho=rho, plan=PLAN
    )


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_training_is_reproducible(small, data):
    first, again = (train(small, "equal weights", data) for _ in range(2))
    close(first, again, rtol=0)
    other = train(small, "equal weights", data, seed=1)
    assert not np.allclose(first["heads"][0]["kernel"], other["heads"][0]["kernel"])


def test_sam_of_radius_zero_is_equal_weights(small, data):
    plain = train(small, "equal weights", data)
    close(plain, train(small, "SAM", data, rho=0.0), rtol=1e-6, atol=1e-7)
    moved = train(small, "SAM", data, rho=0.5)
    difference = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), plain, moved)
    assert float(optax.tree.norm(difference)) > 1e-4


def test_one_task_leaves_the_other_head_alone(small, data):
    done = _multi_task_train.train(small, single(1), data, seed=0, plan=PLAN)
    start = small.init(jax.random.split(jax.random.key(0))[0])
    close(done["heads"][0], start["heads"][0], rtol=1e-6)
    assert not np.allclose(done["heads"][1]["kernel"], start["heads"][1]["kernel"])


@pytest.mark.parametrize("name", ["SAMO, coin", "PCGrad"])
def test_methods_train_every_leaf(small, data, name):
    start = small.init(jax.random.split(jax.random.key(0))[0])
    done = train(small, name, data)
    for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(done), strict=True):
        assert bool(jnp.isfinite(b).all())
        assert float(jnp.abs(a - b).max()) > 0


def test_f_mtl_adds_its_two_parts(small, data):
    # With a linear weighting the sum is that of the perturbed gradients.
    linear = METHODS["F-MTL + MGDA"]._replace(weighting=mean_weights)
    ours, theirs = (
        _multi_task_train.train(small, method, data, seed=0, rho=0.1, plan=PLAN)
        for method in (linear, METHODS["SAM per task"])
    )
    # Adam divides by the gradient: entries near zero show their rounding.
    close(ours, theirs, rtol=1e-3, atol=1e-4)
    clean = train(small, "equal weights", data)
    kernel = lambda params: params["trunk"]["layers"][0]["kernel"]  # noqa: E731
    assert float(jnp.abs(kernel(ours) - kernel(clean)).max()) > 1e-3


def test_the_coin_knows_nothing_of_the_losses(small, params, data):
    rng = np.random.default_rng(0)
    draws = jax.tree.map(
        lambda w: jnp.asarray(rng.standard_normal((200, *w.shape)), w.dtype), params
    )

    def difference(losses, z):
        def there(step):
            return losses(jax.tree.map(lambda w, d: w + step * d, params, z))

        return there(1e-2) - there(-1e-2)

    @jax.jit
    def both(draws):
        true = jax.vmap(lambda z: difference(lambda p: small.losses(p, data), z))
        coin = jax.vmap(
            lambda z: difference(lambda p: _multi_task_methods.coin(p, 2), z)
        )
        return true(draws), coin(draws)

    true, coin = both(draws)
    for share in (np.mean(np.sign(true) == np.sign(coin), axis=0), coin[:, 0] > 0):
        assert abs(np.mean(share) - 0.5) < 0.15  # sd 0.035
    assert np.abs(coin).min() > 0


def test_lengths_of_runs(small, data):
    with pytest.raises(ValueError, match="steps 75 is not a multiple of 50"):
        _multi_task_train.train(
            small, METHODS["SAM"], data, seed=0, plan=Plan(steps=75)
        )


def test_measurements_against_whole_matrices(small, data, params):
    deal = small.deal(0)
    splits = tuple(map(_multi_task.on_device, deal))
    seen = _multi_task_train.measure(small, params, *splits)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    trunk = jax.flatten_util.ravel_pytree(
        jax.tree.map(
            lambda t, w: jnp.full(w.shape, t), _multi_task.owner(params), params
        )
    )[0]

    @jax.jit
    def whole(flat):
        losses = lambda v: small.losses(unravel(v), splits[0])  # noqa: E731
        return losses(flat), jax.jacrev(losses)(flat), jax.hessian(losses)(flat)

    losses, rows, hessians = whole(flat)
    np.testing.assert_allclose(seen.loss, losses, rtol=1e-6)
    shared = np.asarray(rows)[:, np.asarray(trunk) == -1]
    cosine = shared[0] @ shared[1] / np.prod(np.linalg.norm(shared, axis=1))
    np.testing.assert_allclose(seen.cosine, cosine, atol=1e-5)
    tops = [np.linalg.eigvalsh(h)[-1] for h in np.asarray(hessians, np.float64)]
    np.testing.assert_allclose(seen.lambda_max, tops, rtol=1e-2)
    for task in range(2):
        ahead = flat + 0.1 * rows[task] / jnp.linalg.norm(rows[task])
        rise = whole(ahead)[0][task] - losses[task]
        np.testing.assert_allclose(seen.sharpness[task], rise, rtol=1e-3)
    np.testing.assert_allclose(
        seen.accuracy, small.accuracies(params, splits[2]), rtol=1e-6
    )
    assert seen.validation.shape == (2,)


def test_what_was_measured_once_is_kept(small, monkeypatch):
    monkeypatch.setattr(_multi_task_train, "train", lambda *_, **__: object())
    monkeypatch.setattr(_multi_task_train, "measure", lambda *_: object())
    outcome = _multi_task_train.outcome
    first = outcome(small, METHODS["SAM"], 0.1, 0, PLAN)
    assert outcome(small, METHODS["SAM"], 0.1, 0, PLAN) is first
    assert outcome(small, METHODS["SAM"], 0.2, 0, PLAN) is not first


def test_steps_are_timed_against_equal_weights(small):
    once = {"equal weights": METHODS["equal weights"]}
    twice = {**once, "the same": METHODS["equal weights"]}
    found = _multi_task_train.step_ratios(small, ["the same"], PLAN, twice, rounds=3)
    assert list(found) == ["the same"]
    assert 0 < found["the same"] < 100
    assert _multi_task_train.step_ratios(small, [], PLAN, once, rounds=1) == {}
