"""Eigenvalues, singular values and cosines are drawn as they are."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from basinax.landscape import Eigenpairs, gradient_cosines, plots
from basinax.optimizers import hard_spectral_clip

VALUES = np.array([5.0, 3.0, 0.5, -2.0])
RESIDUALS = np.array([0.1, 0.2, 0.3, 0.4])


def line(axis, label):
    (found,) = [x for x in axis.lines if x.get_label() == label]
    return found


def pairs(values=VALUES, converged=(True, False, True, False)):
    numbers = map(jnp.asarray, (values, RESIDUALS, converged))
    values, residuals, converged = numbers
    return Eigenpairs(values, None, residuals, 9, converged)


def test_eigenvalues_their_signs_and_their_convergence():
    axis = plots.eigenvalues(pairs())
    for label, at in {
        "positive": [1, 3],
        "positive, not converged": [2],
        "negative, not converged": [4],
    }.items():
        dots = line(axis, label)
        np.testing.assert_array_equal(dots.get_xdata(), at)
        np.testing.assert_allclose(dots.get_ydata(), VALUES[np.array(at) - 1])
        assert (dots.get_markerfacecolor() == "none") == ("not" in label)
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert len(names) == 3
    stems, bars = axis.collections
    ends = [[[k + 1, 0], [k + 1, v]] for k, v in enumerate(VALUES)]
    np.testing.assert_allclose(stems.get_segments(), ends, rtol=1e-6)
    ends = np.stack([VALUES - RESIDUALS, VALUES + RESIDUALS], 1)
    drawn = np.array(bars.get_segments())[:, :, 1]
    np.testing.assert_allclose(drawn, ends, rtol=1e-6)


def test_bare_eigenvalues_need_no_legend():
    axis = plots.eigenvalues([3.0, 1.0])
    assert axis.get_legend() is None
    np.testing.assert_array_equal(line(axis, "positive").get_ydata(), [3.0, 1.0])
    (bars,) = plots.eigenvalues([3.0], residuals=[0.5]).collections[1:]
    np.testing.assert_array_equal(bars.get_segments()[0][:, 1], [2.5, 3.5])


def test_scale_of_eigenvalues():
    assert plots.eigenvalues([1e4, 1.0]).get_yscale() == "log"
    assert plots.eigenvalues([1e4, 1.0], scale="linear").get_yscale() == "linear"
    assert plots.eigenvalues([1e4, 1.0, -1.0]).get_yscale() == "linear"
    with pytest.raises(ValueError, match="scale must be one of"):
        plots.eigenvalues([1.0], scale="symlog")
    with pytest.raises(ValueError, match="needs positive values"):
        plots.eigenvalues([-1.0], scale="log")


def test_eigenvalues_that_are_not_finite():
    axis = plots.eigenvalues(pairs(np.full(4, np.nan), [False] * 4))
    axis.figure.draw_without_rendering()
    assert np.isnan(line(axis, "positive, not converged").get_ydata()).all()


@pytest.mark.parametrize(
    ("found", "residuals", "message"),
    [
        ([], None, "vector of some numbers"),
        (1.0, None, "vector of some numbers"),
        ([1.0, 2.0], [0.1], "residuals must be a vector of 2 numbers"),
        (pairs(), RESIDUALS, "have their own"),
    ],
)
def test_mistakes_with_eigenvalues(found, residuals, message):
    with pytest.raises(ValueError, match=message):
        plots.eigenvalues(found, residuals=residuals)


def test_singular_values_before_and_after_clipping():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (5, 4))
    matrix = jnp.asarray(u * [2.0, 9.0, 4.0] @ v.T, jnp.float32)
    axis = plots.singular_values(matrix, hard_spectral_clip(matrix, 3.0), threshold=3)
    assert axis.get_yscale() == "log"  # of rank three in four columns
    before, after = (line(axis, name).get_ydata() for name in ("before", "after"))
    # Of a float32 matrix of norm 9: a few units in its last place.
    np.testing.assert_allclose(before, [9.0, 4.0, 2.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(after, [3.0, 3.0, 2.0, 0.0], atol=1e-5)
    np.testing.assert_array_equal(line(axis, "threshold 3").get_ydata(), [3.0, 3.0])
    np.testing.assert_array_equal(line(axis, "before").get_xdata(), [1, 2, 3, 4])


def test_singular_values_are_taken_as_given_and_sorted():
    axis = plots.singular_values(jnp.array([1.0, 3.0, 2.0], jnp.bfloat16))
    assert axis.get_legend() is None
    assert axis.get_yscale() == "linear"
    np.testing.assert_array_equal(line(axis, "before").get_ydata(), [3.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 2, 2)), r"before must be a matrix .* got shape \(2, 2, 2\)"),
        (np.zeros((0, 3)), "before must be a matrix"),
        ([[1.0, np.nan]], "not finite"),
    ],
)
def test_mistakes_with_singular_values(matrix, message):
    with pytest.raises(ValueError, match=message):
        plots.singular_values(matrix)


def test_cosines_their_numbers_and_their_colours():
    grads = jnp.array([[1.0, 0.0], [-3.0, 4.0], [0.0, 2.0]])
    found = gradient_cosines(grads)
    axis = plots.cosines(found, labels=["depth", "parts", "edges"])
    expected = [[1.0, -0.6, 0.0], [-0.6, 1.0, 0.8], [0.0, 0.8, 1.0]]
    (image,) = axis.images
    np.testing.assert_allclose(image.get_array(), expected, atol=1e-6)
    assert image.get_clim() == (-1, 1)
    written = {text.get_position(): text.get_text() for text in axis.texts}
    assert written[1, 0] == written[0, 1] == "-0.60"
    assert written[2, 1] == "0.80"
    red, blue = (image.cmap(image.norm(sign))[:3] for sign in (-0.9, 0.9))
    assert red[0] > red[2], "conflict is red"
    assert blue[2] > blue[0], "agreement is blue"
    for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == ["depth", "parts", "edges"]
    title = axis.get_title(loc="left")
    assert title == "Gradient cosines: mean 0.07, 33% of pairs conflict"


def test_numbers_in_cells_are_readable():
    axis = plots.cosines(np.array([[1.0, -0.7], [0.1, 0.5]]))
    colours = [to_hex(text.get_color()) for text in axis.texts]
    assert colours == ["#ffffff", "#ffffff", "#222222", "#222222"]
    written = {text.get_position(): text.get_text() for text in axis.texts}
    assert written[1, 0] == "-0.70", "row 0, column 1"


def test_many_tasks_have_no_numbers_and_gaps_are_hatched():
    matrix = np.eye(11)
    assert not plots.cosines(matrix).patches
    matrix[3] = matrix[:, 3] = np.nan
    axis = plots.cosines(matrix)
    axis.figure.draw_without_rendering()
    assert not axis.texts
    assert np.ma.getmaskarray(axis.images[0].get_array()).sum() == 21
    assert axis.patches[0].get_hatch()
    axis = plots.cosines(np.array([[np.nan, 0.5], [0.5, 1.0]]))
    assert [text.get_text() for text in axis.texts] == ["0.50", "0.50", "1.00"]


@pytest.mark.parametrize("matrix", [np.ones((2, 3)), np.ones(3), np.ones((0, 0))])
def test_cosines_must_be_square(matrix):
    with pytest.raises(ValueError, match=r"matrix \(T, T\)"):
        plots.cosines(matrix)


def test_as_many_labels_as_tasks():
    with pytest.raises(ValueError, match="name 2 tasks, got 1"):
        plots.cosines(np.eye(2), labels=["a"])
