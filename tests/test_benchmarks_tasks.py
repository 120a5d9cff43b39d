"""Tasks: honest splits, determinism, sensible starts, text that is really there."""

import functools
import math
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")

from optax.contrib import MuonDimensionNumbers

from basinax.benchmarks import _bytes, _digits, _optimizers, _tasks, _train
from basinax.benchmarks._tasks import Options, Usage


@pytest.fixture(scope="module")
def digits():
    return _tasks.load("digits")


@pytest.fixture(scope="module")
def small_bytes():
    return _tasks.load("bytes", Options(width=32, depth=1, sequence=16, batch_size=4))


def rows(images):
    return {row.tobytes() for row in images.inputs}


def test_digit_splits_are_disjoint_and_complete():
    train, validation, test = _digits.read_embedded()
    assert len(train.labels) + len(validation.labels) + len(test.labels) == 1797
    assert not rows(train) & rows(validation)
    assert not rows(train) & rows(test)
    assert not rows(validation) & rows(test)
    for part in (train, validation, test):
        assert set(part.labels.tolist()) == set(range(10))


def test_digit_inputs_are_scaled_by_the_training_split_only(digits):
    train, labels = digits.data
    assert abs(float(jnp.mean(train))) < 1e-4
    assert abs(float(jnp.std(train)) - 1) < 1e-4
    assert labels.shape == (train.shape[0],)
    assert abs(float(jnp.mean(digits.splits.test[0]))) > 1e-4


@pytest.mark.parametrize("name", ["digits", "small_bytes"])
def test_minibatches_are_deterministic_in_the_key(name, request):
    task = request.getfixturevalue(name)
    key = jax.random.key(3)
    first, again = task.batch(task.data, key), task.batch(task.data, key)
    other = task.batch(task.data, jax.random.key(4))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("name", ["digits", "small_bytes"])
def test_loss_starts_near_that_of_the_uniform_prediction(name, request):
    task = request.getfixturevalue(name)
    params = jax.jit(task.init)(jax.random.key(0))
    start = _tasks.evaluate(task, params, task.splits.validation)
    # The perceptron starts with logits of order one, the transformer near zero.
    assert abs(float(start.loss) - task.chance) < (0.4 if name == "digits" else 0.05)
    assert 0 <= float(start.accuracy) < 0.4


def test_evaluation_is_the_mean_over_everything(digits):
    params = jax.jit(digits.init)(jax.random.key(1))
    whole = jax.tree.map(lambda x: x[0], digits.splits.test)
    np.testing.assert_allclose(
        _tasks.evaluate(digits, params, digits.splits.test).loss,
        digits.loss(params, whole),
        rtol=1e-6,
    )


def test_bytes_come_from_the_standard_library():
    corpus = _bytes.read_corpus(None)
    root = Path(sysconfig.get_paths()["stdlib"])
    source = (root / "argparse.py").read_bytes()
    # Whole files: argparse is in exactly one of the splits.
    held = [source in part.tobytes() for part in corpus[:3]]
    assert sum(held) == 1
    assert corpus.cut == "whole files"
    assert len(corpus.train) > 10 * len(corpus.test) > 10**6
    assert corpus.digest == _bytes.read_corpus(None).digest


def test_library_files_are_sorted_and_leave_the_tests_out():
    files = _bytes.library_files()
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = [path.relative_to(root).as_posix() for path in files]
    assert relative == sorted(relative)
    assert not any(part.startswith(("test/", "site-packages/")) for part in relative)
    assert "json/__init__.py" in relative


def test_byte_targets_are_the_inputs_shifted_by_one(small_bytes):
    inputs, targets = small_bytes.batch(small_bytes.data, jax.random.key(0))
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.dtype == jnp.int32
    assert inputs.shape == (4, 16)


def test_the_language_model_cannot_see_the_future(small_bytes):
    params = jax.jit(small_bytes.init)(jax.random.key(0))
    (inputs, targets), last = small_bytes.batch(small_bytes.data, jax.random.key(0)), 15

    @functools.partial(jax.jit, static_argnums=1)
    def loss(tokens, upto):
        batch = tokens[:, :upto], targets[:, :upto]
        return small_bytes.loss(params, batch)

    changed = inputs.at[:, last].set((inputs[:, last] + 1) % 256)
    np.testing.assert_allclose(loss(inputs, last), loss(changed, last), rtol=1e-6)
    # Positions before the last predict the same whatever comes last.
    full, other = loss(inputs, 16) * 16, loss(changed, 16) * 16
    before = loss(inputs, last) * last
    assert abs(float(full - before)) > 0
    assert abs(float(other - full)) < 4 * math.log(256)


def test_own_text_files(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(f"line of file {index}\n" * 400)
    (tmp_path / "picture.bin").write_bytes(b"\0\1\2" * 100)
    options = Options(tmp_path, width=32, depth=1, sequence=16)
    task = _tasks.load("bytes", options)
    assert task.details["files"] == 3
    assert task.details["held out by"] == "last tenth"
    assert "--data-dir" in task.source


def test_too_little_text_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(Usage, match="too little text"):
        _tasks.load("bytes", Options(tmp_path))


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim])
    shape = np.asarray(array.shape, ">u4").tobytes()
    path.write_bytes(head + shape + array.astype(np.uint8).tobytes())


