"""Losses along lines and paths, and what was measured during training."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from basinax.landscape import Barrier, Line, Path, barrier, plots

T = np.array([0.0, 0.25, 0.5, 1.0])
HILL = np.array([1.0, 4.0, 2.0, 3.0])  # 2.5 above the line from 1 to 3, at 0.25


def line(axis, label):
    (found,) = [x for x in axis.lines if x.get_label() == label]
    return found


def data(axis, label):
    return np.array(line(axis, label).get_data())


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_lines_are_drawn_as_they_are():
    axis = plots.lines(Line(jnp.asarray(T), jnp.asarray(HILL)))
    np.testing.assert_allclose(data(axis, "loss"), [T, HILL])
    assert axis.get_legend() is None
    axis = plots.lines({"a": Line(T, HILL), "b": Line(2 * T, 2 * HILL)})
    assert legend(axis) == ["a", "b"]
    np.testing.assert_allclose(data(axis, "b"), [2 * T, 2 * HILL])
    assert line(axis, "a").get_color() != line(axis, "b").get_color()


def test_trees_of_losses_are_named_by_their_places():
    losses = {"train": HILL, "heads": {"x": 2 * HILL}}
    axis = plots.lines(Line(T, losses))
    assert legend(axis) == ["loss, heads/x", "loss, train"]
    np.testing.assert_allclose(data(axis, "loss, heads/x")[1], 2 * HILL)


def test_seven_curves_differ_in_colour_or_dash():
    axis = plots.lines({str(k): Line(T, HILL + k) for k in range(24)})
    styles = {(x.get_color(), str(x._unscaled_dash_pattern)) for x in axis.lines}
    assert len(styles) == 24


@pytest.mark.parametrize("plot", [plots.lines, plots.paths])
def test_losses_that_are_not_finite_leave_gaps(plot):
    losses = np.array([1.0, np.inf, np.nan, 2.0])
    axis = plot({"a": Path(T, losses)} if plot is plots.paths else Line(T, losses))
    axis.figure.draw_without_rendering()
    expected = [1.0, np.nan, np.nan, 2.0]
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), expected)
    nothing = np.full(4, np.nan)
    plot(Path(T, nothing) if plot is plots.paths else Line(T, nothing))


def test_losses_of_many_sizes_are_on_a_logarithmic_scale():
    wide = np.array([0.0, 1e-3, 1.0, 5.0])
    assert plots.lines(Line(T, wide)).get_yscale() == "log"
    assert "log" in plots.lines(Line(T, wide)).get_ylabel()
    assert plots.lines(Line(T, wide), scale="linear").get_yscale() == "linear"
    assert plots.lines(Line(T, HILL)).get_yscale() == "linear"
    assert plots.lines(Line(T, HILL), scale="log").get_yscale() == "log"
    assert plots.lines(Line(T, wide - 1e-5)).get_yscale() == "linear"
    assert plots.paths(Path(T, wide)).get_yscale() == "linear"
    assert plots.paths(Path(T, wide), scale="auto").get_yscale() == "log"


def test_a_barrier_reaches_from_the_chord_to_the_path():
    path = Path(jnp.asarray(T), jnp.asarray(HILL))
    axis = plots.paths(path, barriers=barrier(path))
    np.testing.assert_allclose(data(axis, "_chord loss"), [T, 1 + 2 * T], rtol=1e-6)
    bracket = [[0.25, 0.25], [1.5, 4.0]]
    np.testing.assert_allclose(data(axis, "_barrier loss"), bracket, rtol=1e-6)
    assert legend(axis) == ["loss, barrier 2.5"]


def test_positions_may_go_beyond_the_ends_in_any_order():
    order = [4, 2, 0, 3, 1, 5]
    at, losses = np.array([[-1, *T, 2], [50, *HILL, 70]])[:, order]
    axis = plots.paths(Path(at, losses), barriers=barrier(Path(at, losses)))
    np.testing.assert_allclose(data(axis, "_chord loss"), [T, 1 + 2 * T])
    np.testing.assert_allclose(data(axis, "_barrier loss")[1], [1.5, 4.0])


def test_barriers_of_some_of_several_paths_and_of_trees():
    straight, curved = Path(T, HILL), Path(T, 0 * T)
    found = {"straight": straight, "curved": curved}
    axis = plots.paths(found, barriers={"straight": barrier(straight)})
    assert legend(axis) == ["straight, barrier 2.5", "curved"]
    tree = Path(T, {"a": jnp.asarray(HILL), "b": jnp.asarray(0 * T)})
    axis = plots.paths(tree, barriers=barrier(tree))
    assert legend(axis) == ["loss, a, barrier 2.5", "loss, b, barrier 0"]


@pytest.mark.parametrize("height", [np.inf, np.nan])
def test_a_barrier_that_is_not_finite_is_named_only(height):
    losses = np.array([1.0, np.inf, 2.0, 3.0])
    axis = plots.paths(Path(T, losses), barriers=Barrier(height, 0.25, height, 0))
    axis.figure.draw_without_rendering()
    assert legend(axis) == [f"loss, barrier {height:g}"]
    assert not [x for x in axis.lines if x.get_label().startswith("_barrier")]


def test_mistakes_with_paths():
    path, mark = Path(T, HILL), Barrier(1.0, 0.5, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"barriers of \['b'\], but the paths"):
        plots.paths({"a": path}, barriers={"b": mark})
    with pytest.raises(ValueError, match="mapping of their names"):
        plots.paths({"a": path, "b": path}, barriers=mark)
    with pytest.raises(ValueError, match="losses at 0 and 1"):
        plots.paths(Path(T + 0.1, HILL), barriers=mark)
    for plot in (plots.lines, plots.paths):
        with pytest.raises(ValueError, match="mapping is empty"):
            plot({})
    with pytest.raises(ValueError, match="losses of loss must be a vector of 4"):
        plots.paths(Path(T, HILL[:3]))
    with pytest.raises(ValueError, match="holds no losses"):
        plots.lines(Line(T, {}))


def test_monitored_values_and_threshold():
    steps, values = [0, 10, 20], jnp.array([1.0, jnp.nan, 3.0])
    axis = plots.monitored(steps, values, threshold=2.0)
    np.testing.assert_array_equal(data(axis, "measured"), [steps, values])
    np.testing.assert_array_equal(data(axis, "threshold")[1], [2.0, 2.0, 2.0])
    schedule = plots.monitored(
        steps, values, threshold=[1.0, 2.0, 4.0], threshold_label="2 / rate"
    )
    np.testing.assert_array_equal(data(schedule, "2 / rate")[1], [1.0, 2.0, 4.0])
    assert len(plots.monitored(steps, values).lines) == 1


def test_monitored_eigenvalues_and_names():
    values = np.array([[3.0, 1.0], [4.0, 2.0], [5.0, 2.5]])
    axis = plots.monitored([0, 1, 2], values, threshold=4)
    assert legend(axis) == ["λ1", "λ2", "threshold"]
    np.testing.assert_array_equal(data(axis, "λ2")[1], values[:, 1])
    assert axis.get_ylabel() == "eigenvalue"
    assert axis.get_title(loc="left") == "Eigenvalue over training"
    axis = plots.monitored([0, 1], {"SGD": [1, 2], "SAM": [1, 1]}, ylabel="sharpness")
    assert legend(axis) == ["SGD", "SAM"]
    assert axis.get_ylabel() == "sharpness"


@pytest.mark.parametrize(
    ("steps", "values"),
    [([1], [1.0, 2.0]), (1, 2.0), ([1], np.ones((2, 3))), ([1], {"a": [1, 2]})],
)
def test_monitored_shapes(steps, values):
    with pytest.raises(ValueError, match="vectors of one length"):
        plots.monitored(steps, values)


STEPS = [0, 1, 10, 100, 1000]


def test_grokking_marks_the_delay():
    train, validation = [0.1, 0.2, 0.95, 1, 1], [0.1, 0.1, 0.96, 0.3, 0.99]
    axis = plots.grokking(STEPS, train, validation, level=0.97)
    assert axis.get_xscale() == "log"
    np.testing.assert_array_equal(data(axis, "training"), [STEPS[1:], train[1:]])
    np.testing.assert_array_equal(data(axis, "validation")[1], validation[1:])
    np.testing.assert_array_equal(data(axis, "accuracy 0.97"), [[100, 1e3], [0.97] * 2])
    assert "900 steps (×10) after" in axis.get_title(loc="left")
    early = plots.grokking(STEPS, train, validation)
    np.testing.assert_array_equal(data(early, "accuracy 0.95")[0], [10, 10])
    assert early.get_title(loc="left") == "Grokking"


def test_grokking_by_losses():
    train, validation = [9, 1, 0.1, 1e-3, 1e-4], [9, 9, 9, 9, 0.05]
    axis = plots.grokking(STEPS, train, validation, kind="loss", level=0.1)
    np.testing.assert_array_equal(data(axis, "loss 0.1")[0], [10, 1000])
    assert axis.get_yscale() == "log"
    assert axis.get_ylabel() == "loss"
    axis = plots.grokking(STEPS, train, validation, kind="loss")
    assert len(axis.lines) == 2


def test_without_grokking_there_is_no_delay():
    flat = [0.1, 0.1, np.nan, 0.1, 0.2]
    axis = plots.grokking(STEPS, [0.1, 1, 1, 1, 1], flat)
    axis.figure.draw_without_rendering()
    np.testing.assert_array_equal(data(axis, "accuracy 0.95")[0], [1, np.nan])
    assert axis.get_title(loc="left") == "Grokking"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [0.1], [0.1, 0.2]), "train must be a vector of 2 numbers"),
        (([0], [0.1], [0.1]), "a step above 0"),
        (([], [], []), "steps must be a vector of some numbers"),
    ],
)
def test_mistakes_with_grokking(arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.grokking(*arguments)
    with pytest.raises(ValueError, match="kind must be one of"):
        plots.grokking([1], [1], [1], kind="error")
