"""The model, the data and the options of the runs under DeepSpeed, which one process without it has, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scao_hf.rules.eigenbasis import Eigenbasis

OPTIONS = {"lr": 1e-2, "warmup_steps": 6, "blend_steps": 4, "precond_freq": 3, "min_precond_updates": 2, "k_max": 3}
BATCH = 8
#: The long basis as it is kept for float32 weights, and kept in their own precision.
KEPT = Eigenbasis.fields["long_vectors"]
EXACT = KEPT._replace(bfloat16=False)


class Adapted(nn.Module):
    """A frozen layer with LoRA, as PEFT has it."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.a, self.b = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + 2 * self.b(self.a(x)))


def build(full: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Adapted(*sides, 5) for sides in ((13, 22), (22, 17), (17, 9))))
    for layer in model:
        for param in layer.base.parameters():
            param.requires_grad = full
    return model


def groups(model: nn.Module, frozen: bool = False) -> list[dict[str, Any]]:
    """With decay and without; with ``frozen`` all matrices, trained or not (of a group without trained ones ZeRO-2 fails)."""
    trained = [(name, param) for name, param in model.named_parameters() if frozen or param.requires_grad]
    sides = [len(getattr(param, "ds_shape", param.shape)) for _, param in trained]
    matrices = [pair for pair, ndim in zip(trained, sides, strict=True) if ndim == 2]
    vectors = [pair for pair, ndim in zip(trained, sides, strict=True) if ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}][
        : 2 if vectors and not frozen else 1
    ]


def batch(step: int, rank: int, world: int) -> Tensor:
    rows: Tensor = torch.randn(BATCH, 13, generator=torch.Generator().manual_seed(step))
    return rows.chunk(world)[rank]


def loss_of(output: Tensor, step: int, rank: int, world: int) -> Tensor:
    target = torch.randn(BATCH, 9, generator=torch.Generator().manual_seed(10_000 + step))
    # A scale that makes the clipping of some steps bite, and of others not.
    return (output.float() - target.chunk(world)[rank]).square().mean() * (5 if step % 2 else 0.2)
