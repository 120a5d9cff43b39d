"""The curvature report from end to end, against the exact spectrum."""

import json

import browser
import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("rich")

from basinax.benchmarks import (
    _checkpoint,
    _landscape_page,
    _landscape_report,
    _tasks,
    main,
)
from basinax.benchmarks._tasks import Options, Usage
from basinax.landscape import Density, dense, hessian

TINY = ["landscape", "--width", "4", "--depth", "1", "--seed", "1"]
TINY += ["--eigenvalues", "3", "--probes", "4", "--lanczos-steps", "24"]
TINY += ["--surface", "5"]


def read(folder):
    return json.loads((folder / "landscape.json").read_text())


def check_against(exact, found):
    """Hold a report against the whole spectrum, largest first."""
    assert found["parameters"] == len(exact) == 310
    np.testing.assert_allclose(found["largest"]["values"], exact[:3], rtol=1e-3)
    np.testing.assert_allclose(found["smallest"]["values"], exact[-1:], rtol=1e-3)

    def close(estimate, value, slack=0.0):
        # Four standard errors, themselves of few probes.
        assert abs(estimate["value"] - value) <= 4 * estimate["standard_error"] + slack

    close(found["sums"]["trace"], exact.sum())
    close(found["sums"]["frobenius_norm"], np.sqrt(np.sum(exact**2)))
    spectrum = found["spectrum"]
    damping = spectrum["effective_dimension"]["damping"]
    assert damping == pytest.approx(max(0.01 * exact[0], -2 * exact[-1]), rel=1e-3)
    close(spectrum["effective_dimension"], np.sum(exact / (exact + damping)), 0.1)
    # Steps of the counting function are resolved to the spacing of the nodes only.
    floor = spectrum["floor"]
    assert floor == pytest.approx(1e-3 * exact[0], rel=1e-3)
    close(spectrum["negative_share"], np.mean(exact < -floor), 0.1)
    rate = found["edge"]["gradient_descent_largest_stable_rate"]
    assert rate == pytest.approx(2 / exact[0], rel=1e-3)
    assert found["edge"]["adam_ratio_at_peak_rate"] > 0
    sharp = found["ascent"]
    assert sharp["worst case, radius 0.05"] >= sharp["SAM, one step of 0.05"] > 0


def check_figure(found):
    stored = Density(*(np.array(found["density"][name]) for name in Density._fields))
    (axis,) = _landscape_report.draw(found, stored).axes
    curve, marks = axis.lines
    np.testing.assert_array_equal(curve.get_ydata(), found["density"]["density"])
    drawn = found["largest"]["values"] + found["smallest"]["values"]
    np.testing.assert_array_equal(marks.get_xdata(), drawn)


