"""One self-contained HTML page: sections with a table of contents.

Figures are embedded, styles are inline, nothing is fetched: the file can be mailed or
archived as it is. It follows the reader's dark or light preference.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from basinax.benchmarks._table import Table

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
nav span { margin-right: 1.2rem; }
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


class Section(NamedTuple):
    """A heading and the HTML below it."""

    title: str
    content: str


def table_html(table: Table) -> str:
    """Write a table with its notes; the best cells are marked."""
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


def facts_html(facts: dict[str, Any]) -> str:
    """Write names and values as a list of definitions."""
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


def figure_html(path: Path, caption: str) -> str:
    """Embed a picture with its caption."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def page_html(
    title: str, lead: str, origin: str, sections: Sequence[Section], warning: str = ""
) -> str:
    """Write the whole document.

    Args:
      title: of the page.
      lead: one sentence on what is shown.
      origin: hardware and date.
      sections: what the page holds, in order.
      warning: shown above everything else.

    Returns:
      A complete HTML document.
    """
    links = "".join(
        f'<a href="#s{i}">{escape(name.partition(" (")[0])}</a>'
        for i, (name, _) in enumerate(sections)
    )
    body = "".join(
        f'<section id="s{i}"><h2>{escape(name)}</h2>{content}</section>'
        for i, (name, content) in enumerate(sections)
    )
    caution = f'<p class="warn">{escape(warning)}</p>' if warning else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>"
        f"<p>{escape(lead)}</p>"
        f'<p class="soft">{escape(origin)}</p>'
        f'<nav aria-label="Contents"><span class="soft">Contents</span> {links}</nav>'
        f"{caution}{body}</body></html>\n"
    )
