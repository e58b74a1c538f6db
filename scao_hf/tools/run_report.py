"""``scao-hf report``: what a run did, from its trainer_state.json, as one HTML page and one PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from scao_hf.tools import ToolError, matrices
from scao_hf.tools.run_log import FIRST, RAMP, SECOND, Run, findings, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HTML_NAME, PNG_NAME = "scao-report.html", "scao-report.png"

#: Colours of the pictures; in the page each becomes a CSS variable, so that it can be light or dark.
INK, LINE, GRID = "#101418", "#1f5fbf", "#c9ced6"
_VARIABLES = {INK: "ink", LINE: "line", FIRST: "first", RAMP: "ramp", SECOND: "second", GRID: "grid"}


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
        "optimizer_ms", "Optimizer time", "Milliseconds that each step of the optimizer took, refreshes included.", True
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
    if panel.key in ("scao/captured_mass", "scao/damped"):
        axes.set_ylim(0, 1.03)
    axes.margins(x=0)
    axes.grid(axis="y", color=GRID, linewidth=0.5)
    axes.set_axisbelow("line")
    axes.tick_params(colors=INK, labelsize=10, length=3)
    axes.set_xlabel("step", color=INK, fontsize=10)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def _svg(panel: Panel | matrices.Map, draw: Callable[[Figure], object]) -> str:
    """An inline picture whose colours and font the page decides."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.key, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.8, 2.5), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=150)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(panel.title)} over steps" ', 1)


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


_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #101418; --quiet: #4f5864; --line: #1f5fbf; --first: #e8eaee;
  --ramp: #f6e3c0; --second: #d3ebd9; --grid: #c9ced6; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e9ecf0; --quiet: #a9b2be; --line: #7db1ff;
  --first: #262b32; --ramp: #4a3a17; --second: #1d3b28; --grid: #3a414b; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem;
  max-width: 68rem; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 0; }
ul { padding-left: 1.2rem; }
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; } figcaption, footer { color: var(--quiet); font-size: .9rem; } svg { width: 100%; height: auto; }
.key span { display: inline-block; margin-right: 1em; white-space: nowrap; }
.key i { display: inline-block; width: 1.1em; height: 1.1em; vertical-align: -.15em; margin-right: .3em;
  border: 1px solid var(--quiet); }
footer { margin-top: 1.5rem; }
"""


def _page(run: Run, panels: list[Panel], said: list[str]) -> str:
    key = ""
    if "scao/phase" in run.series:
        names = (("first", "phase 1: AdamW steps"), ("ramp", "ramp"), ("second", "phase 2: steps with curvature"))
        key = "".join(f'<span><i style="background: var(--{name})"></i>{text}</span> ' for name, text in names)
        key = f'<p class="key">{key}</p>'
    charts = "\n".join(
        f"<figure><h2>{escape(panel.title)}</h2>{_svg(panel, draw)}\n"
        f"<figcaption>{escape(panel.words)}</figcaption></figure>"
        for panel, draw in _pictures(run, panels)
    )
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
    title = escape(f"Run {run.name}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n'
        f'<ul>{sentences}</ul>\n{key}\n<main class="charts">{charts}</main>\n'
        "<footer>Made by scao-hf report from the run's own log; nothing is loaded from elsewhere.</footer>"
        "</body></html>\n"
    )


def write_report(run_dir: Path, out: Path | None = None) -> Report:
    """Write the page and the picture.

    Args:
        run_dir: output folder of a run, or a checkpoint of it.
        out: folder for both files, made if need be; ``run_dir`` if None.

    Raises:
        ToolError: there is nothing to report on, or ``out`` cannot be written to.
    """
    run = read_run(run_dir)
    panels = [panel for panel in PANELS if any(map(math.isfinite, run.series.get(panel.key, ([], []))[1]))]
    # Where these are zero throughout, a sentence says it.
    silent = [key for key in ("scao/skipped", "scao/damped") if not any(run.series.get(key, ([], []))[1])]
    panels = [panel for panel in panels if panel.key not in silent]
    said = findings(run)
    folder = out or run_dir
    html, png = folder / HTML_NAME, folder / PNG_NAME
    actions: list[Callable[[], Any]] = [
        lambda: folder.mkdir(parents=True, exist_ok=True),
        lambda: html.write_text(_page(run, panels, said), encoding="utf-8", errors="replace"),
        lambda: _png(run, panels, png),
    ]
    try:
        for action in actions:
            action()
    except OSError as error:
        raise ToolError(f"{folder} cannot be written to ({error.strerror}): choose another with --out") from error
    return Report(html, png, said)
