"""The page of a comparison, from its results: tables, figures, settings, command."""

from html import escape
from pathlib import Path
from typing import Any

from basinax.benchmarks._page import (
    Section,
    facts_html,
    figure_html,
    page_html,
    table_html,
)
from basinax.benchmarks._table import Table, short, tables


def _grid(results: dict[str, Any]) -> Table:
    """Tabulate the learning-rate search, whose losses led to the choice."""
    rows, best = [], set()
    for row, (name, numbers) in enumerate(results["optimizers"].items()):
        cells = [name]
        for column, point in enumerate(numbers["grid"]):
            loss = short(point["validation_loss"], 4)
            cells.append(f"{point['learning_rate']:g}: {loss}")
            if point["learning_rate"] == numbers["learning_rate"]:
                best.add((row, column + 1))
        rows.append(tuple(cells))
    points = max(len(row) - 1 for row in rows)
    return Table(
        "Learning-rate search",
        ("optimizer", *(f"point {i + 1}" for i in range(points))),
        tuple(rows),
        (
            "Final validation loss at each learning rate, one seed that is not among "
            "the reported ones; – means the run diverged.",
        ),
        frozenset(best),
    )


def html(results: dict[str, Any], figures: dict[str, str], folder: Path) -> str:
    """Render the report.

    Args:
      results: contents of ``results.json``.
      figures: file names with captions, from ``draw_all``.
      folder: where the figures are.

    Returns:
      A complete HTML document.
    """
    environment, task = results["environment"], results["task"]
    found = tables(results)
    sections = [Section(table.title, table_html(table)) for table in found]
    if figures:
        drawn = "".join(figure_html(folder / n, text) for n, text in figures.items())
        sections.append(Section("Curves, curvature and surfaces", drawn))
    if found:
        search = _grid(results)
        sections.append(Section(search.title, table_html(search)))
    sections.append(
        Section(
            "Method and settings",
            "<p>Every optimizer gets the same schedule shape, weight decay, number of "
            "steps and number of learning rates. The rate with the best final "
            "validation loss on a seed of its own is then run on the reported seeds; "
            "the test split is used for nothing else.</p>"
            + facts_html({**task, **results["settings"]}),
        )
    )
    sections.append(
        Section(
            "Reproduce",
            f"<pre>{escape(results['command'])}</pre>"
            + facts_html({**environment, "took": f"{results['seconds']:.0f} s"}),
        )
    )
    return page_html(
        f"basinax comparison: {task['name']}",
        f"{task['title']}. {task['source']}.",
        f"{environment['hardware']} · {environment['date']}",
        sections,
        ""
        if results["complete"]
        else "Interrupted: only the optimizers below finished, and step times may be "
        "missing.",
    )


def write_report(results: dict[str, Any], figures: dict[str, str], out: Path) -> Path:
    """Write ``report.html`` into ``out`` and return its path."""
    path = out / "report.html"
    path.write_text(html(results, figures, out), encoding="utf-8")
    return path
