"""The claim about the axes of loss surfaces, and the timing of surfaces."""

import jax.numpy as jnp
import numpy as np
import pytest

from basinax.benchmarks import _claims_landscape, _speed_surfaces
from basinax.benchmarks import _claims_landscape_axes as axes


def test_curvature_is_the_second_derivative():
    def loss(w, batch):
        return batch * (w[0] ** 2 + 2 * w[0] * w[1]) + w[1]

    direction = jnp.array([0.6, 0.8])
    found = axes.curvature(loss, jnp.array([0.3, -0.2]), direction, 2.0, 0.25)
    assert found == pytest.approx(2 * (2 * 0.36 + 4 * 0.48), rel=1e-4)


def run(**changes):
    measured = {
        "eigenvalues": [2.0, 1.0],
        "second_differences": [2.01, 0.995],
        "trace_over_parameters": 0.01,
        "unit": 0.0103,
        "unit_error": 0.0002,
        "filter": 0.02,
    }
    return axes._judge({**measured, **changes})


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, [True, True, True]),
        ({"second_differences": [2.0, 0.98]}, [False, True, True]),
        ({"second_differences": [-2.0, 1.0]}, [False, True, True]),
        ({"unit": 0.0093}, [True, False, True]),
        ({"filter": 0.25}, [True, True, False]),
    ],
)
def test_three_statements_decide(changes, holds):
    found = run(**changes)
    assert found["holds"] == holds
    assert axes.verdict([found]) == ("holds" if all(holds) else "mixed")
    assert axes.verdict([run(), found]) == ("holds" if all(holds) else "mixed")


def test_all_false_does_not_hold():
    found = run(second_differences=[1.0, 1.0], unit=0.02, filter=3.0)
    assert axes.verdict([found]) == "does not hold"


def test_a_small_run_and_its_figure(tmp_path):
    finding = axes.axes(
        examples=40, width=2, steps=20, top=2, draws=4, side=4, seeds=(0,)
    )
    (found,) = finding.numbers["runs"]
    np.testing.assert_allclose(
        found["second_differences"], found["eigenvalues"], rtol=0.02
    )
    assert found["surfaces"]["hessian"].shape == (4, 4)
    assert finding.numbers["start"]["surfaces"] == {}
    figure = _claims_landscape.draw({"axes": finding})
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert set(axes.AXES.values()) <= set(titles)
    figure.savefig(tmp_path / "axes.png")


def test_speed_of_surfaces():
    rows = _speed_surfaces.measure(1, side=2, examples=6, networks=["perceptron"])
    assert len({row["way"] for row in rows}) == len(rows) == 4
    for row in rows:
        assert row["largest_difference"] < 1e-4
        assert (row["ratio"] == 1) == (row["way"] == _speed_surfaces.PEER)
    assert "s for 51x51" in str(_speed_surfaces.table(rows, rounds=1))
