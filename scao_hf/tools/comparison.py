"""``scao-hf compare``: two optimizers on one configuration, each at its learning rate, and what came out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

from scao_hf.tools import ToolError
from scao_hf.tools.arms import Arm, Job, Outcome, Rate, run_arm

#: Runs of one optimizer that ``--lr auto`` makes at most, and the factor between two rates.
MOST_RUNS, FACTOR = 5, 2.0
PNG_NAME, JSON_NAME = "comparison.png", "comparison.json"
QUARTERS = (0.25, 0.5, 0.75, 1.0)


@dataclass
class Side:
    """One of the two optimizers: its runs by learning rate, the best one, and whether that lies between two others."""

    optimizer: str
    runs: dict[Rate, Outcome] = field(default_factory=dict)

    @property
    def usable(self) -> dict[Rate, Outcome]:
        return {rate: outcome for rate, outcome in self.runs.items() if outcome.failure is None}

    @property
    def best(self) -> Outcome | None:
        return min(self.usable.values(), key=lambda outcome: outcome.score, default=None)

    @property
    def failure(self) -> str | None:
        """Why there is no run of this optimizer, None where there is one."""
        return None if self.usable else next((outcome.failure for outcome in self.runs.values()), "it was not run")

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


def compare(
    job: Job, optimizers: tuple[str, str], rate: Rate | None, watch: Callable[[Arm], Callable[[int], None]]
) -> tuple[Side, Side]:
    """Make every run that is not there yet; a run that fails ends its own side only.

    Args:
        job: what is run.
        optimizers: the one to compare with, and SCAO.
        rate: one learning rate for both, or None to search each one's own.
        watch: called when a run begins; what it returns is told the number of steps done.
    """
    sides = Side(optimizers[0]), Side(optimizers[1])
    for side in sides:
        chosen = rate or next_rate(side.runs)
        while chosen is not None:
            arm = Arm(job, side.optimizer, chosen)
            side.runs[chosen] = run_arm(arm, watch(arm))
            chosen = None if rate else next_rate(side.runs)
    return sides


def smoothed(losses: list[float]) -> list[float]:
    """At each step the mean of the last tenth of the run's length, at least five steps, up to there."""
    width = max(5, len(losses) // 10)
    return [fmean(losses[max(0, end - width) : end]) for end in range(1, len(losses) + 1)]


def times(outcome: Outcome) -> list[float]:
    """Seconds from the beginning to the end of each step."""
    return list(accumulate(outcome.seconds))


def reached(outcome: Outcome, loss: float) -> int | None:
    """The first step from which the smoothed loss is at most that, None if it never is."""
    return next((step for step, value in enumerate(smoothed(outcome.losses), 1) if value <= loss), None)


def same_data(sides: tuple[Side, Side]) -> bool:
    """Whether all complete runs have read the same batches in the same order."""
    read = [outcome.data for side in sides for outcome in side.usable.values()]
    return all(data == read[0] for data in read)


def summary(sides: tuple[Side, Side]) -> list[tuple[str, list[str]]]:
    """The rows of the table: what, and its value for each side (empty where a side has failed)."""
    best = [side.best for side in sides]

    def row(name: str, value: Callable[[Outcome], str]) -> tuple[str, list[str]]:
        return name, ["" if outcome is None else value(outcome) for outcome in best]

    shown = [outcome for outcome in best if outcome is not None]
    memory = "peak memory" if any(outcome.device == "cuda" for outcome in shown) else "peak memory of the process"
    rates = [
        "" if outcome is None else f"{outcome.learning_rate:g}{f' ({side.place})' if side.place else ''}"
        for outcome, side in zip(best, sides, strict=True)
    ]
    rows = [
        ("learning rate", rates),
        row("loss, last third of the steps", lambda outcome: f"{outcome.score:.4f}"),
        row("held-out loss", lambda outcome: "" if outcome.eval_loss is None else f"{outcome.eval_loss:.4f}"),
        row("seconds", lambda outcome: f"{sum(outcome.seconds):.1f}"),
        row("seconds per step, median", lambda outcome: f"{median(outcome.seconds):.3f}"),
        row(memory, lambda outcome: f"{outcome.peak_bytes / 2**20:,.0f} MiB"),
        row("optimizer state", lambda outcome: f"{outcome.state_bytes / 2**20:,.2f} MiB"),
    ]
    if len(shown) == 2:
        for part in QUARTERS:
            step = max(1, round(part * len(shown[0].losses)))
            rows.append((f"loss after {step} steps", [f"{smoothed(one.losses)[step - 1]:.4f}" for one in shown]))
        shortest = min(sum(outcome.seconds) for outcome in shown)
        for part in QUARTERS:
            rows.append(
                (f"loss after {part * shortest:.1f} seconds", [_loss_at(one, part * shortest) for one in shown])
            )
    return [entry for entry in rows if any(entry[1])]


def _loss_at(outcome: Outcome, seconds: float) -> str:
    done = sum(time <= seconds * (1 + 1e-9) for time in times(outcome))
    return f"{smoothed(outcome.losses)[done - 1]:.4f}" if done else ""


def verdict(sides: tuple[Side, Side]) -> list[str]:
    """What the comparison shows, in plain sentences, and what it does not."""
    first, second = sides
    said = [f"{side.optimizer} failed: {side.failure}" for side in sides if side.failure]
    if first.best is None or second.best is None:
        return said
    target = smoothed(first.best.losses)[-1]
    step = reached(second.best, target)
    if not all(math.isfinite(outcome.score) for outcome in (first.best, second.best)):
        diverged = " and ".join(side.optimizer for side in sides if side.best and not math.isfinite(side.best.score))
        said.append(f"The loss of {diverged} was NaN or infinite: lower its learning rate.")
    elif step is None:
        said.append(f"{second.optimizer} has not come down to the loss at which {first.optimizer} ended.")
    else:
        seconds, whole = times(second.best)[step - 1], sum(first.best.seconds)
        said.append(
            f"{second.optimizer} came down to the loss at which {first.optimizer} ended after {step} of "
            f"{len(first.best.losses)} steps and {seconds:.1f} of {whole:.1f} seconds."
        )
        own = reached(first.best, target) or len(first.best.losses)
        if own < len(first.best.losses):
            said[-1] += f" {first.optimizer} itself had first come down to it after {own}."
    if second.best.phase is not None and second.best.phase < 2:
        said.append(
            f"{second.optimizer} has not reached phase 2 in {len(second.best.losses)} steps: all of them were plain AdamW "
            "steps. Raise --steps, or lower scao_warmup_steps, scao_min_precond_updates or scao_precond_freq."
        )
    if same_data(sides):
        said.append("All runs have read the same batches in the same order.")
    else:
        said.append("The runs have NOT read the same batches: their losses must not be compared step by step.")
    if any("edge" in side.place for side in sides):
        said.append("A best learning rate lies at the edge of those tried: the optimum may lie beyond it.")
    said.append("One seed: another one moves the losses too. Repeat with --set seed=1 before you rely on a small gap.")
    return said


def draw(sides: tuple[Side, Side], path: Path) -> None:
    """Write the picture: loss against steps and against seconds, each side at its best learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor="white")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for side, colour in zip(sides, ("#a65300", "#1f5fbf"), strict=True):
        if side.best is None:
            continue
        label = f"{side.optimizer}, learning rate {side.best.learning_rate:g}"
        for axes, x in ((by_step, range(1, len(side.best.losses) + 1)), (by_second, times(side.best))):
            axes.plot(x, side.best.losses, color=colour, linewidth=0.7, alpha=0.3)
            axes.plot(x, smoothed(side.best.losses), color=colour, linewidth=1.8, label=label)
    by_step.set_ylabel("training loss (strong: smoothed)")
    for entry in by_step.legend().get_texts():
        entry.set_parse_math(False)  # an optimizer's name is no formula
    for axes, label in ((by_step, "step"), (by_second, "seconds")):
        axes.set_xlabel(label)
        axes.grid(color="#c9ced6", linewidth=0.5)
    figure.savefig(path, dpi=110)


def write(sides: tuple[Side, Side], out: Path) -> list[Path]:
    """Write the picture and all figures of all runs as JSON; the paths."""
    out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = [
        {"optimizer": side.optimizer, "best": outcome is side.best, "score": outcome.score, **vars(outcome)}
        for side in sides
        for outcome in side.runs.values()
    ]
    (out / JSON_NAME).write_text(json.dumps(found), encoding="utf-8")
    written = [out / JSON_NAME]
    if any(side.best for side in sides):
        draw(sides, out / PNG_NAME)
        written.append(out / PNG_NAME)
    return written
