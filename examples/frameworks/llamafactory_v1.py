"""LLaMA-Factory's trainer of version 1 with SCAO, as a plugin for its YAML.

    python examples/frameworks/llamafactory_v1.py sft.yaml

The YAML names SCAO and its options; the trainer hands no learning rate to a plugin, so that it is one of them:

    optim_config: {name: scao, lr: 3.0e-4, k_max: 32}
"""

from __future__ import annotations

from typing import Any

from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
from llamafactory.v1.trainers.sft_trainer import run_sft
from torch import nn

from scao_hf import SCAO, create_scao_optimizer


@OptimizerPlugin("scao").register()
def scao(model: nn.Module, optim_config: dict[str, Any]) -> SCAO:
    """SCAO for what the model trains, with the options of ``optim_config``."""
    options = {name: value for name, value in optim_config.items() if name != "name"}
    if "lr" not in options:
        raise ValueError(
            "optim_config has no lr: SCAO takes the learning rate that you use with AdamW, as in lr: 3.0e-4"
        )
    return create_scao_optimizer(model, **options)


if __name__ == "__main__":
    run_sft()
