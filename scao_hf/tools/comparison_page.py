"""The page and the picture of ``scao-hf compare``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from scao_hf.tools import page as html
from scao_hf.tools.arms import Outcome
from scao_hf.tools.comparison import Side, gap, pairs, same_data, smoothed, summary, times, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def colours(sides: Sequence[Side]) -> list[tuple[Side, str]]:
    """The sides that have a run, each with the colour of its line."""
    chosen = [html.OTHERS[index % len(html.OTHERS)] for index in range(len(sides) - 1)]
    return [(side, colour) for side, colour in zip(sides, [*chosen, html.LINE], strict=True) if side.best]


def bands(blends: Sequence[float]) -> list[tuple[int, int, str]]:
    """(first step, last step, colour) of phase 1, of the ramp and of phase 2, from the curvature's share of each step."""
    found, step = [], 0
    for colour, group in groupby(html.FIRST if b <= 0 else html.RAMP if b < 1 else html.SECOND for b in blends):
        count = len(list(group))
        found.append((step, step + count, colour))
        step += count
    return found


def _curves(axes: Axes, sides: Sequence[Side], x: Callable[[Outcome], Sequence[float]], shaded: bool) -> None:
    for side, colour in colours(sides):
        assert side.best is not None
        if shaded:
            for begin, end, shade in bands(side.best.blends):
                axes.axvspan(begin, end, color=shade, linewidth=0, zorder=0)
        axes.plot(x(side.best), side.best.curve, color=colour, linewidth=0.7, alpha=0.3)
        label = f"{side.optimizer}, learning rate {side.best.learning_rate:g}"
        axes.plot(x(side.best), smoothed(side.best.curve), color=colour, linewidth=1.8, label=label)


def _steps(outcome: Outcome) -> Sequence[float]:
    return range(1, len(outcome.curve) + 1)


def _figure_of(sides: Sequence[Side]) -> str:
    return next(side.best.figure for side in sides if side.best)


def draw(sides: Sequence[Side], title: str, path: Path) -> None:
    """Write the picture: loss or reward against steps and against seconds, each side at its best learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor="white")
    title_text = figure.suptitle(title, fontsize=9, wrap=True)
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    _curves(by_step, sides, _steps, shaded=True)
    _curves(by_second, sides, times, shaded=False)
    by_step.set_ylabel(f"{_figure_of(sides)} in training (strong: smoothed)")
    for entry in (title_text, *by_step.legend().get_texts()):
        entry.set_parse_math(False)  # an optimizer's name is not a formula
    for axes, label in ((by_step, "step"), (by_second, "seconds")):
        axes.set_xlabel(label)
        axes.grid(color=html.GRID, linewidth=0.5)
        axes.set_axisbelow("line")
    figure.savefig(path, dpi=110)


def _differences(axes: Axes, rival: Side, scao: Side, colour: str) -> None:
    """SCAO's figure minus the rival's, batch by batch, and the mean of the part that is judged."""
    (first, second), *_ = pairs(rival, scao)
    found = [two - one for one, two in zip(first.curve, second.curve, strict=True)]
    judged = len(first.tail)
    axes.axhline(0, color=html.INK, linewidth=0.8)
    axes.vlines(range(1, len(found) + 1), 0, found, color=colour, linewidth=max(0.6, 90 / len(found)))
    mean = fmean(found[-judged:])
    axes.hlines(mean, len(found) - judged + 0.5, len(found) + 0.5, color=html.INK, linewidth=1.6, linestyle="--")
    largest = max(map(abs, found[len(found) // 10 :]), default=0.0)
    if 0 < largest < math.inf:
        axes.set_ylim(-1.1 * largest, 1.1 * largest)


def _rates(axes: Axes, sides: Sequence[Side]) -> None:
    for side, colour in colours(sides):
        points = sorted((outcome.learning_rate, fmean(outcome.tail)) for outcome in side.usable.values())
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", linewidth=1.6)
    axes.set_xscale("log", base=2)
    shown = sorted({outcome.learning_rate for side in sides for outcome in side.usable.values()})
    axes.set_xticks(shown, [f"{rate:.2g}" for rate in shown])
    axes.minorticks_off()


def page(sides: Sequence[Side], about: str) -> str:
    """The page: the verdict, the figures, and what they come from."""
    *rivals, scao = sides
    figure, names = _figure_of(sides), {colour: f"other{index}" for index, colour in enumerate(html.OTHERS)}
    charts: list[tuple[str, str, str, Callable[[Axes], object]]] = [
        (
            f"{figure.capitalize()} by step",
            "step",
            "Strong: smoothed. The background shows SCAO's phases.",
            lambda axes: _curves(axes, sides, _steps, shaded=True),
        ),
        (
            f"{figure.capitalize()} by time",
            "seconds of training steps",
            "The same over time: without data, saving and evaluation.",
            lambda axes: _curves(axes, sides, times, shaded=False),
        ),
    ]
    for rival, colour in colours([*rivals, Side("")]):
        if pairs(rival, scao) and same_data(rival, scao) and math.isfinite(gap(rival, scao).mean):
            better = "Below" if figure == "loss" else "Above"
            charts.append(
                (
                    f"scao minus {rival.optimizer}, batch by batch",
                    "step",
                    f"{better} the line SCAO is better on the same batch. Dashed: the mean over the last third, which is "
                    "judged.",
                    lambda axes, rival=rival, colour=colour: _differences(axes, rival, scao, colour),  # type: ignore[misc]
                )
            )
    if any(len(side.usable) > 1 for side in sides):
        words = "Mean of the last third of the steps at each learning rate that was tried."
        charts.append((f"{figure.capitalize()} by learning rate", "learning rate", words, lambda ax: _rates(ax, sides)))

    def fill(figure: Figure, across: str, draw: Callable[[Axes], object]) -> None:
        axes = figure.add_subplot()
        draw(axes)
        html.tidy(axes, across)

    drawn = "\n".join(
        html.chart(title, html.svg(title, lambda f, a=across, d=draw: fill(f, a, d), title), words)  # type: ignore[misc]
        for title, across, words, draw in charts
    )
    lines = [(names.get(colour, "line"), side.optimizer) for side, colour in colours(sides)]
    phases = html.PHASES if scao.best and scao.best.blends else ()
    table = html.table(["", *(side.optimizer for side in sides)], summary(sides))
    said = [*verdict(sides), *([about] if about else [])]
    body = f'{table}\n{html.key([*lines, *phases])}\n<main class="charts">{drawn}</main>'
    return html.page("SCAO compared", said[: len(rivals)], said[len(rivals) :], body, "scao-hf compare")
