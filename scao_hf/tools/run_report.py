"""``scao-hf report``: what a run did, from its trainer_state.json, as one HTML page and one PNG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from scao_hf.tools import matrices, writing
from scao_hf.tools import page as html
from scao_hf.tools.page import LINE
from scao_hf.tools.run_log import Run, findings, read_run, run_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HTML_NAME, PNG_NAME = "scao-report.html", "scao-report.png"


class Panel(NamedTuple):
    """One chart: the logged key, a title, what it tells in plain words, and whether its axis is logarithmic."""

    key: str
    title: str
    words: str
    log: bool = False


PANELS = (
    Panel("loss", "Training loss", "How wrong the model is on the training data: lower is better. Strong: smoothed."),
    Panel("eval_loss", "Evaluation loss", "The same on other data. Stop where it rises while the training loss falls."),
    Panel("learning_rate", "Learning rate", "The size of the steps, as the schedule sets it."),
    Panel(
        "grad_norm", "Gradient norm", "How strongly the data pull at the weights. Lone peaks: unusual batches.", True
    ),
    Panel(
        "optimizer_ms",
        "Optimizer time in ms",
        "What each step of the optimizer took, refreshes of bases included.",
        True,
    ),
    Panel("scao/rank", "Rank", "How many directions of the curvature are in use, on average. 0 until phase 2."),
    Panel(
        "scao/captured_mass", "Captured mass", "The share of the curvature that those directions hold. 1 is all of it."
    ),
    Panel("scao/curvature_norm", "Curvature norm", "How large the curvature is. A jump means unusual gradients.", True),
    Panel(
        "scao/damped",
        "Damped matrices",
        "The share of the matrices that are damped: their steps are scaled as far as is allowed, or, with the published "
        "rule, a factor is damped by more than the least.",
    ),
    Panel(
        "scao/skipped", "Skipped steps", "How often so far a matrix was left as it was: its gradient held NaN or Inf."
    ),
)
#: Of these a sentence says that they are zero throughout.
SILENT = ("scao/skipped", "scao/damped")


@dataclass(frozen=True)
class Report:
    """Where the report is, and what it says in words."""

    html: Path
    png: Path
    findings: list[str]


def _draw(run: Run, panel: Panel, figure: Figure) -> None:
    axes = figure.add_subplot()
    steps, values = run.of(panel.key)
    html.shade(axes, html.bands(*run.of("scao/blend")))
    if panel.key == "loss" and len(values) > 20:
        axes.plot(steps, values, color=LINE, linewidth=0.7, alpha=0.35)
        values = html.smoothed(values)
    axes.plot(steps, values, color=LINE, linewidth=1.6, marker="o" if len(steps) < 13 else None, markersize=4)
    if panel.log and all(value > 0 for value in values if math.isfinite(value)) and max(values) > 20 * min(values):
        axes.set_yscale("log")
        _plain_ticks(axes)
    if panel.key in ("scao/captured_mass", "scao/damped"):
        axes.set_ylim(0, 1.03)
    html.tidy(axes, "step")


def _plain_ticks(axes: Axes) -> None:
    """1, 2, 5, 10 instead of powers of ten, which a range below a decade leaves without a number."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _charts(run: Run) -> list[html.Chart]:
    """Every panel that the run has figures for, and its heat maps."""
    charts = [
        html.Chart(panel.title, panel.words, partial(_draw, run, panel))
        for panel in PANELS
        if any(map(math.isfinite, values := run.of(panel.key)[1])) and (panel.key not in SILENT or any(values))
    ]
    return charts + (matrices.charts(run.matrices) if run.matrices else [])


def write_report(run_dir: Path, out: Path | None = None) -> Report:
    """Write the page and the picture.

    Args:
        run_dir: output folder of a run, a checkpoint of it, or the Axolotl YAML that names the folder.
        out: folder for both files, made if need be; that of the run if None.

    Raises:
        ToolError: there is nothing to report on, or ``out`` cannot be written to.
    """
    run_dir = run_folder(run_dir)
    run = read_run(run_dir)
    charts, said, folder = _charts(run), findings(run), out or run_dir
    about = run.matrices.about if run.matrices else []
    body = html.table((), [(name, [value]) for name, value in about]) if about else ""
    body += html.key(html.PHASES) if run.of("scao/blend")[0] else ""
    page, png = folder / HTML_NAME, folder / PNG_NAME
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        text = html.page(f"Run {run.name}", said[:1], said[1:], body, charts, "scao-hf report")
        page.write_text(text, encoding="utf-8", errors="replace")
        html.png(f"{run.name}: grey phase 1 (AdamW), amber ramp, green phase 2 (curvature)", charts, png)
    return Report(page, png, said)
