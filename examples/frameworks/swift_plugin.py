"""ms-swift with SCAO: swift sft ... --external_plugins examples/frameworks/swift_plugin.py --optimizer scao"""

from __future__ import annotations

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map

from scao_hf import SCAO, SCAOCallback, create_scao_optimizer


class SCAOOptimizer(OptimizerCallback):
    """Builds SCAO at the learning rate and weight decay of the training arguments."""

    def create_optimizer(self, model: Any = None) -> SCAO:
        """Build it, and add its figures to every log."""
        SCAOCallback.attach(self.trainer)
        model = self.trainer.model if model is None else model
        return create_scao_optimizer(model, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)


optimizers_map["scao"] = SCAOOptimizer
