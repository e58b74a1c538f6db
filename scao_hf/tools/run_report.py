"""``scao-hf report``: what a run did, from its trainer_state.json, as one HTML page and one PNG."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from scao_hf.tools import ToolError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HTML_NAME, PNG_NAME = "scao-report.html", "scao-report.png"

#: Colours of the pictures; in the page each becomes a CSS variable, so that it can be light or dark.
INK, LINE, FIRST, RAMP, SECOND, GRID = "#101418", "#1f5fbf", "#e8eaee", "#f6e3c0", "#d3ebd9", "#c9ced6"
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
    Panel("scao/rank", "Rank", "How many directions of the curvature are in use, on average. 0 until phase 2."),
    Panel(
        "scao/captured_mass", "Captured mass", "The share of the curvature that those directions hold. 1 is all of it."
    ),
    Panel("scao/curvature_norm", "Curvature norm", "How large the curvature is. A jump means unusual gradients.", True),
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


@dataclass(frozen=True)
class Run:
    """The log of a run: numbers by key, each with its steps, and what the state file says about the whole."""

    name: str
    series: dict[str, tuple[list[int], list[float]]]
    steps: int
    max_steps: int

    def bands(self) -> list[tuple[float, float, str]]:
        """(first step, last step, colour) of phase 1, of the ramp and of phase 2, in the order in which they came."""
        steps, phases = self.series.get("scao/phase", ([], []))
        blends = dict(zip(*self.series.get("scao/blend", ([], [])), strict=True))
        found: list[tuple[float, float, str]] = []
        begin: float = 0
        for step, phase in zip(steps, phases, strict=True):
            colour = FIRST if phase < 2 else RAMP if blends.get(step, 1.0) < 1 else SECOND
            if found and found[-1][2] == colour:
                found[-1] = (found[-1][0], step, colour)
            else:
                found.append((begin, step, colour))
            begin = step
        return found


def find_state(run_dir: Path) -> Path:
    """The trainer_state.json of a run: its own, or that of its latest checkpoint.

    Raises:
        ToolError: there is no such folder, it is empty, or nothing in it was written by a Trainer.
    """
    if not run_dir.exists():
        raise ToolError(f"{run_dir} does not exist: pass the output_dir of a run")
    if run_dir.is_file():
        raise ToolError(f"{run_dir} is a file: pass the folder that it lies in")
    own = run_dir / "trainer_state.json"
    saved = [path for path in run_dir.glob("checkpoint-*/trainer_state.json") if path.parent.name[11:].isdigit()]
    if saved and not own.exists():
        return max(saved, key=lambda path: int(path.parent.name[11:]))
    if own.exists():
        return own
    if not any(run_dir.iterdir()):
        raise ToolError(f"{run_dir} is empty: the run has saved nothing yet, or this is not its output_dir")
    raise ToolError(
        f"{run_dir} has no trainer_state.json, nor has any checkpoint-* in it: pass the output_dir of a Trainer "
        "or Axolotl run that has saved a checkpoint (save_strategy), or call trainer.save_state() at its end"
    )


def read_run(run_dir: Path) -> Run:
    """The log of the run in that folder.

    Raises:
        ToolError: there is none, it cannot be read, or it holds no training loss.
    """
    path = find_state(run_dir)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        history = [row for row in state["log_history"] if isinstance(row, dict) and "step" in row]
    except (ValueError, KeyError, TypeError) as error:
        raise ToolError(f"{path} is damaged or no Trainer's: take that of an earlier checkpoint") from error
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in history:
        for key, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                steps, values = series.setdefault(key, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    if "loss" not in series:
        raise ToolError(f"{path} holds no training loss: the run ended before its first log (logging_steps)")
    name = run_dir.resolve().name
    return Run(name, series, int(state.get("global_step") or series["loss"][0][-1]), int(state.get("max_steps") or 0))


def findings(run: Run) -> list[str]:
    """What happened, in plain sentences."""
    steps, losses = run.series["loss"]
    finite = [value for value in losses if math.isfinite(value)]
    said = []
    if finite:
        tenth = max(1, len(finite) // 10)
        first, last = fmean(finite[:tenth]), fmean(finite[-tenth:])
        verb = "fell" if last < first else "did not fall: it went"
        said.append(
            f"The training loss {verb} from {first:.4g} to {last:.4g} in {run.steps} steps (first and last tenth)."
        )
    if len(finite) < len(losses):
        bad = next(step for step, value in zip(steps, losses, strict=True) if not math.isfinite(value))
        said.append(f"The loss was NaN or infinite at step {bad}: lower the learning rate, or look at the data there.")
    if run.max_steps > run.steps:
        said.append(f"The log ends at step {run.steps} of {run.max_steps}: the run is not over, or was stopped.")
    if "scao/phase" not in run.series:
        said.append(
            "The log has no scao/ figures: the run used another optimizer, or SCAOCallback was not attached "
            "(SCAOTrainer and the Axolotl plugin attach it)."
        )
        return said
    said += _phase_findings(run)
    skipped = max(run.series.get("scao/skipped", ([], [0.0]))[1])
    if skipped:
        said.append(
            f"{skipped:.0f} times a matrix was left as it was for a step, because its gradient held NaN or Inf. In "
            "float16 a few at the start are usual (loss scaling); many mean a learning rate that is too high."
        )
    else:
        said.append("No step was skipped: every gradient was finite.")
    return said


def _phase_findings(run: Run) -> list[str]:
    steps, phases = run.series["scao/phase"]
    second = next((step for step, phase in zip(steps, phases, strict=True) if phase >= 2), None)
    if second is None:
        return [
            f"Phase 2 was never reached in {run.steps} steps: every step was a plain AdamW step. Train longer, or "
            "lower scao_warmup_steps, scao_min_precond_updates or scao_precond_freq."
        ]
    blend_steps, blends = run.series.get("scao/blend", ([], []))
    full = next((step for step, blend in zip(blend_steps, blends, strict=True) if blend >= 1), None)
    said = f"Phase 2, with curvature, is first logged at step {second}"
    said += (
        f" and is in full effect from step {full}."
        if full is not None
        else "; the run ended on the ramp to its full effect."
    )
    rank, mass = (run.series.get(key, ([], [0.0]))[1][-1] for key in ("scao/rank", "scao/captured_mass"))
    return [
        said,
        f"At the end {rank:.3g} directions were in use on average, holding {mass:.0%} of the measured curvature.",
    ]


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
    axes.plot(steps, values, color=LINE, linewidth=1.6, marker="o" if len(steps) < 3 else None, markersize=4)
    if panel.log and all(value > 0 for value in values if math.isfinite(value)) and max(values) > 20 * min(values):
        axes.set_yscale("log")
    if panel.key == "scao/captured_mass":
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


def _svg(run: Run, panel: Panel) -> str:
    """An inline picture whose colours and font the page decides."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.key, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.8, 2.5), layout="constrained")
        figure.patch.set_alpha(0)
        _draw(figure.add_subplot(), run, panel)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(panel.title)} over steps" ', 1)


