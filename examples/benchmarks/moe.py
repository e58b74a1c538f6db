"""Mixtures of experts: what per-expert curvature is worth, and what the fused LoRA forward and 4-bit experts cost.

    python examples/benchmarks/moe.py toy small forward four-bit    # one thread, about ten minutes
    python examples/benchmarks/tables.py --write                    # the tables of docs/moe.md

``toy``: one mixture learns another that differs from it by low-rank terms. ``small``: a mixture of 8 experts is
pretrained on one half of Python's standard library, then fine-tuned with LoRA on another kind of text. ``forward``: a
layer of experts with LoRA, against PEFT with each of transformers' implementations. ``four-bit``: the same in NF4.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import provenance
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scao_hf import SCAO
from scao_hf.experts import Packing, find_experts, unpack

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "moe.jsonl"
#: Learning rates and seeds; the third optimizer of the toy only shows what experts that are not told apart would give.
GRID: dict[str, dict[str, tuple[tuple[float, ...], int]]] = {
    "toy": {
        "adamw": ((1e-2, 2e-2, 4e-2), 5),
        "scao": ((1e-2, 2e-2, 4e-2), 5),
        "scao, one matrix": ((1e-2, 2e-2, 4e-2), 2),
    },
    "small": {"adamw": ((4e-3, 8e-3, 1.6e-2, 3.2e-2), 2), "scao": ((4e-3, 8e-3, 1.6e-2, 3.2e-2), 2)},
}

Figures = dict[str, Any]


def cosine(step: int, steps: int) -> float:
    """Ten steps of warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimizer_of(name: str, params: list[Any], lr: float, experts: dict[Tensor, Packing]) -> torch.optim.Optimizer:
    """AdamW, SCAO expert by expert, or SCAO with each packed factor as the one matrix that it looks like."""
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    return SCAO(params, lr=lr, weight_decay=0.0, experts=experts if name == "scao" else None)


# The toy ---------------------------------------------------------------------------------------------------------

EXPERTS, WIDTH, RANK, TRUE_RANK, TOKENS, TOY_STEPS = 16, 32, 8, 4, 64, 400


