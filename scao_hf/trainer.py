"""SCAO inside transformers: any Trainer through a mixin, its metrics in every log through a callback."""

from __future__ import annotations

import copy
import inspect
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scao_hf.distributed.exchange import WAYS_OUT
from scao_hf.experts import find_experts, without_gradient
from scao_hf.namesake import foreign_option
from scao_hf.optimizer import SCAO, trainable_parameters
from scao_hf.options import OPTIONS, RULE_DEFAULTS, RULES, did_you_mean, resolve
from scao_hf.report import STATISTICS_NAME, StatisticsFile
from scao_hf.rules import rule_of

if TYPE_CHECKING:
    from transformers import Trainer as _AnyTrainer
else:
    _AnyTrainer = object  # the other base is the Trainer; type checkers have to know that there is one

logger = logging.getLogger(__name__)

#: Optimizer options that have a home in TrainingArguments, and its name there.
TRAINING_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay", "eps": "adam_epsilon"}


def choose_betas(rule: str | None, beta1: float | None, beta2: float | None) -> tuple[float, float] | None:
    """Betas to pass to ``SCAO``: None where nobody chose one, the rule's own for a single one that is missing."""
    if beta1 is None and beta2 is None:
        return None
    default = RULE_DEFAULTS[rule or RULES[0]]["betas"]
    return (default[0] if beta1 is None else beta1, default[1] if beta2 is None else beta2)


def check_scao_kwargs(scao_kwargs: dict[str, Any]) -> None:
    """Validate options that are meant for ``SCAO`` beside those of TrainingArguments.

    Raises:
        ValueError: an unknown option, one that TrainingArguments owns, or a value outside its legal range.
    """
    if not isinstance(scao_kwargs, dict):
        raise ValueError(f"scao_kwargs={scao_kwargs!r} is not valid: it must be a dict of options, as {{'k_max': 32}}")
    for name in scao_kwargs:
        if name in TRAINING_ARGUMENTS:
            raise ValueError(f"scao_kwargs: {name!r} belongs to the training arguments: set {TRAINING_ARGUMENTS[name]}")
        if name not in OPTIONS and name != "betas":
            near = foreign_option(name) or did_you_mean(name, (*OPTIONS, "betas"))
            raise ValueError(f"scao_kwargs: {name!r} is not an option of SCAO{near}; they are: {', '.join(OPTIONS)}")
    passed = {name: value for name, value in scao_kwargs.items() if name != "rule"}
    resolve(scao_kwargs.get("rule") or RULES[0], passed)


def refuse_parallelism(trainer: Trainer) -> None:
    """Refuse the kinds of parallelism that leave no matrix whole.

    Raises:
        ValueError: DeepSpeed or FSDP1, with what to use instead.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_deepspeed_enabled:
        kind = "DeepSpeed: ZeRO"
    elif trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2:
        kind = "FSDP1: it"
    else:
        return
    raise ValueError(f"SCAO does not run under {kind} flattens the matrices that SCAO steps whole. {WAYS_OUT}")


def unwrap(optimizer: Any) -> SCAO | None:
    """The SCAO instance inside Accelerate's wrappers, or None for another optimizer."""
    while optimizer is not None and not isinstance(optimizer, SCAO):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


class SCAOCallback(TrainerCallback):
    """Adds ``SCAO.metrics()`` to every training log, before the console, TensorBoard or W&B read it.

    Beside ``trainer_state.json`` it keeps ``scao_statistics.jsonl``, the figures of every matrix at up to 100 of the
    logged steps, for ``scao-hf report``.

    Use ``SCAOCallback.attach(trainer)``: a callback that is passed as ``callbacks=[...]`` runs after the reporting
    backends, which then see none of the metrics. With another optimizer it does nothing.
    """

    def __init__(self) -> None:
        self._file: StatisticsFile | None = None
        self._start, self._began = 0, 0.0
        self._ms: list[float] = []
        self._reached = False

    @classmethod
    def attach(cls, trainer: Trainer) -> SCAOCallback:
        """Put the callback before all others of ``trainer`` (once, however often it is called) and return it."""
        callbacks = trainer.callback_handler.callbacks
        callback = next((known for known in callbacks if isinstance(known, cls)), None)
        if callback is None:
            callback = cls()
        else:
            callbacks.remove(callback)
        callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn about a resume without state, and about a run that ends before phase 2."""
        optimizer = unwrap(kwargs.get("optimizer"))
        if optimizer is None:
            return
        self._file = StatisticsFile(Path(args.output_dir) / STATISTICS_NAME, state.max_steps)
        self._start, self._ms, self._reached = state.global_step, [], False
        if state.global_step > 0 and not optimizer.state:
            logger.warning(
                "resuming at step %d without SCAO's state: the checkpoint holds no optimizer.pt with scheduler.pt "
                "(save_only_model?), so moments and curvature start again from nothing",
                state.global_step,
            )
        group = optimizer.param_groups[0]
        start = rule_of(group, matrix=True).start(group)
        if 0 < state.max_steps <= start:
            logger.warning(
                "SCAO's phase 2 begins after step %d but the run has %d steps: every step will be a plain AdamW step. "
                "Lower warmup_steps, min_precond_updates or precond_freq",
                start,
                state.max_steps,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to a training log and to the entry of ``log_history`` that was copied from it."""
        optimizer = unwrap(kwargs.get("optimizer"))
        if optimizer is None or logs is None or "loss" not in logs:
            return
        metrics = optimizer.metrics()
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)
        if self._file is not None and self._file.due(state.global_step):
            options = {name: optimizer.param_groups[0][name] for name in OPTIONS}
            # Trainers that build the optimizer from its class pass parameters without their names.
            names = {param: name for name, param in kwargs["model"].named_parameters()}
            rows, write = optimizer.statistics(names), state.is_world_process_zero
            self._file.append(self._start, state.global_step, options, rows, self._ms, write)
            self._ms = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the optimizer's step."""
        self._began = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop it. On a GPU this is the time of the host, which does not wait for the device."""
        self._ms.append(1000 * (time.perf_counter() - self._began))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the first step, check that the LoRA of every expert stack has had a gradient.

        Raises:
            RuntimeError: some had none: they would stay as they are for the whole run, without a word.
        """
        optimizer = unwrap(kwargs.get("optimizer"))
        if self._reached or optimizer is None or not optimizer.state:
            return
        self._reached = True
        missing = without_gradient(kwargs["model"].named_parameters(), optimizer.param_groups, optimizer.state)
        if missing:
            raise RuntimeError(
                f"no gradient has reached the LoRA of these experts, so that they do not train: {', '.join(missing)}. With "
                "4-bit experts call scao_hf.moe.fuse_moe_lora(model) (scao_fuse_moe: true in a YAML) before training"
            )


