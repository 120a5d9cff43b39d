"""Full-batch tasks and their trainer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("rich")

from basinax.benchmarks import (
    _full_batch,
    _grokking,
    _modular,
    _parity,
    _tasks,
    main,
)
from basinax.benchmarks._tasks import Options, Usage
from basinax.optimizers import perp_adamw

# Problems -------------------------------------------------------------------------


def pairs(inputs):
    """Read (a, b) back from two one-hot vectors side by side."""
    p = inputs.shape[1] // 2
    assert (inputs.sum(axis=1) == 2).all()
    return inputs[:, :p].argmax(axis=1), inputs[:, p:].argmax(axis=1)


def test_the_addition_table_has_every_pair_once_with_its_sum():
    inputs, labels = _modular.table(7)
    a, b = pairs(inputs)
    assert sorted(zip(a.tolist(), b.tolist(), strict=True)) == [
        (i, j) for i in range(7) for j in range(7)
    ]
    np.testing.assert_array_equal(labels, (a + b) % 7)


def test_modular_split_is_complete_disjoint_and_dealt_by_the_seed():
    problem = _modular.problem(7, 0.4, 8)
    train, test = problem.deal(0)
    assert len(train[1]) == int(0.4 * 49)
    rows = [set(zip(*pairs(part[0]), strict=True)) for part in (train, test)]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == 49
    for inputs, labels in (train, test):
        a, b = pairs(inputs)
        np.testing.assert_array_equal(labels, (a + b) % 7)
    np.testing.assert_array_equal(problem.deal(0).train[0], train[0])
    assert not np.array_equal(problem.deal(1).train[0], train[0])


def test_parity_of_distinct_vectors():
    problem = _parity.problem(40, 3, 60, 50, 8)
    train, test = problem.deal(0)
    assert train[0].shape == (60, 40)
    assert test[0].shape == (50, 40)
    vectors = np.concatenate([train[0], test[0]])
    assert len({row.tobytes() for row in vectors}) == 110
    assert set(vectors.ravel()) == {0.0, 1.0}
    for inputs, labels in (train, test):
        expected = [int(row[0]) ^ int(row[1]) ^ int(row[2]) for row in inputs]
        np.testing.assert_array_equal(labels, expected)
    # Every bit varies: also the highest of 40.
    assert (vectors.std(axis=0) > 0.3).all()
    assert not np.array_equal(problem.deal(1).train[0], train[0])


def test_all_vectors_of_few_bits():
    train, test = _parity.problem(3, 2, 5, 3, 4).deal(0)
    both = np.concatenate([train[0], test[0]]) @ [1, 2, 4]
    assert sorted(both.tolist()) == list(range(8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _modular.problem(1, 0.5, 8), "modulus of at least 2"),
        (lambda: _modular.problem(5, 1.0, 8), "one to predict"),
        (lambda: _modular.problem(5, 0.01, 8), "one pair to train on"),
        (lambda: _parity.problem(3, 4, 2, 2, 8), "1 <= k"),
        (lambda: _parity.problem(63, 3, 2, 2, 8), "62"),
        (lambda: _parity.problem(3, 2, 5, 4, 8), "no more than the 8 vectors"),
        (lambda: _tasks.load("parity", Options(fraction=1.0)), "at least one of each"),
    ],
)
def test_impossible_problems_are_refused_in_one_line(make, message):
    with pytest.raises(Usage, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_own_data_are_refused(tmp_path):
    with pytest.raises(Usage, match="makes its own data"):
        _tasks.load("modular", Options(tmp_path))


def test_biases_only_for_parity_and_the_start_of_torch():
    bare = jax.jit(_modular.problem(31, 0.5, 64).init)(jax.random.key(0))
    full = jax.jit(_parity.problem(20, 3, 9, 9, 64).init)(jax.random.key(0))
    assert {path[-1].key for path, _ in jax.tree.leaves_with_path(bare)} == {"kernel"}
    assert [w["kernel"].shape for w in bare.values()] == [(62, 64), (64, 64), (64, 31)]
    for layer in (*bare.values(), *full.values()):
        limit = layer["kernel"].shape[0] ** -0.5
        for w in layer.values():
            assert w.dtype == jnp.float32
            assert float(jnp.max(jnp.abs(w))) <= limit
            if w.size > 1000:  # uniform: the deviation is limit / sqrt(3)
                assert float(jnp.std(w)) == pytest.approx(limit / 3**0.5, rel=0.05)
    assert [w["bias"].shape for w in full.values()] == [(64,), (64,), (2,)]
    assert float(jnp.max(jnp.abs(full["layer0"]["bias"]))) > 0


def test_the_network_without_biases_is_homogeneous_in_each_layer():
    problem = _modular.problem(5, 0.5, 8)
    params = problem.init(jax.random.key(0))
    x = jnp.asarray(_modular.table(5)[0])
    for name in params:
        scaled = {**params, name: {"kernel": 4.0 * params[name]["kernel"]}}
        np.testing.assert_array_equal(
            problem.apply(scaled, x), 4.0 * problem.apply(params, x)
        )


# Tasks ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["modular", "parity"])
def test_tasks_train_on_everything_and_hold_the_rest_out(name):
    task = _tasks.load(name, Options(width=8, modulus=11))
    train, validation, test = ((x[0], y[0]) for x, y in task.splits)
    rows = [{row.tobytes() for row in np.asarray(x)} for x, _ in (train, validation)]
    rows.append({row.tobytes() for row in np.asarray(test[0])})
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]
    assert len(validation[1]) == len(test[1]) == task.details["test examples"]
    batch = task.batch(task.data, jax.random.key(0))
    for one, other, whole in zip(batch, train, task.data, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, whole)
    start = _tasks.evaluate(task, task.init(jax.random.key(0)), task.splits.test)
    assert abs(float(start.loss) - task.chance) < 0.2


def test_a_task_with_a_batch_size_draws_rows():
    task = _tasks.load("modular", Options(width=8, modulus=7, batch_size=5))
    inputs, labels = task.batch(task.data, jax.random.key(0))
    a, b = pairs(np.asarray(inputs))
    np.testing.assert_array_equal(labels, (a + b) % 7)
    assert labels.shape == (5,)
    assert not np.array_equal(inputs, task.batch(task.data, jax.random.key(1))[0])
    assert "batch 5" in task.title
    assert task.chance == pytest.approx(math.log(7))


# Trainer --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return _modular.problem(5, 0.6, 8)


def test_the_compiled_run_is_a_plain_loop(small):
    tx = perp_adamw(0.02)
    key, (train, test) = jax.random.key(3), map(_full_batch.on_device, small.deal(3))

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, *train)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    def loss(params, x, y):
        cost = optax.losses.softmax_cross_entropy_with_integer_labels
        return jnp.mean(cost(small.apply(params, x), y))

    def accuracy(params, x, y):
        return np.mean(np.asarray(small.apply(params, x)).argmax(axis=1) == y)

    params = start = jax.jit(small.init)(key)
    state, seen = tx.init(params), []
    for index in range(1, 7):
        params, state, _ = step(params, state)
        if index % 3 == 0:
            flat = np.concatenate([np.ravel(w) for w in jax.tree.leaves(params)])
            slope = jax.tree.leaves(jax.grad(loss)(params, *train))
            grad = np.concatenate([np.ravel(g) for g in slope])
            seen.append(
                {
                    "step": index,
                    "train_loss": loss(params, *train),
                    "train_accuracy": accuracy(params, *train),
                    "test_loss": loss(params, *test),
                    "test_accuracy": accuracy(params, *test),
                    "weight_norm": np.linalg.norm(flat),
                    "alignment": -flat
                    @ grad
                    / np.linalg.norm(flat)
                    / np.linalg.norm(grad),
                    "collapsed": 0.0,
                    "zero_loss": 0.0,
                }
            )
    contestant = _grokking.Contestant(tx)
    run = _grokking.make_run(small, contestant, steps=6, every=3)
    final, looks = run(start, train, test)
    for one, other in zip(jax.tree.leaves(final), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    for field in looks._fields:
        expected = [look[field] for look in seen]
        np.testing.assert_allclose(
            getattr(looks, field), expected, rtol=2e-4, atol=1e-6, err_msg=field
        )
    # A step was taken between the looks, and the training set is not the test set.
    assert seen[0]["train_loss"] != seen[1]["train_loss"]
    assert seen[1]["train_loss"] < seen[1]["test_loss"]


def test_looks_must_divide_the_run(small):
    contestant = _grokking.Contestant(optax.sgd(0.1))
    with pytest.raises(ValueError, match="multiple"):
        _grokking.make_run(small, contestant, steps=7, every=3)


def lead(gap, classes=5):
    return jnp.zeros((1, classes)).at[0, 2].set(gap), jnp.array([2])


def test_objectives_collapse_where_they_should():
    def costs(objective, gap):
        logits, labels = lead(gap)
        return float(objective.cost(logits, labels)[0])

    assert costs(_grokking.softmax("float16"), 14.0) == 0
    assert costs(_grokking.softmax("float32"), 14.0) > 0
    assert costs(_grokking.softmax("float32"), 22.0) == 0
    with jax.enable_x64(True):
        assert costs(_grokking.softmax("float64"), 22.0) == pytest.approx(
            4 * math.exp(-22.0), rel=1e-6
        )
    assert costs(_grokking.COLLAPSE_FREE, 22.0) == pytest.approx(
        4 * math.exp(-22.0), rel=1e-5
    )
    assert costs(_grokking.STABLEMAX, 22.0) == pytest.approx(
        math.log1p(4 / 23), rel=1e-5
    )


def test_float64_is_in_the_softmax_alone(small):
    adam = optax.adamw(0.01)
    found = _grokking.compete(
        small,
        {
            "single": _grokking.Contestant(adam),
            "double": _grokking.Contestant(adam, _grokking.softmax("float64")),
        },
        seeds=(0, 1),
        steps=4,
        every=2,
        say=lambda _: None,
    )
    assert jnp.zeros(()).dtype == jnp.float32  # 64-bit types are off again
    single, double = found["single"], found["double"]
    assert double.weight_norm.dtype == np.float32
    assert double.train_loss.shape == (2, 2)
    assert not np.array_equal(single.train_loss[0], single.train_loss[1])
    # The same split and start, and far from collapse the same function.
    np.testing.assert_allclose(double.train_loss, single.train_loss, rtol=1e-4)
    with jax.enable_x64(True):
        contestant = _grokking.Contestant(adam, _grokking.softmax("float64"))
        run = _grokking.make_run(small, contestant, steps=2, every=2)
        train, test = map(_full_batch.on_device, small.deal(0))
        start = jax.eval_shape(small.init, jax.random.key(0))
        shapes = jax.eval_shape(run, start, train, test)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_every_seed_meets_all_contestants_on_equal_terms(small):
    still = _grokking.Contestant(optax.sgd(0.0))
    heard = []
    options = {"seeds": (4,), "steps": 1, "every": 1}
    looks = _grokking.compete(small, {"still": still}, say=heard.append, **options)
    params = small.init(jax.random.key(4))
    assert looks["still"].weight_norm[0, 0] == pytest.approx(
        float(optax.tree.norm(params)), rel=1e-6
    )
    assert heard == ["still, seed 1 of 1"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--fraction 1.5", "training fraction of 1.5"),
        ("--fraction 0", "must be positive"),
        ("--modulus 1", "modulus of at least 2"),
        ("--modulus 3 --fraction 0.99", "1 held-out examples are too few"),
        ("--data-dir .", "makes its own data"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(words, expected, capsys):
    assert main(["compare", "--task", "modular", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
