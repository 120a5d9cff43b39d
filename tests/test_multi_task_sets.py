"""Multi-task sets that need installing: their readers, and what is said without."""

import gzip
import struct

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")

from basinax.benchmarks import (
    _multi_fashion,
    _tasks,
    _yeast,
)
from basinax.benchmarks._tasks import Options, Usage


def test_missing_sets_say_how_to_install_them(monkeypatch, tmp_path):
    monkeypatch.setattr(_multi_fashion, "DEBIAN", tmp_path / "nothing")
    with pytest.raises(Usage, match="apt-get install dataset-fashion-mnist"):
        _tasks.load("multi-fashion")
    monkeypatch.setattr(_yeast.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Usage, match="pip install river"):
        _tasks.load("yeast")
    with pytest.raises(Usage, match="two-digits has its own data"):
        _tasks.load("two-digits", Options(data_dir=tmp_path))


def write_idx(path, array):
    array = np.asarray(array, np.uint8)
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_multi_fashion_from_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    for part, number in (("train", 40), ("t10k", 12)):
        images = rng.integers(0, 256, (number, 6, 6))
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        labels = np.arange(number) % 4
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    options = Options(tmp_path, width=8, depth=1)
    problem = _multi_fashion.problem(options, sizes=(30, 10, 20))
    assert "--data-dir" in problem.source
    assert problem.classes == 4
    deal = problem.deal(0)
    assert [part.inputs.shape for part in deal] == [(30, 196), (10, 196), (20, 196)]
    assert deal.train.labels.shape == (30, 2)
    assert _tasks.load("multi-fashion", options).details["tasks"] == 2


def test_multi_fashion_wants_squares(tmp_path):
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", np.zeros((20, 2, 3)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.zeros(20))
    with pytest.raises(Usage, match="square images, not 6 pixels"):
        _multi_fashion.problem(Options(tmp_path))


def write_genes(path, number=50):
    rng = np.random.default_rng(0)
    lines = ["Att1,Class1,Att2,Att3,Class2"]
    for index in range(number):
        a, b = rng.standard_normal(2).round(6)
        lines.append(f"{a},{index % 2},{b},7.5,{int(index % 5 == 0)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


def test_yeast_from_a_table(tmp_path, monkeypatch):
    write_genes(tmp_path / _yeast.FILE)

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(_yeast.importlib.util, "find_spec", lambda name: Spec)
    problem = _yeast.problem(Options(width=8, depth=1))
    assert problem.tasks == ("Class1", "Class2")
    assert problem.classes == 2
    deal = problem.deal(0)
    assert [len(part.labels) for part in deal] == [30, 10, 10]
    # Scaled by what is trained on; the constant column stays finite.
    np.testing.assert_allclose(deal.train.inputs.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(deal.train.inputs.std(axis=0), [1, 1, 0], atol=1e-5)
    assert abs(deal.test.inputs.mean(axis=0)[:2]).max() > 1e-3
    labels = np.concatenate([part.labels for part in deal])
    np.testing.assert_array_equal(labels.sum(axis=0), [25, 10])


def test_a_table_without_labels_is_refused(tmp_path):
    path = tmp_path / "table.csv.gz"
    path.write_bytes(gzip.compress(b"Att1,Att2\n1,2\n"))
    with pytest.raises(Usage, match="Class1"):
        _yeast.read(path)
