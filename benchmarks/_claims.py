"""Claims of papers, put to the test: each with its numbers and its control.

A claim is a module with ``PARTS``, a list of named experiments that return a
``Finding``, and ``draw``, one figure of everything found. A finding holds or does not,
whichever way it comes out; nothing is asserted here.
"""

import importlib
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from basinax.benchmarks._results import SCHEMA, environment, write_json
from basinax.benchmarks._table import Table, show
from basinax.benchmarks._tasks import Usage

Say = Callable[[str], None]


class Finding(NamedTuple):
    """What one experiment found."""

    claim: str
    """The statement under test, one sentence."""
    verdict: str
    """"holds", "mixed" or "does not hold"."""
    evidence: str
    """The numbers that decide, in a sentence or two."""
    control: str
    """What happens without the ingredient that the claim is about."""
    numbers: dict[str, Any]
    """Everything measured, for the record and the figure."""
    table: Table | None = None


class Part(NamedTuple):
    """One experiment of a claim."""

    name: str
    run: Callable[..., Finding]
    """``run(say)``; ``run(say, seeds=...)`` where the number of seeds is open."""
    slow: str = ""
    """How long it takes if it only runs with ``--full``, else empty."""


class Claim(NamedTuple):
    """A paper's claims: where they are tested and what they are about."""

    module: str
    about: str

    @property
    def parts(self) -> Sequence[Part]:
        """The experiments."""
        return importlib.import_module(self.module).PARTS

    def draw(self, findings: dict[str, Finding]) -> Figure:
        """Draw what was found."""
        return importlib.import_module(self.module).draw(findings)


CLAIMS: dict[str, Claim] = {
    "spectra": Claim(
        "basinax.benchmarks._claims_spectra",
        "spectral clipping bounds updates and weights, and survives spikes",
    ),
    "grokking": Claim(
        "basinax.benchmarks._claims_grokking",
        "orthogonal gradients and StableMax generalize without weight decay",
    ),
    "landscape": Claim(
        "basinax.benchmarks._claims_landscape",
        "Hessian outliers, the edge of stability, sharpness and generalization",
    ),
    "samo": Claim(
        "basinax.benchmarks._claims_samo",
        "SAM and SAMO flatten minima and help many tasks at once",
    ),
    "nexus": Claim(
        "basinax.benchmarks._claims_nexus",
        "a walk over micro-batches, gradient agreement and unseen sources",
    ),
}


def choose(names: Sequence[str]) -> dict[str, Claim]:
    """Look up claims by name, all of them for an empty list.

    Raises:
      Usage: a name is unknown.
    """
    for name in names:
        if name not in CLAIMS:
            valid = ", ".join(CLAIMS)
            raise Usage(f"unknown claim {name!r}; valid names: {valid}")
    return {name: CLAIMS[name] for name in names or CLAIMS}


def print_finding(name: str, finding: Finding, console: Console) -> None:
    """Print one verdict with its numbers and its control."""
    colour = {"holds": "green", "mixed": "yellow"}.get(finding.verdict, "red")
    title = Text.assemble(
        (f"{name}: ", "bold"), (finding.verdict.upper(), f"bold {colour}")
    )
    console.print(title)
    lines = (
        ("claim", finding.claim),
        ("found", finding.evidence),
        ("control", finding.control),
    )
    for label, text in lines:
        line = Text.assemble((f"{label:<8}", "dim"), text)
        console.print(Padding(line, (0, 0, 0, 2)))
    console.print()
    if finding.table is not None:
        show(finding.table, console)


def _seeds(part: Part, number: int | None) -> dict[str, Any]:
    if number is None or "seeds" not in inspect.signature(part.run).parameters:
        return {}
    return {"seeds": tuple(range(number))}


def run(
    names: Sequence[str],
    out: Path,
    console: Console,
    *,
    full: bool,
    command: str,
    seeds: int | None = None,
) -> dict[str, dict[str, Finding]]:
    """Run the chosen claims; JSON is rewritten after every experiment.

    Args:
      names: which claims, all of them if empty.
      out: folder of the results.
      console: where verdicts go.
      full: also run the experiments that take minutes.
      command: what the user typed, for the record.
      seeds: how many, where an experiment leaves it open; None for its own default.

    Returns:
      Findings by claim and experiment.
    """
    everything: dict[str, dict[str, Finding]] = {}
    for name, claim in choose(names).items():
        findings = everything[name] = {}
        seconds: dict[str, float] = {}
        skipped = []
        for part in claim.parts:
            if part.slow and not full:
                skipped.append(f"{part.name} ({part.slow})")
                continue
            began = time.perf_counter()
            title = f"{name}: {part.name}"
            with console.status(title) as status:

                def say(text: str, title: str = title, status: Any = status) -> None:
                    status.update(f"{title}, {text}")

                findings[part.name] = part.run(say, **_seeds(part, seeds))
            seconds[part.name] = time.perf_counter() - began
            print_finding(part.name, findings[part.name], console)
            write_json(
                out / f"{name}.json",
                {
                    "schema": SCHEMA,
                    "kind": "claims",
                    "command": command,
                    "environment": environment(),
                    "seconds": seconds,
                    "skipped": skipped,
                    "findings": {
                        key: {k: v for k, v in f._asdict().items() if k != "table"}
                        for key, f in findings.items()
                    },
                },
            )
        claim.draw(findings).savefig(out / f"{name}.png")
        if skipped:
            console.print(f"Not run without --full: {', '.join(skipped)}")
        took = sum(seconds.values())
        console.print(
            f"{len(findings)} experiments in {took:.0f} s: {out / name}.json and .png",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return everything
