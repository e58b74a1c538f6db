"""Plain AdamW, for parameters that are not matrices: biases, norms, scalars, convolutions, expert stacks, complex numbers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from scao_hf.rules.base import NOT_NEGATIVE, Bucket, Field, Rule, Step, step_adamw


class AdamW(Rule):
    """torch.optim.AdamW's step."""

    name = "adamw"
    fields: ClassVar[Mapping[str, Field]] = {
        "exp_avg": Field("r l", levels=2),
        "exp_avg_sq": Field("r l", legal=NOT_NEGATIVE, levels=4),
    }

    def step(self, step: Step) -> None:
        """Moments (U4) and their quotient (U6)."""
        step_adamw(step)

    def phase1_steps(self, group: dict[str, Any]) -> int:
        """All of them: there is no curvature to change to."""
        return sys.maxsize

    def figures(self, bucket: Bucket) -> dict[str, Tensor]:
        """No curvature, nothing to report."""
        return {}
