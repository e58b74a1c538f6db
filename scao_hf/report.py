"""What the optimizer can say about itself: metrics for a log, one row per matrix, bytes by kind."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from scao_hf.buckets import Bucket, is_matrix
from scao_hf.rules import rule_of
from scao_hf.state import Groups, expected
from scao_hf.update import blend_weight

METRICS = ("rank", "captured_mass", "curvature_norm")


def _phase(bucket: Bucket) -> tuple[int, float]:
    """(phase, blend) of the bucket's latest step."""
    if bucket.step == 0:
        return 0, 0.0
    start = rule_of(bucket.group, bucket.matrix).start(bucket.group)
    blend = blend_weight(bucket.step, start, bucket.group["blend_steps"])
    return (2 if blend else 1), blend


def metrics(buckets: list[Bucket]) -> dict[str, float]:
    """Means over all matrices: phase and blend of the furthest one, rank, captured mass, curvature norm; skipped steps.

    One device synchronisation. Zeros where there is no matrix or no step yet.
    """
    matrices = [bucket for bucket in buckets if bucket.matrix and bucket.step]
    phase, blend = max((_phase(bucket) for bucket in matrices), default=(0, 0.0))
    figures = {f"scao/{name}": 0.0 for name in METRICS}
    if not buckets:
        return {"scao/phase": float(phase), "scao/blend": blend, **figures, "scao/skipped": 0.0}
    device = buckets[0].state["taken"].device
    summaries = [rule_of(bucket.group, True).summary(bucket.state, bucket.group) for bucket in matrices]
    means = [
        torch.cat([summary[name].double().to(device) for summary in summaries]).mean() for name in METRICS if summaries
    ]
    skipped = torch.stack([_skipped(bucket).double().sum().to(device) for bucket in buckets]).sum()
    *values, lost = torch.stack([*means, skipped]).tolist()
    figures.update(zip(figures, values, strict=False))
    return {"scao/phase": float(phase), "scao/blend": blend, **figures, "scao/skipped": lost}


def _skipped(bucket: Bucket) -> Tensor:
    return bucket.step - bucket.state["taken"]


def statistics(buckets: list[Bucket], names: dict[Tensor, str]) -> list[dict[str, Any]]:
    """One plain row per matrix, in the order of the parameters.

    Args:
        buckets: all buckets with state.
        names: the parameters' names where they are known.
    """
    rows = []
    for bucket in buckets:
        if not bucket.matrix:
            continue
        phase, blend = _phase(bucket)
        summary = {
            name: values.double().tolist()
            for name, values in rule_of(bucket.group, True).summary(bucket.state, bucket.group).items()
        }
        skipped = _skipped(bucket).tolist()
        for index, (param, suffix, _) in enumerate(bucket.members):
            rows.append(
                {
                    "name": names.get(param, "") + suffix,
                    "rows": param.shape[0],
                    "cols": param.shape[1],
                    "block": list(bucket.shape),
                    "step": bucket.step,
                    "phase": phase,
                    "blend": blend,
                    "skipped": int(skipped[index]),
                    **{name: values[index] for name, values in summary.items()},
                }
            )
    return rows


def memory_report(groups: Groups) -> dict[str, int]:
    """Bytes of state by kind (moments, curvature, bases, counters) and in total in phase 2; allocates nothing.

    ``peak`` is the larger of phase 1, which holds AdamW's second moment, and phase 2.
    """
    sizes: Counter[str] = Counter()
    before = sum(
        field.numel() * field.element_size()
        for group in groups
        for param in group["params"]
        for field in expected(param, group, 0).values()
    )
    for group in groups:
        for param in group["params"]:
            for name, field in expected(param, group, sys.maxsize).items():
                kind = (
                    "counters"
                    if name.startswith("taken")
                    else rule_of(group, is_matrix(param)).kind(name.partition(".")[0])
                )
                sizes[kind] += field.numel() * field.element_size()
    total = sum(sizes.values())
    count = sum(param.numel() for group in groups for param in group["params"])
    return {**sizes, "total": total, "peak": max(before, total), "parameters": count}
