"""States of phase 2 for the tests of the kernels, on CPUs and in the emulator."""

from __future__ import annotations

import torch

from scao_hf import refresh


def eigenbasis_state(size: int, r: int, l: int, k: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """What ``ops.eigenbasis_step_`` takes, in its order; the last column of the long basis is masked."""
    roots = torch.randn(size, r, r)
    mask = (torch.arange(k) < max(1, k - 1)).float().expand(size, 1, k).contiguous()
    return {
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


#: What ``ops.eigenbasis_refresh_`` takes after the tensors and the range of matrices.
REFRESH = refresh.Settings(0.9, 0.99, 1e-8, 0.95, 0.6, 0.05, 2, 64)


def refresh_state(size: int, r: int, l: int, k: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """What ``ops.eigenbasis_refresh_`` takes, in its order: eigenvalues fall, so that no two are the same."""
    state = eigenbasis_state(size, r, l, k, dtype)
    roots = torch.randn(size, r, 2 * r) * torch.linspace(1, 0.2, r)[:, None]
    rows = state["long_vectors"].float()
    # A momentum with something in the old directions, most of it outside.
    state["exp_avg"] = state["exp_avg"] * torch.linspace(1, 0.2, r)[:, None]
    state["exp_avg"] -= 0.9 * (state["exp_avg"] @ rows.mT) @ rows
    state["inside_avg"] *= state["mask"] * torch.linspace(1, 0.2, r)[:, None]
    fresh = {
        # The adaptive rank has switched off some of the directions that the sketch holds.
        "mask": (torch.arange(k) < max(1, k // 2)).float().expand(size, 1, k),
        "factor": roots @ roots.mT,
        "factor_values": torch.rand(size, r),
        "long_values": torch.linspace(2, 0.1, k) * state["mask"][:, 0],
        "long_tail": 0.1 * torch.rand(size),
    }
    return {name: (fresh | state if name not in fresh else fresh)[name].contiguous() for name in refresh.FIELDS}
