"""``scao-hf compare``: SCAO and others on one configuration, each at its learning rate, and what came out.

All read the same batches, so that their losses are compared batch by batch: a difference that is small next to the
losses' own spread is still seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

from scao_hf.tools import ToolError, duration, writing
from scao_hf.tools.arms import Arm, Job, Outcome, Rate, run_arm
from scao_hf.tools.page import smoothed

#: Runs of one optimizer that ``--lr auto`` makes at most, and the factor between two rates.
MOST_RUNS, FACTOR = 5, 2.0
PNG_NAME, JSON_NAME, HTML_NAME = "comparison.png", "comparison.json", "comparison.html"
QUARTERS = (0.25, 0.5, 0.75, 1.0)
#: A difference counts from this many standard errors on, and is slight below this share of the loss.
ERRORS, SLIGHT = 2.0, 0.02


@dataclass
class Side:
    """One of the optimizers: its runs by learning rate, the best one, and whether that lies between two others.

    Attributes:
        optimizer: its name.
        runs: with the configuration's own seed, by learning rate.
        repeats: with other seeds, at the best rate.
    """

    optimizer: str
    runs: dict[Rate, Outcome] = field(default_factory=dict)
    repeats: list[Outcome] = field(default_factory=list)

    @property
    def usable(self) -> dict[Rate, Outcome]:
        return {rate: outcome for rate, outcome in self.runs.items() if outcome.failure is None}

    @property
    def best(self) -> Outcome | None:
        return min(self.usable.values(), key=lambda outcome: outcome.score, default=None)

    @property
    def failure(self) -> str | None:
        """Why there is no run of this optimizer, or one too few; None where all are there."""
        if not self.usable:
            return next((outcome.failure for outcome in self.runs.values()), "it was not run")
        return next((outcome.failure for outcome in self.repeats if outcome.failure), None)

    @property
    def place(self) -> str:
        """Where the best learning rate lies among those tried, in words."""
        if len(self.runs) < 2 or self.best is None:
            return ""
        rates = sorted(outcome.learning_rate for outcome in self.usable.values())
        inside = rates[0] < self.best.learning_rate < rates[-1]
        return f"best of {len(rates)}" if inside else f"best of {len(rates)}, at the edge"


def parse_rate(text: str) -> Rate | None:
    """``--lr``: a number, ``config`` for the configuration's own rate, or ``auto`` (None) for a search."""
    if text == "auto":
        return None
    if text == "config":
        return Rate(1.0, relative=True)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ToolError(f"--lr is {text!r}: it must be a number above 0, config or auto")
    return Rate(value)


def next_rate(runs: dict[Rate, Outcome]) -> Rate | None:
    """The next learning rate to try: beyond the best one while that is the largest or smallest; None when done."""
    if not runs:
        return Rate(1.0, relative=True)
    if len(runs) >= MOST_RUNS or any(outcome.failure for outcome in runs.values()):
        return None
    tried = sorted(rate.value for rate in runs)
    best = min(runs, key=lambda rate: runs[rate].score).value
    if best == tried[0]:
        return Rate(best / FACTOR, relative=True)
    return Rate(best * FACTOR, relative=True) if best == tried[-1] else None


def most_runs(rate: Rate | None, seeds: int, optimizers: int = 2) -> int:
    """How many runs a comparison makes at most."""
    return optimizers * ((1 if rate else MOST_RUNS) + seeds - 1)


def estimate(outcome: Outcome, steps: int) -> str:
    """How long so many steps will take, in words, from the first ones of a run; empty before there are enough."""
    if len(outcome.seconds) < 4:
        return ""
    each = median(outcome.seconds[1:])  # the first step warms up
    return f"{duration(each)} a step: about {duration(steps * each)} of training in all, besides loading and evaluation"


def compare(
    job: Job,
    optimizers: Sequence[str],
    rate: Rate | None,
    seeds: int,
    watch: Callable[[Arm], Callable[[Outcome], None]],
) -> list[Side]:
    """Make every run that is not there yet; a run that fails ends its own side only.

    Args:
        job: what is run.
        optimizers: those to compare with, and SCAO as the last.
        rate: one learning rate for all, or None to search each one's own.
        seeds: how many; the search is made with the first.
        watch: called when a run begins; what it returns is told what is there of it so far.
    """
    sides = [Side(name) for name in optimizers]
    for side in sides:
        chosen = rate or next_rate(side.runs)
        while chosen is not None:
            arm = Arm(job, side.optimizer, chosen)
            side.runs[chosen] = run_arm(arm, watch(arm))
            chosen = None if rate else next_rate(side.runs)
    for side in sides if sides[-1].best and any(side.best for side in sides[:-1]) else ():
        if side.best is None:
            continue
        best = next(rate for rate, outcome in side.runs.items() if outcome is side.best)
        for seed in range(1, seeds):
            arm = Arm(job, side.optimizer, best, seed)
            side.repeats.append(run_arm(arm, watch(arm)))
    return sides


