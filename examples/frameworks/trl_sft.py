"""SCAO in TRL without a class: the trainer takes the optimizer's class, and the callback adds its figures to every log.

python examples/frameworks/trl_sft.py --model Qwen/Qwen2.5-0.5B --data train.jsonl     # rows of {"text": "..."}
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from scao_hf import SCAO, SCAOCallback


def main() -> None:
    """Train a LoRA adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", default="runs/trl")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-4)
    arguments = parser.parse_args()
    trainer = SFTTrainer(
        model=arguments.model,
        args=SFTConfig(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            logging_steps=1,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        # The rate is the optimizer's argument: that of SFTConfig is not read.
        optimizer_cls_and_kwargs=(SCAO, {"lr": arguments.lr, "weight_decay": 0.0}),
    )
    SCAOCallback.attach(trainer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
