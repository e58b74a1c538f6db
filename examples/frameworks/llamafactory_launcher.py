"""LLaMA-Factory with SCAO: its YAML knows no other optimizers, so this replaces the one that the Trainer asks for.

    python examples/frameworks/llamafactory_launcher.py train.yaml

The YAML stays as it is; its optimizers with a switch of their own (use_galore, use_apollo, use_muon ...) must be off.
"""

from __future__ import annotations

from typing import Any

from llamafactory.train.tuner import run_exp
from transformers import Trainer, TrainingArguments

from scao_hf import SCAO, SCAOCallback


def scao(args: TrainingArguments, model: Any = None) -> tuple[type[SCAO], dict[str, Any]]:
    """Class and arguments of the optimizer; the trainer adds the groups."""
    return SCAO, {"lr": args.learning_rate}


if __name__ == "__main__":
    Trainer.get_optimizer_cls_and_kwargs = staticmethod(scao)
    run_exp(callbacks=[SCAOCallback()])