def times(outcome: Outcome) -> list[float]:
    """Seconds from the beginning to the end of each step."""
    return list(accumulate(outcome.seconds))


def pairs(first: Side, second: Side) -> list[tuple[Outcome, Outcome]]:
    """For each seed the runs of both sides at their best rates, where both are complete."""
    runs = ([side.best, *side.repeats] if side.best else [] for side in (first, second))
    return [(one, two) for one, two in zip(*runs, strict=False) if not (one.failure or two.failure)]


def same_data(first: Side, second: Side) -> bool:
    """Whether all complete runs with the same seed have read the same batches in the same order."""
    read = [outcome.data for side in (first, second) for outcome in side.usable.values()]
    return all(data == read[0] for data in read) and all(one.data == two.data for one, two in pairs(first, second))


class Gap(NamedTuple):
    """How much better the second run of each pair is in the last third of its steps: negative differences are better.

    Attributes:
        seeds: for each seed, the difference of each batch.
        level: mean of the first runs, without its sign.
    """

    seeds: list[list[float]]
    level: float

    @property
    def mean(self) -> float:
        return fmean(map(fmean, self.seeds))

    @property
    def judgement(self) -> str:
        """In a word or two: better, worse, or no difference where the spread of batches (one seed) or seeds has room for it."""
        parts = list(map(fmean, self.seeds)) if len(self.seeds) > 1 else self.seeds[0]
        error = stdev(parts) / math.sqrt(len(parts)) if len(parts) > 1 else math.inf
        if not abs(self.mean) > ERRORS * error:
            return "no difference"
        slightly = "slightly " if abs(self.mean) < SLIGHT * self.level else ""
        return slightly + ("better" if self.mean < 0 else "worse")


def gap(first: Side, second: Side) -> Gap:
    """The gap between two sides, over all seeds."""
    both = pairs(first, second)
    sign = -1 if both[0][0].rewards else 1
    seeds = [[sign * (b - a) for a, b in zip(one.tail, two.tail, strict=True)] for one, two in both]
    return Gap(seeds, abs(fmean(fmean(one.tail) for one, _ in both)))


