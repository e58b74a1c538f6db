"""SCAO in a plain PyTorch loop: a small network learns a function of badly scaled inputs, in seconds on a CPU."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from scao_hf import SCAO


def main() -> None:
    """Train and print the loss with the optimizer's own figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    inputs = torch.randn(512, 32) * torch.logspace(-1.5, 0.5, 32)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))
    with torch.no_grad():
        targets = teacher(inputs)

    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = SCAO(model.parameters(), lr=arguments.lr, weight_decay=0.0)
    for step in range(1, arguments.steps + 1):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        if step == 1 or step % 20 == 0:
            figures = optimizer.metrics()
            print(
                f"step {step:4d}  loss {loss.item():.6f}  phase {figures['scao/phase']:.0f}  "
                f"blend {figures['scao/blend']:.2f}  rank {figures['scao/rank']:.1f}"
            )


if __name__ == "__main__":
    main()
