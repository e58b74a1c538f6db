"""One process of an Axolotl run over gloo on the CPU, started by torchrun: DDP or FSDP2 as its config says."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_trainer_worker import pretend_that_accelerate_shards_on_cpus, whole


def meshes_of_cpus() -> None:
    """Axolotl asks for a mesh of CUDA devices by name: give it one of CPUs."""
    from accelerate.parallelism_config import ParallelismConfig

    build = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, device_type: build(self, "cpu")


def processes_of_cpus() -> None:
    """Accelerate switches DeepSpeed on for devices other than CPUs alone: only the processes are told of CPUs."""
    import deepspeed
    from accelerate import PartialState

    deepspeed.init_distributed("gloo")
    before = PartialState.__init__

    def init(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        before(self, cpu=True, **kwargs)

    PartialState.__init__ = init  # type: ignore[method-assign]


def main(file: Path, folder: Path) -> None:
    pretend_that_accelerate_shards_on_cpus()
    meshes_of_cpus()
    import axolotl.train
    from accelerate import PartialState
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import TrainDatasetMeta
    from datasets import Dataset

    torch.set_num_threads(1)
    if "deepspeed:" in file.read_text():
        processes_of_cpus()
    else:
        # As `accelerate launch --cpu` does.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        PartialState(cpu=True)
    execute = axolotl.train.execute_training

    def execute_and_report(cfg: Any, trainer: Any, resume: Any) -> None:
        """The report is made here, as Axolotl dissolves the group of processes before it returns."""
        execute(cfg, trainer, resume)
        optimizer = trainer.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        report = {
            "weights": whole(trainer.model_wrapped),
            "optimizer": type(optimizer).__name__,
            "sharded": sorted({type(param.data).__name__ for param in trainer.model_wrapped.parameters()}),
            "sharing": getattr(optimizer, "_sharing", None) is not None,
            "phases": [entry["scao/phase"] for entry in trainer.state.log_history if "loss" in entry],
        }
        torch.save(report, folder / f"{dist.get_rank() if dist.is_initialized() else 0}.pt")

    axolotl.train.execute_training = execute_and_report
    cfg = load_cfg(str(file))
    cfg.device_map = {"": "cpu"}  # with several processes Axolotl takes their numbers for those of GPUs
    rows = torch.randint(3, 200, (64, 12), generator=torch.Generator().manual_seed(1)).tolist()
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in rows])
    torch.manual_seed(0)
    axolotl.train.train(cfg=cfg, dataset_meta=TrainDatasetMeta(train_dataset=data, total_num_steps=cfg.max_steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
