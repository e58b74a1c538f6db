"""SCAO in a LightningModule: return it from configure_optimizers; clipping, accumulation and precision are the Trainer's.

python examples/frameworks/lightning_module.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scao_hf import create_scao_optimizer


class Regression(lightning.LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """SCAO's figures, into every logger."""
        self.log_dict(self.optimizers().optimizer.metrics())

    def configure_optimizers(self) -> dict[str, Any]:
        """SCAO, and a schedule that steps with it."""
        optimizer = create_scao_optimizer(self, lr=2e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Train and print SCAO's figures."""
    torch.manual_seed(0)
    inputs = torch.randn(2048, 32)
    loader = DataLoader(TensorDataset(inputs, inputs.cumsum(1).tanh()), batch_size=32, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Regression(), loader)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(f"loss {figures['loss']:.4f}  phase {figures['scao/phase']:.0f}")


if __name__ == "__main__":
    main()
