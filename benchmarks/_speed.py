"""Micro-benchmarks, each a ratio to a peer that is timed in turn with it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from basinax.benchmarks import (
    _speed_clip,
    _speed_losses,
    _speed_monitor,
    _speed_nexus,
    _speed_peers,
    _speed_products,
    _speed_projection,
    _speed_sam,
    _speed_samo,
    _speed_spectra,
    _speed_surfaces,
    _speed_weightings,
)
from basinax.benchmarks._results import SCHEMA, environment, write_json
from basinax.benchmarks._table import Table, show
from basinax.benchmarks._tasks import Usage


class Study(NamedTuple):
    """What to time."""

    parts: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    methods: tuple[Any, ...]
    kappa: float
    rounds: int
    logits: tuple[int, int] = _speed_losses.SHAPE


class Part(NamedTuple):
    """One micro-benchmark."""

    about: str
    measure: Callable[[Study], list[dict[str, Any]]]
    table: Callable[[list[dict[str, Any]], Study], Table]
    by_name_only: bool = False
    """Whether it runs only where it is asked for: it needs more than the package."""


PARTS: dict[str, Part] = {
    "clip": Part(
        "soft_spectral_clip by shape and method, with its error",
        lambda s: _speed_clip.measure(s.shapes, s.methods, s.kappa, s.rounds),
        lambda rows, s: _speed_clip.table(rows, s.kappa, s.rounds),
    ),
    "losses": Part(
        "StableMax and collapse-free losses against optax's softmax",
        lambda s: _speed_losses.measure(s.logits, s.rounds),
        lambda rows, s: _speed_losses.table(rows, s.rounds),
    ),
    "projection": Part(
        "AdamW with perp_grad in front against AdamW alone",
        lambda s: _speed_projection.measure(rounds=s.rounds),
        lambda rows, s: _speed_projection.table(rows, s.rounds),
    ),
    "monitor": Part(
        "training with a monitor of the sharpness against training without",
        lambda s: _speed_monitor.measure(rounds=s.rounds),
        lambda rows, s: _speed_monitor.table(rows, s.rounds),
    ),
    "nexus": Part(
        "gradients by nexus against accumulation",
        lambda s: _speed_nexus.measure(rounds=s.rounds),
        lambda rows, s: _speed_nexus.table(rows, s.rounds),
    ),
    "products": Part(
        "products with curvature operators, in gradients",
        lambda s: _speed_products.measure_products(s.rounds),
        lambda rows, s: _speed_products.table(rows, s.rounds),
    ),
    "sam": Part(
        "SGD behind sam against SGD alone",
        lambda s: _speed_sam.measure(rounds=s.rounds),
        lambda rows, s: _speed_sam.table(rows, s.rounds),
    ),
    "samo": Part(
        "gradients of several tasks against the passes they are made of",
        lambda s: _speed_samo.measure(rounds=s.rounds),
        lambda rows, s: _speed_samo.table(rows, s.rounds),
    ),
    "spectra": Part(
        "eigenpairs, trace and density, in gradients",
        lambda s: _speed_spectra.measure(s.rounds),
        lambda rows, s: _speed_spectra.table(rows, s.rounds),
    ),
    "surfaces": Part(
        "loss surfaces, in milliseconds per point",
        lambda s: _speed_surfaces.measure(rounds=s.rounds),
        lambda rows, s: _speed_surfaces.table(rows, s.rounds),
    ),
    "weightings": Part(
        "task weightings on eight and forty tasks, in milliseconds",
        lambda s: _speed_weightings.measure(rounds=s.rounds),
        lambda rows, s: _speed_weightings.table(rows, s.rounds),
    ),
    "peers": Part(
        "the landscape against PyTorch's tools (only by name, six minutes)",
        lambda s: _speed_peers.measure(s.rounds),
        lambda rows, s: _speed_peers.table(rows, s.rounds),
        by_name_only=True,
    ),
}


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
    """Check what the user asked for; no part means all that need no peers.

    Raises:
      Usage: a part, a shape, a method or a number makes no sense.
    """
    for part in parts:
        if part not in PARTS:
            raise Usage(f"unknown part {part!r}; valid names: {', '.join(PARTS)}")
    for method in methods or ():
        if method not in _speed_clip.METHODS:
            valid = ", ".join(_speed_clip.METHODS)
            raise Usage(f"unknown method {method!r}; valid names: {valid}")
    if not kappa > 0 or rounds < 1:
        raise Usage("--kappa must be positive and --rounds at least 1")
    if shapes is None:
        accelerator = jax.default_backend() != "cpu"
        shapes = _speed_clip.SHAPES + (
            _speed_clip.ACCELERATOR_SHAPES if accelerator else ()
        )
    chosen = tuple(methods or _speed_clip.METHODS)
    if _speed_clip.REFERENCE not in chosen:
        chosen = (*chosen, _speed_clip.REFERENCE)
    size = _shape(logits, "--logits") if logits else _speed_losses.SHAPE
    everything = [name for name, part in PARTS.items() if not part.by_name_only]
    parts = tuple(parts or everything)
    return Study(parts, tuple(map(_shape, shapes)), chosen, kappa, rounds, size)


def run(study: Study, out: Path, console: Console, *, command: str) -> dict[str, Any]:
    """Time the chosen parts, print their tables and write ``speed.json``."""
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "speed",
        "command": command,
        "environment": environment(),
        "kappa": study.kappa,
        "rounds": study.rounds,
        "rows": {},
    }
    path = out / "speed.json"
    for name in study.parts:
        with console.status(f"timing {PARTS[name].about}"):
            rows = results["rows"][name] = PARTS[name].measure(study)
        write_json(path, results)
        show(PARTS[name].table(rows, study), console)
    console.print(results["environment"]["hardware"], highlight=False)
    console.print(f"Numbers: {path}", highlight=False, markup=False, soft_wrap=True)
    return results