def check_planes(found, loss, params):
    """Every plane has the model at its origin; the path starts far and ends there."""
    planes = found["planes"]
    assert set(planes) == {"hessian", "random", "path"}
    here = float(loss(params))
    for name in ("hessian", "random"):
        assert planes[name]["losses"][2][2] == pytest.approx(here, rel=1e-5)
    path = np.array(planes["path"]["coordinates"])
    np.testing.assert_allclose(path[-1], 0.0, atol=1e-5)
    assert np.linalg.norm(path[0]) == pytest.approx(
        np.linalg.norm(path, axis=1).max(), rel=0.2
    )
    # Training went downhill, on the coarsest of grids too.
    grid, losses = planes["path"], np.array(planes["path"]["losses"])
    start, end = (
        losses[
            np.abs(np.array(grid["x"]) - point[0]).argmin(),
            np.abs(np.array(grid["y"]) - point[1]).argmin(),
        ]
        for point in (path[0], path[-1])
    )
    assert start > 1.4 * end
    explained = planes["path"]["explained"]
    assert 0.5 < sum(explained) <= 1 + 1e-6
    # Along the sharpest axis the quadratic model adds one nat at the border.
    (x,) = {len(planes["hessian"][k]) for k in ("x", "y")}
    assert x == 5
    reach = planes["hessian"]["x"][-1]
    assert 0.5 * found["largest"]["values"][0] * reach**2 == pytest.approx(1, rel=1e-3)
    panels = _landscape_page.draw_planes(found).axes
    titles = [axis.get_title(loc="left") for axis in panels]
    assert [t for t in titles if t] == [
        t for t, _, _ in _landscape_page.TITLES.values()
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Train, measure and save; nearly all of it is compiling."""
    out = tmp_path_factory.mktemp("landscape")
    train = ["--steps", "100", "--rate", "0.01", "--save", str(out / "model.npz")]
    assert main([*TINY, *train, "--out", str(out)]) == 0
    return out


@browser.in_browser
def test_the_report_in_a_browser(finished, tmp_path):
    browser.check(finished / "report.html", tmp_path)


def test_report_of_a_trained_model_and_of_its_checkpoint(finished, tmp_path, capsys):
    """One test, because one set of compiled instruments does."""
    saved, folder = finished / "model.npz", tmp_path / "again"
    found = read(finished)
    task = _tasks.load("digits", Options(width=4, depth=1))
    params = _checkpoint.load(saved, jax.eval_shape(task.init, jax.random.key(0)))
    matrix = dense(hessian(task.loss, params, task.curvature, linearize=True), params)
    symmetric = 0.5 * (np.asarray(matrix, np.float64) + np.asarray(matrix).T)
    check_against(np.linalg.eigvalsh(symmetric)[::-1], found)
    check_figure(found)
    check_planes(found, lambda w: task.loss(w, task.curvature), params)
    for name in _landscape_page.CAPTIONS:
        assert (finished / name).read_bytes().startswith(b"\x89PNG")

    capsys.readouterr()
    load = ["--checkpoint", str(saved), "--out", str(folder)]
    assert main([*TINY, *load]) == 0
    again = read(folder)
    for key in ("largest", "sums", "spectrum", "ascent", "noise", "test_loss"):
        assert again[key] == found[key]
    assert "adam_ratio_at_peak_rate" not in again["edge"]  # no optimizer, no edge
    assert set(again["planes"]) == {"hessian", "random"}  # no training, no path
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 100
    for text in ("λ1", "trace", "PAC-Bayes", "model.npz"):
        assert text in out


def test_gaps_and_unconverged_pairs():
    top = {
        "values": [4.0, 2.0, -1.0],
        "residuals": [1e-5, 0.5, 1e-6],
        "converged": [True, False, True],
        "matvecs": 20,
    }
    bottom = {"values": [-1.0], "residuals": [0.1], "converged": [False], "matvecs": 9}
    table = _landscape_report.eigenvalues({"largest": top, "smallest": bottom})
    assert [row[0] for row in table.rows] == ["λ1", "λ2 ~", "λ3", "smallest ~"]
    assert [row[3] for row in table.rows] == ["2.00", "–", "–", "–"]
    assert "not converged" in table.notes[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--task nothing", "valid names: digits, bytes"),
        ("--steps 0", "--steps 0: must be positive"),
        ("--rate -1", "--rate -1: must be positive"),
        ("--lanczos-steps 0", "--lanczos-steps 0: must be positive"),
        ("--save model.txt", "must end in .npz"),
        ("--checkpoint none.npz", "No such file"),
        ("--checkpoint none.npz --save x.npz", "nothing new to save"),
    ],
)
def test_mistakes_are_one_line(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["landscape", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_other_models_are_refused(tmp_path):
    params = {"a": np.ones((2, 3), np.float32), "b": [np.zeros(2, np.float32)]}
    path = tmp_path / "folder" / "x.npz"
    _checkpoint.save(path, params)
    back = _checkpoint.load(path, params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(Usage, match=r"a has shape \(2, 3\), this model needs \(3, 2\)"):
        _checkpoint.load(path, {**params, "a": np.ones((3, 2))})
    with pytest.raises(Usage, match="holds a, b/0; this model needs a"):
        _checkpoint.load(path, {"a": params["a"]})
    path.write_text("no archive")
    with pytest.raises(Usage, match=r"not an \.npz file"):
        _checkpoint.load(path, params)
