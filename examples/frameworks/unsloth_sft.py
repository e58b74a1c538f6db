"""SCAO with Unsloth: its trainer takes the optimizer's class, and keeps the groups of embedding_learning_rate.

python examples/frameworks/unsloth_sft.py --model unsloth/Qwen2.5-3B-bnb-4bit --data train.jsonl
"""

from __future__ import annotations

import argparse

from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments  # isort: split

# unsloth patches what is imported after it
from datasets import load_dataset

from scao_hf import SCAO, SCAOCallback


def main() -> None:
    """Train a LoRA adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-4)
    arguments = parser.parse_args()
    model, tokenizer = FastLanguageModel.from_pretrained(arguments.model, max_seq_length=1024, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
    trainer = UnslothTrainer(
        model=model,
        processing_class=tokenizer,
        args=UnslothTrainingArguments(
            output_dir="runs/unsloth", max_steps=arguments.steps, logging_steps=1, report_to="none"
        ),
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
        optimizer_cls_and_kwargs=(SCAO, {"lr": arguments.lr, "weight_decay": 0.0}),
    )
    SCAOCallback.attach(trainer)
    trainer.train()
    model.save_pretrained("runs/unsloth")


if __name__ == "__main__":
    main()
