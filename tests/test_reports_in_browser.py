"""The checks of rendered pages notice pages that are broken."""

from browser import in_browser, render
from matplotlib.figure import Figure


@in_browser
def test_a_probe_notices_a_page_that_is_broken(tmp_path):
    """A missing picture, a dead link and a table that is too wide are all seen."""
    Figure().savefig(tmp_path / "there.png")
    page = tmp_path / "page.html"
    page.write_text(
        '<html><body><nav><a href="#s1">one</a></nav><img src="there.png">'
        '<img src="data:image/png;base64,AAAA"><div style="width:2000px">.</div>'
        "</body></html>"
    )
    said = render(page, tmp_path)
    assert (said["drawn"], said["images"], said["broken"]) == (1, 2, 1)
    assert said["overflow"] > 0
    assert said["outside"] == ["there.png"]
