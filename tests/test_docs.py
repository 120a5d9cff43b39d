"""Every Python block of the documentation runs as it stands, page by page."""

import pathlib
import re
import types

import pytest

import basinax.landscape
import basinax.optimizers
import basinax.testing

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks_of(page):
    """Return the code of a page, each block moved to the line where it stands."""
    text = page.read_text()
    return [
        "\n" * text.count("\n", 0, found.start(1)) + found[1]
        for found in BLOCK.finditer(text)
    ]


RUNNABLE = [page for page in PAGES if blocks_of(page)]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(DOCS)))
def test_page_runs(page):
    names = {"__name__": "page"}
    for block in blocks_of(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_no_python_escapes_the_test_above(page):
    """By another word for it, a title or an indented fence."""
    text = BLOCK.sub("", page.read_text())
    assert not re.search(
        r"^\s*(```|~~~)\s*\{?\s*\.?(py|pycon|Python)", text, re.MULTILINE
    )


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(shown) == len(set(shown)), "a name is shown twice"
    public = {
        f"{module.__name__}.{name}"
        for module in (basinax.optimizers, basinax.landscape, basinax.testing)
        for name in module.__all__
    }
    assert set(shown) == public


def test_verdicts_are_those_that_were_printed():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    printed = re.findall(
        r"^(\S.*): (HOLDS|MIXED|DOES NOT HOLD)$", results, re.MULTILINE
    )
    table = (DOCS / "guides" / "claims.md").read_text()
    told = re.findall(
        r"^\| (.+?) \| (holds|mixed|does not hold) \|", table, re.MULTILINE
    )
    assert sorted(told) == sorted((name, verdict.lower()) for name, verdict in printed)


def test_equations_become_markup_or_errors(monkeypatch):
    pytest.importorskip("latex2mathml")
    exceptions = pytest.importorskip("mkdocs.exceptions")
    monkeypatch.syspath_prepend(DOCS)
    import hooks

    page = types.SimpleNamespace(
        file=types.SimpleNamespace(src_uri="p.md"), url="p.html"
    )

    def rendered(tex):
        span = f'<span class="arithmatex">\\({tex}\\)</span>'
        return hooks.on_page_content(span, page=page)

    assert rendered(r"\sigma &lt; 1").count("<mo>&#x0003C;</mo>") == 1
    assert rendered(r"\lVert x \rVert").count('stretchy="false"') == 2
    for wrong in (r"\nosuchcommand x", r"a &amp; b", r"\left( a"):
        with pytest.raises(exceptions.PluginError, match=r"p\.md"):
            rendered(wrong)


def test_names_in_the_text_link_to_the_reference(monkeypatch):
    pytest.importorskip("latex2mathml")
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(DOCS)
    import hooks

    page = types.SimpleNamespace(
        file=types.SimpleNamespace(src_uri="guides/p.md"), url="guides/p.html"
    )
    link = '<a href="../reference/spectra.html#basinax.landscape.trace">'
    plain = "<h2><code>trace</code></h2> <b><code>trace</code></b> <code>loss_fn</code>"
    assert hooks.on_page_content(plain, page=page) == plain
    found = hooks.on_page_content("<p>a <code>trace</code></p>", page=page)
    assert found == f"<p>a {link}<code>trace</code></a></p>"


def test_the_site_loads_nothing_from_a_network():
    """Texts may link elsewhere; images, scripts and styles may not come from there."""
    for file in [ROOT / "mkdocs.yml", *DOCS.rglob("*.*")]:
        if file.suffix in {".css", ".js", ".yml"}:
            assert "//" not in re.sub(r"^ *// .*$", "", file.read_text(), flags=re.M), (
                file
            )
    for page in PAGES:
        loaded = r"(!\[[^]]*\]\(|src=|<link|<script|@import)[^)>]*//"
        assert not re.search(loaded, page.read_text()), page


@pytest.mark.slow
def test_the_worked_example_passes_every_check():
    names = {"__name__": "page"}
    page = DOCS / "guides" / "adding-an-optimizer.md"
    kernel, transformation, optimizer, *_ = blocks_of(page)
    for block in (kernel, transformation, optimizer):
        exec(compile(block, str(page), "exec"), names)
    from basinax.testing import check_transformation

    assert len(check_transformation(names["soft_sign_descent"]).passed) > 30
