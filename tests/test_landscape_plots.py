"""Plots show the numbers they are given."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from basinax.landscape import Density, plots

GRID = np.linspace(-1.0, 5.0, 7)
CURVE = np.array([0.0, 2.0, 1.0, 0.5, 0.1, 0.02, 0.01])
ERROR = 0.1 * CURVE


def density(error=ERROR, curve=CURVE):
    one = jnp.ones((2, 3))
    return Density(*map(jnp.asarray, (GRID, curve, error)), one, one)


def line(axis, label):
    (found,) = [x for x in axis.lines if x.get_label() == label]
    return found.get_xdata(), found.get_ydata()


def test_density_is_drawn_as_it_is():
    axis = Figure().subplots()
    assert plots.density(density(), ax=axis, outliers=[3.0, 4.5]) is axis
    np.testing.assert_allclose(line(axis, "density"), [GRID, CURVE], rtol=1e-6)
    at, height = line(axis, "outliers")
    np.testing.assert_array_equal(at, [3.0, 4.5])
    low, high = axis.get_ylim()
    assert ((low < height) & (height < high)).all()
    assert high > CURVE.max()


def test_the_band_is_one_standard_error():
    axis = plots.density(density())
    (band,) = axis.collections
    corners = band.get_paths()[0].vertices
    floor = axis.get_ylim()[0]
    for x, y, e in zip(GRID, CURVE, ERROR, strict=True):
        heights = corners[np.isclose(corners[:, 0], x), 1]
        np.testing.assert_allclose(heights.min(), max(y - e, floor), rtol=1e-5)
        np.testing.assert_allclose(heights.max(), max(y + e, floor), rtol=1e-5)


def test_one_probe_has_no_band():
    axis = plots.density(density(np.full(7, np.inf)))
    assert not axis.collections


@pytest.mark.parametrize("curve", [np.zeros(7), np.full(7, np.nan)])
def test_density_without_anything_to_see(curve, tmp_path):
    axis = plots.density(density(np.full(7, np.nan), curve), outliers=2.0)
    axis.figure.savefig(tmp_path / "x.png")
    np.testing.assert_array_equal(line(axis, "outliers")[0], [2.0])


def test_monitored_values_and_threshold():
    axis = Figure().subplots()
    steps, values = [0, 10, 20], jnp.array([1.0, jnp.nan, 3.0])
    assert plots.monitored(steps, values, ax=axis, threshold=2.0) is axis
    np.testing.assert_array_equal(line(axis, "measured"), [steps, values])
    np.testing.assert_array_equal(line(axis, "threshold")[1], [2.0, 2.0, 2.0])
    schedule = plots.monitored(steps, values, threshold=[1.0, 2.0, 4.0])
    np.testing.assert_array_equal(line(schedule, "threshold")[1], [1.0, 2.0, 4.0])
    assert len(plots.monitored(steps, values).lines) == 1


@pytest.mark.parametrize(("steps", "values"), [([1], [1.0, 2.0]), (1, 2.0)])
def test_monitored_shapes(steps, values):
    with pytest.raises(ValueError, match="vectors of one length"):
        plots.monitored(steps, values)


def test_without_matplotlib_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (
        lambda: plots.density(density()),
        lambda: plots.monitored([0], [1.0]),
    ):
        with pytest.raises(ImportError, match=r"basinax\[plot\]") as caught:
            call()
        assert "\n" not in str(caught.value)
