"""The update rules, one file each. A rule is a table of fields and functions of a ``Step``: it owns no state itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scao_hf.rules.adamw import AdamW
from scao_hf.rules.base import COUNTERS, Rule, Step, idle_experts_kept
from scao_hf.rules.eigenbasis import Eigenbasis
from scao_hf.rules.orthogonal import Orthogonal
from scao_hf.rules.published import Published

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


__all__ = ["COUNTERS", "Rule", "Step", "idle_experts_kept", "is_entrywise", "is_large", "rule_of"]
