"""Plots show the numbers they are given, and share one look."""

import ast
import inspect
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from basinax.landscape import Barrier, Density, Line, Path, Plane, plots

GRID = np.linspace(-1.0, 5.0, 7)
CURVE = np.array([0.0, 2.0, 1.0, 0.5, 0.1, 0.02, 0.01])
ERROR = 0.1 * CURVE
THREE = np.array([0.0, 0.5, 1.0])


def density(error=ERROR, curve=CURVE):
    one = jnp.ones((2, 3))
    return Density(*map(jnp.asarray, (GRID, curve, error)), one, one)


def line(axis, label):
    (found,) = [x for x in axis.lines if x.get_label() == label]
    return found.get_xdata(), found.get_ydata()


CALLS = {
    "cosines": lambda **k: plots.cosines(np.eye(3), **k),
    "density": lambda **k: plots.density(density(), outliers=[3.0], **k),
    "eigenvalues": lambda **k: plots.eigenvalues([2.0, -1.0], **k),
    "grokking": lambda **k: plots.grokking([1, 9], [0, 1], [0, 1], **k),
    "lines": lambda **k: plots.lines(Line(THREE, THREE), **k),
    "monitored": lambda **k: plots.monitored([0, 1], [1.0, 2.0], threshold=2, **k),
    "paths": lambda **k: plots.paths(
        Path(THREE, np.array([0, 3, 1.0])), barriers=Barrier(2.5, 0.5, 3, -2.5), **k
    ),
    "singular_values": lambda **k: plots.singular_values(np.eye(3), **k),
    "surface": lambda **k: plots.surface(
        Plane(THREE, THREE, np.add.outer(THREE, THREE)), path=np.eye(2), **k
    ),
    "trajectory": lambda **k: plots.trajectory(np.eye(2), **k),
}
EVERY = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def luminance(colour):
    """Return the relative luminance of WCAG 2."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(x, y):
    low, high = sorted([luminance(x), luminance(y)])
    return (high + 0.05) / (low + 0.05)


def test_every_function_is_public_documented_and_tested():
    assert set(plots.__all__) == set(CALLS)
    changelog = (pathlib.Path(__file__).parent.parent / "CHANGELOG.md").read_text()
    for name in plots.__all__:
        function = getattr(plots, name)
        for part in ("Args:", "Returns:", "Raises:", ">>> ", "Reference:"):
            assert part in function.__doc__, (name, part)
        assert f"`{name}`" in changelog, name
        given = inspect.signature(function).parameters
        assert given["ax"].default is None
        assert given["title"].default is None


@EVERY
def test_every_plot_is_titled_labelled_and_readable_everywhere(call):
    axis = Figure().subplots()
    assert call(ax=axis) is axis
    assert axis.get_xlabel()
    assert axis.get_ylabel()
    assert axis.get_title(loc="left")
    assert call(title="mine").get_title(loc="left") == "mine"
    assert not axis.patch.get_visible()
    texts = [axis.xaxis.label, axis.yaxis.label, axis.title, *axis.get_xticklabels()]
    for text in texts:
        assert text.get_fontsize() >= 9
    inks = {text.get_color() for text in (axis.xaxis.label, *axis.get_xticklabels())}
    for ink in inks | {axis.spines["left"].get_edgecolor()}:
        for page in ("#ffffff", "#1e1e1e"):  # no grey reaches more than 4.08 on both
            assert contrast(ink, page) > 3.9


@EVERY
def test_a_new_figure_has_no_background_and_no_global_state(call):
    figure = call().figure
    figure.draw_without_rendering()
    assert figure.get_facecolor()[3] == 0
    width, _ = figure.get_size_inches()
    assert 800 / width >= 100  # pixels per inch at the width of a README


def test_curves_stand_out_on_light_and_on_dark_pages():
    from basinax.landscape._plot_style import COLOURS

    for colour in COLOURS:
        assert contrast(colour, "#ffffff") > 2
        assert contrast(colour, "#1e1e1e") > 3


def test_matplotlib_is_imported_late():
    """No statement of any module imports it, only those inside functions."""
    modules = [*pathlib.Path(plots.__file__).parent.glob("*.py")]
    assert len(modules) > 40
    for module in modules:
        for statement in ast.parse(module.read_text()).body:
            names = [x.name for x in getattr(statement, "names", [])]
            names.append(getattr(statement, "module", None) or "")
            assert not [x for x in names if x.startswith("matplotlib")], module


@EVERY
def test_pyplot_is_never_imported(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    call()


@EVERY
def test_without_matplotlib_one_line_names_the_extra(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"basinax\[plot\]") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_density_is_drawn_as_it_is():
    axis = plots.density(density(), outliers=[3.0, 4.5])
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
def test_density_without_anything_to_see(curve):
    axis = plots.density(density(np.full(7, np.nan), curve), outliers=2.0)
    axis.figure.draw_without_rendering()
    np.testing.assert_array_equal(line(axis, "outliers")[0], [2.0])
