"""What the pages of ``scao-hf report`` and ``scao-hf compare`` share: one file, light or dark, charts as inline SVG."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours of the phases: AdamW steps, the ramp, steps with curvature.
FIRST, RAMP, SECOND = "#e8eaee", "#f6e3c0", "#d3ebd9"
#: Colours of the pictures; in a page each becomes a CSS variable, so that it can be light or dark.
INK, LINE, GRID = "#101418", "#1f5fbf", "#c9ced6"
#: Lines of up to four others.
OTHERS = ("#a65300", "#1d7a46", "#8a3fa0", "#5d6570")
_COLOURS = {
    "ink": (INK, "#e9ecf0"),
    "line": (LINE, "#7db1ff"),
    "first": (FIRST, "#262b32"),
    "ramp": (RAMP, "#4a3a17"),
    "second": (SECOND, "#1d3b28"),
    "grid": (GRID, "#3a414b"),
    "other0": (OTHERS[0], "#ffa657"),
    "other1": (OTHERS[1], "#6fd39a"),
    "other2": (OTHERS[2], "#d19be6"),
    "other3": (OTHERS[3], "#aeb6c1"),
    "paper": ("#ffffff", "#14171b"),
    "quiet": ("#4f5864", "#a9b2be"),
}


def _variables(dark: bool) -> str:
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in _COLOURS.items())


_STYLE = f"""
:root {{ color-scheme: light dark; {_variables(False)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(True)} }} }}
body {{ background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem;
  max-width: 68rem; }}
h1 {{ font-size: 1.4rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.05rem; margin: 0; }}
.lead {{ font-size: 1.15rem; margin: .5rem 0; }} ul {{ padding-left: 1.2rem; }} li {{ overflow-wrap: anywhere; }}
.charts {{ display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }}
figure {{ margin: 0; }} figcaption, footer {{ color: var(--quiet); font-size: .9rem; }} svg {{ width: 100%; height: auto; }}
.key span {{ display: inline-block; margin-right: 1em; white-space: nowrap; }}
.key i {{ display: inline-block; width: 1.1em; height: 1.1em; vertical-align: -.15em; margin-right: .3em;
  border: 1px solid var(--quiet); }}
.table {{ overflow-x: auto; }} table {{ border-collapse: collapse; margin: 1rem 0; max-width: 100%; }}
th, td {{ border-bottom: 1px solid var(--grid); padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top;
  overflow-wrap: break-word; }}
@media (max-width: 40rem) {{ table {{ font-size: .8rem; }} th, td {{ padding-right: .4rem; }} }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
footer {{ margin-top: 1.5rem; }}
"""


class Chart(NamedTuple):
    """One chart: a title, what it tells in plain words, and what fills an empty figure with it."""

    title: str
    words: str
    draw: Callable[[Figure], object]


def bands(steps: Iterable[float], blends: Iterable[float]) -> list[tuple[float, float, str]]:
    """(first step, last step, colour) of phase 1, of the ramp and of phase 2, from the curvature's share in each step."""
    found: list[tuple[float, float, str]] = []
    begin = 0.0
    for step, blend in zip(steps, blends, strict=True):
        colour = FIRST if blend <= 0 else RAMP if blend < 1 else SECOND
        if found and found[-1][2] == colour:
            found[-1] = (found[-1][0], step, colour)
        else:
            found.append((begin, step, colour))
        begin = step
    return found


def shade(axes: Axes, phases: Iterable[tuple[float, float, str]]) -> None:
    """Colour the background of a chart over steps with its ``bands``."""
    for begin, end, colour in phases:
        axes.axvspan(begin, end, color=colour, linewidth=0, zorder=0)


def smoothed(values: Sequence[float]) -> list[float]:
    """At each point the mean of what is finite in the last tenth of the length, at least five points, up to there."""
    width, means = max(5, len(values) // 10), []
    for end in range(1, len(values) + 1):
        finite = list(filter(math.isfinite, values[max(0, end - width) : end]))
        means.append(fmean(finite) if finite else math.nan)
    return means


def tidy(axes: Axes, across: str, filled: bool = False) -> None:
    """Frame, grid and text of a chart; ``across`` is what the x axis counts. One that is ``filled`` has no grid."""
    axes.margins(x=0)
    if not filled:
        axes.grid(axis="y", color=GRID, linewidth=0.5)
        axes.set_axisbelow("line")
    axes.tick_params(colors=INK, labelsize=10, length=3)
    axes.set_xlabel(across, color=INK, fontsize=10)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(filled or side in ("left", "bottom"))
        spine.set_color(INK)


def _svg(chart: Chart) -> str:
    """An inline picture whose colours and font the page decides."""
    import matplotlib
    from matplotlib.figure import Figure

    # The title salts the ids in the picture, which must be those of no other on the page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.8, 2.5), layout="constrained")
        figure.patch.set_alpha(0)
        chart.draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=150)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, (colour, _) in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(chart.title)}" ', 1)


