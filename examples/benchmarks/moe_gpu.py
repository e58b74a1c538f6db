"""The run that needs a GPU: a mixture of experts through Axolotl, with SCAO and each way to run the experts.

    python examples/benchmarks/moe_gpu.py --steps 30      # one GPU, CUDA, Triton, scao-hf[axolotl]; no download

A random Qwen3-MoE over bytes is trained on a text by ``axolotl train`` four times: PEFT with grouped_mm, the fused
forward, the fused forward on 4-bit experts, and Axolotl's KernelsPlugin with ScatterMoE. It prints the first and the last
loss and the peak memory, and fails unless all four losses fall from the same start. It has not been run yet, for want of a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCAO = "axolotl_plugin.SCAOPlugin"
KERNELS = "axolotl.integrations.kernels.KernelsPlugin"
#: What differs between the runs.
RUNS: dict[str, dict[str, Any]] = {
    "grouped_mm": {"plugins": [SCAO], "experts_implementation": "grouped_mm"},
    "fused": {"plugins": [SCAO], "scao_fuse_moe": True},
    "fused, 4 bit": {"plugins": [SCAO], "scao_fuse_moe": True, "load_in_4bit": True, "quantize_moe_experts": True},
    "scattermoe": {"plugins": [SCAO, KERNELS], "use_kernels": True, "use_scattermoe": True},
}


def config(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """The YAML of a run, as a dict."""
    own = RUNS[name]
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "base_model": str(folder / "model"),
        "optimizer": "scao",
        "adapter": "qlora" if own.get("load_in_4bit") else "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "lora_mlp_kernel": False,
        "datasets": [{"path": str(folder / "text.jsonl"), "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0,
        "sequence_len": 512,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "learning_rate": 0.001,
        "lr_scheduler": "cosine",
        "weight_decay": 0.0,
        "bf16": bf16,
        "fp16": not bf16,  # a T4 would emulate bfloat16, slowly
        "logging_steps": 1,
        "save_steps": steps,
        "output_dir": str(folder / name.replace(", ", "-").replace(" ", "")),
        "seed": 42,
        **own,
    }


def byte_tokenizer() -> Any:
    """Of bytes, with <pad>, <s> and </s> as its first three of 259 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, **names)


def prepare(folder: Path) -> None:
    """A random model with a byte tokenizer, and a text."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 4}
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes, **experts))
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    lines = [json.dumps({"text": text[at : at + 500]}) for at in range(0, len(text) - 500, 250)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def figures(output: Path) -> dict[str, float]:
    """First and last loss and peak memory of a finished run."""
    states = sorted(output.glob("checkpoint-*/trainer_state.json"))
    log = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    memory = [value for entry in log for key, value in entry.items() if key.startswith("memory/max_active")]
    return {"first": losses[0], "last": losses[-1], "peak GiB": max(memory, default=float("nan"))}


def main(argv: list[str] | None = None) -> int:
    """Run all four and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("runs/moe-gpu"), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: this needs a GPU: ScatterMoE and Axolotl's 4-bit experts run on CUDA alone", file=sys.stderr)
        return 1
    import yaml

    arguments.folder.mkdir(parents=True, exist_ok=True)
    prepare(arguments.folder)
    found = {}
    for name in RUNS:
        settings = config(name, arguments.folder, arguments.steps)
        path = arguments.folder / "config.yml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        subprocess.run(["axolotl", "train", str(path), "--launcher", "python"], check=True)
        found[name] = figures(Path(settings["output_dir"]))
        print(name, json.dumps(found[name]), flush=True)
    start = found["grouped_mm"]["first"]
    wrong = [name for name, run in found.items() if abs(run["first"] - start) > 0.05 or run["last"] >= run["first"]]
    print(f"error: {', '.join(wrong)}" if wrong else "all four agree at the start and learn")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