def summary(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """The rows of the table: what, and its value for each side (empty where a side has failed)."""
    best = [side.best for side in sides]

    def row(name: str, value: Callable[[Outcome], str]) -> tuple[str, list[str]]:
        return name, ["" if outcome is None else value(outcome) for outcome in best]

    shown = [outcome for outcome in best if outcome is not None]
    figure = shown[0].figure if shown else "loss"
    memory = "peak memory" if any(outcome.device == "cuda" for outcome in shown) else "peak memory of the process"
    rates = [
        "" if outcome is None else f"{outcome.learning_rate:g}{f' ({side.place})' if side.place else ''}"
        for outcome, side in zip(best, sides, strict=True)
    ]
    rows = [
        ("learning rate", rates),
        row(f"{figure}, last third of the steps", lambda outcome: f"{fmean(outcome.tail):.4f}"),
        row("held-out loss", lambda outcome: "" if outcome.eval_loss is None else f"{outcome.eval_loss:.4f}"),
        row("seconds", lambda outcome: f"{sum(outcome.seconds):.1f}"),
        row("seconds per step, median", lambda outcome: f"{median(outcome.seconds):.3f}"),
        row(memory, lambda outcome: f"{outcome.peak_bytes / 2**20:,.0f} MiB"),
        row("optimizer state", lambda outcome: f"{outcome.state_bytes / 2**20:,.2f} MiB"),
    ]
    if len(shown) == len(sides):
        for part in QUARTERS:
            step = max(1, round(part * len(shown[0].losses)))
            rows.append((f"{figure} after {step} steps", [f"{smoothed(one.curve)[step - 1]:.4f}" for one in shown]))
        shortest = min(sum(outcome.seconds) for outcome in shown)
        for part in QUARTERS:
            after = [at(one, part * shortest) for one in shown]
            values = ["" if value is None else f"{value:.4f}" for value in after]
            rows.append((f"{figure} after {part * shortest:.1f} seconds", values))
    return [entry for entry in rows if any(entry[1])]


def at(outcome: Outcome, seconds: float) -> float | None:
    """The smoothed figure after so many seconds, None where the first step took longer."""
    done = sum(time <= seconds * (1 + 1e-9) for time in times(outcome))
    return smoothed(outcome.curve)[done - 1] if done else None


def _change(ratio: float, more: str, less: str) -> str:
    return "the same" if abs(ratio - 1) < 0.005 else f"{abs(ratio - 1):.0%} {more if ratio > 1 else less}"


def headline(first: Side, second: Side) -> str:
    """The result in one sentence."""
    both, found = pairs(first, second), gap(first, second)
    figure = both[0][0].figure
    relative = figure == "loss" and found.level > 0  # a reward may be anything, zero on average too
    parts = [mean / found.level if relative else -mean for mean in (found.mean, *map(fmean, found.seeds))]
    form = "{:.1%}" if relative else "{:.3g}"
    size = f"{form.format(abs(parts[0]))} {'higher' if parts[0] > 0 else 'lower'}" if parts[0] else "the same"
    if len(both) > 1:
        size += f" (by seed {', '.join(('+' if part > 0 else '') + form.format(part) for part in parts[1:])})"
    batches = [difference for seed in found.seeds for difference in seed]
    better = sum(difference < 0 for difference in batches)
    held_out = [(one.eval_loss, two.eval_loss) for one, two in both if one.eval_loss and two.eval_loss is not None]
    ratio = fmean(two / one for one, two in held_out) - 1 if held_out else 0.0
    said = f", held-out loss {abs(ratio):.1%} {'higher' if ratio > 0 else 'lower'}" if held_out else ""
    slower = fmean(median(two.seconds) / median(one.seconds) for one, two in both)
    larger = fmean(two.peak_bytes / one.peak_bytes for one, two in both)
    return (
        f"{second.optimizer} against {first.optimizer}: {figure} {size}, {'higher' if both[0][0].rewards else 'lower'} on "
        f"{better} of the last {len(batches)} batches{said}, steps {_change(slower, 'longer', 'shorter')}, peak memory "
        f"{_change(larger, 'more', 'less')}: {found.judgement}; {len(both)} seed{'s' if len(both) > 1 else ''}."
    )


def verdict(sides: Sequence[Side]) -> list[str]:
    """What the comparison shows, in plain sentences, and what it does not."""
    *rivals, scao = sides
    said = [f"{side.optimizer} failed: {side.failure}" for side in sides if side.failure]
    met = [rival for rival in rivals if rival.best and scao.best]
    if scao.best is None or not met:
        return said
    told = [_of_pair(rival, scao) for rival in met]
    said += [sentence for sentence, _ in told]
    if all(fair for _, fair in told):
        said.append("All runs have read the same batches in the same order.")
    said += _short(scao)
    if any("edge" in side.place for side in sides):
        said.append("A best learning rate lies at the edge of those tried: the optimum may lie beyond it.")
    if any(len(pairs(rival, scao)) == 1 for rival in met):
        said.append("Another seed moves the losses too: repeat with --seeds 3 before you rely on a small gap.")
    return said


def _of_pair(first: Side, second: Side) -> tuple[str, bool]:
    """The sentence about two sides, and whether it compares their losses."""
    diverged = [
        side.optimizer
        for side, outcomes in zip((first, second), zip(*pairs(first, second), strict=True), strict=True)
        if not all(math.isfinite(outcome.score) for outcome in outcomes)
    ]
    if diverged:
        assert first.best is not None
        figure = first.best.figure
        return f"The {figure} of {' and '.join(diverged)} was NaN or infinite: lower its learning rate.", False
    if not same_data(first, second):
        names = f"{first.optimizer} and {second.optimizer}"
        return f"The runs of {names} have NOT read the same batches: do not compare their losses step by step.", False
    return headline(first, second), True


def _short(side: Side) -> list[str]:
    """A sentence where a good part of the run was over before SCAO's curvature was in full effect."""
    assert side.best is not None
    blends = side.best.blends
    full, steps = sum(blend >= 1 for blend in blends), len(blends)
    if not blends or 2 * full >= steps:
        return []
    if not any(blends):
        return [
            f"{side.optimizer} has not reached phase 2 in {steps} steps: all of them were plain AdamW steps. Raise --steps, "
            "or lower scao_warmup_steps, scao_min_precond_updates or scao_precond_freq."
        ]
    return [
        f"{steps - full} of the {steps} steps were AdamW steps or the ramp to SCAO's curvature: raise --steps for more of it."
    ]


def write(sides: Sequence[Side], out: Path, about: str = "") -> list[Path]:
    """Write all figures of all runs as JSON, and where any run is complete a page and a picture.

    Args:
        sides: the rivals, and SCAO as the last.
        out: folder, made if need be.
        about: what was compared, a line for the page.

    Returns:
        The paths.
    """
    from scao_hf.tools.comparison_page import write_page

    found = [
        {
            "optimizer": side.optimizer,
            "seed": seed,
            "best": outcome is side.best,
            "score": outcome.score,
            **vars(outcome),
        }
        for side in sides
        for seed, outcome in [*((0, one) for one in side.runs.values()), *enumerate(side.repeats, 1)]
    ]
    written = [out / JSON_NAME]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        written[0].write_text(json.dumps(found), encoding="utf-8")
        if any(side.best for side in sides):
            written += [out / PNG_NAME, out / HTML_NAME]
            write_page(sides, about, page=out / HTML_NAME, png=out / PNG_NAME)
    return written
