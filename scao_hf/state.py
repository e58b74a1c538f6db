"""What the state of a parameter consists of, under the options of its group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scao_hf import low_bit
from scao_hf.buckets import Bucket, Member, arithmetic_dtype, as_real, members_of
from scao_hf.experts import packing_of
from scao_hf.rules import Rule, is_entrywise, rule_of

EARLIER = "take an earlier checkpoint, or start from the weights alone"

State = dict[Tensor, dict[str, Any]]
Groups = list[dict[str, Any]]
Wholes = dict[Tensor, Tensor | None]


def members(param: Tensor, group: dict[str, Any]) -> list[tuple[tuple[int, int], Member]]:
    """The blocks of a parameter under the options of its group, with their shapes."""
    if is_entrywise(group):
        return [((1, as_real(param).numel()), Member(param, "", None))] if param.numel() else []

    def cut_sides(shape: torch.Size) -> int:
        return rule_of(group, True, shape).cut_sides

    return members_of(param, group["max_precond_dim"], cut_sides, packing_of(group))


def rule_for(param: Tensor, group: dict[str, Any]) -> Rule:
    """The rule that steps a parameter of a group."""
    shape, member = next(iter(members(param, group)), ((), None))
    return rule_of(group, member is not None and member.block is not None, shape)


def create(bucket: Bucket, device: torch.device) -> dict[str, Tensor]:
    """Zeroed stacked state of a bucket of its age on ``device``; ``taken`` counts the finite gradients of each member,
    ``level`` is how large they were (U3), ``activity`` which of those of an expert were not zero (X3)."""
    rule = rule_of(bucket.group, bucket.matrix, bucket.shape)
    size = bucket.size
    taken = torch.zeros(size, dtype=bucket.dtype, device=device)
    fields = rule.create(size, bucket.shape, bucket.dtype, device, bucket.group, bucket.step)
    counters = {"taken": taken, "level": torch.zeros_like(taken)}
    if (
        bucket.packed
        and bucket.group["scao_version"] >= 3
        and any(rule.field(name).kind == "curvature" for name in fields)
    ):
        counters["activity"] = torch.zeros(size, 2, dtype=bucket.dtype, device=device)
    return counters | low_bit.zeros(fields, rule, bucket.group)


def expected(param: Tensor, group: dict[str, Any], step: int) -> dict[str, Tensor]:
    """The fields of a parameter's state after ``step`` steps as meta tensors, for checks and for counting bytes."""
    fields: dict[str, Tensor] = {}
    for shape, member in members(param, group):
        bucket = Bucket(group, shape, step, arithmetic_dtype(param), [member])
        for name, stack in create(bucket, torch.device("meta")).items():
            fields[name + member.suffix] = bucket.split(stack)[0]
    return fields


def only_foreign(entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> bool:
    """Whether an entry holds only what a wrapper of the optimizer has put there, before the parameter's first step."""
    return not entry.keys() & {"step", "bytes", *expected(param, group, 0)}


def pairs(state_dict: dict[str, Any], groups: Groups) -> list[tuple[Any, Tensor, dict[str, Any]]]:
    """(saved id, live parameter, saved group) of every parameter."""
    return [
        (key, param, saved)
        for saved, group in zip(state_dict["param_groups"], groups, strict=True)
        for key, param in zip(saved["params"], group["params"], strict=True)
    ]
