"""SCAO in a LightningModule: steps through Lightning's closure, a schedule, and a resume that is exact."""

from __future__ import annotations

# ruff: noqa: E402 -- Lightning may be missing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

lightning = pytest.importorskip("lightning", reason="needs lightning (make test-newest installs it)")

from scao_hf import SCAO


class Regression(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 12))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self.layers(batch[0]) - batch[0][:, :12].tanh()).square().mean()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = SCAO(self.parameters(), lr=0.02, warmup_steps=5, precond_freq=5, blend_steps=2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: Path, resume: Path | None = None) -> tuple[Any, Regression]:
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=64)  # an epoch is a step
    model = Regression()
    save = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=20, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=32,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[save],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader, ckpt_path=resume)
    return trainer, model


@pytest.mark.filterwarnings("ignore")
def test_a_run_enters_phase_two_and_resumes_exactly(tmp_path: Path) -> None:
    trainer, whole = fit(tmp_path)
    assert trainer.optimizers[0].metrics()["scao/phase"] == 2
    _, resumed = fit(tmp_path / "again", tmp_path / "step=20.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
