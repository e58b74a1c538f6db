"""One process of a Trainer's run over gloo on the CPU, started by torchrun: DDP, FSDP2 as Accelerate sets it up, DeepSpeed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist


def pretend_that_accelerate_shards_on_cpus() -> None:
    """Accelerate switches FSDP on for devices other than CPUs alone: count gloo's processes as such."""
    from accelerate import state
    from accelerate.utils import DistributedType

    before = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        before(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        # Every later call takes the type of the processes again, too.
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None:
            state.AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)

    state.AcceleratorState.__init__ = init  # type: ignore[method-assign]


def whole(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, param in model.named_parameters():
        value = param.detach()
        if hasattr(param, "_hp_mapping") or hasattr(param, "_z3_optimizer"):
            from deepspeed.utils import safe_get_full_fp32_param

            value = safe_get_full_fp32_param(param) if param.requires_grad else value
        if param.requires_grad:
            found[name.removeprefix("module.")] = (
                value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
            )
    return found


def main(model_path: str, folder: Path, kind: str, settings: dict[str, Any]) -> None:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, TrainingArguments

    from scao_hf import SCAOTrainer

    torch.set_num_threads(1)
    if kind == "fsdp":
        pretend_that_accelerate_shards_on_cpus()
        settings["fsdp"] = "full_shard auto_wrap"
        settings["fsdp_config"] = {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": settings.pop("state_dict_type", "SHARDED_STATE_DICT"),
        }
    resume = settings.pop("resume", None)
    lora = settings.pop("lora", True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    if lora:
        config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    rows = torch.randint(3, 200, (64, 12), generator=torch.Generator().manual_seed(1)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        lr_scheduler_type="constant",
        learning_rate=0.01,
        disable_tqdm=True,
        **settings,
    )
    quick = {"warmup_steps": 3, "blend_steps": 2, "precond_freq": 2, "min_precond_updates": 1, "k_max": 4}
    trainer = SCAOTrainer(model=model, args=arguments, train_dataset=data, scao_kwargs=quick)
    trainer.train(resume_from_checkpoint=resume)
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    report = {
        "weights": whole(trainer.model_wrapped),
        "sharded": sorted({type(param.data).__name__ for param in trainer.model_wrapped.parameters()}),
        "optimizer": type(optimizer).__name__,
        "sharing": getattr(optimizer, "_sharing", None) is not None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "phases": [entry["scao/phase"] for entry in trainer.state.log_history if "loss" in entry],
    }
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(report, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
