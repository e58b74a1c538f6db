"""What the optimizer can say about itself: metrics for a log, one row per matrix, bytes by kind."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scao_hf.rules import Groups, expected, is_large, rule_for
from scao_hf.rules.base import COUNTERS, Bucket, blend_weight

METRICS = ("rank", "captured_mass", "curvature_norm", "damped")
#: Next to a run's trainer_state.json: the figures of every matrix over time.
STATISTICS_NAME = "scao_statistics.jsonl"


def _phase(bucket: Bucket) -> tuple[int, float]:
    """(phase, blend) of the bucket's latest step."""
    if bucket.step == 0:
        return 0, 0.0
    blend = blend_weight(bucket.step, bucket.phase1_steps, bucket.group["blend_steps"])
    return (2 if blend else 1), blend


def metrics(buckets: list[Bucket]) -> dict[str, float]:
    """Means over all matrices: phase and blend of the furthest one, then ``METRICS``; skipped steps.

    One device synchronisation. Zeros where there is no matrix or no step yet.
    """
    matrices = [bucket for bucket in buckets if bucket.matrix and bucket.step]
    phase, blend = max((_phase(bucket) for bucket in matrices), default=(0, 0.0))
    figures = {"phase": float(phase), "blend": blend, **dict.fromkeys((*METRICS, "skipped"), 0.0)}
    if buckets:
        device = buckets[0].state["taken"].device
        summaries = [bucket.rule.figures(bucket) for bucket in matrices]
        columns = {name: [summary[name] for summary in summaries] for name in METRICS if summaries}
        columns["skipped"] = [_skipped(bucket) for bucket in buckets]
        joined = [torch.cat([part.to(device) for part in column]) for column in columns.values()]
        # In float64 on the CPU: MPS has none.
        values = torch.cat(joined).cpu().double().split([len(column) for column in joined])
        for name, value in zip(columns, values, strict=True):
            figures[name] = float(value.sum() if name == "skipped" else value.mean())
    return {f"scao/{name}": value for name, value in figures.items()}


def _skipped(bucket: Bucket) -> Tensor:
    return bucket.step - bucket.state["taken"]


def statistics(buckets: list[Bucket], names: dict[Tensor, str]) -> list[dict[str, Any]]:
    """One plain row per matrix, in the order of the parameters; ``name[e]`` is expert e of a packed one.

    Args:
        buckets: all buckets with state.
        names: the parameters' names where they are known.
    """
    rows = []
    for bucket in buckets:
        if not bucket.matrix:
            continue
        phase, blend = _phase(bucket)
        summary = {name: values.tolist() for name, values in bucket.rule.figures(bucket).items()}
        skipped = _skipped(bucket).tolist()
        matrices = [
            (names.get(owner, "") + suffix + (f"[{expert}]" if bucket.packed else ""), shape)
            for (param, suffix, block), owner in zip(bucket.members, bucket.owners, strict=True)
            if block is not None
            # Of a tensor without memory, as a sharded parameter has none between two steps.
            for shape in [
                block.part(torch.empty(param.shape, device="meta")).shape[1:] if bucket.packed else param.shape
            ]
            for expert in range(block.size)
        ]
        for index, (name, shape) in enumerate(matrices):
            rows.append(
                {
                    "name": name,
                    "rows": shape[0],
                    "cols": shape[1],
                    "block": list(bucket.shape),
                    "step": bucket.step,
                    "phase": phase,
                    "blend": blend,
                    "skipped": int(skipped[index]),
                    **{field: values[index] for field, values in summary.items()},
                }
            )
    return rows


