"""Contours are those of the losses that were computed, and so are paths on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver

from basinax.landscape import Plane, TrajectoryDirections, plane, plots
from basinax.landscape._plot_levels import contour_levels

X, Y = np.linspace(-1.0, 1.0, 9), np.linspace(-0.5, 2.0, 6)
SLOPE = np.add.outer(2 * X, 3 * Y)  # from -3.5 to 8, with straight contours


def contours(axis):
    """Return filled contours and contour lines, None where there are none."""
    sets = [c for c in axis.collections if isinstance(c, QuadContourSet)]
    filled, drawn = ([c for c in sets if c.filled == f] for f in (True, False))
    return filled[0] if filled else None, drawn[0] if drawn else None


def line(axis, label):
    (found,) = [x for x in axis.lines if x.get_label() == label]
    return np.array(found.get_data())


def bar(axis):
    (found,) = [a for a in axis.figure.axes if a is not axis]
    return found


def test_contours_lie_where_the_losses_say():
    axis = plots.surface(Plane(X, Y, SLOPE))
    filled, drawn = contours(axis)
    assert (filled.zmin, filled.zmax) == (SLOPE.min(), SLOPE.max())
    assert filled.levels[0] <= -3.5
    assert filled.levels[-1] >= 8
    assert 6 <= len(filled.levels) <= 13
    assert set(drawn.levels) <= set(filled.levels)
    for level, segments in zip(drawn.levels, drawn.allsegs, strict=True):
        (points,) = segments
        np.testing.assert_allclose(
            2 * points[:, 0] + 3 * points[:, 1], level, atol=1e-9
        )
    assert bar(axis).get_ylabel() == "loss"
    assert axis.get_xlim() == (-1, 1)
    assert axis.get_ylim() == (-0.5, 2)


def test_a_computed_plane():
    def loss(w):
        return w[0] ** 2 + 3 * w[1]

    found = plane(loss, jnp.zeros(2), *jnp.eye(2), x=X, y=Y)
    filled, _ = contours(plots.surface(found))
    assert filled.zmin == pytest.approx(-1.5)
    assert filled.zmax == pytest.approx(7.0)


def test_the_centre_is_marked_where_it_is_inside():
    np.testing.assert_array_equal(line(plots.surface(Plane(X, Y, SLOPE)), "_centre"), 0)
    axis = plots.surface(Plane(X, Y + 1, SLOPE))
    assert not axis.lines


def test_surfaces_with_the_same_limits_share_levels_and_colours():
    first = contours(plots.surface(Plane(X, Y, SLOPE), vmin=0, vmax=5))[0]
    axis = plots.surface(Plane(X, Y, 0.3 * SLOPE + 1), vmin=0, vmax=5)
    second = contours(axis)[0]
    np.testing.assert_array_equal(first.levels, second.levels)
    for value in (-1.0, 2.2, 9.0):
        assert first.cmap(first.norm(value)) == second.cmap(second.norm(value))
    assert (first.extend, second.extend) == ("both", "min")
    assert bar(axis).get_ylabel() == "loss (smallest -0.05)"
    # Though the losses of one alone would be on a logarithmic scale.
    limits = {"vmin": 0.01, "vmax": 10.0}
    first, second = (
        contours(plots.surface(Plane(X, Y, losses), **limits))[0]
        for losses in (10.0**SLOPE, 3 + 0.01 * SLOPE)
    )
    np.testing.assert_array_equal(first.levels, second.levels)
    assert first.norm(0.1) == second.norm(0.1) > 0.2


def test_what_is_clipped_is_said():
    axis = plots.surface(Plane(X, Y, SLOPE), vmax=2.0)
    filled, _ = contours(axis)
    assert filled.extend == "max"
    assert filled.levels[-1] == 2.0
    assert bar(axis).get_ylabel() == "loss (largest 8)"
    assert not plots.surface(Plane(X, Y, SLOPE), colorbar=False).figure.axes[1:]


def test_wide_ranges_are_on_a_logarithmic_scale():
    wide = 10.0 ** (SLOPE / 2)
    axis = plots.surface(Plane(X, Y, wide))
    filled, drawn = contours(axis)
    assert "log scale" in bar(axis).get_ylabel()
    half = filled.norm(np.sqrt(filled.levels[0] * filled.levels[-1]))
    assert half == pytest.approx(0.5)
    assert filled.levels[-1] >= wide.max()
    assert len(drawn.levels) >= 3
    linear = contours(plots.surface(Plane(X, Y, wide), scale="linear"))[0]
    assert linear.norm(linear.levels[[0, -1]].mean()) == pytest.approx(0.5)


def test_zeros_and_a_single_deep_point_do_not_take_all_levels():
    wide = 10.0 ** (SLOPE / 2)
    wide[3, 3], wide[4, 4] = 0.0, 1e-30
    axis = plots.surface(Plane(X, Y, wide))
    axis.figure.draw_without_rendering()
    filled, _ = contours(axis)
    assert filled.levels[0] > 1e-4
    assert filled.extend == "min"
    assert "smallest 0" in bar(axis).get_ylabel()
    # The lowest colour covers the hole, which nothing is cut out for.
    inside = [path.contains_point((X[3], Y[3])) for path in filled.get_paths()]
    assert inside[0]


@pytest.mark.parametrize("value", [0.0, 2.5, -1e30, 1e-30])
def test_a_flat_surface_has_one_colour(value):
    axis = plots.surface(Plane(X, Y, np.full((9, 6), value)))
    axis.figure.draw_without_rendering()
    filled, drawn = contours(axis)
    assert drawn is None
    low, high = filled.levels
    assert low < value < high
    (tick,) = bar(axis).get_yticks()
    assert tick == value


@pytest.mark.parametrize("magnitude", [1e-40, 1e-8, 1e12, 3e38, 1e190])
def test_losses_of_any_size(magnitude):
    for losses in (SLOPE, 10.0**SLOPE, 1 + 1e-9 * SLOPE):
        axis = plots.surface(Plane(X, Y, magnitude * losses))
        axis.figure.draw_without_rendering()
        filled, _ = contours(axis)
        assert len(filled.levels) >= 4
        assert np.isfinite(filled.levels).all()


def test_losses_that_are_not_finite_leave_a_hatched_gap():
    assert not plots.surface(Plane(X, Y, SLOPE)).patches
    losses = SLOPE.copy()
    losses[0, 0], losses[-1, -1], losses[-1, 0] = np.nan, np.inf, 1e300
    axis = plots.surface(Plane(X, Y, losses))
    axis.figure.draw_without_rendering()
    (gap,) = axis.patches
    assert gap.get_hatch()
    assert gap.get_bbox().bounds == (-1, -0.5, 2, 2.5)
    filled, _ = contours(axis)
    rest = losses[np.abs(losses) < 1e300]
    assert (filled.zmin, filled.zmax) == (rest.min(), rest.max())
    corners = np.concatenate([p.vertices for p in filled.get_paths()])
    assert not (corners == [-1, -0.5]).all(1).any()
    assert (corners == [-1, 2.0]).all(1).any()
    assert axis.get_legend().get_texts()[0].get_text() == "not finite"
    nothing = plots.surface(Plane(X, Y, np.full_like(SLOPE, np.nan)))
    nothing.figure.draw_without_rendering()
    assert contours(nothing) == (None, None)


def test_paths_are_drawn_and_stay_in_view():
    path = np.array([[0.5, 3.0], [0.2, 1.0], [0.0, 0.0]])
    axis = plots.surface(Plane(X, Y, SLOPE), path=jnp.asarray(path))
    np.testing.assert_allclose(line(axis, "path"), path.T)
    assert axis.get_xlim() == (-1, 1)
    low, high = axis.get_ylim()
    assert low == -0.5
    assert high > 3.0
    assert axis.get_legend() is None
    both = plots.surface(Plane(X, Y, SLOPE), path={"SGD": path, "SAM": -path})
    np.testing.assert_allclose(line(both, "SAM"), -path.T)
    names = [text.get_text() for text in both.get_legend().get_texts()]
    assert names == ["SGD", "SAM"]


def test_trajectories_name_the_axes_with_what_they_explain():
    points = jnp.array([[4.0, 1.0, 7.0], [1.0, 0.5, 7.0], [0.0, 0.0, 0.0]])
    found = TrajectoryDirections((), points, jnp.array([0.9, 0.0625, 0.01]))
    for axis in (
        plots.trajectory(found),
        plots.surface(Plane(X, Y, SLOPE), path=found),
    ):
        np.testing.assert_array_equal(line(axis, "path"), points[:, :2].T)
        assert "90.0%" in axis.get_xlabel()
        assert "6.2%" in axis.get_ylabel()
    axis = plots.trajectory({"a": found, "b": -points})
    np.testing.assert_array_equal(line(axis, "b"), -points[:, :2].T)
    ends = [x.get_xydata()[0] for x in axis.lines if x.get_label() == "_end"]
    np.testing.assert_array_equal(ends, [[4, 1], [0, 0], [-4, -1], [0, 0]])


def test_directions_keep_their_proportions_and_stay_inside():
    moves = np.array([[3.0, 0.0], [-1.0, 2.0]])
    for given in (moves, {"first": moves[0], "second": moves[1]}):
        axis = plots.surface(Plane(X, Y, SLOPE), directions=given)
        (arrows,) = [c for c in axis.collections if isinstance(c, Quiver)]
        tips = np.stack([arrows.U, arrows.V], 1)
        factor = tips[0, 0] / 3
        np.testing.assert_allclose(tips, factor * moves)
        assert (tips >= [-1, -0.5]).all()
        assert (tips <= [1, 2]).all()
        assert np.abs(tips).max() > 0.3
        names = [text.get_text() for text in axis.texts]
        assert names == [*given] if isinstance(given, dict) else ["1", "2"]


def test_given_levels():
    filled, _ = contours(plots.surface(Plane(X, Y, SLOPE), levels=[-4.0, 0, 1, 9]))
    np.testing.assert_array_equal(filled.levels, [-4, 0, 1, 9])
    filled, _ = contours(plots.surface(Plane(X, Y, SLOPE), levels=3))
    assert 3 <= len(filled.levels) <= 4


@pytest.mark.parametrize("count", [2, 5, 12, 40])
@pytest.mark.parametrize("decades", [0.1, 0.31, 1, 3, 9, 38])
def test_logarithmic_levels_cover_and_are_few(count, decades):
    for low in (1e-3, 0.7, 1.0):
        high = low * 10**decades
        edges, _ = contour_levels(np.array([low, high]), "log", count, None, None)
        assert edges[0] <= low * (1 + 1e-12)
        assert edges[-1] >= high * (1 - 1e-12)
        assert edges[1] > low
        assert edges[-2] < high
        assert 2 <= len(edges) <= count + 1
        assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (Plane(X, Y, SLOPE.T), {}, r"shape \(6, 9\) for 9 x and 6 y"),
        (Plane(X, Y[:1], SLOPE[:, :1]), {}, "both at least 2"),
        (Plane(X, Y, {"test": SLOPE}), {}, "losses is a tree"),
        (Plane(X, Y, SLOPE), {"levels": [1.0, 0.0]}, "ascending"),
        (Plane(X, Y, SLOPE), {"levels": 1}, "at least 2"),
        (Plane(X, Y, SLOPE), {"vmin": 3, "vmax": 1}, "ascend; got 3 to 1"),
        (Plane(X, Y, SLOPE), {"scale": "log", "vmin": -1}, "be positive"),
        (Plane(X, Y, -SLOPE - 9), {"scale": "log"}, "positive values"),
        (Plane(X, Y, SLOPE), {"scale": "big"}, "scale must be one of"),
        (Plane(X, Y, SLOPE), {"path": np.ones(2)}, r"of shape \(n, 2\)"),
        (Plane(X, Y, SLOPE), {"path": {}}, "mapping is empty"),
        (Plane(X, Y, SLOPE), {"path": {"SGD": np.ones((3, 1))}}, "SGD must be"),
        (Plane(X, Y, SLOPE), {"directions": np.zeros((1, 2))}, "must not all vanish"),
        (Plane(X, Y, SLOPE), {"directions": [[1, np.nan]]}, "must be finite"),
        (Plane(X, Y, SLOPE), {"directions": [1.0, 2, 3]}, "vector of 2 numbers"),
    ],
)
def test_mistakes(given, options, message):
    with pytest.raises(ValueError, match=message):
        plots.surface(given, **options)


def test_surfaces_side_by_side():
    figure = Figure(layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, sign in zip(axes, (1, -1), strict=True):
        found = Plane(X, Y, jax.device_get(sign * SLOPE))
        assert plots.surface(found, ax=axis, colorbar=sign > 0) is axis
    assert len(figure.axes) == 3
