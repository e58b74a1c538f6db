"""SCAO in a loop with Accelerate: mixed precision, accumulation, clipping, and the metrics behind the prepared optimizer.

accelerate launch examples/frameworks/accelerate_loop.py      # or python
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scao_hf import create_scao_optimizer


def main() -> None:
    """Train a small network and print the loss with SCAO's figures."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    inputs = torch.randn(2048, 32)
    rows = TensorDataset(inputs, inputs.cumsum(1).tanh())
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    optimizer = create_scao_optimizer(model, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 64)
    model, optimizer, loader, schedule = accelerator.prepare(
        model, optimizer, DataLoader(rows, batch_size=32, shuffle=True), schedule
    )
    for epoch in range(2):
        for batch, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(batch), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        figures = optimizer.optimizer.metrics()  # Accelerate wraps the optimizer, which keeps its own methods
        accelerator.print(f"epoch {epoch}  loss {loss.item():.4f}  phase {figures['scao/phase']:.0f}")


if __name__ == "__main__":
    main()
