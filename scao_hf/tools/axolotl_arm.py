"""The Axolotl plugin of ``scao-hf compare``: it attaches a recorder and changes nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin

from scao_hf.tools.arms import FILE_VARIABLE

if TYPE_CHECKING:
    from transformers import Trainer


class MeasurePlugin(BasePlugin):
    """Records the run into the file that ``SCAO_COMPARE_FILE`` names; does nothing where there is none."""

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Attach the recorder."""
        from scao_hf.tools.measure import Recorder

        if path := os.environ.get(FILE_VARIABLE):
            Recorder.watch(trainer, Path(path))
