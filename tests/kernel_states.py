"""States of phase 2 for the tests of the kernels, on CPUs and in the emulator."""

from __future__ import annotations

import torch


def eigenbasis_state(size: int, r: int, l: int, k: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """What ``ops.eigenbasis_step_`` takes, in its order; the last column of the long basis is masked."""
    mask = (torch.arange(k) < max(1, k - 1)).float().expand(size, 1, k).contiguous()
    return {
        "exp_avg": 0.1 * torch.randn(size, r, l),
        "factor": torch.randn(size, r, r),
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
