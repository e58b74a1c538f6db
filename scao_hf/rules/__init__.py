"""The update rules, one file each. A rule is free functions' composition: it owns no state and no lifecycle."""

from __future__ import annotations

from typing import Any

from scao_hf.rules.adamw import AdamW
from scao_hf.rules.eigenbasis import Eigenbasis
from scao_hf.rules.published import Published
from scao_hf.rules.rule import COUNTERS, Legal, Rule, Tick

_MATRIX_RULES: dict[str, Rule] = {"eigenbasis": Eigenbasis(), "published": Published()}
_PLAIN = AdamW()


def rule_of(group: dict[str, Any], matrix: bool) -> Rule:
    """The rule that steps a group's matrices, or (``matrix`` False) its other parameters."""
    return _MATRIX_RULES[group["rule"]] if matrix else _PLAIN


__all__ = ["COUNTERS", "Legal", "Rule", "Tick", "rule_of"]
