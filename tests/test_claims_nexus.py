"""Verdicts of the claims about Nexus; the exact ones in full, training in small."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("rich")

from basinax.benchmarks import (
    _claims,
    _claims_nexus,
    _claims_nexus_language,
    _claims_nexus_theory,
    _claims_nexus_valley,
    _multi_source,
    _multi_source_train,
    _results,
)
from basinax.benchmarks._multi_source_train import Course, Look, Setting, Way
from basinax.benchmarks._tasks import classification

VALLEY, THEORY = _claims_nexus_valley, _claims_nexus_theory
LANGUAGE, TRAIN = _claims_nexus_language, _multi_source_train


def recorded(finding):
    """Pass a finding on, if it can be written down."""
    json.dumps(_results.plain(finding.numbers))
    return finding


# Valley --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valley():
    return recorded(VALLEY.valley(seeds=(0, 1)))


def test_the_walk_brings_the_minima_together(valley):
    assert valley.verdict == "holds"
    for run in valley.numbers["runs"].values():
        assert max(run["train"]) < 0.503
        if not run["gamma"]:
            assert min(run["held_out"]) > 1.7
            assert min(run["distance"]) > 0.9
        elif run["inner"] == "raw":
            np.testing.assert_allclose(run["held_out"], 0.5, atol=1e-5)
        else:  # to within γ, as unit steps do not shrink
            assert max(run["held_out"]) < 0.51
            assert max(run["distance"]) < VALLEY.GAMMA


def test_the_floor_of_the_valley_is_flat():
    points = np.array([[0.3, -0.4, phi] for phi in np.linspace(-2, 2, 9)])
    np.testing.assert_allclose(
        VALLEY.mean_loss(points, VALLEY.SOURCES), 0.5 * 0.25 + 0.5, rtol=1e-12
    )
    x, y, phi = points[0]
    each = [
        ((x - a * math.sin(phi)) ** 2 + (y - b * math.sin(phi)) ** 2) / 2
        + math.cos(phi) ** 2 / 2
        for a, b in VALLEY.HELD_OUT
    ]
    found = VALLEY.mean_loss(points[0], VALLEY.HELD_OUT)
    np.testing.assert_allclose(found, np.mean(each), rtol=1e-12)


def test_walks_are_those_of_a_loop():
    """Raw steps and SGD, written out."""
    _, path = VALLEY.walk("SGD 0.1", "raw", seeds=(7,), steps=5)
    sources = np.array(VALLEY.SOURCES)
    orders = np.random.default_rng(7).permuted(np.tile(np.arange(3), (5, 1)), axis=1)
    point = np.array(VALLEY.START)
    for order in orders:
        total = np.zeros(3)
        for a in sources[order]:
            x, phi = (
                (point - VALLEY.GAMMA * total)[:2],
                (point - VALLEY.GAMMA * total)[2],
            )
            miss = x - a * np.sin(phi)
            turn = -miss @ a * np.cos(phi) - np.cos(phi) * np.sin(phi)
            total += [*miss, turn]
        point = point - 0.1 * total / 3
    np.testing.assert_allclose(path.points[0, -1], point, rtol=1e-12)


def ended(held_out, train=0.5, gamma=VALLEY.GAMMA, outer="SGD 0.1"):
    return {"outer": outer, "gamma": gamma, "train": [train], "held_out": [held_out]}


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ({"held_out": 0.5}, {"held_out": 0.5}, "holds"),
        ({"held_out": 0.5}, {"held_out": 1.9}, "mixed"),
        ({"held_out": 0.5}, {"held_out": 0.5, "train": 0.6}, "mixed"),
        # Lower than at rest with the same steps is not enough.
        ({"held_out": 1.85}, {"held_out": 1.85}, "does not hold"),
    ],
)
def test_verdict_on_the_valley(first, second, verdict):
    runs = {
        "rest, raw": ended(1.8, gamma=0.0),
        "rest, normalised": ended(1.9, gamma=0.0),
        "rest, AdamW": ended(0.1, gamma=0.0, outer="AdamW 0.01"),
        "first": ended(**first),
        "second": ended(**second),
    }
    assert VALLEY.judge(runs) == verdict


# First order ---------------------------------------------------------------------


def test_raw_steps_follow_the_inner_products():
    finding = recorded(THEORY.raw_expansion())
    assert finding.verdict == "holds"
    left = np.array(finding.numbers["residuals"]["raw"]) / np.square(THEORY.GAMMAS)
    np.testing.assert_allclose(left[1:], left[-1], rtol=0.02)
    twice = np.array(finding.numbers["residuals"]["twice"]) / THEORY.GAMMAS
    np.testing.assert_allclose(twice[1:], twice[-1], rtol=0.1)


def test_unit_steps_do_not_quite_follow_the_cosines():
    finding = recorded(THEORY.cosine_expansion())
    assert finding.verdict == "does not hold"
    residuals, exponents = finding.numbers["residuals"], finding.numbers["exponents"]
    left = np.array(residuals["normalised"]) / np.square(THEORY.GAMMAS)
    np.testing.assert_allclose(left[1:], left[-1], rtol=0.02)
    assert exponents["cosine"] == pytest.approx(1, abs=0.05)


def test_the_forms_are_equal_for_multiples_of_the_identity(x64):
    centres = np.random.default_rng(0).standard_normal((3, THEORY.SIZE))
    sources = [
        lambda x, c=c, s=s: s * ((x - c) ** 2).sum()
        for c, s in zip(centres, (1.0, 2.0, 5.0), strict=True)
    ]
    forms = THEORY.first_order(sources, jnp.ones(THEORY.SIZE))
    np.testing.assert_allclose(forms["cosine"][1], forms["normalised"][1], rtol=1e-9)


def test_exponents():
    gammas = (1e-1, 1e-3)
    assert THEORY.order(gammas, (3e-2, 3e-6)) == pytest.approx(2)
    assert THEORY.judge(2.0) == "holds"
    assert THEORY.judge(1.1) == "does not hold"


def test_unit_gradients_end_at_the_geometric_median(monkeypatch):
    finding = recorded(THEORY.median())
    assert finding.verdict == "holds"
    centre = finding.numbers["targets"]["median"]
    corners = np.array(THEORY.CORNERS)
    pulls = (corners - centre) / np.linalg.norm(corners - centre, axis=1)[:, None]
    np.testing.assert_allclose(pulls.sum(axis=0), 0, atol=1e-9)
    monkeypatch.setattr(
        THEORY, "fixed_points", lambda: dict.fromkeys(("raw", "normalised"), corners[2])
    )
    assert THEORY.median().verdict == "does not hold"


# Equal training loss -------------------------------------------------------------


def course(losses, slope=2.0, noise=0.0):
    losses = np.asarray(losses)
    wave = noise * (-1.0) ** np.arange(len(losses))
    values = slope * losses + 1 + wave
    look = Look(losses, values[:, None] * [1.0, 3.0], *[values] * 4)
    return Course(10 * np.arange(1, len(losses) + 1), look, list(range(len(losses))))


LOSSES = np.linspace(3, 1, 20)


@pytest.mark.parametrize("level", [1.0, 1.53, 3.0])
def test_lines_are_read_off_exactly(level):
    found = TRAIN.at_level(course(LOSSES), level)
    assert found.train == pytest.approx(level)
    assert found.unseen == pytest.approx(2 * level + 1)
    np.testing.assert_allclose(found.held_out, np.array([1.0, 3.0]) * (2 * level + 1))


def test_trembling_is_averaged_out():
    for level in (1.4, 1.45, 1.5):
        found = TRAIN.at_level(course(LOSSES, noise=0.1), level)
        assert found.unseen == pytest.approx(2 * level + 1, abs=0.03)


def test_levels_that_were_not_passed():
    assert TRAIN.at_level(course(LOSSES), 0.99) is None
    assert TRAIN.at_level(course(LOSSES), 3.01) is None
    assert TRAIN.at_level(course([2.0, 2.0]), 2.0) is None
    assert TRAIN.at_level(course([2.0, math.nan]), 2.0) is None
    assert TRAIN.nearest(course(LOSSES), 1.11) == 18


def test_differences_are_paired():
    found = LANGUAGE.paired([1.0, 3.0, 5.0], [2.0, 3.0, 4.0])
    assert found == pytest.approx({"mean": 0.0, "error": 1 / math.sqrt(3)})
    assert math.isnan(LANGUAGE.paired([1.0], [2.0])["error"])
    assert math.isnan(LANGUAGE.paired([1.0, math.nan], [2.0, 2.0])["mean"])


@pytest.mark.parametrize(
    ("mean", "error", "below", "above"),
    [
        (-0.3, 0.1, True, False),
        (-0.2, 0.11, False, False),
        (0.3, 0.1, False, True),
        (-0.3, math.nan, False, False),
        (math.nan, math.nan, False, False),
    ],
)
def test_two_standard_errors(mean, error, below, above):
    difference = {"mean": mean, "error": error}
    assert LANGUAGE.clear(difference, -1) is below
    assert LANGUAGE.clear(difference, 1) is above


def invented(unseen):
    """Three seeds that differ more from one another than ways do."""
    others = {key: 0.0 for key in LANGUAGE.MEASURES}
    return [{**others, "unseen": unseen + 10 * seed + 1e-3 * seed} for seed in range(3)]


@pytest.mark.parametrize(
    ("plain", "unit", "first", "second", "verdict"),
    [
        (2.0, 2.0, 1.9, 1.8, "holds"),
        (2.0, 1.85, 1.9, 1.8, "mixed"),
        (2.0, 1.7, 1.9, 1.8, "does not hold"),  # unit gradients alone do better
        (1.7, 2.0, 1.9, 1.8, "does not hold"),
        (2.0, 2.0, math.nan, 1.8, "mixed"),
    ],
)
def test_verdict_needs_both_controls(plain, unit, first, second, verdict):
    ways = LANGUAGE.ways((0.1, 0.2))
    values = (plain, unit, first, second, 0.0, 5.0, 5.0)
    runs = {w.name: invented(v) for w, v in zip(ways, values, strict=True)}
    runs["unit"][0]["unseen"] += 1e-3  # or the standard error vanishes
    runs["accumulation"][1]["unseen"] += 1e-3
    compared = LANGUAGE.compare(ways, runs)
    pure = [w.name for w in ways if w.gamma and not w.mixed]
    better = [compared[name]["better"]["unseen"] for name in pure]
    assert LANGUAGE.judge(better) == verdict
    # Mixed walks are held against mixed unit gradients, here at 0.
    assert set(compared["mixed, Nexus 0.1"]["against"]) == {
        "accumulation",
        "mixed, unit",
    }
    assert not compared["mixed, Nexus 0.1"]["better"]["unseen"]


# Training ------------------------------------------------------------------------

TINY = Setting(width=32, depth=1, length=12, size=2, steps=24, every=4, windows=3)


@pytest.fixture(scope="module")
def sources():
    return _multi_source.standard_library()


@pytest.fixture(scope="module")
def prepared(sources):
    """The next byte from the last one alone, which compiles in no time."""
    classes, width = 256, 4

    def init(key):
        del key
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((2, classes, width)).astype(np.float32)
        return {"embedding": jnp.asarray(rows[0]), "head": jnp.asarray(rows[1].T)}

    model = classification(lambda params, x: params["embedding"][x] @ params["head"])
    problem = TRAIN.pose(sources, TINY)._replace(init=init, loss=model.loss)
    return problem, TRAIN.make_trainer(problem)


def test_the_model_knows_nothing_at_the_start(sources):
    problem = TRAIN.pose(sources, TINY)
    params = problem.init(jax.random.key(0))
    loss = jax.jit(problem.loss)(params, jax.tree.map(lambda x: x[0], problem.train))
    assert loss == pytest.approx(math.log(256), abs=0.1)
    assert problem.train[0].shape == problem.held_out[1].shape == (5, 3, 12)
    assert problem.unseen[0].shape == (10, 3, 12)


def test_dealing_does_not_matter_without_walking(prepared):
    """The mean gradient of a step is that of its windows; unit gradients are not."""
    plain, dealt, unit, unit_dealt, walked = (
        TRAIN.train(*prepared, Way("", *how), 0).params[-1]
        for how in (
            (False, 0.0, False),
            (False, 0.0, True),
            (True, 0.0, False),
            (True, 0.0, True),
            (True, 0.2, False),
        )
    )

    def apart(one, other):
        return float(optax.tree.norm(jax.tree.map(jnp.subtract, one, other)))

    assert apart(plain, dealt) < 1e-5
    for other in (unit_dealt, walked, plain):
        assert apart(unit, other) > 0.01


def test_looks_are_what_they_say(prepared):
    problem, trainer = prepared
    run = TRAIN.train(problem, trainer, LANGUAGE.PLAIN, 1)
    np.testing.assert_array_equal(run.step, np.arange(4, 25, 4))
    params = run.params[-1]
    value_and_grad = jax.jit(jax.value_and_grad(problem.loss))
    of_sources = [
        value_and_grad(params, batch) for batch in zip(*problem.train, strict=True)
    ]
    losses = [float(value) for value, _ in of_sources]
    flat = np.stack(
        [
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)])
            for _, g in of_sources
        ]
    ).astype(np.float64)
    norms = np.linalg.norm(flat, axis=1)
    cosines = (flat @ flat.T) / np.outer(norms, norms)
    look = Look(*(x[-1] for x in run.look))
    np.testing.assert_allclose(look.train, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(look.norm, np.sqrt(np.mean(norms**2)), rtol=1e-4)
    off = cosines[~np.eye(5, dtype=bool)]
    np.testing.assert_allclose(look.cosine, off.mean(), rtol=1e-3, atol=1e-5)
    variance = np.mean(np.sum((flat - flat.mean(axis=0)) ** 2, axis=1))
    np.testing.assert_allclose(look.variance, variance, rtol=1e-4)
    assert look.held_out.shape == (5,)
    assert run.look.train[-1] < run.look.train[0]
    again = TRAIN.train(problem, trainer, LANGUAGE.PLAIN, 1)
    np.testing.assert_array_equal(again.look.unseen, run.look.unseen)


def test_language_model_in_small(sources, prepared, valley, monkeypatch, tmp_path):
    monkeypatch.setattr(LANGUAGE, "pose", lambda *_: prepared[0])
    monkeypatch.setattr(LANGUAGE, "make_trainer", lambda *_: prepared[1])
    monkeypatch.setattr(LANGUAGE, "DESCENT_STEPS", 2)
    finding = LANGUAGE.language_model(
        sources=sources, setting=TINY, gammas=(0.05,), seeds=(0, 1)
    )
    recorded(finding)
    assert finding.verdict in ("holds", "does not hold")
    runs = finding.numbers["runs"]
    assert list(runs) == [way.name for way in LANGUAGE.ways((0.05,))]
    for level, run in zip(finding.numbers["levels"], runs["accumulation"], strict=True):
        assert level in run["course"]["train"]
        assert run["distance"] > 0
        assert run["descended"] > 0
    cells = {row[0]: row for row in finding.table.rows}
    expected = np.mean([run["unseen"] for run in runs["unit"]])
    assert cells["unit"][3] == f"{expected:.3f}"

    findings = {
        _claims_nexus.VALLEY: valley,
        _claims_nexus.COSINE: THEORY.cosine_expansion(),
        _claims_nexus.LANGUAGE: finding,
    }
    assert set(findings) <= {part.name for part in _claims.CLAIMS["nexus"].parts}
    figure = _claims_nexus.draw(findings)
    assert len(figure.axes) == 5  # one is a colour bar
    figure.savefig(tmp_path / "nexus.png")
    _claims_nexus.draw({}).savefig(tmp_path / "empty.png")


def test_on_an_accelerator_the_model_is_larger(sources, monkeypatch):
    asked = []

    def pose(_, setting):
        asked.append(setting)
        raise InterruptedError

    monkeypatch.setattr(LANGUAGE, "pose", pose)
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        with pytest.raises(InterruptedError):
            LANGUAGE.language_model(sources=sources)
    assert asked == [Setting(), LANGUAGE.LARGE]
