"""Plain AdamW, for parameters without two sides: biases, norms, scalars, convolutions, expert stacks, complex numbers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scao_hf import ops
from scao_hf.rules.rule import FINITE, NOT_NEGATIVE, Legal, Tick
from scao_hf.update import adam_direction, adam_moments

MOMENTS: Mapping[str, Legal] = {"exp_avg": FINITE, "exp_avg_sq": NOT_NEGATIVE}


class AdamW:
    """torch.optim.AdamW's step."""

    cut_sides = 0
    takes_turns = False
    legal = MOMENTS

    def create(
        self,
        size: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        group: dict[str, Any],
        step: int = 0,
    ) -> dict[str, Tensor]:
        """Two moments."""
        return {name: torch.zeros(size, *shape, dtype=dtype, device=device) for name in ("exp_avg", "exp_avg_sq")}

    def step(self, state: dict[str, Tensor], grads: Tensor, tick: Tick) -> Tensor:
        """(U4), then (U6)."""
        adam_moments(state["exp_avg"], state["exp_avg_sq"], grads, tick.weights)
        return adam_direction(state["exp_avg"], state["exp_avg_sq"], tick.bias, tick.group["eps"])

    def fused(
        self,
        state: dict[str, Tensor],
        params: list[Tensor],
        grads: list[Tensor],
        step: int,
        group: dict[str, Any],
        due: slice,
    ) -> bool:
        """Where there is a kernel."""
        if not ops.has("adamw_step_", state["exp_avg"]):
            return False
        moments, counters = (state["exp_avg"], state["exp_avg_sq"]), (state["taken"], state["level"])
        ops.adamw_step_(params, grads, *moments, None, *counters, *ops.numbers(group))
        return True

    def summary(self, state: dict[str, Tensor], group: dict[str, Any]) -> dict[str, Tensor]:
        """No curvature, nothing to report."""
        return {}

    def start(self, group: dict[str, Any]) -> int:
        """Never leaves phase 1."""
        return sys.maxsize

    def kind(self, name: str) -> str:
        """Moments only."""
        return "moments"
