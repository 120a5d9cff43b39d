"""Texts of several sources: disjoint, held out at their ends, drawn fairly."""

import gzip
import sysconfig
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")

from basinax.benchmarks import _multi_source as multi
from basinax.benchmarks._bytes import library_files
from basinax.benchmarks._tasks import Usage


@pytest.fixture(scope="module")
def library():
    return multi.standard_library()


def small(*lengths):
    texts = {f"s{i}": np.full(n, i, np.uint8) for i, n in enumerate(lengths)}
    return multi.collect(texts, ("other", np.full(20, 99, np.uint8)), "made up")


# The standard library


def test_no_file_is_in_two_sources():
    root = Path(sysconfig.get_paths()["stdlib"])
    groups = {**multi.LIBRARY, multi.LIBRARY_UNSEEN[0]: multi.LIBRARY_UNSEEN[1]}
    found = dict.fromkeys(groups, 0)
    for path in library_files():
        name = path.relative_to(root).as_posix()
        owners = [
            group for group, prefixes in groups.items() if name.startswith(prefixes)
        ]
        assert len(owners) <= 1, name
        assert not name.startswith(("test/", "tests/"))
        for owner in owners:
            found[owner] += 1
    assert all(found.values()), found


def test_training_text_has_nothing_held_out_or_unseen(library):
    text = library.text.tobytes()
    assert library.unseen_name not in library.names
    for part in (*library.held_out, library.unseen):
        middle = len(part) // 2
        assert part[middle : middle + 2000].tobytes() not in text
    for train, held_out in zip(library.train, library.held_out, strict=True):
        assert len(train) > 1e5
        assert len(held_out) == (len(train) + len(held_out)) // 10


def test_reading_again_gives_the_same(library):
    assert multi.standard_library().digest == library.digest
    shorter = library._replace(unseen=library.unseen[:-1])
    assert shorter.digest != library.digest


def test_the_tail_is_held_out():
    text = np.arange(25, dtype=np.uint8)
    found = multi.collect({"a": text}, ("b", text), "made up")
    np.testing.assert_array_equal(found.train[0], text[:23])
    np.testing.assert_array_equal(found.held_out[0], text[23:])
    with pytest.raises(Usage, match="'a' has no text"):
        multi.collect({"a": text[:3]}, ("b", text), "made up")


def test_joining():
    joined = multi.join([b"ab", b"", b"with\0zero", b"cd", b"ef"], limit=4)
    assert joined.tobytes() == b"ab\0c"
    assert multi.join([]).size == 0


# Packages


def packages(root):
    for name, domain in multi.DOMAINS.items():
        text = f"{name} ".encode() * 40
        packed = domain.pattern.endswith(("gz", "dz"))
        file = (
            root / domain.folder / domain.pattern.replace("**/", "").replace("*", "x")
        )
        file.parent.mkdir(parents=True)
        file.write_bytes(gzip.compress(text) if packed else text)


def test_packages_are_read(tmp_path):
    packages(tmp_path)
    skipped = tmp_path / multi.DOMAINS["Go"].folder / "a_test.go"
    skipped.write_bytes(b"func TestNothing()")
    found = multi.domains(tmp_path)
    assert found.names == tuple(multi.DOMAINS)
    for name, train, held_out in zip(*found[:3], strict=True):
        whole = train.tobytes() + held_out.tobytes()
        assert whole == f"{name} ".encode() * 40
    assert found.unseen_name == "Python"
    assert b"import" in found.unseen[:10_000].tobytes()


def test_missing_packages_are_named(tmp_path, monkeypatch):
    packages(tmp_path)
    (tmp_path / multi.DOMAINS["proofs"].folder / "set.mm").unlink()
    with pytest.raises(Usage, match=r"of metamath-databases is not.*apt-get install"):
        multi.domains(tmp_path)
    nowhere = multi.Domain("no-such-package", "usr/no/such/folder", "*")
    monkeypatch.setattr(multi, "DOMAINS", {"nothing": nowhere})
    found = multi.load()
    assert found.names == tuple(multi.LIBRARY)
    assert "no-such-package is not installed" in found.origin


# Draws


def test_a_microbatch_has_one_source_and_a_step_has_all():
    sources = small(30, 50, 100)
    starts = multi.pure(sources, np.random.default_rng(0), 400, 6, 12)
    assert starts.shape == (400, 3, 6)
    first, last = sources.text[starts], sources.text[starts + 11]
    np.testing.assert_array_equal(first, last)  # a window does not leave its source
    owner = first[:, :, 0]
    np.testing.assert_array_equal(first, np.repeat(owner[:, :, None], 6, axis=2))
    np.testing.assert_array_equal(np.sort(owner, axis=1), np.tile([0, 1, 2], (400, 1)))
    # Every order comes up, and every place that a window fits in.
    assert len({tuple(row) for row in owner}) == 6
    np.testing.assert_array_equal(
        np.unique(starts[starts < 27]), np.arange(27 - 12 + 1)
    )


def test_mixing_deals_the_same_windows_anew():
    sources = small(30, 50, 100)
    starts = multi.pure(sources, np.random.default_rng(0), 50, 4, 5)
    dealt = multi.mixed(starts, np.random.default_rng(1))
    flat, again = (np.sort(x.reshape(50, -1), axis=1) for x in (starts, dealt))
    np.testing.assert_array_equal(flat, again)
    owner = sources.text[dealt]
    several = [len(set(batch)) > 1 for step in owner for batch in step]
    assert np.mean(several) > 0.8


def test_draws_follow_the_seed():
    sources = small(30, 50)
    one, same, other = (
        multi.pure(sources, np.random.default_rng(seed), 20, 4, 5) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
