"""The report's page in a browser, as wide as a phone and a desk: nothing sticks out or is missing.

Needs a Chromium; the test asks for `chromium`, `chromium-browser` and `google-chrome`, or CHROMIUM.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(os.fspath(ROOT))

from bench.__main__ import main  # noqa: E402  (needs the path)

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FILES = [
    *sorted((ROOT / "tests" / "bench_examples").glob("*.json")),
    ROOT / "bench" / "results" / "growth.json",
]

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# What the frame around the page finds out about it, written where --dump-dom prints it.
FRAME = """<!doctype html><title>frame</title>
<iframe id="page" src="report.html" style="width:{width}px;height:{height}px;border:0"></iframe>
<pre id="found"></pre>
<script>
window.onload = () => {{
  const page = document.getElementById("page").contentDocument;
  const wide = page.documentElement.scrollWidth;
  const inScroller = (element) => {{
    for (let at = element; at && at !== page.body; at = at.parentElement) {{
      const overflow = page.defaultView.getComputedStyle(at).overflowX;
      if (overflow === "auto" || overflow === "scroll") return true;
    }}
    return false;
  }};
  const out = [...page.querySelectorAll("body *")]
    .filter((e) => e.getBoundingClientRect().right > {width} + 1 && !inScroller(e))
    .map((e) => e.tagName + " " + e.textContent.trim().slice(0, 40));
  const pictures = [...page.images];
  document.getElementById("found").textContent = JSON.stringify({{
    width: wide,
    out: out.slice(0, 5),
    pictures: pictures.length,
    shown: pictures.filter((i) => i.complete && i.naturalWidth > 0 && i.width > 200).length,
    described: pictures.filter((i) => i.alt.length > 10).length,
    letters: parseFloat(page.defaultView.getComputedStyle(page.body).fontSize),
    headings: page.querySelectorAll("h2").length,
    links: [...page.querySelectorAll("a[href^='#']")]
      .filter((a) => !page.getElementById(a.getAttribute("href").slice(1))).length,
  }});
}};
</script>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    assert main(["report", *map(os.fspath, FILES), "--out", os.fspath(out)]) == 0
    return out


def browse(*arguments):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=5000"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=120, check=True
    ).stdout


@pytest.mark.parametrize("width", [360, 1280], ids=["phone", "desk"])
def test_the_page_fits_the_screen(report, width):
    frame = report / f"frame-{width}.html"
    frame.write_text(FRAME.format(width=width, height=900))
    # Chromium's window cannot be as narrow as a phone; a frame in it can.
    shown = browse("--window-size=1400,1000", "--dump-dom", frame.as_uri())
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL).group(1))
    assert found["width"] <= width, found
    assert found["out"] == []
    assert found["pictures"] == len(list(report.glob("*.png"))) > 0
    assert found["shown"] == found["described"] == found["pictures"]
    assert found["letters"] >= 14
    assert found["headings"] > 3
    assert found["links"] == 0


def test_the_page_can_be_printed(report, tmp_path):
    paper = tmp_path / "report.pdf"
    browse(f"--print-to-pdf={paper}", (report / "report.html").as_uri())
    assert paper.read_bytes().startswith(b"%PDF")
    assert paper.stat().st_size > 50_000
