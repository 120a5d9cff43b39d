"""What the site needs beyond its theme: equations without scripts, pages from files.

Equations are written in TeX between dollar signs and become MathML here, which browsers
draw themselves. The changelog and the recorded results are pages of the site, though
they live elsewhere in the repository. Two comments in pages stand for text that would
go stale as a copy: `<!-- help: COMMAND -->` for a command's options and
`<!-- examples -->` for the example scripts. Public names in the text become links to
the reference.
"""

import argparse
import ast
import functools
import html
import os
import pathlib
import posixpath
import re
import textwrap
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGES = {"changelog.md": "CHANGELOG.md", "results.md": "benchmarks/RESULTS.md"}

# What the extension arithmatex leaves for a script: \(...\) inline, \[...\] displayed.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
# Code in the text; headings, links, listings and arguments, in bold, are left alone.
_CODE = re.compile(
    r"<(?P<tag>a|h[1-6]|pre|b)\b.*?</(?P=tag)>|<code>(?P<name>\w+)</code>", re.DOTALL
)
_SHOWN = re.compile(r"^::: (\S+)\n(?! )", re.MULTILINE)
_HELP = re.compile(r"<!-- help: (\w+) -->")
_UNKNOWN = re.compile(r"<m[io]>(?:\\|&<)")
# Bars that \left and \right have not stretched are as high as letters, and fences.
_BARS = re.compile("<mo>(&#x02225;|&#x02016;|&#x0007C;|\\|)</mo>")
_FENCE = '<mo stretchy="false" lspace="0.08em" rspace="0.08em">{}</mo>'
_DOUBLE, _SINGLE = _FENCE.format("&#x02016;"), _FENCE.format("|")
_FENCES = {
    "&#x02225;": _DOUBLE,
    "&#x02016;": _DOUBLE,
    "&#x0007C;": _SINGLE,
    "|": _SINGLE,
}


def on_files(files: Files, config: Any) -> Files:
    """Add pages made from files outside the documentation folder."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = text.replace("](../docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Fill in what the comments stand for."""
    del kwargs
    markdown = _HELP.sub(lambda match: f"```text\n{_help_of(match[1])}\n```", markdown)
    if "<!-- examples -->" not in markdown:
        return markdown
    return markdown.replace("<!-- examples -->", "\n".join(map(_show, _scripts())))


def _help_of(command: str) -> str:
    from basinax.benchmarks._cli import build_parser

    os.environ["COLUMNS"] = "88"  # where argparse looks for the width
    actions = build_parser()._subparsers._group_actions
    (commands,) = (a for a in actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[command].format_help().strip()


def _scripts() -> list[pathlib.Path]:
    return sorted(EXAMPLES.glob("[!_]*.py"))


def _show(script: pathlib.Path) -> str:
    """Make a section of a script: what its docstring says, then the whole of it."""
    text = script.read_text(encoding="utf-8")
    summary, _, rest = (ast.get_docstring(ast.parse(text)) or script.stem).partition(
        "\n"
    )
    return (
        f"## `{script.name}`\n\n**{summary}**\n{rest}\n\n"
        f'??? example "Source"\n\n    ```{{.py title="examples/{script.name}"}}\n'
        f"{textwrap.indent(text, '    ')}    ```\n"
    )


def on_page_content(content: str, page: Any, **kwargs: Any) -> str:
    """Replace TeX in the finished page by MathML."""
    del kwargs
    where = page.file.src_uri
    content = _BLOCK.sub(lambda match: _math(match[1], where, "block"), content)
    content = _INLINE.sub(lambda match: _math(match[1], where, "inline"), content)
    return _CODE.sub(lambda match: _linked(match, page.url), content)


@functools.cache
def _places() -> dict[str, str]:
    """Map public names to where the reference shows them."""
    return {
        name.rpartition(".")[2]: f"reference/{page.stem}.html#{name}"
        for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
        for name in _SHOWN.findall(page.read_text(encoding="utf-8"))
    }


def _linked(match: re.Match[str], url: str) -> str:
    """Link a public name in the text to the reference."""
    name, place = match["name"], _places().get(match["name"])
    if place is None:
        return match[0]
    target = posixpath.relpath(place, posixpath.dirname(url) or ".")
    return f'<a href="{target}"><code>{name}</code></a>'


def _math(tex: str, where: str, display: str) -> str:
    """Convert one equation; what the converter does not know it would print as is."""
    tex = html.unescape(tex).strip()
    try:
        math = convert(tex, display=display)
    except Exception as error:
        raise PluginError(f"{where}: cannot set the equation {tex!r}") from error
    if _UNKNOWN.search(math):
        raise PluginError(f"{where}: unknown command or stray & in {tex!r}")
    math = _BARS.sub(lambda match: _FENCES[match[1]], math)
    return math if display == "inline" else f'<div class="math-block">{math}</div>'
