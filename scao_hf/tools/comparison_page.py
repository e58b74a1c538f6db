"""The page and the picture of ``scao-hf compare``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from scao_hf.tools import page as html
from scao_hf.tools.arms import Outcome
from scao_hf.tools.comparison import Side, gap, pairs, same_data, summary, times, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def colours(sides: Sequence[Side]) -> list[tuple[Side, Outcome, str]]:
    """The sides that have a run, each with the best one and the colour of its line."""
    chosen = [html.OTHERS[index % len(html.OTHERS)] for index in range(len(sides) - 1)]
    coloured = zip(sides, [*chosen, html.LINE], strict=True)
    return [(side, side.best, colour) for side, colour in coloured if side.best]


def _steps(outcome: Outcome) -> Sequence[float]:
    return range(1, len(outcome.curve) + 1)


def _curves(axes: Axes, sides: Sequence[Side], x: Callable[[Outcome], Sequence[float]]) -> None:
    """Loss or reward of each side at its best learning rate; over steps with SCAO's phases behind it."""
    for side, best, colour in colours(sides):
        if x is _steps and best.blends:
            html.shade(axes, html.bands(_steps(best), best.blends))
        axes.plot(x(best), best.curve, color=colour, linewidth=0.7, alpha=0.3)
        label = f"{side.optimizer}, learning rate {best.learning_rate:g}"
        axes.plot(x(best), html.smoothed(best.curve), color=colour, linewidth=1.8, label=label)


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
    for side, _, colour in colours(sides):
        points = sorted((outcome.learning_rate, fmean(outcome.tail)) for outcome in side.usable.values())
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", linewidth=1.6)
    axes.set_xscale("log", base=2)
    shown = sorted({outcome.learning_rate for side in sides for outcome in side.usable.values()})
    axes.set_xticks(shown, [f"{rate:.2g}" for rate in shown])
    axes.minorticks_off()


def _charts(sides: Sequence[Side]) -> list[html.Chart]:
    """Loss or reward over steps and over time, SCAO's gain on each other batch by batch, and what each rate gave."""
    *rivals, scao = sides
    figure = next(best.figure for _, best, _ in colours(sides))
    charts: list[html.Chart] = []

    def add(title: str, across: str, words: str, draw: Callable[[Axes], None]) -> None:
        def fill(figure: Figure) -> None:
            axes = figure.add_subplot()
            draw(axes)
            html.tidy(axes, across)

        charts.append(html.Chart(title, words, fill))

    words = "Strong: smoothed. The background shows SCAO's phases."
    add(f"{figure.capitalize()} by step", "step", words, lambda axes: _curves(axes, sides, _steps))
    words = "The same over time: without data, saving and evaluation."
    add(f"{figure.capitalize()} by time", "seconds of training steps", words, lambda axes: _curves(axes, sides, times))
    better = "Below" if figure == "loss" else "Above"
    words = (
        f"{better} the line SCAO is better on the same batch. Dashed: the mean over the last third, which is judged."
    )
    for rival, _, colour in colours([*rivals, Side("")]):
        if pairs(rival, scao) and same_data(rival, scao) and math.isfinite(gap(rival, scao).mean):
            title = f"scao minus {rival.optimizer}, batch by batch"
            add(title, "step", words, partial(_differences, rival=rival, scao=scao, colour=colour))
    if any(len(side.usable) > 1 for side in sides):
        words = "Mean of the last third of the steps at each learning rate that was tried."
        add(f"{figure.capitalize()} by learning rate", "learning rate", words, lambda axes: _rates(axes, sides))
    return charts


def write_page(sides: Sequence[Side], about: str, page: Path, png: Path) -> None:
    """Write the page with the verdict, the figures and their charts, and the charts as a picture.

    Args:
        sides: the rivals, and SCAO as the last; at least one has a complete run.
        about: what was compared, a line for the page.
        page, png: where.
    """
    *rivals, scao = sides
    charts, said = _charts(sides), [*verdict(sides), *([about] if about else [])]
    names = {colour: f"other{index}" for index, colour in enumerate(html.OTHERS)}
    lines = [(names.get(colour, "line"), side.optimizer) for side, _, colour in colours(sides)]
    phases = html.PHASES if scao.best and scao.best.blends else ()
    table = html.table(["", *(side.optimizer for side in sides)], summary(sides))
    body, lead = f"{table}\n{html.key([*lines, *phases])}", said[: len(rivals)]
    text = html.page("SCAO compared", lead, said[len(rivals) :], body, charts, "scao-hf compare")
    page.write_text(text, encoding="utf-8", errors="replace")
    html.png(said[0], charts, png)
