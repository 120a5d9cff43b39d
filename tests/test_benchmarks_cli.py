"""The command line from end to end, mistakes and interruptions included."""

import json
import re

import browser
import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("rich")

from basinax.benchmarks import (
    _compare,
    _draw,
    _results,
    _speed_clip,
    _speed_monitor,
    _speed_nexus,
    _speed_projection,
    _surface_figures,
    _table,
    main,
)

TINY = (
    "compare --optimizers adamw,spectra_adamw --steps 10 --seeds 2 --grid 2 --width 8 "
    "--depth 1 --batch-size 8 --surface 5 --out"
)


def run_compare(out):
    return main([*TINY.split(), str(out)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compare, "TIMING_ROUNDS", 5)
        assert run_compare(out) == 0
    return out


def read(out):
    return json.loads((out / "results.json").read_text())


def test_results_hold_every_seed_and_every_number(finished):
    results = read(finished)
    assert results["complete"] is True
    assert list(results["optimizers"]) == ["adamw", "spectra_adamw"]
    assert results["settings"]["steps"] == 10
    assert results["settings"]["search_seed"] not in results["settings"]["seeds"]
    assert "--optimizers adamw,spectra_adamw" in results["command"]
    assert results["environment"]["versions"]["jax"] == jax.__version__
    for numbers in results["optimizers"].values():
        assert len(numbers["grid"]) == 2
        assert numbers["at_grid_end"] is True  # every point of two is an end
        best = min(numbers["grid"], key=lambda point: point["validation_loss"])
        assert numbers["learning_rate"] == best["learning_rate"]
        assert [seed["seed"] for seed in numbers["seeds"]] == [0, 1]
        for seed in numbers["seeds"]:
            curve = seed["curves"]["validation_loss"]
            assert len(curve) == 10
            assert curve[-1] == pytest.approx(seed["validation_loss"], rel=1e-5)
            assert np.isfinite(seed["lambda_max"])
            assert seed["trace_standard_error"] > 0
        losses = [seed["test_loss"] for seed in numbers["seeds"]]
        mean = numbers["summary"]["test_loss"]
        assert mean["mean"] == pytest.approx(np.mean(losses))
        assert mean["sd"] == pytest.approx(np.std(losses, ddof=1))
    assert results["timing"]["ratio"]["adamw"] == 1.0


def test_surfaces_are_those_of_the_first_seed(finished):
    results = read(finished)
    for numbers in results["optimizers"].values():
        around, seed = numbers["surroundings"], numbers["seeds"][0]
        surface = np.array(around["plane"]["losses"])
        assert surface.shape == (5, 5)
        line = np.array(around["line"]["losses"])
        # The batch that curvature is measured on is the whole training set here.
        assert surface[2, 2] == pytest.approx(seed["train_loss"], rel=1e-5)
        assert line[4] == pytest.approx(seed["train_loss"], rel=1e-5)
        step = around["line"]["steps"][5]
        second = (line[3] - 2 * line[4] + line[5]) / step**2
        assert second == pytest.approx(seed["lambda_max"], rel=0.25)


def test_surfaces_share_axes_and_colours(finished):
    results = read(finished)
    figure = _surface_figures.surface_figure(results)
    panels = [axis for axis in figure.axes if axis.get_title(loc="left")]
    assert [axis.get_title(loc="left") for axis in panels] == ["adamw", "spectra_adamw"]
    first, second = (axis.collections[0] for axis in panels)
    np.testing.assert_array_equal(first.levels, second.levels)
    seen = np.array(
        [o["surroundings"]["plane"]["losses"] for o in results["optimizers"].values()]
    )
    assert first.levels[0] <= seen.min()
    assert first.levels[-1] >= seen.max()
    (axis,) = _surface_figures.line_figure(results).axes
    for line, numbers in zip(axis.lines, results["optimizers"].values(), strict=True):
        np.testing.assert_array_equal(
            line.get_ydata(), numbers["surroundings"]["line"]["losses"]
        )


def test_spectra_never_steps_beyond_its_ceiling(finished):
    results = read(finished)
    ceiling = results["settings"]["step_norm_ceiling"]
    for seed in results["optimizers"]["spectra_adamw"]["seeds"]:
        assert seed["max_update_norm"] <= ceiling * 1.001


def test_pairs_are_by_seed(finished):
    results = read(finished)
    pair = results["paired"]["spectra_adamw"]
    base, new = (results["optimizers"][n]["seeds"] for n in ("adamw", "spectra_adamw"))
    differences = [
        b["test_loss"] - a["test_loss"] for a, b in zip(base, new, strict=True)
    ]
    assert pair["base"] == "adamw"
    assert pair["mean"] == pytest.approx(np.mean(differences))
    assert pair["better"] == sum(d < 0 for d in differences)


def test_report_is_self_contained_and_agrees_with_the_numbers(finished):
    page = (finished / "report.html").read_text()
    results = read(finished)
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    assert "http" not in page
    for numbers in results["optimizers"].values():
        assert _table.spread(numbers["summary"]["test_loss"]) in page
    assert results["command"] in page
    for name in (*_draw.FIGURES, *_draw.SURFACES):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


@browser.in_browser
def test_the_report_in_a_browser(finished, tmp_path):
    browser.check(finished / "report.html", tmp_path)


def test_the_table_fits_a_hundred_columns(finished, capsys):
    console = __import__("rich.console").console.Console(width=100)
    for table in _table.tables(read(finished)):
        _table.show(table, console)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert any("spectra_adamw" in line for line in lines)


def test_ctrl_c_keeps_what_is_finished(finished, tmp_path, monkeypatch, capsys):
    done = read(finished)["optimizers"]

    def interrupted(study, name, *rest):
        if name == "spectra_adamw":
            raise KeyboardInterrupt
        return done[name]

    monkeypatch.setattr(_compare, "run_optimizer", interrupted)
    assert run_compare(tmp_path) == 130
    results = read(tmp_path)
    assert results["complete"] is False
    assert list(results["optimizers"]) == ["adamw"]
    assert "Interrupted" in (tmp_path / "report.html").read_text()
    out = capsys.readouterr().out
    assert "Interrupted: 1 of 2 optimizers finished" in out
    assert out.count("Interrupted") == 1


def test_ctrl_c_before_anything_is_finished(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_compare, "run_optimizer", interrupted)
    assert run_compare(tmp_path) == 130
    assert read(tmp_path)["optimizers"] == {}
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("compare --surface 2", "--surface 2: needs at least 3"),
        ("compare --task nothing", "valid names: digits, bytes"),
        ("compare --optimizers adamw,nope", "valid names: adamw, spectra_adamw"),
        ("compare --data-dir /does/not/exist", "no such folder"),
        ("compare --steps 1", "needs at least 2"),
        ("compare --seeds 0", "needs at least 1"),
        ("compare --grid 9", "1 to 5"),
        ("claims nothing", "valid names: spectra"),
        ("speed everything", "valid names: clip, losses, projection, monitor, nexus"),
        ("speed --methods magic", "valid names: auto, eigh"),
        ("speed --shapes 3by4", "ROWSxCOLUMNS"),
        ("speed --logits 3by4", "--logits '3by4': write"),
    ],
)
def test_mistakes_are_one_line(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert expected in captured.err


@pytest.mark.parametrize("words", ["", "nothing", "compare --seeds many", "--wrong"])
def test_mistakes_in_the_grammar_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", ["", "compare", "claims", "speed"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "python -m basinax.benchmarks" in text
    if command:
        assert "examples:" in text


def test_speed(tmp_path, capsys):
    words = (
        "speed clip losses --shapes 8x16 --logits 4x8 --rounds 2 "
        "--methods eigh,polynomial --out"
    )
    assert main([*words.split(), str(tmp_path)]) == 0
    results = json.loads((tmp_path / "speed.json").read_text())
    assert [row["method"] for row in results["rows"]["clip"]] == [
        "eigh",
        "polynomial",
        "newton_schulz",  # the reference comes along
    ]
    assert all(row["relative_error"] < 1e-3 for row in results["rows"]["clip"])
    assert results["rows"]["clip"][2]["speedup"] == 1.0
    losses = {row["loss"]: row for row in results["rows"]["losses"]}
    assert losses["softmax (optax)"]["ratio"] == 1.0
    assert losses["softmax (optax)"]["gradient_error"] == 1.0  # it collapsed
    assert losses["softmax, collapse-free"]["gradient_error"] < 1e-5
    assert losses["StableMax"]["gradient_error"] < 1e-6
    out = capsys.readouterr().out
    assert "8x16" in out
    assert "4x8 float32 logits" in out


def test_speed_of_the_projection():
    rows = _speed_projection.measure(leaves=2, shape=(3, 4), rounds=2)
    names = list(_speed_projection.optimizers())
    assert [row["optimizer"] for row in rows] == 2 * names
    assert rows[0]["parameters"] == 24
    assert [row["ratio"] for row in rows if row["optimizer"] == "adamw"] == [1.0, 1.0]
    assert all(row["ratio"] > 0 for row in rows)
    text = str(_speed_projection.table(rows, rounds=2))
    assert "near parallel" in text


@pytest.mark.slow
def test_speed_of_the_monitor():
    """Both columns come from training; a measurement is close to the eigenvalue."""
    (row,) = _speed_monitor.measure((16,), rounds=1, steps=100, measurements=1)
    assert row["cost"] > -1
    assert row["within"] == row["measurements"] == 1
    assert row["largest_error"] < 0.05
    assert "1 of 1" in str(_speed_monitor.table([row], rounds=1))


def test_speed_of_nexus():
    rows = _speed_nexus.measure((4,), (3, 5, 2), microbatches=2, rounds=2)
    assert [row["gradient"] for row in rows] == list(_speed_nexus.contestants())
    assert rows[0]["ratio"] == rows[0]["fastest_ratio"] == 1
    assert all(row["copies"] > 0 for row in rows)
    # What is timed is the same gradient where nothing is walked or normalised.
    rng = np.random.default_rng(0)
    params = [np.float32(rng.normal(size=(3, 2)))]
    data = np.float32(rng.normal(size=(2, 4, 3))), rng.integers(0, 2, (2, 4))
    raw = _speed_nexus.contestants()["raw"]
    _, expected = _speed_nexus.accumulate(params, data)
    _, found = raw(params, data, inner_learning_rate=0.0)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert "over accumulation" in str(_speed_nexus.table(rows, rounds=2))


def test_speed_reference_is_the_definition():
    x = np.diag([3.0, 4.0])
    expected = np.diag([3 / np.sqrt(1 + 9 / 16), 4 / np.sqrt(2)])
    np.testing.assert_allclose(_speed_clip.reference(x, 4.0), expected, atol=1e-14)


def test_summary_leaves_out_what_diverged():
    found = _results.summary([1.0, float("nan"), 3.0, None])
    assert found == {"mean": 2.0, "sd": pytest.approx(2**0.5), "finite": 2, "of": 4}
    assert _results.summary([float("inf")])["mean"] is None


def test_spread_shows_what_the_spread_justifies():
    def written(mean, sd, finite=3, of=3):
        return _table.spread({"mean": mean, "sd": sd, "finite": finite, "of": of})

    assert written(1.23456, 0.0123) == "1.235 ± 0.012"
    assert written(123.4, 45.6) == "123 ± 46"
    assert written(4.3e-4, 9e-5) == "(4.3 ± 0.9)e-4"
    assert written(0.2512, 0.0361) == "0.25 ± 0.04"
    assert written(-0.02, 0.012) == "-0.020 ± 0.012"
    assert written(None, None, 0) == "diverged"
    assert written(5.0, None, 1) == "5.000 (1/3)"


def test_plain_has_no_nan(tmp_path):
    path = tmp_path / "x.json"
    _results.write_json(path, {"a": np.array([1.0, np.nan]), "b": float("inf")})
    assert json.loads(path.read_text()) == {"a": [1.0, None], "b": None}
    assert list(tmp_path.iterdir()) == [path]


def test_curves_that_blow_up_are_still_drawn(finished, tmp_path):
    results = read(finished)
    for seed in results["optimizers"]["adamw"]["seeds"]:
        for key in ("train_loss", "validation_loss", "update_norm", "weight_norm"):
            seed["curves"][key] = [None] * 10
        seed["test_loss"] = seed["lambda_max"] = seed["trace"] = None
    summary = results["optimizers"]["adamw"]["summary"]
    empty = {"mean": None, "sd": None, "finite": 0, "of": 2}
    for key in summary:
        summary[key] = 0 if key == "lambda_converged" else empty
    results["optimizers"]["adamw"]["surroundings"] = None
    assert len(_draw.draw_all(results, tmp_path)) == 5
    results["optimizers"]["spectra_adamw"]["surroundings"] = None
    assert len(_draw.draw_all(results, tmp_path)) == 3
    performance = _table.tables(results)[0]
    assert performance.rows[0][3] == "diverged"
    assert performance.best == {(1, 3)}
