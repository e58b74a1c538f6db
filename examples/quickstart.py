"""SCAO next to AdamW in a plain PyTorch loop: a small network learns a function of badly scaled inputs, in seconds on a CPU.

It shows how the loop looks, not how good SCAO is: at ``--lr 1e-2`` SCAO ends above AdamW here. ``scao-hf compare`` tells for
a run of your own.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scao_hf import SCAO


def network() -> nn.Module:
    """The same weights for both optimizers."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))


def step(model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor) -> float:
    """One step; the loss before it."""
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def main() -> None:
    """Train with both and print their losses, with SCAO's own figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3, help="of both (default: %(default)s)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    inputs = torch.randn(512, 32) * torch.logspace(-1.5, 0.5, 32)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))
    with torch.no_grad():
        targets = teacher(inputs)

    usual, model = network(), network()
    adamw = torch.optim.AdamW(usual.parameters(), lr=arguments.lr, weight_decay=0.0)
    optimizer = SCAO(model.parameters(), lr=arguments.lr, weight_decay=0.0)
    print("step    AdamW loss   SCAO loss   phase  blend  rank")
    for number in range(1, arguments.steps + 1):
        losses = (step(usual, adamw, inputs, targets), step(model, optimizer, inputs, targets))
        if number == 1 or number % 20 == 0:
            found = optimizer.metrics()
            print(
                f"{number:4d}    {losses[0]:10.6f}  {losses[1]:10.6f}   {found['scao/phase']:5.0f}  "
                f"{found['scao/blend']:5.2f}  {found['scao/rank']:4.1f}"
            )
    print(f"After {arguments.steps} steps SCAO's loss is {losses[1] / losses[0]:.2g} times AdamW's at this rate.")


if __name__ == "__main__":
    main()
