"""What an optimizer says about the run that it is part of: parameters that do not train, a run that is too short."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from scao_hf.experts import packing_of
from scao_hf.optimizer import SCAO
from scao_hf.rules import members, rule_of
from scao_hf.rules.base import blend_weight
from scao_hf.zero import ZeroSCAO

logger = logging.getLogger(__name__)

#: So many names are shown in a message.
SHOWN = 3


def _parameters(optimizer: SCAO | ZeroSCAO) -> list[tuple[dict[str, Any], Tensor]]:
    """With their groups. Under DeepSpeed as tensors of their shapes, as its vectors are in their place."""
    groups = optimizer.shapes if isinstance(optimizer, ZeroSCAO) else optimizer.param_groups
    return [(group, param) for group in groups for param in group["params"]]


def check_parameters(optimizer: SCAO | ZeroSCAO, named: Iterable[tuple[str, Tensor]]) -> None:
    """Before training: whether the optimizer holds what is to be trained, and matrices among it.

    Args:
        optimizer: of the run.
        named: the model's named parameters.

    Raises:
        RuntimeError: all of the optimizer's parameters are frozen.
    """
    held = _parameters(optimizer)
    if not any(param.requires_grad for _, param in held):
        raise RuntimeError(
            "all parameters of the optimizer are frozen, so that nothing would train: others were trainable when it was "
            "built (before set_adapter, for example). Set trainer.optimizer = None before train() to build it again"
        )
    known = {optimizer.origins[param] if isinstance(optimizer, ZeroSCAO) else param for _, param in held}
    left_out = [name for name, param in named if param.requires_grad and param not in known]
    if left_out:
        logger.warning(
            "%d trainable parameters are not in the optimizer and do not train: %s. Set trainer.optimizer = None before "
            "train() to build it again, or freeze them",
            len(left_out),
            ", ".join(left_out[:SHOWN]) + (", ..." if len(left_out) > SHOWN else ""),
        )
    # Matrices with a side of length 1 are told by the optimizer itself (scao_hf.notices).
    if all(param.ndim != 2 for _, param in held):
        logger.warning("none of the %d parameters is a matrix, so that every step is a plain AdamW step", len(held))


def check_length(optimizer: SCAO | ZeroSCAO, steps: int) -> None:
    """Warn of a run that ends before the curvature has its full effect.

    Args:
        optimizer: as it is before the run.
        steps: optimizer steps that the run takes from here.
    """
    if isinstance(optimizer, SCAO):
        optimizer.look_at_weights()
    ramps = {
        (rule_of(group, True, shape).phase1_steps(group), group["blend_steps"])
        for group, param in _parameters(optimizer)
        for shape, member in members(param, group)
        if member.block is not None
    }
    start, ramp = max(ramps, key=sum, default=(0, 0))
    if steps <= 0 or start == 0:  # no matrix, or only those of rule="orthogonal", which has no phase 1
        return
    last = steps + max((int(entry.get("step", 0)) for entry in optimizer.state.values()), default=0)
    share = blend_weight(last, start, ramp)
    if share == 0:
        logger.warning(
            "SCAO's phase 2 begins after step %d but the run has %d steps: every step will be a plain AdamW step. "
            "Lower warmup_steps, min_precond_updates or precond_freq",
            start,
            last,
        )
    elif share < 1:
        logger.warning(
            "the run's %d steps end in the ramp of SCAO's phase 2, where the curvature has %s of its effect: phase 1 "
            "takes %d steps (warmup_steps, or min_precond_updates x precond_freq), the ramp %d more (blend_steps). Lower "
            "them or train for longer",
            last,
            f"{100 * share:.0f} %",
            start,
            ramp,
        )


def check_gradients(optimizer: SCAO) -> None:
    """Before the first step.

    Raises:
        RuntimeError: no parameter has a gradient.
    """
    if not any(param.grad is not None for _, param in _parameters(optimizer)):
        raise RuntimeError(
            "no gradient has reached any parameter of the optimizer, so that nothing would train: the forward pass does "
            "not use them (another adapter is active, or none). Set trainer.optimizer = None before train() to build it "
            "again from what is trainable now"
        )


def check_experts(optimizer: SCAO, named: Iterable[tuple[str, Tensor]]) -> None:
    """After the first step.

    Raises:
        RuntimeError: the LoRA of some expert stacks has had no gradient: it would stay as it is for the whole run.
    """
    packed = {param for group, param in _parameters(optimizer) if packing_of(group) is not None}
    missing = [name for name, param in named if param in packed and param not in optimizer.state]
    if missing:
        raise RuntimeError(
            f"no gradient has reached the LoRA of these experts, so that they do not train: {', '.join(missing)}. With "
            "4-bit experts call scao_hf.moe.fuse_moe_lora(model) (scao_fuse_moe: true in a YAML) before training"
        )
