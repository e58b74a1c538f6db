"""The two tasks of moe.py that are trained: a toy mixture that learns another, and a small language model.

Each is run by one call that returns its result: which optimizer, learning rate and seed is all that differs.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import pkgutil
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scao_hf import SCAO
from scao_hf.blocks import Packing, unpack
from scao_hf.experts import find_experts

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
#: What defines the task, for the key of a run.
TOY = {"experts": EXPERTS, "width": WIDTH, "rank": RANK, "true_rank": TRUE_RANK, "tokens": TOKENS, "steps": TOY_STEPS}


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


class Small:
    """The second task; the model is pretrained when the first run asks for it."""

    def __init__(self) -> None:
        self.before, self.after = texts()
        digest = hashlib.sha256(bytes(self.before.tolist()) + bytes(self.after.tolist())).hexdigest()[:12]
        self.definition = {
            "data": digest,
            "pretrain_steps": PRETRAIN_STEPS,
            "rank": RANK,
            "rows": ROWS,
            "steps": LM_STEPS,
        }
        self.weights: dict[str, Tensor] = {}

    def run(self, name: str, lr: float, seed: int) -> Figures:
        """Held-out loss after LoRA on the experts of the pretrained model."""
        from peft import LoraConfig, get_peft_model

        from scao_hf.moe import fuse_moe_lora

        self.weights = self.weights or pretrained(self.before)
        model = lm_base()
        model.load_state_dict(self.weights)
        torch.manual_seed(seed)
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=targets)
        model = get_peft_model(model, settings)
        fuse_moe_lora(model)
        params = [param for param in model.parameters() if param.requires_grad]
        optimizer = optimizer_of(name, params, lr, find_experts(model))
        draw, cut = torch.Generator().manual_seed(seed), len(self.after) * 9 // 10
        for step in range(LM_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = lr * cosine(step, LM_STEPS)
            batch = rows_of(self.after[:cut], draw, ROWS)
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
        with torch.no_grad():
            held = rows_of(self.after[cut:], torch.Generator().manual_seed(9), 64)
            return {"loss": float(model(input_ids=held, labels=held).loss)}
