"""No page is wider than the window it is read in and no table breaks a word, as a browser shows them: on a telephone,
on a desk.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from arriero.runtimes.proof.pages import render_html, write_page
from tests.runtimes.proof.test_report import make_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
# A frame of the asked width stands for a window: browsers do not make windows as narrow as telephones.
FRAME = """<iframe id=f style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<script>
window.onload = () => {{
  const inside = document.getElementById("f").contentDocument;
  const wide = [...inside.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > {width} + 0.5);
  const root = inside.documentElement, broken = [], texts = inside.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {{
    if (!text.parentElement.closest("table")) continue;
    for (const word of text.data.matchAll(/[\\p{{L}}\\p{{N}}][\\p{{L}}\\p{{N}}.,]*/gu)) {{
      const range = inside.createRange();
      range.setStart(text, word.index);
      range.setEnd(text, word.index + word[0].length);
      if (word[0].length < 20 && new Set([...range.getClientRects()].map(r => r.top)).size > 1) broken.push(word[0]);
    }}
  }}
  document.body.innerHTML = "<p id=told>" + (root.scrollWidth - root.clientWidth) + " " +
    [...wide.map(e => e.tagName + "." + e.className), ...broken].join(";") + "</p>";
}};
</script>"""


def measured(page: str, width: int, folder: Path) -> tuple[int, str]:
    """CSS pixels by which the page is wider than a frame of this width, the elements that reach beyond it, and the
    words and numbers of its tables that stand on two lines.
    """
    escaped = page.replace("&", "&amp;").replace('"', "&quot;")
    (folder / "frame.html").write_text(FRAME.format(width=width, page=escaped), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1600,1000", "--dump-dom", (folder / "frame.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    told = re.search(r'<p id="told">(-?\d+) ?(.*?)</p>', shown)
    assert told is not None, shown[-2000:]
    return int(told.group(1)), told.group(2)


@pytest.mark.parametrize("width", [500, 1280])
def test_a_parity_page_is_no_wider_than_its_window(tmp_path, width):
    report = make_report(48)
    long = replace(report.cases[0], name="a-case-with-a-name-of-many-words-and-no-space-" * 3, candidate_text="x" * 300)
    page = render_html(replace(report, cases=(long, *report.cases), labels={"reference record": "0f" * 32}))
    assert measured(page, width, tmp_path) == (0, "")


@pytest.mark.parametrize("width", [500, 1280])
def test_a_comparison_is_no_wider_than_its_window(tmp_path, width):
    heads = [f"Head {n}" for n in range(13)]
    numbers = ["12,345.67 MiB", "float32, 12,345 KiB/token", "0.0123 ± 0.0012", "98.5 % (96.0 to 99.0)"] * 3
    rows = [[f"portable-int8-with-a-long-name-{n}", *numbers] for n in range(8)]
    write_page(tmp_path / "page.html", "Bundles compared", {"checkpoint": "/a/b" * 40}, heads, rows, ["A note."], [])
    assert measured((tmp_path / "page.html").read_text(), width, tmp_path) == (0, "")
