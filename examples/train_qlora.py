"""4-bit QLoRA with ``SCAOTrainer``: a complete script, without Axolotl.

On a CPU, with the model and the data that `make demo-inputs` prepares (a minute or two):

    .venv/bin/python examples/train_qlora.py --steps 20

On a GPU, with any causal model of the Hugging Face hub and a JSON-lines file of chats
(``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}``):

    python examples/train_qlora.py --model Qwen/Qwen2.5-3B-Instruct --data chats.jsonl --steps 300 --length 1024 --lr 2e-4
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from scao_hf import SCAOTrainer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def chat(line: str, place: str) -> list[dict[str, str]]:
    """The messages in a line of the data."""
    try:
        messages = json.loads(line).get("messages")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{place} is not JSON of the form {{'messages': [...]}}: {error}") from error
    known = isinstance(messages, list) and all(
        isinstance(it, dict) and {"role", "content"} <= set(it) for it in messages
    )
    if not (known and messages):
        raise ValueError(f"{place}: no messages, a list of {{'role': ..., 'content': ...}}")
    return messages


class Chats(Dataset):
    """Tokenised chats whose labels cover the last answer only."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            messages = chat(line, f"{path}, line {number}")
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
            asked = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            labels = [-100] * min(asked, len(ids)) + ids[asked:]
            if asked < len(ids):  # a row whose answer was cut off whole has nothing to learn from
                self.rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        if not self.rows:
            raise ValueError(f"{path} has no chat with an answer inside --length {length} tokens")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def load_model(name: str, rank: int, dtype: torch.dtype) -> Any:
    """The base model in 4-bit NF4 with fresh LoRA factors on all linear layers."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    device = {"": 0} if torch.cuda.is_available() else {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization, dtype=dtype, device_map=device)
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=torch.cuda.is_available())
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, task_type="CAUSAL_LM"))


def precision() -> torch.dtype:
    """bfloat16 where the GPU has it, float16 on others (a T4 would emulate bfloat16, slowly), float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def main() -> int:
    """Train the adapter and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/demo/model", help="hub name or folder (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path(".cache/demo/docstrings.jsonl"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/train_qlora"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, help="rows per step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens per row (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="default: %(default)s")
    parser.add_argument("--report-to", default="none", help="none, tensorboard, wandb (default: %(default)s)")
    arguments = parser.parse_args()
    needed = [arguments.data, *([Path(arguments.model)] if arguments.model.startswith((".", "/")) else [])]
    for path in needed:
        if not path.exists():
            print(f"error: {path} is missing; `make demo-inputs` prepares the defaults", file=sys.stderr)
            return 1

    dtype = precision()
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        rows = Chats(arguments.data, tokenizer, arguments.length)
        model = load_model(arguments.model, arguments.rank, dtype)
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        print(f"error: --model {arguments.model} cannot be loaded: {reason}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    trainer = SCAOTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            learning_rate=arguments.lr,
            lr_scheduler_type="cosine",
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            report_to=arguments.report_to,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=42,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(arguments.output)
    print(f"adapter: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
