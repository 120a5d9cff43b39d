"""Pages as a reader sees them: rendered by headless Chromium, offline.

A script appended to a copy of a page reports what the browser made of it.
"""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MISSING = "needs Chromium: install Debian's package chromium"


def in_browser(test):
    """Mark a test that renders a page."""
    skip = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
    return pytest.mark.browser(skip(test))


QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]

# Widths overflow where a table or figure is wider than a phone's or desktop's page.
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images];
  const links = [...document.querySelectorAll("nav a")];
  const said = {
    drawn: images.filter(i => i.complete && i.naturalWidth > 300).length,
    images: images.length,
    broken: links.filter(a => !document.querySelector(a.getAttribute("href"))).length,
    links: links.map(a => a.textContent),
    headings: [...document.querySelectorAll("h2")].map(h => h.textContent),
    overflow: document.documentElement.scrollWidth - innerWidth,
    outside: [...document.querySelectorAll("[src], [href]")]
      .map(e => e.getAttribute("src") ?? e.getAttribute("href"))
      .filter(to => !to.startsWith("data:") && !to.startsWith("#")),
  };
  const out = document.createElement("pre");
  out.id = "said";
  out.textContent = JSON.stringify(said);
  document.body.append(out);
});</script>"""


def chromium(tmp_path, *options):
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    return subprocess.run(
        [CHROMIUM, *QUIET, profile, *options],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def render(page, tmp_path, width=1100):
    """Return what the probe said of the page."""
    copy = tmp_path / "probed.html"
    copy.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    dom = chromium(
        tmp_path,
        "--virtual-time-budget=5000",
        f"--window-size={width},2000",
        "--dump-dom",
        copy.as_uri(),
    )
    (said,) = re.findall(r'<pre id="said">(.*?)</pre>', dom, re.DOTALL)
    return json.loads(html.unescape(said))


def check(page, tmp_path):
    """Assert that a page is whole, at the width of a desktop and of a phone."""
    from matplotlib import image

    for width in (1100, 600):
        said = render(page, tmp_path, width)
        assert said["images"] > 0
        assert said["drawn"] == said["images"]
        assert said["outside"] == []
        assert said["broken"] == 0
        assert len(said["links"]) == len(said["headings"]) > 3
        assert said["overflow"] <= 0, f"wider than a window of {width} pixels"
    shot = tmp_path / "shot.png"
    chromium(tmp_path, "--window-size=1100,2000", f"--screenshot={shot}", page.as_uri())
    pixels = image.imread(shot)[..., :3]
    assert pixels.shape[0] >= 1000
    # Text and figures all the way down: no empty half.
    ink = np.ptp(pixels, axis=2) + np.abs(pixels - pixels[0, 0]).max(axis=2)
    assert (ink[: len(ink) // 2] > 0.2).mean() > 0.01
    assert (ink[len(ink) // 2 :] > 0.2).mean() > 0.01
