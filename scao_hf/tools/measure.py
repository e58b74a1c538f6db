"""What a run under ``scao-hf compare`` writes down about itself: one JSON line for each step.

``python -m scao_hf.tools.measure SCRIPT ...`` runs a training script this way; Axolotl loads ``scao_hf.tools.axolotl_arm``.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import runpy
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from scao_hf.tools.arms import ARM_VARIABLE, FILE_VARIABLE
from scao_hf.trainer import SCAOCallback, SCAOTrainerMixin, optimizer_class


def peak_bytes() -> int:
    """Largest memory so far: the allocator's on a GPU, the process's resident set without one."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def state_bytes(optimizer: Any) -> int:
    """Bytes of the tensors in an optimizer's state, shared ones counted once, through Accelerate's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if optimizer is None:
        return 0
    found = {}
    for entry in optimizer.state.values():
        for value in entry.values():
            if isinstance(value, Tensor) and value.numel():
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def batch_checksum(inputs: Any, before: int = 0) -> int:
    """A checksum of the integers and texts in a batch (tokens, labels, masks; the prompts of GRPO), however they are nested."""
    if isinstance(inputs, Mapping):
        inputs = [part for name in sorted(inputs, key=str) for part in (str(name), inputs[name])]
    if isinstance(inputs, (list, tuple)):
        for part in inputs:
            before = batch_checksum(part, before)
    elif isinstance(inputs, Tensor) and not inputs.is_floating_point():
        before = zlib.crc32(inputs.detach().cpu().contiguous().numpy().tobytes(), before)
    elif isinstance(inputs, (str, int)):
        before = zlib.crc32(str(inputs).encode(errors="replace"), before)
    return before


class Recorder(TrainerCallback):
    """Writes loss, seconds, memory and the batch's checksum of each step; ``watch`` puts it in place.

    The seconds are those of the step alone: reading data, logging, saving and evaluating are left out.
    """

    def __init__(self, path: Path, accumulation: int) -> None:
        self.path, self.accumulation = path, accumulation
        self.started = self.seconds = 0.0
        self.checksum, self.batches = 0, 0

    @classmethod
    def watch(cls, trainer: Trainer, path: Path) -> Recorder:
        """Attach a recorder to a trainer, which then shows a NaN loss as what it is."""
        recorder = cls(path, trainer.args.gradient_accumulation_steps)
        trainer.args.logging_nan_inf_filter = False
        trainer.add_callback(recorder)
        step = trainer.training_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            # One micro-batch a step is enough to see that two runs read the same data, and waits for the device once.
            if recorder.batches % recorder.accumulation == 0:
                recorder.checksum = batch_checksum(inputs)
            recorder.batches += 1
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = training_step
        return recorder

    def write(self, **row: Any) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The line that says how the run began."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.write(begin=state.global_step, learning_rate=args.learning_rate, device=device)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock, when the device has finished."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.started

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The line of a step, or of an evaluation."""
        if logs and "loss" in logs:
            self.write(
                step=state.global_step,
                loss=float(logs["loss"]),
                seconds=self.seconds,
                data=self.checksum,
                state_bytes=state_bytes(kwargs.get("optimizer")),
                peak_bytes=peak_bytes(),
                blend=logs.get("scao/blend"),
                reward=logs.get("reward"),
            )
        if logs and "eval_loss" in logs:
            self.write(step=state.global_step, eval_loss=float(logs["eval_loss"]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The line that says that the run is complete."""
        self.write(end=state.global_step)


def prepare_trainer(trainer: Any, arm: dict[str, Any], path: Path) -> None:
    """Give a script's trainer the optimizer, the learning rate and the length of one arm, and attach a recorder.

    Args:
        trainer: any ``transformers.Trainer``; its own optimizer is replaced, its SCAO options are kept.
        arm: ``optimizer``, ``steps``, ``output_dir``, ``save_steps``, ``seed`` (what is added to the trainer's own) and
            ``scale`` or ``learning_rate``.
        path: where the recorder writes.
    """
    args = trainer.args = copy.copy(trainer.args)
    args.max_steps, args.save_steps, args.logging_steps = arm["steps"], arm["save_steps"], 1
    args.logging_strategy = args.save_strategy = type(args.save_strategy)("steps")
    args.eval_strategy, args.load_best_model_at_end = type(args.eval_strategy)("no"), False
    if trainer.eval_dataset is not None:
        args.eval_strategy, args.eval_steps = type(args.eval_strategy)("steps"), arm["steps"]
    args.save_total_limit, args.output_dir, args.push_to_hub = 1, arm["output_dir"], False
    args.learning_rate = arm["learning_rate"] or args.learning_rate * arm["scale"]
    if arm["seed"]:
        args.seed, args.data_seed = args.seed + arm["seed"], None
        set_seed(args.seed)  # the order of the data and dropout follow it; what the script has drawn before stays
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [one for one in callbacks if not type(one).__module__.startswith("transformers.integrations")]
    trainer.optimizer = trainer.lr_scheduler = trainer.optimizer_cls_and_kwargs = None
    own = isinstance(trainer, SCAOTrainerMixin)
    if arm["optimizer"] == "scao":
        if not own:
            trainer.__class__ = type("Compared", (SCAOTrainerMixin, type(trainer)), {})
            trainer.scao_kwargs = {}
            optimizer_class(trainer)
            SCAOCallback.attach(trainer)
        trainer.create_optimizer()
    else:
        args.optim = arm["optimizer"]
        maker: Any = super(SCAOTrainerMixin, trainer) if own else trainer  # the mixin would build SCAO
        maker.create_optimizer()
    Recorder.watch(trainer, path)


def run_script(script: str, arguments: list[str]) -> None:
    """Run a training script as ``__main__`` up to the end of its training; it saves nothing of its own after that."""
    arm, path = json.loads(os.environ[ARM_VARIABLE]), Path(os.environ[FILE_VARIABLE])
    train = Trainer.train

    def measured(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare_trainer(self, arm, path)
        folder = arm["output_dir"]
        kwargs["resume_from_checkpoint"] = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        train(self, **kwargs)
        sys.exit(0)

    Trainer.train = measured
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")
    sys.exit(f"{script} has ended without calling train() of a transformers Trainer")


if __name__ == "__main__":
    run_script(sys.argv[1], sys.argv[2:])
