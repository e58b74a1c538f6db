"""The update rules, one file each. A rule is a table of fields and functions of a ``Step``: it owns no state itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scao_hf.rules.adamw import AdamW
from scao_hf.rules.base import COUNTERS, Rule, Step, idle_experts_kept
from scao_hf.rules.eigenbasis import Eigenbasis
from scao_hf.rules.orthogonal import Orthogonal
from scao_hf.rules.published import Published

_RULES: dict[str, Rule] = {
    "eigenbasis": Eigenbasis(),
    "orthogonal": Orthogonal(),
    "published": Published(),
    "adamw": AdamW(),
}


def rule_of(group: dict[str, Any], matrix: bool, shape: Sequence[int] = ()) -> Rule:
    """The rule that steps a group's matrices, or (``matrix`` False) its other parameters.

    Args:
        group: the parameter group. ``rule="auto"`` takes the eigenbasis where one side is small, as in LoRA factors, and
            the orthogonal rule where both are larger than ``max_precond_dim``.
        matrix: whether it is one.
        shape: its two sides, in any order; without them the rule of matrices with a small side.
    """
    name = group["rule"] if matrix else "adamw"
    if name == "auto":
        name = "orthogonal" if shape and min(shape) > group["max_precond_dim"] else "eigenbasis"
    return _RULES[name]


__all__ = ["COUNTERS", "Rule", "Step", "idle_experts_kept", "rule_of"]
