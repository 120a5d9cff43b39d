"""Verdicts of the landscape claims on invented runs; small real runs and the figure."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

pytest.importorskip("flax")
pytest.importorskip("rich")

from basinax.benchmarks import (
    _claims_landscape,
    _claims_landscape_edge,
    _claims_landscape_generalization,
    _claims_landscape_optimizers,
    _claims_landscape_outliers,
    _claims_landscape_runs,
    _results,
)
from basinax.benchmarks._tasks import Options
from basinax.landscape import adam_diagonal, dense, hessian, preconditioned

EDGE, OUTLIERS = _claims_landscape_edge, _claims_landscape_outliers
EQUAL, GAP = _claims_landscape_optimizers, _claims_landscape_generalization
RUNS = _claims_landscape_runs


def recorded(finding):
    """Pass a finding on, if it can be written down."""
    json.dumps(_results.plain(finding.numbers))
    return finding


# Outliers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "number"),
    [
        ([9.0, 8.0, 7.0, 1.0, 0.9, 0.8], 3),
        ([9.0, 1.0, 0.9, 1e-9, -5.0], 3),
        ([4.0, 3.0, -1e-6], 1),
        ([4.0], 0),
        ([-1.0, -2.0], 0),
        # The twenty-first gap is beyond what is looked at.
        ([*np.linspace(40.0, 20.0, 21), *[1e-3] * 5], 20),
    ],
)
def test_outliers_end_at_the_largest_gap(values, number):
    assert OUTLIERS.count_outliers(values) == number


def spectrum(classes, found, untrained=(1, 1)):
    return {
        "classes": classes,
        "parameters": 100,
        "train_loss": [0.1, 0.1],
        "outliers": list(found),
        "outliers_untrained": list(untrained),
        "gap": 3.0,
        "next_gap": 1.2,
        "small_share": 0.9,
        "largest": np.geomspace(1.0, 0.01, 21),
    }


@pytest.mark.parametrize(
    ("five", "ten", "verdict"),
    [
        ((4, 4), (9, 9), "holds"),
        ((4, 4), (9, 8), "mixed"),
        ((5, 3), (10, 1), "does not hold"),
    ],
)
def test_verdict_on_outliers(monkeypatch, five, ten, verdict):
    runs = {5: spectrum(5, five), 10: spectrum(10, ten), 3: spectrum(3, (1, 1))}
    monkeypatch.setattr(OUTLIERS, "_measure", lambda classes, **_: runs[classes])
    finding = recorded(OUTLIERS.outliers(classes=(3, 5, 10), seeds=(0, 1)))
    assert finding.verdict == verdict  # three classes do not count
    assert "0 of 4 times" in finding.control


# Edge ----------------------------------------------------------------------------


def test_edges_of_the_methods():
    known = {
        "GD 0.4": 2 / 0.4,
        "momentum 0.6": (2 + 2 * 0.9) / 0.6,
        "Adam 0.002": 38 / 0.002,
    }
    found = {walker.name: walker.threshold for walker in EDGE.walkers()}
    for name, threshold in known.items():
        assert found[name] == pytest.approx(threshold, rel=1e-5)


def course(ratios, threshold=5.0):
    ratios = np.asarray(ratios, float)
    steps = 10 * np.arange(len(ratios))
    return RUNS.Course(steps, np.ones(len(ratios)), threshold * ratios)


RISES = np.linspace(0.2, 0.9, 40)
STAYS = [*np.linspace(0.2, 1.0, 20), *([0.98, 1.04] * 10)]
EXPLODES = [*np.linspace(0.2, 1.0, 20), *[2.0] * 20]
FALLS = np.geomspace(0.9, 0.01, 40)
LATE = [*RISES[:-1], 1.0]


@pytest.mark.parametrize(
    ("ratios", "crossed", "answer"),
    [
        (RISES, None, None),
        (STAYS, 190, True),
        (EXPLODES, 190, False),
        (FALLS, None, False),
        ([*EXPLODES[:30], *FALLS[:10]], 190, False),
        (LATE, 390, True),
    ],
)
def test_staying_on_the_edge(ratios, crossed, answer):
    run = EDGE.assess(course(ratios), 5.0)
    assert run["crossed_at"] == crossed
    assert EDGE.on_edge(run) is answer


def test_what_is_reported_of_a_run():
    run = EDGE.assess(course(STAYS), 5.0)
    assert (run["median"], run["low"], run["high"]) == pytest.approx((1.01, 0.98, 1.04))


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((STAYS, STAYS), "holds"),
        ((STAYS, RISES), "holds"),
        ((STAYS, FALLS), "mixed"),
        ((RISES, RISES), "does not hold"),
        ((EXPLODES, FALLS), "does not hold"),
    ],
)
def test_verdict_on_the_edge(monkeypatch, ratios, verdict):
    """The control falls, and does not count."""
    thrice = iter([*ratios, FALLS])
    monkeypatch.setattr(EDGE, "follow", lambda *_, **__: course(next(thrice)))
    walkers = [EDGE._descent(0.4, 10), EDGE._descent(0.4, 10), EDGE.walkers()[-1]]
    walkers[1] = walkers[1]._replace(name="another")
    finding = recorded(EDGE.edges(contestants=walkers))
    assert finding.verdict == verdict
    assert ("not counted" in finding.evidence) is any(x is RISES for x in ratios)
    assert ("↑" in str(finding.table.rows)) is any(x is RISES for x in ratios)


def test_sharpness_along_a_run_is_that_of_the_preconditioned_hessian():
    batch = RUNS.digits(30, 3, centred=True)
    network = RUNS.tanh_network((64, 2, 3))
    loss = RUNS.squared_error(network.apply)
    params = network.init(jax.random.key(0))
    (adam,) = (walker for walker in EDGE.walkers() if walker.ema)
    seen = RUNS.follow(
        loss,
        adam.tx,
        params,
        batch,
        steps=4,
        every=2,
        products=10,
        preconditioner=adam.preconditioner,
    )
    np.testing.assert_array_equal(seen.step, [0, 2])
    state = adam.tx.init(params)
    for step in range(3):
        value, grads = jax.value_and_grad(loss)(params, batch)
        if step in seen.step:
            divisor = adam_diagonal(state, grads)
            scaled = preconditioned(hessian(loss, params, batch), divisor)
            matrix = np.asarray(dense(scaled, params), np.float64)
            exact = np.linalg.eigvalsh(matrix)[-1]
            assert seen.sharpness[step // 2] == pytest.approx(exact, rel=1e-3)
            assert seen.loss[step // 2] == pytest.approx(float(value), rel=1e-5)
        updates, state = adam.tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)


def test_digits_of_some_classes():
    inputs, labels = RUNS.digits(50, 3, centred=True)
    assert inputs.shape == (50, 64)
    assert set(labels.tolist()) == {0, 1, 2}
    np.testing.assert_allclose(inputs.mean(axis=0), 0.0, atol=1e-6)


# Equal loss ----------------------------------------------------------------------


def passings(*sharpness):
    """One list per seed, an entry per level; None was not reached."""
    return [
        [None if value is None else EQUAL.Passing(7, 0.1, value) for value in seed]
        for seed in sharpness
    ]


def test_ratios_are_paired_by_seed():
    ours = passings([1.0, 4.0], [2.0, None], [1.0, 4.0])
    theirs = passings([2.0, 2.0], [8.0, 5.0], [2.0, None])
    first, second = EQUAL.ratios(ours, theirs)
    logs = np.log([0.5, 0.25, 0.5])
    assert first["ratio"] == pytest.approx(np.exp(logs.mean()))
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    assert (first["low"], first["high"]) == pytest.approx((np.exp(low), np.exp(high)))
    assert (second["ratio"], second["seeds"], second["high"]) == (2.0, 1, math.inf)


FLAT = passings([1.0, 0.5], [1.1, 0.52], [1.05, 0.51])
SHARP = passings([4.0, 2.0], [4.2, 2.2], [4.1, 2.1])
HALF = passings([1.0, 2.0], [1.1, 2.2], [1.05, 2.1])
FLATTER = passings([0.9, 0.2], [1.0, 0.21], [1.2, 0.22])


@pytest.mark.parametrize(
    ("claimed", "control", "verdict"),
    [
        (FLAT, SHARP, "holds"),
        (HALF, SHARP, "mixed"),
        (FLAT, FLATTER, "mixed"),  # larger steps do as well
        (SHARP, SHARP, "does not hold"),
        (passings([None, None], [None, None], [1.0, None]), SHARP, "does not hold"),
    ],
)
def test_verdict_at_equal_loss(monkeypatch, claimed, control, verdict):
    found = dict(
        zip(("base", "claim", "control"), (SHARP, claimed, control), strict=True)
    )
    monkeypatch.setattr(EQUAL, "follow", lambda _, c, **__: found[c.role])
    finding = recorded(EQUAL.equal_loss(levels=(0.5, 0.1), seeds=(0, 1, 2)))
    assert finding.verdict == verdict


# Generalization ------------------------------------------------------------------


def test_tau_with_its_interval():
    rng = np.random.default_rng(0)
    x = rng.permutation(20).astype(float)
    same = GAP.tau_interval(x, np.exp(x))
    assert (same["tau"], same["low"], same["high"]) == pytest.approx((1, 1, 1))
    y = rng.normal(size=20)
    found = GAP.tau_interval(x, y)
    expected = stats.kendalltau(x, y)
    assert (found["tau"], found["p"]) == pytest.approx(tuple(expected))
    assert found["low"] < 0 < found["high"]
    assert found["low"] < found["tau"] < found["high"]
    # The spread of tau between independent samples is known.
    spread = math.sqrt(2 * (2 * 20 + 5) / (9 * 20 * 19))
    assert found["high"] - found["low"] == pytest.approx(4 * spread, rel=0.4)


def test_recognizing_a_setting_is_not_enough():
    settings = [
        GAP.Setting(rate, 16, width, 0.0) for width in (8, 64) for rate in (0.1, 0.2)
    ]
    gap = np.array([1.0, 2.0, 11.0, 12.0])
    only_width = np.array([0.0, 0.0, 1.0, 1.0])
    # All pairs of widths agree, the pairs of rates are ties.
    assert GAP.one_setting_tau(settings, only_width, gap) == 0.5
    assert GAP.one_setting_tau(settings, gap, gap) == 1.0
    assert GAP.one_setting_tau(settings, np.array([2.0, 1.0, 12.0, 11.0]), gap) == 0.0
    assert GAP.one_setting_tau(settings[:1], gap[:1], gap[:1]) is None


def test_only_intervals_decide():
    above, across = {"tau": 0.2, "low": 0.1}, {"tau": 0.95, "low": -0.1}
    assert GAP.judge([above, above]) == "holds"
    assert GAP.judge([above, across]) == "mixed"
    assert GAP.judge([across, across]) == "does not hold"


@pytest.mark.parametrize(
    ("signs", "verdict"),
    [((1,), "holds"), ((1, -1), "mixed"), ((-1,), "does not hold")],
)
def test_verdict_on_generalization(monkeypatch, signs, verdict):
    gap = np.linspace(0.1, 0.3, 12)
    settings = [GAP.Setting(rate, 16, 8, 0.0) for rate in gap]
    names = (*GAP.SHARPNESS, *GAP.OTHERS)
    rows = [
        {
            **{name: signs[i % len(signs)] * x for i, name in enumerate(names)},
            **{"train_loss": 0.03, "train_accuracy": 1.0},
            **{"loss_gap": x, "error_gap": 2 * x},
        }
        for x in gap
    ]
    monkeypatch.setattr(GAP, "collect", lambda *_, **__: (settings, rows, 3))
    finding = recorded(GAP.generalization())
    assert finding.verdict == verdict
    assert "3 more did not fit" in finding.table.notes[0]


# For real ------------------------------------------------------------------------


def test_small_experiments_run_and_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(EDGE, "follow", lambda *_, **__: course(STAYS))
    grid = GAP.Grid((0.01, 0.02), (10,), (16,), (0.0, 0.01))
    base, ran, follow = EQUAL.CONTESTANTS[0], [], EQUAL.follow

    def follow_once(*args, **settings):
        if not ran:
            ran.append(follow(*args, **settings))
        return ran[0]

    monkeypatch.setattr(EQUAL, "follow", follow_once)
    findings = {
        "outliers": OUTLIERS.outliers(
            classes=(3,), examples=40, width=2, steps=5, seeds=(0,)
        ),
        "edge of stability": EDGE.edges(contestants=EDGE.walkers()[:1]),
        "sharpness at equal loss": EQUAL.equal_loss(
            contestants=(base, base._replace(label="other", role="claim")),
            options=Options(width=4, depth=1),
            steps=3,
            levels=(1e3, 1e-9),
            seeds=(0,),
        ),
        "sharpness and generalization": GAP.generalization(
            grid=grid, steps=300, examples=20
        ),
    }
    assert set(findings) <= {part.name for part in _claims_landscape.PARTS}
    for finding in findings.values():
        recorded(finding)
    runs = findings["sharpness at equal loss"].numbers["runs"]
    assert runs["adamw"]["step"][0]["mean"] == 1
    assert runs["adamw"]["sharpness"][1]["mean"] is None
    assert runs["other"]["ratio"][0]["ratio"] == 1.0
    models = findings["sharpness and generalization"].numbers["models"]
    assert len(models) >= 3
    assert all(model["train_loss"] <= GAP.TARGET for model in models)
    assert all(model["train_accuracy"] == 1.0 for model in models)

    figure = _claims_landscape.draw(findings)
    assert len(figure.axes) == 4
    bars = [patch.get_width() for patch in figure.axes[3].patches]
    taus = findings["sharpness and generalization"].numbers["taus"]
    np.testing.assert_allclose(bars, [found["tau"] for found in taus.values()])
    (run,) = findings["edge of stability"].numbers["runs"].values()
    seen = run["seeds"][0]
    np.testing.assert_allclose(
        figure.axes[1].lines[0].get_ydata(),
        np.asarray(seen["course"]["sharpness"]) / seen["threshold"],
    )
    figure.savefig(tmp_path / "landscape.png")
    _claims_landscape.draw({}).savefig(tmp_path / "empty.png")


def test_a_longer_run_takes_the_place_of_the_shorter(monkeypatch):
    monkeypatch.setattr(EDGE, "follow", lambda *_, **__: course(STAYS))
    finding = EDGE.edges(seeds=(0, 1))
    names = (_claims_landscape.EDGE, _claims_landscape.LONG_EDGE)
    figure = _claims_landscape.draw(dict.fromkeys(names, finding))
    assert len(figure.axes) == 1


def test_models_stop_at_the_target():
    """Once there, a model is frozen while the others train on."""
    network = RUNS.tanh_network((64, 6, 3))
    data = RUNS.digits(20, 3)
    loss = RUNS.cross_entropy(network.apply)
    settings = [GAP.Setting(rate, 8, 6, 0.0) for rate in (0.1, 1e-5)]
    params, losses, steps = GAP.train(
        network, loss, settings, data, steps=100, seed=0, target=0.1
    )
    assert 0.01 < losses[0] <= 0.1 < losses[1]  # 100 steps would go on to 4e-4
    assert steps[0] < 100 == steps[1]
    first = jax.tree.map(lambda leaf: leaf[0], params)
    assert float(loss(first, data)) == pytest.approx(float(losses[0]), rel=1e-5)
    assert jnp.isfinite(losses).all()


def test_slow_parts_say_how_slow():
    slow = {part.name: part.slow for part in _claims_landscape.PARTS}
    assert not slow["outliers"]
    assert "minute" in slow["sharpness and generalization"]
