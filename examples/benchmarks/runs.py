"""The runs of result files, sorted into settings, and what is computed from them."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import data
import peers
import sweep

VARIES = ("optimizer", "options", "lr", "seed", "steps", "eval_steps")  # within one setting
#: What a table says of runs whose options, or SCAO's rule, stood for something else than today.
EARLIER = "earlier version"

Record = dict[str, Any]


@dataclass
class Setting:
    """All runs that differ in optimizer, learning rate, seed and length alone; the longest ones make the table."""

    cell: dict[str, Any]
    steps: int
    runs: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))  # by optimizer
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def usual_batch(self) -> bool:
        """Whether a step has as many rows as the task takes unless it is told otherwise."""
        return bool(self.cell["batch"] == sweep.BATCH[self.cell["task"]])

    @property
    def trained(self) -> list[str]:
        """The task, and its data, model and size where they are not the usual ones."""
        sums = [data.SUMS] if self.cell["data"] == data.SUMS else []
        return [self.cell["task"], *sums, *(self.cell[part] for part in ("base", "size") if part in self.cell)]

    @property
    def name(self) -> str:
        """What a README calls it: what is trained, rank, batch and clipping if not the usual ones, schedule, steps."""
        clip = "" if self.cell["clip"] == sweep.CLIP else f"-clip{self.cell['clip']:g}"
        rank = f"-r{self.cell['rank']}" if "rank" in self.cell else ""
        batch = "" if self.usual_batch else f"-b{self.cell['batch']}"
        return f"{'-'.join(self.trained)}{rank}{batch}{clip}-{self.cell['schedule']}-{self.steps}"

    def is_current(self, optimizer: str) -> bool:
        """Whether an optimizer's runs are of what it is today."""
        return all(peers.is_current(record["cell"]) for record in self.runs[optimizer][:1])

    def label(self, optimizer: str) -> str:
        """What a row calls an optimizer."""
        return f"`{optimizer}`" + ("" if self.is_current(optimizer) else f" ({EARLIER})")

    def at(self, optimizer: str, steps: int | None = None) -> dict[float, dict[int, Record]]:
        """An optimizer's runs of one length, by learning rate and seed."""
        found: dict[float, dict[int, Record]] = defaultdict(dict)
        for record in self.runs[optimizer]:
            if record["cell"]["steps"] == (steps or self.steps):
                found[record["cell"]["lr"]][record["cell"]["seed"]] = record
        return dict(sorted(found.items()))


def records(paths: Iterable[Path], name: str) -> list[Record]:
    """The runs of the result files of that name."""
    return [record for path in paths if path.name == name for record in sweep.read(path)[0].values()]