def key(entries: Sequence[tuple[str, str]]) -> str:
    """What colours mean: (variable of the colour, words)."""
    spans = "".join(f'<span><i style="background: var(--{name})"></i>{escape(text)}</span> ' for name, text in entries)
    return f'<p class="key">{spans}</p>'


PHASES = (("first", "phase 1: AdamW steps"), ("ramp", "ramp"), ("second", "phase 2: steps with curvature"))


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table; without a head its values are text. A number stays in one line with its unit."""
    kind = ' class="number"' if head else ""
    top = "".join(f"<th{kind if index else ''}>{escape(text)}</th>" for index, text in enumerate(head))
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td{kind}>{_whole(escape(value))}</td>' for value in values)}</tr>"
        for name, values in rows
    )
    return f'<div class="table"><table>{f"<tr>{top}</tr>" if top else ""}{body}</table></div>'


def _whole(text: str) -> str:
    return re.sub(r"(?<=\d) (?=(MiB|ms|s)\b)", "&nbsp;", text)


def png(title: str, charts: Sequence[Chart], path: Path) -> None:
    """Write the charts as one picture, two in a row.

    Args:
        title: above them; no part of it is read as a formula, nor of the legend that labelled lines get in the first chart.
        charts: the same as for ``page``.
        path: of the file.
    """
    from matplotlib.figure import Figure

    rows = -(-len(charts) // 2)
    figure = Figure(figsize=(11, 2.7 * rows + 0.6), layout="constrained", facecolor="white")
    # matplotlib's own wrapping reads a part between two dollar signs as a formula even so.
    figure.suptitle(textwrap.fill(title, 110), fontsize=12, color=INK, parse_math=False)
    for part, chart in zip(figure.subfigures(rows, 2, squeeze=False).flatten(), charts, strict=False):
        part.suptitle(chart.title, fontsize=11, color=INK, parse_math=False)
        chart.draw(part)
    if figure.axes[0].get_legend_handles_labels()[1]:
        for text in figure.axes[0].legend().get_texts():
            text.set_parse_math(False)
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.2)


def page(title: str, lead: Sequence[str], said: Sequence[str], body: str, charts: Iterable[Chart], command: str) -> str:
    """A whole page: its headlines, further sentences, what ``table`` and ``key`` have made, and charts."""
    leads = "".join(f'<p class="lead">{escape(sentence)}</p>\n' for sentence in lead)
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
    figures = "\n".join(
        f"<figure><h2>{escape(chart.title)}</h2>{_svg(chart)}\n<figcaption>{escape(chart.words)}</figcaption></figure>"
        for chart in charts
    )
    title = escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n'
        f'{leads}<ul>{sentences}</ul>\n{body}\n<main class="charts">{figures}</main>\n'
        f"<footer>Made by {escape(command)} from the run's own log; nothing is loaded from elsewhere.</footer>"
        "</body></html>\n"
    )
