"""Verdicts of the claims about SAM and SAMO on invented runs; small real ones."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

pytest.importorskip("flax")
pytest.importorskip("rich")

from basinax.benchmarks import (
    _claims,
    _claims_samo,
    _claims_samo_digits,
    _claims_samo_edge,
    _claims_samo_toy,
    _cli,
    _results,
)
from basinax.benchmarks._multi_task_train import Measured
from basinax.benchmarks._tasks import Usage

DIGITS, EDGE, TOY = _claims_samo_digits, _claims_samo_edge, _claims_samo_toy
BASE = "equal weights"


def recorded(finding):
    """Pass a finding on, if it can be written down."""
    json.dumps(_results.plain(finding.numbers))
    assert {len(row) for row in finding.table.rows} == {len(finding.table.columns)}
    return finding


# Toy -----------------------------------------------------------------------------


def test_the_losses_of_the_toy():
    # In the valley above, in the bowl below, and where the bowls balance.
    u, v = 2.0, 3.0
    upper = np.log(abs(0.5 * (u + 7) - np.tanh(v))) + 6
    found = TOY.losses(jnp.array([u, v]))
    np.testing.assert_allclose(found[0], np.tanh(1.5) * upper, rtol=1e-5)
    np.testing.assert_allclose(
        TOY.losses(jnp.array([1.0, -2.0]))[1],
        np.tanh(1.0) * ((1 + 7) ** 2 / 10 + 0.01 * 6**2 - 20),
        rtol=1e-5,
    )
    assert np.mean(TOY.losses(jnp.array([0.0, -8.0]))) == pytest.approx(
        -15.09, abs=0.01
    )
    mirrored = TOY.losses(jnp.array([-u, v]))[::-1]
    np.testing.assert_allclose(found, mirrored, rtol=1e-5)


@pytest.mark.parametrize(
    ("sam", "ours", "coin", "verdict"),
    [
        ([0.6, 0.8], [1.0, 1.0], [0.8, 0.9], "holds"),
        ([0.6, 0.8], [1.0, 1.0], [0.8, 1.0], "mixed"),
        ([0.6, 1.0], [1.0, 1.0], [0.8, 0.9], "does not hold"),
        ([0.6, 0.6], [0.4, 0.6], [0.2, 0.2], "does not hold"),
    ],
)
def test_verdict_on_the_toy(sam, ours, coin, verdict):
    shares = {"none": [0.6], "SAM": sam, "SAMO": ours, "SAMO, coin": coin}
    assert TOY.judge(shares) == verdict


def test_the_toy_counts_runs_that_get_near(monkeypatch):
    far = {"none": 3, "SAM": 3, "SAMO": 5, "SAMO, exact": 5, "SAMO, coin": 4}

    def ends(perturbation, weighting, rho, *, seeds, steps):
        del weighting, rho, steps
        near = np.arange(5) < far[perturbation]
        return np.where(near, -15.0, -12.0)[:, None] + np.zeros(len(seeds))

    monkeypatch.setattr(TOY, "descend", ends)
    finding = recorded(TOY.toy(seeds=(0, 1), radii=(0.1, 0.5)))
    assert finding.verdict == "holds"
    assert finding.numbers["shares"]["MGDA"]["SAM"] == [0.6, 0.6]
    assert "SAMO, coin 80%, 80%" in finding.control
    assert len(finding.table.rows) == 2 * (1 + 4 * 2)


def test_descent_on_the_toy_goes_down():
    ends = TOY.descend("SAMO, coin", "MGDA", 0.5, seeds=(0, 1), steps=200)
    assert ends.shape == (5, 2)
    start = np.array([np.mean(TOY.losses(jnp.array(x))) for x in TOY.STARTS])
    assert (ends[2] < start[2]).all()  # from (9, 9)
    assert ends[2, 0] != ends[2, 1]  # each seed draws its own directions


# Two digits ----------------------------------------------------------------------


def measured(accuracy, eigenvalue=10.0, cosine=0.1, validation=None):
    two = np.array([accuracy, accuracy - 0.1])
    return Measured(
        two,
        two if validation is None else np.full(2, validation),
        np.ones(2),
        cosine,
        np.full(2, 0.1),
        np.array([eigenvalue, 2 * eigenvalue]),
    )


def test_paired_interval_is_students():
    x = [1.0, 2.0, 4.0]
    found = DIGITS.Paired.of(x)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(x), scale=stats.sem(x))
    np.testing.assert_allclose(found, [np.mean(x), low, high])
    assert str(DIGITS.Paired.of([1.0])) == "+1.00"


def test_effect_is_paired_by_seed():
    base = [measured(0.80, 16.0, 0.1), measured(0.84, 4.0, 0.2)]
    ours = [measured(0.83, 4.0, 0.3), measured(0.87, 1.0, 0.4)]
    seen = DIGITS.effect(ours, base)
    np.testing.assert_allclose(seen.gain, [3.0, 3.0, 3.0], atol=1e-9)
    assert seen.flatter == pytest.approx(0.25)
    assert seen.aligned == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("gain", "low", "flatter", "aligned", "verdict"),
    [
        (3.0, 1.0, 0.3, 0.2, "holds"),
        (3.0, -1.0, 0.3, 0.2, "mixed"),
        (1.5, 1.0, 0.3, 0.2, "mixed"),
        (3.0, 1.0, 0.7, 0.2, "mixed"),
        (3.0, 1.0, 0.3, 0.0, "mixed"),
        (0.0, -1.0, 1.1, 0.0, "does not hold"),
    ],
)
def test_verdict_on_perturbing(gain, low, flatter, aligned, verdict):
    paired = DIGITS.Paired(gain, low, 2 * gain - low)
    assert DIGITS.judge_effect(DIGITS.Effect(paired, flatter, aligned)) == verdict


@pytest.mark.parametrize(
    ("coin", "smaller", "verdict"),
    [
        (0.1, 0.1, "holds"),
        (0.1, -0.1, "mixed"),
        (-0.1, 0.1, "mixed"),
        (-0.1, -0.1, "does not hold"),
    ],
)
def test_verdict_on_the_sign(coin, smaller, verdict):
    over_coin, over_smaller = (
        DIGITS.Paired(low + 1, low, low + 2) for low in (coin, smaller)
    )
    assert DIGITS.judge_sign(over_coin, over_smaller) == verdict


@pytest.fixture
def invented(monkeypatch):
    """Let a table of (method, rho) -> accuracy, eigenvalue, cosine do the training."""
    table = {}

    def outcome(problem, method, rho, seed, plan):
        del problem, plan
        (name,) = (n for n, m in DIGITS.METHODS.items() if m is method)
        accuracy, *rest = table.get((name, rho), table.get(name, (0.9, 3.0, 0.4)))
        return measured(accuracy + 1e-3 * seed, *rest)

    monkeypatch.setattr(DIGITS, "outcome", outcome)
    monkeypatch.setattr(DIGITS, "singles", lambda *_: np.array([0.84, 0.8]))
    monkeypatch.setattr(
        DIGITS, "step_ratios", lambda problem, names, plan: dict.fromkeys(names, 2.0)
    )
    return table


def test_the_radius_is_chosen_on_validation_examples(invented):
    invented[BASE] = (0.85, 10.0, 0.1)
    invented["SAMO", 0.1] = (0.88, 4.0, 0.3, 0.80)
    invented["SAMO", 0.2] = (0.95, 4.0, 0.3, 0.70)  # best on the test examples
    finding = recorded(DIGITS.sweep(seeds=(0, 1), radii=(0.1, 0.2)))
    assert finding.numbers["chosen"]["SAMO"] == "SAMO, ρ 0.1"
    assert finding.verdict == "holds"
    assert "+3.00" in finding.evidence
    assert "SAM, ρ 0.1" in finding.control
    labels = [row[:2] for row in finding.table.rows]
    assert labels[:3] == [("one task alone", "–"), (BASE, "–"), ("SAM", "0.1")]
    delta = 100 * -((0.85 - 0.84) / 0.84 + (0.75 - 0.8) / 0.8) / 2
    assert float(finding.table.rows[1][4].split(" ")[0].replace("−", "-")) == (
        pytest.approx(delta, abs=0.1)
    )


def test_perturbing_that_does_nothing_does_not_hold(invented):
    for name in (BASE, *DIGITS.PERTURBED):
        invented[name] = (0.85, 10.0, 0.1)
    assert DIGITS.sweep(seeds=(0, 1), radii=(0.1,)).verdict == "does not hold"


@pytest.mark.parametrize(
    ("ours", "verdict"), [(0.93, "holds"), (0.9, "does not hold"), (0.905, "mixed")]
)
def test_the_sign_against_coin_and_smaller_radius(invented, ours, verdict):
    invented["SAMO"] = (ours, 3.0, 0.4)
    invented["SAMO, coin"] = (0.9, 3.0, 0.4)
    invented["SAMO, no local part"] = (0.91, 3.0, 0.4)
    finding = recorded(DIGITS.sign(seeds=(0, 1, 2), others=("SAMO, exact",)))
    assert finding.verdict == verdict
    radii = {run["method"]: run["rho"] for run in finding.numbers["runs"].values()}
    assert radii["SAMO, no local part"] == pytest.approx(radii["SAMO"] / 2**0.5)
    assert "SAMO, exact +0.00" in finding.control


def test_weightings_are_compared_with_themselves(invented):
    invented["MGDA"] = (0.80, 20.0, 0.1)
    invented["SAMO + MGDA"] = (0.85, 5.0, 0.3)
    invented["FairGrad"] = (0.90, 20.0, 0.1)
    invented["SAMO + FairGrad"] = (0.90, 25.0, 0.1)
    one = recorded(DIGITS.combiners(seeds=(0, 1), weightings=("MGDA",)))
    assert one.verdict == "holds"
    assert "MGDA +5.00 (+5.00 to +5.00) × 0.25" in one.evidence
    assert one.table.columns[-1] == "step"
    both = DIGITS.combiners(seeds=(0, 1), weightings=("MGDA", "FairGrad"))
    assert both.verdict == "mixed"


# Edge ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flatter", "over", "verdict"),
    [
        ([0.3, 0.3], [1.0, 1.1], "holds"),
        ([0.3, 0.3], [1.0, 1.3], "mixed"),
        ([0.3, 0.95], [1.0, 1.1], "mixed"),
        ([1.0, 1.0], [0.5, 1.0], "does not hold"),
    ],
)
def test_verdict_on_the_edge(flatter, over, verdict):
    assert EDGE.judge(flatter, over) == verdict


def test_late_is_the_last_quarter():
    steps = np.arange(1, 9, dtype=float)
    seen = {"step": steps, "lambda_max": 10 * steps, "edge": np.full(8, 10.0)}
    found = EDGE.late(seen)
    assert found["step"] == 7.5
    assert found["over_edge"] == 7.5


def test_sam_walks_to_its_edge(monkeypatch):
    # A small step size of SAM and few steps: flatter already, far from any edge.
    monkeypatch.setitem(
        EDGE.SETTINGS,
        "squared error",
        EDGE.SETTINGS["squared error"]._replace(radii=(0.0, 0.3), examples=50),
    )
    finding = recorded(
        EDGE.edges(seeds=(0,), settings=("squared error",), steps=60, every=30)
    )
    runs = finding.numbers["runs"]["squared error"]
    assert runs[0.3][0]["lambda_max"] < runs[0.0][0]["lambda_max"]
    assert runs[0.0][0]["edge"] == pytest.approx(5.0)
    assert runs[0.3][0]["edge"] < 2.0
    with pytest.raises(ValueError, match="not a multiple"):
        EDGE.course("squared error", 0.0, 0, steps=70, every=30)


# All -----------------------------------------------------------------------------


def test_what_was_found_can_be_drawn(invented, tmp_path):
    course = {"step": np.arange(1, 5), "lambda_max": np.ones(4), "edge": np.ones(4)}
    runs = {0.0: [EDGE.late(course)], 0.1: [EDGE.late(course)]}
    del invented
    findings = {
        _claims_samo.NOISY: DIGITS.sweep(seeds=(0, 1), radii=(0.1, 0.2)),
        _claims_samo.EDGE: _claims.Finding(
            "", "holds", "", "", {"runs": {"squared error": runs}}
        ),
    }
    figure = _claims_samo.draw(findings)
    figure.savefig(tmp_path / "samo.png")
    assert (tmp_path / "samo.png").stat().st_size > 10_000
    assert [bool(axis.lines) for axis in figure.axes] == [True, True, True, False]


def test_seeds_reach_the_parts_that_take_them(monkeypatch, tmp_path):
    seen = []

    def takes(say, *, seeds=(7,)):
        del say
        seen.append(tuple(seeds))
        return _claims.Finding("", "holds", "", "", {})

    parts = (
        _claims.Part("takes", takes),
        _claims.Part("does not", lambda say: takes(say)),
    )
    monkeypatch.setattr(_claims_samo, "PARTS", parts)
    arguments = ["claims", "samo", "--out", str(tmp_path)]
    assert _cli.main([*arguments, "--seeds", "2"]) == 0
    assert _cli.main(arguments) == 0
    assert seen == [(0, 1), (7,), (7,), (7,)]
    assert _cli.main([*arguments, "--seeds", "0"]) == _cli.MISTAKE


def test_the_claim_is_registered():
    assert set(_claims.choose(["samo"])) == {"samo"}
    names = [part.name for part in _claims.CLAIMS["samo"].parts]
    assert {name for name, _ in _claims_samo.PANELS} <= set(names)
    with pytest.raises(Usage, match="samo"):
        _claims.choose(["nothing"])
