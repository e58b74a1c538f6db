"""The measurements of moe.py that train nothing: times and memory of a layer of experts with LoRA, fused or not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Figures = dict[str, Any]

HIDDEN, INNER, LAYER_TOKENS = 256, 512, 512
#: The layer without LoRA, by transformers' implementations: what no forward with LoRA can be faster than.
FLOORS = {"without LoRA": "grouped_mm", "without LoRA, eager": "eager"}


class Layer:
    """One layer of Qwen3-MoE experts, with LoRA (r = 8) or without, and a routing to run it with."""

    def __init__(self, experts: int, lora: bool = True) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            moe_intermediate_size=INNER,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=experts,
            num_experts_per_tok=2,
        )
        self.model: Any = Qwen3MoeForCausalLM(config).requires_grad_(False)
        if lora:
            targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
            settings = LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=targets)
            self.model = get_peft_model(self.model, settings)
            for name, param in self.model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(param, std=0.02)
        self.experts = next(m for name, m in self.model.named_modules() if name.endswith("mlp.experts"))
        draw = torch.Generator().manual_seed(1)
        self.x = torch.randn(LAYER_TOKENS, HIDDEN, generator=draw)
        self.shares, self.choices = torch.rand(LAYER_TOKENS, experts, generator=draw).topk(2)

    def run(self) -> list[Tensor]:
        """Forward and backward; every gradient."""
        for param in self.experts.parameters():
            param.grad = None
        x, shares = self.x.clone().requires_grad_(), self.shares.clone().requires_grad_()
        self.experts(x, self.choices, shares).square().sum().backward()
        return [x.grad, shares.grad, *(p.grad for p in self.experts.parameters() if p.grad is not None)]


def milliseconds(
    contenders: dict[str, Callable[[], Any]],
    repeats: dict[str, int],
    prepare: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """Median processor time of each, taken alternately; ``prepare(name)`` comes before each and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(max(repeats.values()) + 1):
        for name, contender in contenders.items():
            if turn > repeats[name]:
                continue
            prepare(name)
            began = time.thread_time()
            contender()
            if turn or not repeats[name]:
                times[name].append(1000 * (time.thread_time() - began))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def extra_bytes(run: Callable[[], Any]) -> int:
    """The most that is allocated at a time beyond what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    now = peak = 0
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def forward(experts: int) -> Figures:
    """Times and peaks of a layer with the fused forward, PEFT with each implementation, and without LoRA."""
    from scao_hf.moe import fuse_moe_lora, unfuse_moe_lora

    adapted, bare = Layer(experts), Layer(experts, lora=False)

    def prepare(name: str) -> None:
        unfuse_moe_lora(adapted.model)
        if name == "fused":
            fuse_moe_lora(adapted.model)
        if name in ("grouped_mm", "eager", "batched_mm"):
            adapted.model.config._experts_implementation = name
        elif name in FLOORS:
            bare.model.config._experts_implementation = FLOORS[name]

    names = [*FLOORS, "fused", "grouped_mm", "eager", *(["batched_mm"] if experts <= 16 else [])]
    contenders = {name: (bare if name in FLOORS else adapted).run for name in names}
    repeats = {**dict.fromkeys(names, 15), "eager": 15 if experts <= 16 else 3, "batched_mm": 0}
    figures: Figures = {"ms": milliseconds(contenders, repeats, prepare), "extra_bytes": {}}
    for name in names:
        if name != "batched_mm":
            prepare(name)
            figures["extra_bytes"][name] = extra_bytes(contenders[name])
    gradients = []
    for name in ("fused", "eager"):
        prepare(name)
        gradients.append(adapted.run())
    figures["gradient_difference"] = max(float((a - b).norm() / b.norm()) for a, b in zip(*gradients, strict=True))
    return figures


def four_bit(experts: int) -> Figures:
    """Times of a layer in full precision and in NF4, both fused; the bytes; the gradients against decoded weights."""
    from scao_hf.moe import dequantize_experts, fuse_moe_lora, quantize_experts

    plain, coded, decoded = Layer(experts), Layer(experts), Layer(experts)
    done = quantize_experts(coded.model)
    quantize_experts(decoded.model)
    dequantize_experts(decoded.model)
    for layer in (plain, coded, decoded):
        fuse_moe_lora(layer.model)
    pairs = zip(coded.run(), decoded.run(), strict=True)
    return {
        "ms": milliseconds({"float32": plain.run, "nf4": coded.run}, {"float32": 41, "nf4": 41}),
        "bytes_of_bfloat16": done.bytes / done.bfloat16_bytes,
        "gradient_difference": max(float((a - b).norm() / b.norm()) for a, b in pairs),
    }
