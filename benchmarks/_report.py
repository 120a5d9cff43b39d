"""One self-contained HTML page from the results of a comparison.

Figures are embedded, styles are inline, nothing is fetched: the file can be mailed or
archived as it is. It follows the reader's dark or light preference.
"""

import base64
from html import escape
from pathlib import Path
from typing import Any

from basinax.benchmarks._table import Table, short, tables

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --line: #d8dee4;
  --page: #ffffff; --panel: #f6f8fa; --accent: #0072b2; --best: #0b7a4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #8d96a0;
  --line: #30363d; --page: #0d1117; --panel: #161b22; --accent: #56b4e9;
  --best: #4fd1a0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2.5rem 1.5rem 4rem; color: var(--ink);
  background: var(--page); font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .7rem; padding-top: .4rem; }
p { margin: .4rem 0; } .soft, .notes { color: var(--soft); }
.notes { font-size: .87rem; margin: .6rem 0 0; padding-left: 1.1rem; }
nav { margin: 1.2rem 0 0; font-size: .92rem; }
nav a { color: var(--accent); display: inline-block; margin-right: 1.2rem;
  text-decoration: none; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .75rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { background: var(--panel); font-weight: 600; border-bottom: 1px solid var(--line); }
tr + tr td { border-top: 1px solid var(--line); }
td.best { font-weight: 700; color: var(--best); }
td.name { font-family: ui-monospace, monospace; font-size: .86rem; }
figure { margin: 1rem 0 1.6rem; } figcaption { color: var(--soft); font-size: .87rem; }
figure img { width: 100%; border-radius: 8px; border: 1px solid var(--line);
  background: #fff; display: block; margin-bottom: .45rem; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; overflow-x: auto; font: .87rem/1.5 ui-monospace, monospace; }
.warn { border-left: 4px solid #e69f00; background: var(--panel); padding: .6rem 1rem;
  border-radius: 0 8px 8px 0; margin: 1rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.4rem;
  font-size: .9rem; margin: 0; } dt { color: var(--soft); } dd { margin: 0; }
"""


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = []
    for row, cells in enumerate(table.rows):
        marked = []
        for column, cell in enumerate(cells):
            kind = "name" if column == 0 else ""
            kind = "best" if (row, column) in table.best else kind
            marked.append(f'<td class="{kind}">{escape(cell)}</td>')
        body.append(f"<tr>{''.join(marked)}</tr>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(body)}</tbody></table></div><ul class="notes">{notes}</ul>'
    )


def _facts(facts: dict[str, Any]) -> str:
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            text = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            text = ", ".join(map(str, value))
        elif isinstance(value, float):
            text = f"{value:.4g}"
        elif isinstance(value, int):
            text = f"{value:,}"
        else:
            text = str(value)
        label = key.replace("_", " ")
        rows.append(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


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
    sections: list[tuple[str, str]] = []
    found = tables(results)
    sections += [(table.title, _table(table)) for table in found]
    if figures:
        drawn = "".join(_figure(folder / n, caption) for n, caption in figures.items())
        sections.append(("Curves and curvature", drawn))
    if found:
        search = _grid(results)
        sections.append((search.title, _table(search)))
    sections.append(
        (
            "Method and settings",
            "<p>Every optimizer gets the same schedule shape, weight decay, number of "
            "steps and number of learning rates. The rate with the best final "
            "validation loss on a seed of its own is then run on the reported seeds; "
            "the test split is used for nothing else.</p>"
            + _facts({**task, **results["settings"]}),
        )
    )
    sections.append(
        (
            "Reproduce",
            f"<pre>{escape(results['command'])}</pre>"
            + _facts({**environment, "took": f"{results['seconds']:.0f} s"}),
        )
    )
    links = "".join(
        f'<a href="#s{i}">{escape(title.partition(" (")[0])}</a>'
        for i, (title, _) in enumerate(sections)
    )
    body = "".join(
        f'<section id="s{i}"><h2>{escape(title)}</h2>{content}</section>'
        for i, (title, content) in enumerate(sections)
    )
    warning = ""
    if not results["complete"]:
        warning = (
            '<p class="warn">Interrupted: only the optimizers below finished, and '
            "step times may be missing.</p>"
        )
    title = f"basinax comparison: {task['name']}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>"
        f"<p>{escape(task['title'])}. {escape(task['source'])}.</p>"
        f'<p class="soft">{escape(environment["hardware"])} · '
        f"{escape(environment['date'])}</p>"
        f"<nav>{links}</nav>{warning}{body}</body></html>\n"
    )


def write_report(results: dict[str, Any], figures: dict[str, str], out: Path) -> Path:
    """Write ``report.html`` into ``out`` and return its path."""
    path = out / "report.html"
    path.write_text(html(results, figures, out), encoding="utf-8")
    return path
