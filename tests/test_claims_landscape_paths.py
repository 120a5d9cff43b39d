"""Verdicts of the claim about paths on invented runs, and a small real run."""

import json

import pytest

pytest.importorskip("flax")
pytest.importorskip("rich")

import numpy as np

from basinax.benchmarks import _claims_landscape, _results
from basinax.benchmarks import _claims_landscape_paths as paths


def run(train, test, straight=0.5):
    """Invent a run from the barriers of its Bezier curve."""
    heights = {
        "straight line": (straight, straight),
        "Bezier curve": (train, test),
        "polygon": (0.4, 0.4),
    }
    t = np.linspace(0, 1, 5)
    return {
        "positions": t,
        "paths": {
            name: {
                split: {
                    "losses": 0.1 + 4 * t * (1 - t) * height,
                    "height": height,
                    "mode_connectivity": -height,
                }
                for split, height in zip(("train", "test"), both, strict=True)
            }
            for name, both in heights.items()
        },
        "same_start": 0.01,
        "cka": 0.9,
        "cka_untrained": 0.6,
    }


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([run(0.0, 0.04), run(0.01, 0.0)], "holds"),
        ([run(0.0, 0.04), run(0.01, 0.06)], "mixed"),
        ([run(0.06, 0.06), run(0.5, 0.7)], "does not hold"),
        ([run(0.0, 0.0, straight=0.0)], "does not hold"),  # there was no barrier
    ],
)
def test_verdict(monkeypatch, runs, verdict):
    monkeypatch.setattr(paths, "measure", lambda seed, **_: runs[seed])
    finding = paths.paths(seeds=range(len(runs)))
    assert finding.verdict == verdict
    assert finding.table.rows[1][1] == ", ".join(
        paths.short(r["paths"]["Bezier curve"]["train"]["height"]) for r in runs
    )
    json.dumps(_results.plain(finding.numbers))


def test_small_run(monkeypatch):
    """Equal losses at the ends of both paths; everything can be judged and drawn."""
    # The polygon, another program to compile, has its tests elsewhere.
    monkeypatch.setitem(paths.KINDS, "polygon", "bezier")
    found = paths.paths(seeds=(0,), width=12, steps=60, search=60, positions=5)
    (measured,) = found.numbers["runs"]
    for split in paths.SPLITS:
        losses = [measured["paths"][name][split]["losses"] for name in paths.KINDS]
        for other in losses[1:]:
            np.testing.assert_allclose(other[[0, -1]], losses[0][[0, -1]], rtol=1e-6)
            assert np.abs(other[2] - losses[0][2]) > 1e-3
    straight = measured["paths"]["straight line"]["train"]["height"]
    assert measured["paths"]["Bezier curve"]["train"]["height"] < 0.5 * straight
    assert 0 <= measured["same_start"] < 0.5 * straight
    assert 0 < measured["cka"] <= 1
    figure = _claims_landscape.draw({"paths": found})
    assert len(figure.axes[0].lines) == 2 * len(paths.KINDS) + 2


def test_shuffled_batches_are_the_seeds():
    """Each epoch sees every example of its full batches once."""
    orders = []
    data = {"inputs": np.zeros((200, 1)), "labels": np.arange(200)}
    batch = data["inputs"], data["labels"]
    original = paths._fit
    try:
        paths._fit = lambda loss, params, order, batch: orders.append(np.array(order))
        for seed in (0, 0, 1):
            paths.fit(None, None, seed, batch, 5)
    finally:
        paths._fit = original
    assert orders[0].shape == (5, paths.BATCH)
    assert len(np.unique(orders[0][:3])) == 3 * paths.BATCH
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
