"""Plain AdamW, for parameters that are not matrices: biases, norms, scalars, convolutions, expert stacks, complex numbers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from scao_hf import ops
from scao_hf.buckets import Bucket
from scao_hf.rules.base import NOT_NEGATIVE, Field, Rule, Step, accumulate, adam_direction, adam_moments


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


def step_adamw(step: Step, refreshes: bool = False) -> None:
    """(U4) and (U6), and (E1) where the state has a ``factor``: what every rule with a phase 1 does in it.

    Args:
        step: changed in place.
        refreshes: whether the first refresh follows.
    """
    state, group = step.state, step.group
    if step.is_native("adamw_step_"):
        fields = [state[name] for name in ("taken", "level", "exp_avg", "exp_avg_sq", "factor") if name in state]
        step.run_native(ops.adamw_step_, fields, refreshes=refreshes)
        return
    grads = step.gradients()
    if "factor" in state:
        accumulate(state["factor"], grads @ grads.mT, step.curvature_weight)
    adam_moments(state["exp_avg"], state["exp_avg_sq"], grads, step.weights)
    step.write(adam_direction(state["exp_avg"], state["exp_avg_sq"], step.bias, group["eps"]))
