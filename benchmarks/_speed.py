"""Micro-benchmarks, each a ratio to a peer that is timed in turn with it.

The part "clip" is here, the others have their own files. Every method clips the same
Gaussian matrices at the same kappa, the largest singular value over the threshold, and
the ratio is against the authors' iteration (10 coupled Newton-Schulz steps in float32).
Speed means little without the error, which is measured against a float64 singular value
decomposition.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from basinax.benchmarks import _speed_losses, _speed_projection
from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._results import SCHEMA, environment, write_json
from basinax.benchmarks._table import Table, short, show
from basinax.benchmarks._tasks import Usage
from basinax.optimizers import soft_spectral_clip

METHODS: tuple[Any, ...] = ("auto", "eigh", "polynomial", "newton_schulz", "svd")
REFERENCE = "newton_schulz"
SHAPES = ("256x1024", "512x512", "512x2048")
ACCELERATOR_SHAPES = ("768x2304", "768x3072", "1024x4096", "1536x6144")
PARTS = ("clip", "losses", "projection")
MINIMUM_SECONDS = 0.02  # a timing shorter than this repeats the call


class Study(NamedTuple):
    """What to time."""

    parts: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    methods: tuple[Any, ...]
    kappa: float
    rounds: int
    logits: tuple[int, int] = _speed_losses.SHAPE


def _shape(text: str, option: str = "--shapes") -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise Usage(f"{option} {text!r}: write shapes as ROWSxCOLUMNS, like 256x1024")
    return int(rows), int(columns)


def prepare(
    parts: Sequence[str],
    shapes: Sequence[str] | None,
    methods: Sequence[str] | None,
    kappa: float,
    rounds: int,
    logits: str | None = None,
) -> Study:
    """Check what the user asked for; no part means all of them.

    Raises:
      Usage: a part, a shape, a method or a number makes no sense.
    """
    for part in parts:
        if part not in PARTS:
            raise Usage(f"unknown part {part!r}; valid names: {', '.join(PARTS)}")
    for method in methods or ():
        if method not in METHODS:
            valid = ", ".join(METHODS)
            raise Usage(f"unknown method {method!r}; valid names: {valid}")
    if not kappa > 0 or rounds < 1:
        raise Usage("--kappa must be positive and --rounds at least 1")
    if shapes is None:
        accelerator = jax.default_backend() != "cpu"
        shapes = SHAPES + (ACCELERATOR_SHAPES if accelerator else ())
    chosen = tuple(methods or METHODS)
    if REFERENCE not in chosen:
        chosen = (*chosen, REFERENCE)
    size = _shape(logits, "--logits") if logits else _speed_losses.SHAPE
    parts = tuple(parts or PARTS)
    return Study(parts, tuple(map(_shape, shapes)), chosen, kappa, rounds, size)


def reference(x: np.ndarray, threshold: float) -> np.ndarray:
    """Clip by a float64 singular value decomposition."""
    u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    return (u * (s / np.sqrt(1.0 + (s / threshold) ** 2))) @ vt


def measure_shape(study: Study, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Time and check every method on one shape; one row per method."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    threshold = float(np.linalg.norm(x.astype(np.float64), 2)) / study.kappa
    exact = reference(x, threshold)
    on_device = jnp.asarray(x)
    calls: dict[str, Any] = {
        method: partial(
            jax.jit(partial(soft_spectral_clip, method=method)), on_device, threshold
        )
        for method in study.methods
    }
    errors = {}
    for method, call in calls.items():
        difference = np.asarray(call(), np.float64) - exact
        errors[method] = float(np.linalg.norm(difference) / np.linalg.norm(exact))
    probe = interleaved_times(calls, rounds=1)
    repeats = max(1, int(MINIMUM_SECONDS / min(t[0] for t in probe.values())))
    times = interleaved_times(calls, rounds=study.rounds, repeats=min(repeats, 50))
    return [
        {
            "shape": list(shape),
            "method": method,
            "milliseconds": 1e3 * median(times[method]),
            "speedup": median(
                [
                    slow / fast
                    for slow, fast in zip(times[REFERENCE], times[method], strict=True)
                ]
            ),
            "relative_error": errors[method],
        }
        for method in study.methods
    ]


def table(results: dict[str, Any]) -> Table:
    """Tabulate time, speed-up and error by shape and method."""
    rows = []
    for row in results["rows"]:
        rows.append(
            (
                "x".join(map(str, row["shape"])),
                row["method"],
                short(row["milliseconds"]),
                f"{row['speedup']:.2f}×",
                f"{row['relative_error']:.1e}",
            )
        )
    return Table(
        "Soft spectral clipping of one float32 matrix",
        ("shape", "method", "ms", f"vs {REFERENCE}", "relative error"),
        tuple(rows),
        (
            f"Gaussian matrices, kappa {results['kappa']:g}; median of "
            f"{results['rounds']} interleaved rounds; larger ratios are faster. "
            "Error: Frobenius norm against a float64 SVD.",
            results["environment"]["hardware"],
        ),
    )


def run(study: Study, out: Path, console: Console, *, command: str) -> dict[str, Any]:
    """Time everything, print the tables and write ``speed.json``."""
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "speed",
        "command": command,
        "environment": environment(),
        "kappa": study.kappa,
        "rounds": study.rounds,
    }
    path = out / "speed.json"
    with console.status("") as status:
        if "clip" in study.parts:
            results["rows"] = []
            for shape in study.shapes:
                status.update(f"timing {shape[0]}x{shape[1]}")
                results["rows"] += measure_shape(study, shape)
                write_json(path, results)
        if "losses" in study.parts:
            status.update("timing losses")
            results["losses"] = _speed_losses.measure(study.logits, study.rounds)
            write_json(path, results)
        if "projection" in study.parts:
            status.update("timing perp_grad")
            results["projection"] = _speed_projection.measure(rounds=study.rounds)
            write_json(path, results)
    if "rows" in results:
        show(table(results), console)
    if "losses" in results:
        show(_speed_losses.table(results["losses"], study.rounds), console)
    if "projection" in results:
        show(_speed_projection.table(results["projection"], study.rounds), console)
    console.print(f"Numbers: {path}", highlight=False, markup=False, soft_wrap=True)
    return results
