"""Which rule steps which matrix, and what the state of a parameter consists of then, under the options of its group.

The rules are one file each. A rule is a table of fields and functions of a ``Step``: it owns no state itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scao_hf.blocks import Member, arithmetic_dtype, as_real, members_of
from scao_hf.experts import packing_of
from scao_hf.rules.adamw import AdamW
from scao_hf.rules.base import Bucket, Rule
from scao_hf.rules.eigenbasis import Eigenbasis
from scao_hf.rules.low_bit import encoded_zeros
from scao_hf.rules.orthogonal import Orthogonal
from scao_hf.rules.published import Published

State = dict[Tensor, dict[str, Any]]
Groups = list[dict[str, Any]]
Wholes = dict[Tensor, Tensor | None]

_RULES: dict[str, Rule] = {rule.name: rule for rule in (Eigenbasis(), Orthogonal(), Published(), AdamW())}


def rule_of(group: dict[str, Any], matrix: bool, shape: Sequence[int] = ()) -> Rule:
    """The rule that steps a group's matrices, or (``matrix`` False) its other parameters.

    Args:
        group: the parameter group. ``rule="auto"`` takes the orthogonal rule where both sides are larger than
            ``max_precond_dim`` and training starts ``from_scratch``, and the eigenbasis for all other matrices.
        matrix: whether it is one.
        shape: its two sides, in any order; without them the rule of matrices with a small side.
    """
    name = group["rule"] if matrix else "adamw"
    if name == "auto":
        name = "orthogonal" if group.get("from_scratch") and is_large(shape, group) else "eigenbasis"
    return _RULES[name]


def is_large(shape: Sequence[int], group: dict[str, Any]) -> bool:
    """Whether both sides of a matrix are too large for a dense factor; False without a shape."""
    return bool(shape) and min(shape) > group["max_precond_dim"]


def is_entrywise(group: dict[str, Any]) -> bool:
    """Whether AdamW steps a whole group: where that is its rule, and embeddings and heads instead of the orthogonal rule."""
    orthogonal = group["rule"] == "orthogonal" or (group["rule"] == "auto" and group.get("from_scratch"))
    return group["rule"] == "adamw" or bool(orthogonal and group.get("vocabulary"))


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
    rule, size = bucket.rule, bucket.size
    taken = torch.zeros(size, dtype=bucket.dtype, device=device)
    fields = rule.create(size, bucket.shape, bucket.dtype, device, bucket.group, bucket.step)
    counters = {"taken": taken, "level": torch.zeros_like(taken)}
    if (
        bucket.packed
        and bucket.group["scao_version"] >= 3
        and any(rule.field(name).kind == "curvature" for name in fields)
    ):
        counters["activity"] = torch.zeros(size, 2, dtype=bucket.dtype, device=device)
    return counters | encoded_zeros(bucket, fields)


def expected(param: Tensor, group: dict[str, Any], step: int) -> dict[str, Tensor]:
    """The fields of a parameter's state after ``step`` steps as meta tensors, for checks and for counting bytes."""
    fields: dict[str, Tensor] = {}
    for shape, member in members(param, group):
        rule = rule_of(group, member.block is not None, shape)
        bucket = Bucket(group, shape, step, arithmetic_dtype(param), rule, [member])
        for name, stack in create(bucket, torch.device("meta")).items():
            fields[name + member.suffix] = bucket.split(stack)[0]
    return fields


def only_foreign(entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> bool:
    """Whether an entry holds only what a wrapper of the optimizer has put there, before the parameter's first step."""
    return not entry.keys() & {"step", "bytes", *expected(param, group, 0)}
