"""The documentation in a browser: no page is wider than its screen, no table is cut off, search answers from a file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("mkdocs", "material", "latex2mathml"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: none of {', '.join(BROWSERS)} is on PATH")

#: Opens every page in a frame of that width, one after the other, and writes down what does not fit.
PROBE = """<!doctype html><iframe id=f style="width:{width}px;height:900px;border:0"></iframe><p id=out></p><script>
const pages = {pages}, found = [];
f.onload = () => setTimeout(() => {{
  const page = f.contentDocument, root = page.documentElement;
  if (root.scrollWidth > {width}) found.push(f.src.split("/").pop() + " is " + root.scrollWidth + " wide");
  for (const wrap of page.querySelectorAll(".md-typeset__scrollwrap"))
    if (wrap.scrollWidth > wrap.clientWidth + 1) found.push(f.src.split("/").pop() + ": a table is cut off");
  next();
}}, 300);
const next = () => {{
  if (pages.length) f.src = pages.shift(); else out.textContent = "FOUND [" + found.join("; ") + "]";
}};
next();
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True, timeout=180)
    return folder


def dom(folder: Path, address: str, budget: int) -> str:
    """What a page has become after so many milliseconds."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files", "--window-size=1400,1000"]
    command += [f"--virtual-time-budget={budget}", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_fits_the_screen(site: Path, tmp_path: Path, width: int) -> None:
    pages = [page.as_uri() for page in sorted(site.glob("*.html")) if page.name != "404.html"]
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(width=width, pages=pages), encoding="utf-8")
    found = re.search(r"FOUND \[(.*?)\]", dom(tmp_path, probe.as_uri(), 60_000).partition("<p id")[2])
    assert found is not None, "the pages were not opened"
    assert found[1] == ""


def test_search_answers_from_a_file(site: Path, tmp_path: Path) -> None:
    page = dom(tmp_path, f"{(site / 'index.html').as_uri()}?q=stochastic+rounding", 20_000)
    assert re.search(r"\d+ matching documents", page)
