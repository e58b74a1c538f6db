"""SCAO in a loop with Lightning Fabric: setup() returns a wrapper that passes metrics() on.

python examples/frameworks/fabric_loop.py
"""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scao_hf import create_scao_optimizer


def main() -> None:
    """Train a small network and print the loss with SCAO's figures."""
    fabric = Fabric(accelerator="auto", devices=1)
    torch.manual_seed(0)
    inputs = torch.randn(2048, 32)
    rows = TensorDataset(inputs, inputs.cumsum(1).tanh())
    network = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    model, optimizer = fabric.setup(network, create_scao_optimizer(network, lr=2e-3, weight_decay=0.0))
    for batch, targets in fabric.setup_dataloaders(DataLoader(rows, batch_size=32, shuffle=True)):
        loss = nn.functional.mse_loss(model(batch), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.4f}  phase {optimizer.metrics()['scao/phase']:.0f}")


if __name__ == "__main__":
    main()
