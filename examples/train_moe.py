"""LoRA on the experts of a mixture, in 4 bit, with ``SCAOTrainer``: a complete script, without Axolotl.

Without arguments it makes a tiny random Qwen3-MoE over bytes and trains it on its own text, on a CPU, in seconds:

    .venv/bin/python examples/train_moe.py

With a model of the Hugging Face hub, on a GPU (not run by us on one yet):

    python examples/train_moe.py --model Qwen/Qwen3-30B-A3B --text my.txt --steps 300 --length 1024 --rank 16 \\
        --lr 2e-4
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainingArguments

from scao_hf import SCAOTrainer
from scao_hf.moe import fuse_moe_lora, quantize_experts

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def tiny_model() -> Any:
    """A random mixture of 8 experts over bytes."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=64,
            moe_intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=8,
            num_experts_per_tok=2,
        )
    )


def main() -> int:
    """Train the adapter and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder (default: a tiny random one)")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="plain text (default: this script)")
    parser.add_argument("--output", type=Path, default=Path("runs/train_moe"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=64, help="tokens per row (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="LoRA rank (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="default: %(default)s")
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if arguments.model:
        ids = AutoTokenizer.from_pretrained(arguments.model)(text)["input_ids"]
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16 if bf16 else torch.float32)
    else:
        ids, model = list(text.encode()), tiny_model()
    rows = [ids[first : first + arguments.length] for first in range(0, len(ids) - arguments.length, arguments.length)]

    # The order matters: PEFT finds the experts' weights by name, which 4-bit weights do not keep.
    config = LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=[], target_parameters=EXPERTS)
    model = get_peft_model(model, config)
    done = quantize_experts(model)
    print(f"experts in 4 bit: {done.bytes / 2**20:.2f} MiB, {done.bytes / done.bfloat16_bytes:.3f} of their bfloat16")
    print(f"fused: {len(fuse_moe_lora(model))} expert modules")
    trainer = SCAOTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            learning_rate=arguments.lr,
            lr_scheduler_type="cosine",
            logging_steps=5,
            save_strategy="no",
            bf16=bf16,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    trainer.train()
    trainer.save_model()
    print(f"adapter: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