def settings(paths: Iterable[Path]) -> list[Setting]:
    """Sort the runs of result files into settings, those of each file apart.

    Of an optimizer whose options stand for different values in different runs (a default or SCAO's rule has changed),
    the values of the run that comes last count.
    """
    groups: dict[tuple[Path, str], list[Record]] = defaultdict(list)
    unavailable: dict[str, dict[str, str]] = defaultdict(dict)
    for path in paths:
        runs, missing = sweep.read(path)
        for record in runs.values():
            shared = {name: value for name, value in record["cell"].items() if name not in VARIES}
            groups[path, json.dumps(shared, sort_keys=True)].append(record)
        for record in missing:
            unavailable[record["task"]][record["optimizer"]] = record["unavailable"]
    found = []
    for (_, group), records in groups.items():
        cell = json.loads(group)
        setting = Setting(cell, max(record["cell"]["steps"] for record in records))
        options = {record["cell"]["optimizer"]: record["cell"]["options"] for record in records}
        for record in records:
            if record["cell"]["options"] == options[record["cell"]["optimizer"]]:
                setting.runs[record["cell"]["optimizer"]].append(record)
        missing_here = unavailable[cell["task"]].items()
        setting.unavailable = {name: reason for name, reason in missing_here if name not in setting.runs}
        found.append(setting)
    names = [setting.name for setting in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two settings share a name ({', '.join(sorted(names))}): keep their result files apart")
    return sorted(found, key=lambda setting: setting.name)


def loss_of(record: Record) -> float:
    """The held-out loss at the end, infinite for a run that diverged."""
    return float("inf") if record["diverged"] else record["eval_loss"]


def best_lr(by_lr: dict[float, dict[int, Record]]) -> float:
    """The learning rate of the lowest mean held-out loss, of those with the most seeds.

    A grid is bracketed with one seed and its best rates get more: means over different seeds would not be comparable.
    """
    most = max(map(len, by_lr.values()))
    return min(
        (lr for lr, seeds in by_lr.items() if len(seeds) == most),
        key=lambda lr: statistics.mean(map(loss_of, by_lr[lr].values())),
    )


def held_out(records: Sequence[Record]) -> dict[int, float]:
    """The mean held-out loss by step, where all runs have one."""
    losses: dict[int, list[float]] = defaultdict(list)
    for record in records:
        for entry in record["evals"]:
            losses[entry["step"]].append(entry["loss"])
    return {step: statistics.mean(values) for step, values in losses.items() if len(values) == len(records)}


def crossing(runs: Sequence[Record], target: float) -> float | None:
    """The step at which runs first reach a held-out loss, of the quickest one, linear between two measurements."""
    reached = []
    for record in runs:
        before = None
        for entry in record["evals"]:
            if entry["loss"] <= target:
                step = float(entry["step"])
                if before is not None:
                    part = (before["loss"] - target) / (before["loss"] - entry["loss"])
                    step = before["step"] + part * (step - before["step"])
                reached.append(step)
                break
            before = entry
    return min(reached, default=None)


def enclosure(by_lr: dict[float, dict[int, Record]]) -> str:
    """Whether the best learning rate lies between two worse ones: "enclosed", or what there is instead."""
    best = best_lr(by_lr)
    if len(by_lr) == 1:
        return "only one"
    for seeds in by_lr.values():
        shared = [seed for seed in seeds if seed in by_lr[best]]
        if sum(loss_of(seeds[seed]) for seed in shared) < sum(loss_of(by_lr[best][seed]) for seed in shared):
            return "open"  # a rate with fewer seeds is the better one on those
    return "enclosed" if min(by_lr) < best < max(by_lr) else "edge"


def _alone(record: Record) -> bool:
    return record["machine"]["threads"] == 1 and record["machine"]["gpu"] is None


def seconds(record: Record, entry: dict[str, float]) -> float:
    """Training seconds at a measurement: processor time on one CPU thread, which other processes do not lengthen."""
    return entry["cpu_seconds" if _alone(record) else "seconds"]


def optimizer_seconds(record: Record) -> float:
    """Seconds of the optimizer's part of a step, by the same clock."""
    total: float = record["optimizer_cpu_seconds" if _alone(record) else "optimizer_seconds"]
    return total / len(record["train_loss"])


def same_machine(record: Record, other: Record) -> bool:
    """Whether two runs had the same kind of processor, GPU and number of threads."""
    return all(record["machine"][name] == other["machine"][name] for name in ("cpu", "gpu", "threads"))


#: What a table says in place of a time that it cannot compare.
OTHER_MACHINE = "other machine"


def beside(records: Iterable[Record], reference: Sequence[Record]) -> list[Record]:
    """The records that ran on the machine of ``reference``: the only ones whose times may stand next to its times."""
    return [record for record in records if all(same_machine(record, other) for other in reference)]


def pass_seconds(setting: Setting, reference: Record) -> float:
    """Seconds of a forward and backward pass: the median over all runs of a setting on one machine.

    It is the same work for every optimizer. What one run needs for it differs from what another needs by a fifth, by
    what else the machine does: two runs' own seconds would compare that, and not the optimizers.
    """
    return statistics.median(
        (seconds(record, last) - optimizer_seconds(record) * last["step"]) / last["step"]
        for found in setting.runs.values()
        for record in found
        if record["evals"] and same_machine(record, reference)
        for last in record["evals"][-1:]
    )


def step_seconds(setting: Setting, records: Iterable[Record], reference: Sequence[Record]) -> float | None:
    """Seconds of a whole step on the machine of ``reference``; None where no record is of that machine."""
    comparable = beside(records, reference)
    if not comparable:
        return None
    return pass_seconds(setting, reference[0]) + statistics.median(map(optimizer_seconds, comparable))


def means(setting: Setting) -> dict[str, float]:
    """The held-out loss of each optimizer at its best learning rate, the lowest first."""
    found = {}
    for optimizer in setting.runs:
        by_lr = setting.at(optimizer)
        if by_lr:
            found[optimizer] = statistics.mean(map(loss_of, by_lr[best_lr(by_lr)].values()))
    return dict(sorted(found.items(), key=lambda item: item[1]))


def reversed_pairs(ours: dict[str, float], theirs: dict[str, float]) -> list[tuple[str, str]]:
    """Optimizers whose order differs between two tables by more than half a percent in each of them."""
    both = [name for name in ours if name in theirs]
    return [
        (first, second)
        for at, first in enumerate(both)
        for second in both[at + 1 :]
        if ours[second] > 1.005 * ours[first] and theirs[first] > 1.005 * theirs[second]
    ]
