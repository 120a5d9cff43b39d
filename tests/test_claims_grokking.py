"""Verdicts of the grokking claims on invented runs; small real runs and the figure."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("rich")

from basinax.benchmarks import (
    _claims_grokking,
    _claims_grokking_collapse,
    _claims_grokking_perp,
    _full_batch,
    _grokking,
    _parity,
    _results,
)

COLLAPSE, PERP = _claims_grokking_collapse, _claims_grokking_perp
STEPS = np.array([10, 20, 30, 40])


def looks(test, *, train=(1.0,) * 4, seeds=3, loss=1e-3, zero=0.0):
    """Invent runs: the same accuracies on every seed, or one row for each."""

    def rows(values):
        return np.broadcast_to(np.asarray(values, np.float32), (seeds, 4)).copy()

    fields = dict.fromkeys(_grokking.Looks._fields, 0.5)
    known = {"train_accuracy": train, "train_loss": loss, "zero_loss": zero}
    fields |= {"step": STEPS, "test_accuracy": test, **known}
    return _grokking.Looks(**{name: rows(value) for name, value in fields.items()})


LATE, SOON, NEVER = (0.0, 0.0, 0.0, 1.0), (0.0, 1.0, 1.0, 1.0), (0.0, 0.01, 0.02, 0.03)


def judge(monkeypatch, module, experiment, found):
    """Run an experiment on invented runs."""

    def compete(problem, contestants, *, seeds, **_):
        assert list(contestants) == list(found)
        assert all(len(x.step) == len(seeds) for x in found.values())
        return found

    monkeypatch.setattr(module, "compete", compete)
    finding = experiment()
    json.dumps(_results.plain(finding.numbers))
    return finding


@pytest.mark.parametrize(
    ("perp", "adamw", "verdict"),
    [
        (SOON, NEVER, "holds"),
        (NEVER, NEVER, "does not hold"),
        (SOON, SOON, "does not hold"),
        (SOON, (0.0, 0.06, 0.06, 0.06), "does not hold"),
        ((SOON, NEVER, SOON), NEVER, "mixed"),
    ],
)
def test_verdict_on_orthogonal_gradients(monkeypatch, perp, adamw, verdict):
    found = {"⊥AdamW": looks(perp), "AdamW": looks(adamw)}
    finding = judge(monkeypatch, PERP, lambda: PERP.orthogonal(seeds=range(3)), found)
    assert finding.verdict == verdict


@pytest.mark.parametrize(
    ("perp", "decayed", "verdict"),
    [
        (SOON, LATE, "holds"),
        (LATE, SOON, "does not hold"),
        (SOON, SOON, "does not hold"),
        (NEVER, LATE, "does not hold"),
        (SOON, (SOON, LATE, LATE), "mixed"),
        (NEVER, NEVER, "does not hold"),
    ],
)
def test_verdict_on_the_rivals(monkeypatch, perp, decayed, verdict):
    found = {
        "⊥AdamW": looks(perp),
        "AdamW": looks(NEVER),
        "AdamW, decay 1": looks(decayed),
        "Grokfast": looks(NEVER),
        "Grokfast, decay 1": looks(LATE),
    }
    finding = judge(monkeypatch, PERP, PERP.rivals, found)
    assert finding.verdict == verdict


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"float64": {"loss": 5e-8}}, "mixed"),  # lower, but not by enough
        ({"collapse-free float32": {"zero": 0.1}}, "mixed"),
        ({"collapse-free float32": {"test": 0.1}}, "mixed"),
        (
            {
                name: {"loss": 1e-3, "zero": 0.0, "test": 0.2}
                for name in ("float16", "float32", "float64", "collapse-free float32")
            },
            "does not hold",
        ),
    ],
)
def test_verdict_on_collapse(monkeypatch, changes, verdict):
    runs = {
        "float16": {"test": 0.1, "loss": 1e-4, "zero": 0.9},
        "float32": {"test": 0.2, "loss": 1e-7, "zero": 0.9},
        "float64": {"test": 0.3, "loss": 1e-10, "zero": 0.0},
        "collapse-free float32": {"test": 0.3, "loss": 1e-10, "zero": 0.0},
    }
    found = {
        name: looks(**{**run, **changes.get(name, {})}) for name, run in runs.items()
    }
    finding = judge(monkeypatch, COLLAPSE, COLLAPSE.quartet, found)
    assert finding.verdict == verdict


@pytest.mark.parametrize(
    ("stable", "single", "double", "verdict", "helped"),
    [
        (LATE, 0.6, 0.6, "holds", False),
        (LATE, 0.6, 0.8, "holds", True),
        (LATE, LATE, LATE, "does not hold", False),
        (0.7, 0.6, 0.6, "mixed", False),
        ((LATE, LATE, NEVER, LATE), 0.6, 0.6, "does not hold", False),
    ],
)
def test_verdict_on_stablemax(monkeypatch, stable, single, double, verdict, helped):
    found = {
        "StableMax": looks(stable, seeds=4),
        "softmax, float32": looks(single, seeds=4),
        "softmax, float64": looks(double, seeds=4),
    }
    experiment = COLLAPSE.stablemax_parity(20, 30, 40)
    finding = judge(monkeypatch, COLLAPSE, experiment, found)
    assert finding.verdict == verdict
    assert finding.numbers["float64_helps"] is helped
    assert ("so rounding explains" in finding.control) is helped


def test_first_step_at_a_level():
    found = looks((SOON, NEVER, LATE))
    assert _grokking.first_at(found, 0.95) == [20, None, 40]
    assert _grokking.first_at(found, 1.0, "train_accuracy") == [10, 10, 10]
    assert PERP.when([20, None, 40]) == "20 to 40 (2/3)"
    assert PERP.when([None, None]) == "never"
    assert PERP.when([20, 20]) == "20"


def test_rivals_trace_with_their_optimizers(monkeypatch):
    """Enough to see that the chains fit together, without compiling five runs."""
    shapes = {}

    def compete(problem, contestants, *, seeds, steps, every, say):
        train, test = map(_full_batch.on_device, problem.deal(0))
        start = jax.eval_shape(problem.init, jax.random.key(0))
        for name, contestant in contestants.items():
            run = _grokking.make_run(problem, contestant, steps=steps, every=every)
            seen = jax.eval_shape(run, start, train, test)[1]
            shapes[name] = seen.test_accuracy.shape
        return {name: looks(NEVER) for name in contestants}

    monkeypatch.setattr(PERP, "compete", compete)
    finding = PERP.rivals(p=5, width=8, steps=4, every=2)
    assert list(shapes.values()) == [(2,)] * 5
    assert list(shapes) == list(finding.numbers["runs"])


@pytest.fixture(scope="module")
def findings():
    """Two experiments for real, at a size where nothing is learnt."""
    tiny = {"steps": 4, "every": 2, "seeds": (0,)}
    parity = _parity.problem(6, 2, 20, 10, 8)
    return {
        "collapse by precision": COLLAPSE.quartet(p=5, width=8, **tiny),
        "StableMax, 20 bits": COLLAPSE.stablemax(parity, **tiny),
    }


def test_small_experiments_run(findings):
    assert set(findings) <= {part.name for part in _claims_grokking.PARTS}
    for finding in findings.values():
        assert finding.verdict == "does not hold"
        for run in finding.numbers["runs"].values():
            assert np.shape(run["curves"]["test_accuracy"]) == (1, 2)
            assert np.isfinite(run["curves"]["train_loss"]).all()


def test_every_experiment_can_be_drawn(findings, monkeypatch, tmp_path):
    names = ("⊥AdamW", "AdamW", "AdamW, decay 1", "Grokfast", "Grokfast, decay 1")
    invented = {name: looks(SOON) for name in names}
    rivals = judge(monkeypatch, PERP, PERP.rivals, invented)
    diverged = rivals._replace(numbers=json.loads(json.dumps(rivals.numbers)))
    diverged.numbers["runs"]["AdamW"]["curves"]["test_accuracy"][0][1] = None
    figure = _claims_grokking.draw({"rivals of ⊥Grad": diverged, **findings})
    assert len([axis for axis in figure.axes if axis.get_title(loc="left")]) == 4
    figure.savefig(tmp_path / "grokking.png")
    assert (tmp_path / "grokking.png").stat().st_size > 10_000
    _claims_grokking.draw({}).savefig(tmp_path / "empty.png")


def test_slow_parts_say_how_slow():
    parts = {part.name: part for part in _claims_grokking.PARTS}
    assert not parts["⊥Grad, p = 113"].slow
    assert "minute" in parts["StableMax, p = 47"].slow
    assert "GPU" in _claims_grokking.LARGE.slow