class Toy:
    """Two layers of expert matrices, a fixed uneven router, inputs of uneven directions; the teacher adds low-rank terms."""

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        scale = torch.logspace(0, -1.5, WIDTH)
        self.mix = torch.linalg.qr(self.normal(WIDTH, WIDTH))[0] * scale
        self.router = 2 * self.normal(EXPERTS, WIDTH)
        self.favour = torch.linspace(0, -8, EXPERTS)
        self.base = [self.normal(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5 for _ in range(2)]
        self.teacher = []
        for weight in self.base:
            a = self.normal(EXPERTS, TRUE_RANK, WIDTH) / WIDTH**0.5
            self.teacher.append(weight + self.normal(EXPERTS, WIDTH, TRUE_RANK) / 2 @ a)

    def normal(self, *shape: int) -> Tensor:
        """Random numbers of this task."""
        return torch.randn(*shape, generator=self.draw)

    def batch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Inputs, and the weights of each token's two experts."""
        x = self.normal(tokens, WIDTH) @ self.mix.T
        shares, choices = (x @ self.router.T + self.favour).softmax(-1).topk(2)
        return x, torch.zeros(tokens, EXPERTS).scatter_(1, choices, shares / shares.sum(-1, keepdim=True))

    @staticmethod
    def forward(x: Tensor, gates: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Every expert on every token, weighted."""
        inner = F.silu(torch.einsum("nd,ehd->enh", x, first))
        return torch.einsum("enh,edh,ne->nd", inner, second, gates)


def toy(name: str, lr: float, seed: int) -> Figures:
    """Relative error of the student's difference from the base model, after training, on held-out tokens."""
    task = Toy(seed)
    x, gates = task.batch(2000)
    target = task.forward(x, gates, *task.teacher)
    start = (task.forward(x, gates, *task.base) - target).norm()
    packings, params = (Packing("A", EXPERTS), Packing("B", EXPERTS)), []
    for _ in range(2):
        params.append(nn.Parameter(task.normal(EXPERTS * RANK, WIDTH) / WIDTH**0.5))
        params.append(nn.Parameter(torch.zeros(WIDTH, EXPERTS * RANK)))
    experts = {param: packings[index % 2] for index, param in enumerate(params)}
    optimizer = optimizer_of(name, params, lr, experts)

    def student() -> list[Tensor]:
        pairs = zip(task.base, params[::2], params[1::2], strict=True)
        return [w + 2 * unpack(b, packings[1]) @ unpack(a, packings[0]) for w, a, b in pairs]

    idle = 0.0
    for step in range(TOY_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, TOY_STEPS)
        batch, weights = task.batch(TOKENS)
        idle += float((weights.sum(0) == 0).float().mean()) / TOY_STEPS
        difference = task.forward(batch, weights, *student()) - task.forward(batch, weights, *task.teacher)
        optimizer.zero_grad()
        (100 * difference.square().mean()).backward()
        optimizer.step()
    with torch.no_grad():
        error = (task.forward(x, gates, *student()) - target).norm() / start
    return {"loss": float(error), "idle": idle}


# A small language model ------------------------------------------------------------------------------------------

LM_STEPS, PRETRAIN_STEPS, LENGTH, ROWS = 100, 250, 64, 8


def texts() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library: the documentation of one half of the modules, the code of the other."""
    import importlib

    halves: list[list[str]] = [[], []]
    names = sorted(
        name for _, name, package in pkgutil.iter_modules() if name in sys.stdlib_module_names and not package
    )
    for index, name in enumerate(name for name in names if name not in ("this", "antigravity", "idlelib", "__main__")):
        try:
            module = importlib.import_module(name)
            source = inspect.getsource(module)
        except (ImportError, OSError, TypeError):
            continue
        if index % 2:
            halves[1].append(source)
        else:
            members = [module, *vars(module).values()]
            halves[0] += [text for text in map(inspect.getdoc, members) if text and len(text) > 80]
    first, second = (torch.frombuffer(bytearray("\n".join(half).encode()), dtype=torch.uint8) for half in halves)
    return first[:400_000].long(), second[:400_000].long()


def rows_of(text: Tensor, draw: torch.Generator, count: int) -> Tensor:
    """``count`` windows of a text."""
    starts = torch.randint(0, len(text) - LENGTH, (count,), generator=draw)
    return torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


def lm_base() -> Any:
    """A Qwen3-MoE of 8 experts over bytes, random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

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
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=LENGTH,
            experts_implementation="grouped_mm",
        )
    )


def pretrained(text: Tensor) -> dict[str, Tensor]:
    """The model's weights after AdamW on a text."""
    model, draw = lm_base(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(PRETRAIN_STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * cosine(step, PRETRAIN_STEPS)
        batch = rows_of(text, draw, 2 * ROWS)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return dict(model.state_dict())


def small(name: str, lr: float, seed: int, weights: dict[str, Tensor], text: Tensor) -> Figures:
    """Held-out loss after LoRA (r = 8) on the experts of the pretrained model."""
    from peft import LoraConfig, get_peft_model

    from scao_hf.moe import fuse_moe_lora

    model = lm_base()
    model.load_state_dict(weights)
    torch.manual_seed(seed)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=targets))
    fuse_moe_lora(model)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = optimizer_of(name, params, lr, find_experts(model))
    draw, cut = torch.Generator().manual_seed(seed), len(text) * 9 // 10
    for step in range(LM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, LM_STEPS)
        batch = rows_of(text[:cut], draw, ROWS)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    with torch.no_grad():
        held = rows_of(text[cut:], torch.Generator().manual_seed(9), 64)
        return {"loss": float(model(input_ids=held, labels=held).loss)}


