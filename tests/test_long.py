"""Twenty thousand steps: int8 curvature and moments in few bits against float32, memory, and time per step."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from scao_hf import SCAO

STEPS, PART, BATCH = 20_000, 1_000, 32
#: Standard deviation of what the targets hold besides what can be learnt.
NOISE = 0.1
#: The step from which memory must not grow.
FIRST = 100
SETTINGS: dict[str, Any] = {
    "warmup_steps": 20,
    "blend_steps": 10,
    "precond_freq": 10,
    "min_precond_updates": 1,
    "k_max": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8 curvature, bfloat16 moments": {"use_int8_ema": True, "moment_dtype": "bfloat16"},
    "int8 curvature, int8 moments": {"use_int8_ema": True, "moment_dtype": "int8"},
}
#: How far the excess loss of few bits may be from that of float32 over the last quarter. Measured: 0.0004 and 0.0018.
DRIFT = 0.01
#: Mebibytes that the process may grow by from step 100 on; measured: 0.2.
GROWTH = 1.0
#: How much slower the last quarter may be than the first. Measured: -0.09 to 0.04, which is what other programs do to it.
SLOWER = 0.25


def resident() -> float:
    """MiB that the process holds in memory, after a collection."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(steps: int = STEPS, **chosen: Any) -> dict[str, Any]:
    """LoRA-like factors that follow a target of their own rank; excess loss, memory and processor time for each part.

    The target turns all the time, so that an optimizer that falls behind is seen in the loss; what is counted is the loss
    above the noise, which no weights can lower.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(512, 48, generator=draw)
    inner = torch.randn(48, 8, generator=draw) / 7
    outer, turning = torch.randn(8, 40, generator=draw) / 3, torch.randn(8, 40, generator=draw) / 3
    params = [
        torch.nn.Parameter(torch.randn(8, 48, generator=draw) / 7),
        torch.nn.Parameter(torch.zeros(40, 8)),
        torch.nn.Parameter(torch.zeros(40)),
    ]
    optimizer = SCAO(params, lr=2e-3, weight_decay=0.0, **SETTINGS, **chosen)
    losses, memory, times = [], [], []
    total, start = 0.0, time.process_time()
    for step in range(steps):
        rows = torch.randint(0, 512, (BATCH,), generator=draw)
        noise = NOISE * torch.randn(BATCH, 40, generator=draw)
        error = x[rows] @ params[0].T @ params[1].T + params[2] - x[rows] @ inner @ (outer + turning * step / STEPS)
        loss = (error - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() - NOISE**2
        if step + 1 == FIRST:
            memory.append(resident())
        if (step + 1) % PART == 0:
            losses.append(total / PART)
            memory.append(resident())
            times.append(time.process_time() - start)
            total, start = 0.0, time.process_time()
    held = sum(v.numel() * v.element_size() for e in optimizer.state.values() for v in e.values() if torch.is_tensor(v))
    return {"losses": losses, "memory_mib": memory, "seconds": times, "state_bytes": held}


@pytest.mark.long
def test_twenty_thousand_steps_neither_drift_nor_grow_nor_slow_down() -> None:
    found = {kind: run(**chosen) for kind, chosen in KINDS.items()}
    quarter = STEPS // PART // 4
    full = sum(found["float32"]["losses"][-quarter:])
    for kind, record in found.items():
        drift = sum(record["losses"][-quarter:]) / full - 1
        growth = record["memory_mib"][-1] - record["memory_mib"][0]
        slower = min(record["seconds"][-quarter:]) / min(record["seconds"][:quarter]) - 1
        print(f"{kind}: drift {100 * drift:+.2f} %, memory {growth:+.1f} MiB, time {100 * slower:+.0f} %")
        assert abs(drift) <= DRIFT and record["losses"][-1] < record["losses"][0]
        assert growth <= GROWTH
        assert slower <= SLOWER


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({kind: run(int(sys.argv[1]), **chosen) for kind, chosen in KINDS.items()}, indent=1))
