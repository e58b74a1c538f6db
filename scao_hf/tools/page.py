"""What the pages of ``scao-hf report`` and ``scao-hf compare`` share: one file, light or dark, charts as inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

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


def svg(title: str, draw: Callable[[Figure], object], salt: str) -> str:
    """An inline picture whose colours and font the page decides.

    Args:
        title: what it shows, for those who do not see it.
        draw: fills an empty figure.
        salt: something that no other picture of the page has, for the ids in it.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.8, 2.5), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=150)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, (colour, _) in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def tidy(axes: Axes, across: str) -> None:
    """Frame, grid and text of a chart; ``across`` is what the x axis counts."""
    axes.margins(x=0)
    axes.grid(axis="y", color=GRID, linewidth=0.5)
    axes.set_axisbelow("line")
    axes.tick_params(colors=INK, labelsize=10, length=3)
    axes.set_xlabel(across, color=INK, fontsize=10)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


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


def chart(title: str, picture: str, words: str) -> str:
    """A picture with its title and what it tells."""
    return f"<figure><h2>{escape(title)}</h2>{picture}\n<figcaption>{escape(words)}</figcaption></figure>"


def page(title: str, lead: Sequence[str], said: Sequence[str], body: str, command: str) -> str:
    """A whole page: its headlines, further sentences, and what ``table``, ``key`` and ``chart`` have made."""
    leads = "".join(f'<p class="lead">{escape(sentence)}</p>\n' for sentence in lead)
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
    title = escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n'
        f"{leads}<ul>{sentences}</ul>\n{body}\n"
        f"<footer>Made by {escape(command)} from the run's own log; nothing is loaded from elsewhere.</footer>"
        "</body></html>\n"
    )