# A layer of experts ----------------------------------------------------------------------------------------------

HIDDEN, INNER, LAYER_TOKENS = 256, 512, 512


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


def milliseconds(contenders: dict[str, Callable[[], Any]], repeats: dict[str, int]) -> dict[str, float]:
    """Median processor time of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(max(repeats.values()) + 1):
        for name, contender in contenders.items():
            if turn > repeats[name]:
                continue
            began = time.thread_time()
            contender()
            if turn or not repeats[name]:
                times[name].append(1000 * (time.thread_time() - began))
    return {name: statistics.median(values) for name, values in times.items()}


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

    def contender(name: str) -> Callable[[], Any]:
        layer = bare if name == "without LoRA" else adapted

        def run() -> list[Tensor]:
            unfuse_moe_lora(adapted.model)
            if name == "fused":
                fuse_moe_lora(adapted.model)
            layer.model.config._experts_implementation = "grouped_mm" if name == "without LoRA" else name
            return layer.run()

        return run

    names = ["without LoRA", "fused", "grouped_mm", "eager", *(["batched_mm"] if experts <= 16 else [])]
    contenders = {name: contender(name) for name in names}
    repeats = {"without LoRA": 15, "fused": 15, "grouped_mm": 9, "eager": 5 if experts <= 16 else 1, "batched_mm": 0}
    figures: Figures = {"ms": milliseconds(contenders, {name: repeats[name] for name in names})}
    figures["extra_bytes"] = {name: extra_bytes(contenders[name]) for name in names if name != "batched_mm"}
    pairs = zip(contenders["fused"](), contenders["eager"](), strict=True)
    figures["gradient_difference"] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return figures


def four_bit() -> Figures:
    """Times of a layer in full precision and in NF4, both fused; the bytes; the gradients against decoded weights."""
    from scao_hf.moe import dequantize_experts, fuse_moe_lora, quantize_experts

    plain, coded, decoded = Layer(16), Layer(16), Layer(16)
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


def cells(part: str) -> Iterator[tuple[dict[str, Any], Callable[[], Figures]]]:
    """What a part measures: what defines each measurement, and the measurement."""
    if part == "toy":
        for name, (rates, seeds) in GRID[part].items():
            for lr in rates:
                for seed in range(seeds):
                    yield {"optimizer": name, "lr": lr, "seed": seed}, lambda n=name, r=lr, s=seed: toy(n, r, s)
    elif part == "small":
        before, after = texts()
        weights = pretrained(before)
        for name, (rates, seeds) in GRID[part].items():
            for lr in rates:
                for seed in range(seeds):
                    cell = {"optimizer": name, "lr": lr, "seed": seed}
                    yield cell, lambda n=name, r=lr, s=seed: small(n, r, s, weights, after)
    elif part == "forward":
        for experts in (16, 64):
            yield {"experts": experts}, lambda e=experts: forward(e)
    else:
        yield {}, four_bit


def main(argv: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("toy", "small", "forward", "four-bit"))
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    parser.add_argument("--redo", action="store_true", help="measure again what the file has")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    kept = arguments.out.read_text(encoding="utf-8").splitlines() if arguments.out.exists() else []
    if arguments.redo:
        kept = [line for line in kept if json.loads(line)["part"] not in arguments.parts]
    known = [(record["part"], record["cell"]) for record in map(json.loads, kept)]
    origin = {"machine": provenance.machine(), "versions": provenance.versions("scao")}
    for part in arguments.parts:
        command = f"python examples/benchmarks/moe.py {part}"
        for cell, measure in cells(part):
            if (part, cell) in known:
                continue
            record = {"part": part, "cell": cell, "figures": measure(), "command": command, **origin}
            print(part, cell, json.dumps(record["figures"]), flush=True)
            kept.append(json.dumps(record))
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