def _png(run: Run, panels: list[Panel], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 2.7 * rows + 0.6), layout="constrained", facecolor="white")
    figure.suptitle(f"{run.name}: grey phase 1 (AdamW), amber ramp, green phase 2 (curvature)", fontsize=12, color=INK)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, 2, index + 1)
        axes.set_title(panel.title, fontsize=11, color=INK, loc="left")
        _draw(axes, run, panel)
    figure.savefig(path, dpi=110)


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
.key span { display: inline-block; width: 1.1em; height: 1.1em; vertical-align: -.15em; margin: 0 .3em 0 .8em;
  border: 1px solid var(--quiet); } .key span:first-child { margin-left: 0; }
"""


def _page(run: Run, panels: list[Panel], said: list[str]) -> str:
    key = ""
    if "scao/phase" in run.series:
        names = (("first", "phase 1: AdamW steps"), ("ramp", "ramp"), ("second", "phase 2: steps with curvature"))
        key = "".join(f'<span style="background: var(--{name})"></span>{text}' for name, text in names)
        key = f'<p class="key">{key}</p>'
    charts = "\n".join(
        f"<figure><h2>{escape(panel.title)}</h2>{_svg(run, panel)}\n"
        f"<figcaption>{escape(panel.words)}</figcaption></figure>"
        for panel in panels
    )
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
    title = escape(f"Run {run.name}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n'
        f'<ul>{sentences}</ul>\n{key}\n<main class="charts">{charts}</main>\n'
        "<footer>Made by scao-hf report from trainer_state.json; nothing is loaded from elsewhere.</footer>"
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
    if not any(run.series.get("scao/skipped", ([], []))[1]):
        panels = [panel for panel in panels if panel.key != "scao/skipped"]  # a sentence says it
    said = findings(run)
    folder = out or run_dir
    html, png = folder / HTML_NAME, folder / PNG_NAME
    actions: list[Callable[[], Any]] = [
        lambda: folder.mkdir(parents=True, exist_ok=True),
        lambda: html.write_text(_page(run, panels, said), encoding="utf-8"),
        lambda: _png(run, panels, png),
    ]
    try:
        for action in actions:
            action()
    except OSError as error:
        raise ToolError(f"{folder} cannot be written to ({error.strerror}): choose another with --out") from error
    return Report(html, png, said)
