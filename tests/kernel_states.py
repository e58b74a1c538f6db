"""States of phase 2 for the tests of the kernels in the emulator, and steps of them in PyTorch, to which they are held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scao_hf import options
from scao_hf.blocks import Block, Member
from scao_hf.rules import rule_of
from scao_hf.rules.base import Bucket, Step, blend_weight
from scao_hf.rules.eigenbasis import Eigenbasis

#: lr, betas, eps, weight decay and rho.
NUMBERS = [0.01, 0.9, 0.99, 1e-8, 0.05, 0.95]
#: A step of phase 2 in which the ramp is over.
LATE = 1000
#: Options by which the same step is in the middle of the ramp.
RAMP = {"blend_steps": 2 * LATE}


def group(**changed: Any) -> dict[str, Any]:
    """A parameter group with ``NUMBERS``, whose refreshes keep 2 directions or more."""
    numbers = {"lr": NUMBERS[0], "eps": NUMBERS[3], "weight_decay": NUMBERS[4]}
    return {**options.resolve("eigenbasis", {"rho": NUMBERS[5], "k_min": 2, "k_max": 64}), **numbers, **changed}


def ramp_numbers() -> list[float]:
    """What the kernel takes in that step."""
    return [*NUMBERS, blend_weight(LATE + 1, Eigenbasis().phase1_steps(group()), RAMP["blend_steps"])]


def eigenbasis_state(size: int, r: int, l: int, k: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The fields that the kernels of phase 2 take, in their order; the last column of the long basis is masked."""
    roots = torch.randn(size, r, r)
    mask = (torch.arange(k) < max(1, k - 1)).float().expand(size, 1, k).contiguous()
    state = {
        "exp_avg": 0.1 * torch.randn(size, r, l),
        "factor": roots @ roots.mT,
        "inside_avg": torch.randn(size, r, k),
        "inside_sq": torch.rand(size, r, k),
        "row": torch.rand(size, r, 1),
        "col": torch.rand(size, 1, l),
        "taken": torch.arange(size, dtype=torch.float32) + 11,
        "level": 0.1 * torch.arange(size, dtype=torch.float32),
        "vectors": torch.linalg.qr(torch.randn(size, r, r))[0].contiguous(),
        "mask": mask,
        "gain": torch.rand(size) + 0.5,
        "long_vectors": (torch.linalg.qr(torch.randn(size, l, k))[0] * mask).mT.to(dtype).contiguous(),
        "agreement": torch.linspace(0.3, 0.9, size),
    }
    return {name: state[name] for name in Eigenbasis.native_fields}


@torch.no_grad()
def take_step(params: list[Tensor], grads: list[Tensor], state: dict[str, Tensor], **changed: Any) -> None:
    """One step of all ``params``, stored as [r, l] or [l, r], by the rule's PyTorch code."""
    _, r, l = state["exp_avg"].shape
    phase2 = "vectors" in state
    options = group(**changed)
    rule = rule_of(options, r > 1)
    bucket = Bucket(options, (r, l), LATE if phase2 else 0, torch.float32, rule)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
        sides = (0, param.shape[0]), (0, param.shape[-1])
        block = Block(*sides, transposed=tuple(param.shape) != (r, l), whole=True) if r > 1 else None
        bucket.members.append(Member(param, "", block))
    rule.step(Step(bucket, state, bucket.step + 1, slice(0, 0)))
