"""An Axolotl plugin that writes how long each step takes: ``plugins: [step_clock.Clock]``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback


class StepClock(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Writes the seconds of each step and of its optimizer, with the GPU waited for, and the peaks of memory so far."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.times: dict[str, float] = {}

    def _mark(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times[name] = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Before the first forward pass."""
        self._mark("begin")

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """After the gradients have been clipped."""
        self._mark("before")

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """After the optimizer."""
        self._mark("after")

    def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:
        """Before logs, evaluations and checkpoints."""
        self._mark("end")
        line = {
            "step": state.global_step,
            "seconds": round(self.times["end"] - self.times["begin"], 5),
            "optimizer": round(self.times["after"] - self.times["before"], 6),
        }
        if torch.cuda.is_available():
            line |= {"active": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


class Clock(BasePlugin):  # type: ignore[misc, unused-ignore]
    """Adds the clock to a trainer; ``clock.jsonl`` lies next to the output's folder."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """As Axolotl asks for them."""
        return [StepClock(Path(cfg.output_dir).with_name("clock.jsonl"))]