class SCAOTrainerMixin(_AnyTrainer):
    """Gives any Trainer SCAO as its optimizer; put it first in the bases.

    ``class MySFT(SCAOTrainerMixin, SFTTrainer): pass`` is all that is needed. Learning rate, weight decay and epsilon
    come from the training arguments. ``adam_beta1`` and ``adam_beta2`` do too where they differ from the defaults of
    TrainingArguments; otherwise the rule's own betas hold (to force 0.9 and 0.999, pass ``betas`` in ``scao_kwargs``).
    Parameters are grouped as the Trainer groups them, so biases and norms are not decayed. ``trainer.args`` is a copy
    of the arguments that names the optimizer ``scao``; the caller's object is left as it was.

    Args:
        *args: positional arguments of the Trainer.
        scao_kwargs: options of ``SCAO`` (``scao_hf.options.OPTIONS`` and ``betas``).
        **kwargs: keyword arguments of the Trainer.

    Raises:
        ValueError: an option that is unknown or outside its range; a second optimizer; ``optim_args``; DeepSpeed or
            FSDP1.
    """

    args: TrainingArguments
    optimizer: Optimizer | None

    def __init__(self, *args: Any, scao_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        check_scao_kwargs({} if scao_kwargs is None else scao_kwargs)
        self.scao_kwargs = dict(scao_kwargs or {})
        super().__init__(*args, **kwargs)
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise ValueError("this trainer builds SCAO itself: pass neither optimizers nor optimizer_cls_and_kwargs")
        if self.args.optim_args:
            raise ValueError(f"optim_args={self.args.optim_args!r} is not read here: pass its options in scao_kwargs")
        refuse_parallelism(self)
        self.args = copy.copy(self.args)
        self.args.optim = "scao"
        SCAOCallback.attach(self)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Build SCAO over the trainable parameters of the model (newer releases pass it), or of the Trainer's own."""
        if self.optimizer is None:
            model = args[0] if args else kwargs.get("model")
            self.optimizer = self._build_scao(self.model if model is None else model)
        return self.optimizer

    def _build_scao(self, model: nn.Module) -> SCAO:
        decayed = set(self.get_decay_parameter_names(model))
        trainable = trainable_parameters(model)
        groups: list[dict[str, Any]] = [
            {"params": [pair for pair in trainable if pair[0] in decayed], "weight_decay": self.args.weight_decay},
            {"params": [pair for pair in trainable if pair[0] not in decayed], "weight_decay": 0.0},
        ]
        options = dict(self.scao_kwargs)
        if options.get("betas") is None:
            options["betas"] = choose_betas(options.get("rule"), *(self._chosen(f"adam_beta{n}") for n in (1, 2)))
        return SCAO(
            [group for group in groups if group["params"]],
            lr=self.args.learning_rate,
            eps=self.args.adam_epsilon,
            weight_decay=self.args.weight_decay,
            experts=find_experts(model),
            **{name: value for name, value in options.items() if name != "rule" or value is not None},
        )

    def _chosen(self, name: str) -> float | None:
        """A training argument, or None where it has the default of TrainingArguments."""
        value: float = getattr(self.args, name)
        return None if value == inspect.signature(TrainingArguments).parameters[name].default else value


class SCAOTrainer(SCAOTrainerMixin, Trainer):
    """``transformers.Trainer`` with SCAO: ``SCAOTrainer(model=..., args=..., train_dataset=..., scao_kwargs={})``."""
