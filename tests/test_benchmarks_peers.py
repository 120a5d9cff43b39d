"""The comparison with PyTorch's curvature tools, as far as it goes without torch."""

import importlib
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from basinax.benchmarks import _peers_problem, _results, _speed_peers, _table

SHAPES = {
    "perceptron": ((64, 2), (2, 3), (3, 10)),
    "convolutional": ((3, 3, 1, 2), (3, 3, 2, 2), (32, 3), (3, 10)),
}
NOWHERE = {"no_such_package": "no-such-package"}


def small(name, examples=6):
    rng = np.random.default_rng(0)
    params = {}
    for layer, shape in enumerate(SHAPES[name]):
        draws = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        params[f"w{layer}"] = jnp.asarray(2 * draws, jnp.float32)
        params[f"b{layer}"] = jnp.asarray(rng.normal(size=shape[-1]), jnp.float32)
    x = jnp.asarray(rng.uniform(size=(examples, 64)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, examples), jnp.int32)
    return _peers_problem.make(name, params, x, y)


def dense_hessian(problem):
    """Differentiate twice in float64, without products."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), problem.params)
        point, unravel = ravel_pytree(wide)
        x = np.asarray(problem.x, np.float64)

        def loss(point):
            return problem.loss(unravel(point), x, problem.y)

        return np.asarray(jax.jit(jax.jacrev(jax.grad(loss)))(point))


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Spend little on code that runs once or twice, and keep what others compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "clear_caches", lambda: None)
        before = jax.config.values["jax_disable_most_optimizations"]
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def answers():
    found = {}
    for name in SHAPES:
        problem = small(name)
        found[name] = problem, _peers_problem.exact(problem), dense_hessian(problem)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_the_exact_answers_are_those_of_the_matrix(answers, name):
    _, truth, matrix = answers[name]
    np.testing.assert_allclose(truth.trace, np.trace(matrix), rtol=1e-10)
    top = np.linalg.eigvalsh(matrix)[::-1][: _peers_problem.TOP]
    np.testing.assert_allclose(truth.top, top, rtol=1e-9)
    expected = matrix @ truth.direction
    np.testing.assert_allclose(truth.product, expected, atol=1e-12 * abs(matrix).max())


@pytest.fixture(scope="module")
def rows(answers):
    problem, truth, _ = answers["perceptron"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_speed_peers, "exact", lambda _: truth)
        patch.setattr(_speed_peers, "SPREAD_PROBES", 32)
        # One basis size for all instruments, so that they share what is compiled.
        patch.setattr(_speed_peers, "STEPS", 32)
        patch.setitem(_speed_peers.PRODUCTS, "perceptron", 66)
        return _speed_peers.measure(1, [problem], NOWHERE)


def test_our_side_is_right_on_every_task(rows):
    found = {(row["task"], row["by"]): row for row in rows if "note" not in row}
    assert {task for task, _ in found} == set(_speed_peers.OURS)
    for (task, _), row in found.items():
        # The trace is random, but 33 vectors span almost all that ten classes bend.
        assert row["error"] < (1e-3 if task == "trace" else 2e-5), row
        assert min(row["wall"], row["processor"], row["first"]) > 0
        assert row["gradients"] > 0
    assert found["trace", "basinax, XTrace, 66"]["reported_error"] < 1e-3
    # What everyone is measured against is measured against itself.
    references = [row for key, row in found.items() if key[1] != "basinax, fresh"]
    assert len(references) == len(_speed_peers.OURS)
    for row in references:
        assert row["processor_ratio"] == row["wall_ratio"] == 1.0


def test_errors_are_told_from_answers(answers):
    _, truth, matrix = answers["perceptron"]
    error = _speed_peers.relative_error
    assert error("product", 1.5 * truth.product, truth) == pytest.approx(0.5)
    assert error("trace", [0.9 * truth.trace, 0], truth) == pytest.approx(0.1)
    shuffled = np.roll(truth.top, 2)
    assert error("top-5", shuffled, truth) == 0
    nodes = np.linalg.eigvalsh(matrix)
    assert error("density", nodes, truth) < 1e-9
    copies = np.concatenate([nodes, truth.top[:1]])  # a ghost moves all others down
    expected = max(truth.top[:-1] / truth.top[1:]) - 1
    assert error("density", copies, truth) == pytest.approx(expected)


def test_hutchinson_needs_its_variance_over_that_allowed(answers):
    problem, truth, matrix = answers["perceptron"]
    variance = 2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2))
    exact = variance / (_speed_peers.TARGET * truth.trace) ** 2
    # The sample variance of 256 draws is known to 9 % if they are Gaussian.
    assert 0.6 < _speed_peers.needed_probes(problem, truth) / exact < 1.6


def test_what_is_missing_takes_one_line_each(rows):
    notes = [row["note"] for row in rows if "note" in row]
    assert notes == ["no_such_package is not installed: pip install no-such-package"]
    assert _speed_peers.missing({"json": "json"}) == []
    table = _speed_peers.table(rows, rounds=1)
    assert notes[0] in table.notes


def test_torch_is_imported_by_nothing_else():
    if importlib.util.find_spec("torch") is None:
        with pytest.raises(ModuleNotFoundError, match="torch"):
            importlib.import_module("basinax.benchmarks._peers_torch")
    else:
        assert "torch" not in sys.modules


def test_a_peer_that_fails_is_named_and_the_others_go_on(answers):
    _, truth, _ = answers["perceptron"]

    def broken(seed):
        raise AttributeError("module 'torch' has no attribute 'eig'\nmore")

    def steady(seed):
        return truth.top * (1 + 1e-3 * seed)

    contender = _speed_peers.Contender
    entrants = [
        contender("gradient", "JAX", lambda seed: None, repeats=3),
        contender("gradient", "torch", lambda seed: None, repeats=3),
        contender("top-5", "basinax", steady),
        contender("top-5", "peer", broken),
        contender("top-5", "third", steady, scale=4.0),
    ]
    found, failures = _speed_peers.race(entrants, truth, rounds=2)
    assert failures == ["peer failed at top-5: module 'torch' has no attribute 'eig'"]
    assert [row["by"] for row in found] == ["JAX", "torch", "basinax", "third"]
    expected = 1e-3 * np.sqrt((0 + 1 + 4) / 3)
    assert found[2]["error"] == pytest.approx(expected)
    assert found[3]["error"] == pytest.approx(expected / 2)  # four times the probes


def test_a_failure_of_our_own_is_raised(answers):
    def broken(seed):
        raise ValueError("ours")

    contender = _speed_peers.Contender("top-5", "basinax", broken)
    with pytest.raises(ValueError, match="ours"):
        _speed_peers.race([contender], answers["perceptron"][1], rounds=1)


def test_the_table_fits_a_hundred_columns(capsys):
    base = {
        "network": "convolutional",
        "examples": 256,
        "parameters": 71754,
        "hutchinson_probes": 2500,
        "threads": 1,
        "versions": {"torch": "2.0"},
        "wall": 123.4,
        "fastest_wall": 100.0,
        "processor": 123.4,
        "fastest_processor": 100.0,
        "first": 12.34,
        "gradients": 1234.5,
        "error": 0.00123,
        "wall_ratio": 12.34,
        "processor_ratio": 12.34,
        "fastest_processor_ratio": 23.45,
        "fastest_wall_ratio": 34.56,
    }
    rows = [
        base | {"task": "density", "by": "curvlinops, not reorth."},
        base
        | {"task": "trace", "by": "eigenthings, Hutch++, 84", "reported_error": 0.01},
        base | {"network": "perceptron", "task": "gradient", "by": "JAX"},
        {"note": "a line"},
    ]
    assert json.loads(json.dumps(_results.plain(rows))) == rows
    table = _speed_peers.table(rows, rounds=3)
    assert [line[0] for line in table.rows] == [
        "convolutional",
        "density, curvlinops, not reorth.",
        "trace, eigenthings, Hutch++, 84",
        "perceptron",
        "gradient, JAX",
    ]
    assert all(len(line) == len(table.columns) for line in table.rows)
    assert table.rows[2][4] == "1e-3 (1e-2)"
    assert table.rows[2][5:] == ("12.3×", "23.4×", "12.3×")
    assert table.notes[-1] == "a line"
    console = __import__("rich.console").console.Console(width=100)
    _table.show(table, console)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert any("curvlinops, not reorth." in line for line in lines)
