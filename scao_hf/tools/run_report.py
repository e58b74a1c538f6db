"""``scao-hf report``: what a run did, from its trainer_state.json, as one HTML page and one PNG."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from scao_hf.tools import ToolError, matrices
from scao_hf.tools import page as html
from scao_hf.tools.page import INK, LINE
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


@dataclass(frozen=True)
class Report:
    """Where the report is, and what it says in words."""

    html: Path
    png: Path
    findings: list[str]


def smooth(values: list[float], width: int) -> list[float]:
    """Mean of the last ``width`` finite values at each point."""
    out, window = [], list[float]()
    for value in values:
        if math.isfinite(value):
            window = [*window, value][-width:]
        out.append(fmean(window) if window else math.nan)
    return out


def _draw(axes: Axes, run: Run, panel: Panel) -> None:
    steps, values = run.series[panel.key]
    for begin, end, colour in run.bands():
        axes.axvspan(begin, end, color=colour, linewidth=0, zorder=0)
    if panel.key == "loss" and len(values) > 20:
        axes.plot(steps, values, color=LINE, linewidth=0.7, alpha=0.35)
        values = smooth(values, max(5, len(values) // 20))
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


def _pictures(run: Run, panels: list[Panel]) -> list[tuple[Panel | matrices.Map, Callable[[Figure], object]]]:
    """Every chart and heat map with what draws it."""
    charts: list[tuple[Panel | matrices.Map, Callable[[Figure], object]]] = [
        (panel, lambda figure, panel=panel: _draw(figure.add_subplot(), run, panel))  # type: ignore[misc]
        for panel in panels
    ]
    if (found := run.matrices) is not None:
        charts += [
            (chosen, lambda figure, chosen=chosen: matrices.draw_map(figure, found, chosen, INK))  # type: ignore[misc]
            for chosen in matrices.MAPS
        ]
    return charts


def _png(run: Run, panels: list[Panel], path: Path) -> None:
    from matplotlib.figure import Figure

    pictures = _pictures(run, panels)
    rows = -(-len(pictures) // 2)
    figure = Figure(figsize=(11, 2.7 * rows + 0.6), layout="constrained", facecolor="white")
    title = f"{run.name}: grey phase 1 (AdamW), amber ramp, green phase 2 (curvature)"
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    parts = figure.subfigures(rows, 2, squeeze=False).flatten()
    for part, (panel, draw) in zip(parts, pictures, strict=False):
        part.suptitle(panel.title, fontsize=11, color=INK)
        draw(part)
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.2)


def _page(run: Run, panels: list[Panel], said: list[str]) -> str:
    key = html.key(html.PHASES) if "scao/phase" in run.series else ""
    charts = "\n".join(
        html.chart(panel.title, html.svg(f"{panel.title} over steps", draw, panel.key), panel.words)
        for panel, draw in _pictures(run, panels)
    )
    about = run.matrices.about if run.matrices else []
    settings = html.table((), [(name, [value]) for name, value in about]) if about else ""
    body = f'{settings}{key}\n<main class="charts">{charts}</main>'
    return html.page(f"Run {run.name}", said[:1], said[1:], body, "scao-hf report")


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
    panels = [panel for panel in PANELS if any(map(math.isfinite, run.series.get(panel.key, ([], []))[1]))]
    # Where these are zero throughout, a sentence says it.
    silent = [key for key in ("scao/skipped", "scao/damped") if not any(run.series.get(key, ([], []))[1])]
    panels = [panel for panel in panels if panel.key not in silent]
    said = findings(run)
    folder = out or run_dir
    page, png = folder / HTML_NAME, folder / PNG_NAME
    actions: list[Callable[[], Any]] = [
        lambda: folder.mkdir(parents=True, exist_ok=True),
        lambda: page.write_text(_page(run, panels, said), encoding="utf-8", errors="replace"),
        lambda: _png(run, panels, png),
    ]
    try:
        for action in actions:
            action()
    except OSError as error:
        raise ToolError(f"{folder} cannot be written to ({error.strerror}): choose another with --out") from error
    return Report(page, png, said)
