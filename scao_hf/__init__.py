"""SCAO: a second-order optimizer for fine-tuning language models with LoRA, in AdamW's place and in its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scao_hf.ops import backend
from scao_hf.optimizer import SCAO, create_scao_optimizer

if TYPE_CHECKING:
    from scao_hf.trainer import SCAOCallback, SCAOTrainer, SCAOTrainerMixin

__version__ = "0.2.0"
__all__ = ["SCAO", "SCAOCallback", "SCAOTrainer", "SCAOTrainerMixin", "__version__", "backend", "create_scao_optimizer"]

_NEED_TRANSFORMERS = ("SCAOCallback", "SCAOTrainer", "SCAOTrainerMixin")


def __getattr__(name: str) -> Any:
    """Import the Trainer integration when it is first asked for, so that ``import scao_hf`` needs torch alone."""
    if name not in _NEED_TRANSFORMERS:
        raise AttributeError(f"module 'scao_hf' has no attribute {name!r}")
    try:
        from scao_hf import trainer
    except ModuleNotFoundError as error:
        raise ImportError(
            f"scao_hf.{name} needs {error.name}, which is not installed: pip install 'scao-hf[hf]'"
        ) from error
    return getattr(trainer, name)
