"""The pages of report and compare in a real browser: no errors, light and dark, and no wider than a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("typer")
pytest.importorskip("transformers")

from test_tools import history, matrix_records, run_folder
from test_tools_compare import three_sides

from scao_hf.tools.comparison import HTML_NAME, write
from scao_hf.tools.run_report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: none of {', '.join(BROWSERS)} is on PATH")

PROBE = """<!doctype html><iframe id=f src="{page}" style="width:{width}px;height:9000px;border:0"></iframe>
<script>f.onload = () => {{
  const page = f.contentDocument.documentElement, charts = [...f.contentDocument.querySelectorAll("figure svg")];
  const sizes = charts.map(chart => parseFloat(getComputedStyle(chart.querySelector("text") || chart).fontSize)
    * chart.getBoundingClientRect().width / chart.viewBox.baseVal.width);
  document.title = [page.scrollWidth, charts.length, Math.min(...sizes)].join(" ");
}}</script>"""


@pytest.fixture(scope="module", params=["report", "compare"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "compare":
        folder = tmp_path_factory.mktemp("compared")
        write(three_sides(), folder, "a-configuration-with-a-long-name.yml, 60 steps a run")
        return folder / HTML_NAME
    folder = run_folder(tmp_path_factory.mktemp("browser") / "a <run> of some length", history(60))
    matrix_records(folder, 60)
    return write_report(folder).html


def browse(folder: Path, page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=10000"]
    done = subprocess.run([*command, *arguments, page.as_uri()], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, "the page has written to the browser's console"
    return done


@pytest.mark.parametrize("dark", [False, True])
def test_page_follows_the_colour_scheme(page: Path, tmp_path: Path, dark: bool) -> None:
    image = pytest.importorskip("PIL.Image")
    shot = tmp_path / "page.png"
    scheme = ("--blink-settings=preferredColorScheme=0",) if dark else ("--blink-settings=preferredColorScheme=1",)
    browse(tmp_path, page, *scheme, "--window-size=1200,2200", f"--screenshot={shot}")
    pixels = image.open(shot).convert("L")
    corner, darkest, brightest = pixels.getpixel((2, 2)), *pixels.getextrema()
    assert (corner < 40) is dark and (corner > 220) is not dark
    assert brightest - darkest > 180, "the text does not stand out"
    assert len(set(pixels.resize((60, 110)).getdata())) > 20, "the charts are not there"


@pytest.mark.parametrize("width", [360, 1200])
def test_page_fits_its_width_and_its_charts_are_legible(page: Path, tmp_path: Path, width: int) -> None:
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(page=page.as_uri(), width=width), encoding="utf-8")
    shown = browse(tmp_path, probe, "--allow-file-access-from-files", "--window-size=1300,9000", "--dump-dom").stdout
    title = re.search(r"<title>(\d+) (\d+) ([\d.]+)</title>", shown)
    assert title is not None, shown[:500]
    assert int(title[1]) <= width and int(title[2]) == (5 if page.name == HTML_NAME else 10)
    assert float(title[3]) > 8, "the smallest text of a chart is under 8 pixels high"
