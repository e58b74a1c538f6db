"""One process of a run under DeepSpeed's ZeRO over gloo on the CPU, started by torchrun: LoRA, or every weight."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo", DEEPSPEED_LOG_LEVEL="error")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed_model import BATCH, EXACT, KEPT, OPTIONS, batch, build, groups, loss_of
from torch import Tensor

from scao_hf.rules.eigenbasis import Eigenbasis
from scao_hf.zero import ZeroSCAO


def bytes_sent() -> dict[str, int]:
    """What this process sends through the exchanges of the optimizer, counted where they hand it to torch."""
    counted = {"exchanged": 0, "exchanges": 0}
    before = dist.all_to_all_single

    def counting(received: Tensor, send: Tensor, takes: list[int], gives: list[int], **kwargs: Any) -> Any:
        counted["exchanged"] += sum(size for target, size in enumerate(gives) if target != dist.get_rank())
        counted["exchanges"] += 1
        return before(received, send, takes, gives, **kwargs)

    dist.all_to_all_single = counting
    return counted


def main(folder: Path, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    full, steps = settings.get("full", False), settings.get("steps", 30)
    Eigenbasis.fields["long_vectors"] = EXACT if settings.get("exact") else KEPT
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": settings.get("accumulation", 1),
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **settings.get("config", {}),
    }
    if settings.get("zero_init"):
        start = build(full)
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = build(full)
        for param, value in zip(model.parameters(), start.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                param.data.copy_(value.data)
    else:
        model = build(full)
    optimizer = ZeroSCAO(groups(model, settings.get("frozen", False)), **{**OPTIONS, **settings.get("options", {})})
    counted = bytes_sent()
    engine, wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    first = 0
    if "resume" in settings:
        engine.load_checkpoint(settings["resume"])
        first = engine.global_steps
    dtype = next(engine.module.parameters()).dtype
    parts = settings.get("accumulation", 1)
    norms, phases = [], []
    for step in range(first, steps):
        for group in wrapped.param_groups:
            group["lr"] = OPTIONS["lr"] * (1 - step / 60)
        mine = batch(step, rank, world).chunk(parts)
        for index, rows in enumerate(mine):
            output = engine(rows.to(dtype))
            target = loss_of(output, step, rank * parts + index, world * parts)
            engine.backward(target)
            engine.step()
        norms.append(float(engine.get_global_grad_norm() or 0))
        phases.append(optimizer.metrics()["scao/phase"])
        if step + 1 == settings.get("save"):
            engine.save_checkpoint(str(folder / "checkpoint"))
    weights = {}
    from deepspeed.utils import safe_get_full_fp32_param

    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            weights[name] = safe_get_full_fp32_param(param).clone()
    found = {
        "weights": weights,
        "norms": norms,
        "phases": phases,
        "steps": engine.global_steps,
        "rows": optimizer.statistics(),
        "state": optimizer.state_dict(),
        **counted,
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
