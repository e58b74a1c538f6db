"""Tiny random mixtures of experts of four architectures, with LoRA on their stacked experts by PEFT."""

from __future__ import annotations

import random
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

#: Architecture -> (config class, model class, its own names of the sizes that differ).
STYLES: dict[str, tuple[str, str, dict[str, str]]] = {
    "qwen3": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"moe_intermediate_size": "inner", "num_experts": "experts"}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": "experts"}),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": "experts"}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": "experts"}),
}
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base_model(
    style: str, experts: int = 4, hidden: int = 32, inner: int = 64, layers: int = 2, dtype: torch.dtype = torch.float32
) -> Any:
    """A model with random weights that route every token to two experts, eager."""
    config, model, names = STYLES[style]
    sizes = {"inner": inner, "experts": experts}
    torch.manual_seed(0)
    made = getattr(transformers, model)(
        getattr(transformers, config)(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            num_experts_per_tok=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
            experts_implementation="eager",
            **{name: sizes[size] for name, size in names.items()},
        )
    ).to(dtype)
    for name, param in made.named_parameters():
        if "experts" in name or "gate" in name or "router" in name:
            nn.init.normal_(param, std=1.0 if param.ndim == 2 else param.shape[-1] ** -0.5)
    return made


def with_lora(model: Any, rank: int = 4, targets: list[str] | None = None, random_b: bool = True) -> Any:
    """The model with LoRA on its experts; B is random, unless a fresh adapter is wanted."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=targets or TARGETS)
    peft = get_peft_model(model, config)
    for name, param in peft.named_parameters():
        if "lora_B" in name and random_b:
            nn.init.normal_(param, std=0.1)
    return peft


def tokens(seed: int = 0, rows: int = 2, length: int = 13) -> torch.Tensor:
    """Token numbers ``[rows, length]``."""
    draw = random.Random(seed)
    return torch.tensor([[draw.randrange(3, 64) for _ in range(length)] for _ in range(rows)])


def backward(model: Any, seed: int = 0) -> torch.Tensor:
    """One forward and backward pass; the loss."""
    loss: torch.Tensor = model(input_ids=tokens(seed), labels=tokens(seed)).loss
    loss.backward()
    return loss.detach()