def test_own_idx_files(tmp_path):
    generator = np.random.default_rng(0)
    for part, size in (("train", 40), ("t10k", 10)):
        images = generator.integers(0, 256, (size, 5, 4))
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images)
        labels = np.arange(size) % 3
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels)
    np.testing.assert_array_equal(
        _digits.read_idx(tmp_path / "t10k-images-idx3-ubyte"), images
    )
    task = _tasks.load("digits", Options(tmp_path))
    assert task.details["train examples"] == 36
    assert task.details["validation examples"] == 4
    assert task.details["test examples"] == 10
    assert task.chance == pytest.approx(math.log(3))


@pytest.mark.parametrize("content", [b"", b"\0\0\x0d\1....", b"\0\0\x08\1\0\0\0\x09ab"])
def test_broken_idx_files_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(Usage, match=r"IDX|truncated"):
        _digits.read_idx(path)


def test_missing_idx_files_are_named(tmp_path):
    with pytest.raises(Usage, match="train-images"):
        _tasks.load("digits", Options(tmp_path))


def test_embeddings_are_transposed_and_vectors_are_not_matrices(small_bytes):
    params = jax.eval_shape(small_bytes.init, jax.random.key(0))
    numbers = small_bytes.dimension_numbers(params)
    assert numbers["embed"]["embedding"] == MuonDimensionNumbers(1, 0)
    assert numbers["head"]["kernel"] == MuonDimensionNumbers(0, 1)
    assert numbers["norm"]["scale"] is None


@pytest.fixture(scope="module")
def gradient():
    """A small tree with a matrix of each aspect, and something like its gradient."""
    params = {
        name: jax.random.normal(jax.random.key(i), shape)
        for i, (name, shape) in enumerate(
            {"wide": (3, 5), "square": (4, 4), "tall": (5, 2), "bias": (5,)}.items()
        )
    }
    return params, jax.tree.map(jnp.sin, params)


def first_update(task, name, threshold, params, grads, rate=1e-2):
    entry, plan = _optimizers.OPTIMIZERS[name], _train.Plan.of(20, threshold)

    @jax.jit
    def update(rate):
        tx = _train.transformation(task, entry, plan, rate)
        return tx.update(grads, tx.init(params), params)[0]

    return update(rate)


@pytest.mark.parametrize("name", list(_optimizers.OPTIMIZERS))
def test_every_optimizer_descends_with_a_traced_rate(digits, gradient, name):
    params, grads = gradient
    updates = first_update(digits, name, 1.0, params, grads)
    slope = optax.tree.vdot(updates, grads)
    assert float(slope) < 0
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_signum_entry_is_spectra_signum_without_a_threshold(digits, gradient):
    params, grads = gradient
    signum = first_update(digits, "signum", 1.0, params, grads)
    clipped = first_update(digits, "spectra_signum", math.inf, params, grads)
    for name in ("square", "tall", "bias"):  # aspect scale one
        np.testing.assert_allclose(clipped[name], signum[name], rtol=1e-4)


def test_training_compiles_once_for_all_rates_and_repeats_exactly():
    task = _tasks.load("digits", Options(width=8, depth=1, batch_size=8))
    plan = _train.Plan(steps=6, every=3, threshold=4.0)
    entry = _optimizers.OPTIMIZERS["spectra_signum"]
    traced = []

    def loss(params, batch):
        traced.append(batch)
        return task.loss(params, batch)

    trainer = _train.make_trainer(task._replace(loss=loss), entry, plan)
    runs = [_train.train(task, trainer, plan, 0, 1e-2)]
    once = len(traced)
    runs += [_train.train(task, trainer, plan, s, r) for s, r in ((1, 3e-2), (0, 1e-2))]
    assert len(traced) == once > 0
    for a, b in zip(jax.tree.leaves(runs[0]), jax.tree.leaves(runs[2]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(runs[0].records.step, [3, 6])
    start = jax.jit(task.init)(jax.random.split(jax.random.key(0))[0])
    first = _tasks.evaluate(task, start, task.splits.train)
    assert float(runs[0].final.train.loss) < float(first.loss)


def test_a_run_is_looked_at_about_forty_times():
    for steps in (10, 200, 300, 1000):
        plan = _train.Plan.of(steps, 4.0)
        assert steps % plan.every == 0
        assert steps / plan.every <= 60
    assert _train.Plan.of(7, 4.0).every == 1


def test_schedule_peaks_once_and_never_stands_still():
    rate = np.array([_optimizers.schedule(2.0, 100)(k) for k in range(100)])
    assert rate.max() == pytest.approx(2.0)
    assert rate.argmax() == _optimizers.warmup_steps(100)
    assert rate.min() > 0
    assert (np.diff(rate[10:]) < 0).all()


def test_every_grid_has_the_same_size_and_spacing():
    sizes = set()
    for entry in _optimizers.OPTIMIZERS.values():
        sizes.add(len(entry.grid))
        ratios = np.diff(np.log10(entry.grid))
        np.testing.assert_allclose(ratios, 0.5, atol=0.03)
    assert sizes == {5}
    assert _optimizers.narrow((1.0, 2.0, 3.0, 4.0, 5.0), 3) == (2.0, 3.0, 4.0)
