"""The Axolotl config that the tests train a tiny Llama with: LoRA on every layer, on a CPU, without any data of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tiny_run(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The keys of a run with SCAO in ``folder``; ``changes`` set to None remove keys."""
    base: dict[str, Any] = {
        "base_model": str(model),
        "plugins": ["axolotl_plugin.SCAOPlugin"],
        "optimizer": "scao",
        "scao_precond_freq": 2,
        "scao_blend_steps": 2,
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "adapter": "lora",
        "lora_target_linear": True,
        # The fused kernels, on by default, call CUDA.
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "lora_mlp_kernel": False,
        "lora_embedding_kernel": False,
        "learning_rate": 0.01,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "val_set_size": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "seed": 7,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}