def memory_report(groups: Groups, counted: Collection[Tensor]) -> dict[str, int]:
    """Bytes of state by kind (moments, curvature, bases, counters) and in total in phase 2; allocates nothing.

    ``peak`` is the larger of phase 1, which holds AdamW's second moment, and phase 2. Besides the state, four bytes per
    matrix remember how many gradients it had taken at the last look for gradients that are never finite.

    Args:
        groups: the parameter groups.
        counted: the parameters whose state is asked for.
    """
    sizes: Counter[str] = Counter()
    before = 0
    owned = [(param, group) for group in groups for param in group["params"] if param in counted]
    for param, group in owned:
        before += sum(field.nbytes for field in expected(param, group, 0).values())
        for name, field in expected(param, group, sys.maxsize).items():
            field_name = name.partition(".")[0]
            kind = "counters" if field_name in COUNTERS else rule_for(param, group).field(field_name).kind
            sizes[kind] += field.nbytes
    total = sum(sizes.values())
    return {**sizes, "total": total, "peak": max(before, total), "parameters": sum(param.numel() for param, _ in owned)}


def entries_of(param: Tensor) -> int:
    """How many entries a parameter has, also where ZeRO-3 has cut it on loading, when only DeepSpeed knows the number."""
    entries: int = getattr(param, "ds_numel", param.numel())
    return entries


def describe(groups: Groups) -> str:
    """One line for each group and rule: how many parameters, with which rate and decay; frozen ones on a line of their own.

    The rate is the group's own, whatever a schedule makes of it. Large matrices of ``rule="auto"`` are called auto until the
    optimizer has looked at their weights.
    """
    lines: Counter[str] = Counter()
    entries: Counter[str] = Counter()
    for index, group in enumerate(groups):
        rate = group["initial_lr" if "initial_lr" in group else "lr"]
        rates = f"lr {float(rate):.4g}, weight decay {float(group['weight_decay']):.4g}"
        undecided = group["rule"] == "auto" and group["from_scratch"] is None
        for param in group["params"]:
            rule = rule_for(param, group).name
            if undecided and rule != "adamw" and is_large(param.shape, group):
                rule = "auto"
            line = f"group {index}: {{}} by {rule}, {rates}" if param.requires_grad else f"group {index}: {{}} frozen"
            lines[line] += 1
            entries[line] += param.numel()
    return "\n".join(
        line.format(f"{count} parameter{'s' * (count > 1)} ({entries[line]:,} entries)")
        for line, count in lines.items()
    )


class StatisticsFile:
    """Writes ``statistics()`` over time as JSON lines: a header with names and options, then one line per record.

    A run that starts at step 0 overwrites the file; one that is resumed adds a header that says from where.

    Args:
        path: the file; its folder is made if need be.
        steps: length of the run, 0 if unknown. At most about ``RECORDS`` records are made in it.
        about: what the run is, for the header.
    """

    RECORDS = 100

    def __init__(self, path: Path, steps: int, about: dict[str, Any] | None = None) -> None:
        self.path, self.interval, self.about = path, max(1, -(-steps // self.RECORDS)), about or {}
        self._names: list[str] | None = None
        self._latest = -self.interval

    def due(self, step: int) -> bool:
        """Whether enough steps have gone by since the latest record."""
        return step >= self._latest + self.interval

    def append(
        self,
        start: int,
        step: int,
        options: dict[str, Any],
        rows: list[dict[str, Any]],
        *,
        ms: list[float],
        write: bool,
        whole: list[float] | None = None,
    ) -> None:
        """Add a record.

        Args:
            start: the step at which this process began, 0 unless resumed.
            step: of the record.
            options: the optimizer's, for the header.
            rows: what ``statistics()`` returned.
            ms: milliseconds of each optimizer step since the record before.
            write: False in all processes but one; they make their records at the same steps.
            whole: milliseconds of each whole step since then, forward and backward pass included.
        """
        self._latest = step
        if not write:
            return
        lines = []
        names = [row["name"] for row in rows]
        first = self._names is None
        if names != self._names:
            self._names = names
            lines.append({"from": start if first else step, "matrices": names, "options": options, "run": self.about})
        figures = {name: [float(f"{row[name]:.4g}") for row in rows] for name in (*METRICS, "skipped")}
        times = {"optimizer_ms": ms, "step_ms": whole or []}
        rounded = {name: [round(value, 3) for value in values] for name, values in times.items()}
        lines.append({"step": step, **figures, **rounded})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w" if first and start == 0 else "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
