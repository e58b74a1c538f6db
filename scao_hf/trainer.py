"""SCAO inside transformers: any Trainer through a mixin, its metrics in every log through a callback."""

from __future__ import annotations

import inspect
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scao_hf import __version__, checks
from scao_hf.distributed.exchange import INSTEAD
from scao_hf.experts import find_experts, find_vocabulary
from scao_hf.names import with_names
from scao_hf.optimizer import SCAO, trainable_parameters
from scao_hf.options import (
    OPTIONS,
    RULE_DEFAULTS,
    RULES,
    SWITCHES,
    about_unknown,
    check,
    eight_bit_hint,
    resolve_arguments,
)
from scao_hf.report import STATISTICS_NAME, StatisticsFile, entries_of
from scao_hf.zero import ZeroSCAO, refused

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
    """Validate options that are meant for ``SCAO`` besides those of TrainingArguments.

    Raises:
        ValueError: an unknown option, one that TrainingArguments owns, or a value outside its legal range.
    """
    if not isinstance(scao_kwargs, dict):
        raise ValueError(f"scao_kwargs={scao_kwargs!r} is not valid: it must be a dict of options, as {{'k_max': 32}}")
    known = (*OPTIONS, "betas", "partial_resume")
    for name in scao_kwargs:
        if name in TRAINING_ARGUMENTS:
            raise ValueError(f"scao_kwargs: {name!r} belongs to the training arguments: set {TRAINING_ARGUMENTS[name]}")
        if name not in known:
            raise ValueError(f"scao_kwargs: {name!r} is not an option of SCAO{about_unknown(name, known)}")
    check("partial_resume", scao_kwargs.get("partial_resume", False), SWITCHES["partial_resume"])
    resolve_arguments(scao_kwargs)


def optimizer_class(trainer: Trainer) -> type[SCAO] | type[ZeroSCAO]:
    """SCAO, or its form for DeepSpeed's ZeRO where the trainer runs under that.

    Raises:
        ValueError: FSDP1, or a DeepSpeed configuration with which SCAO does not run, with what to use instead.
    """
    state = trainer.accelerator.state  # not the trainer's is_..._enabled: TRL's PPO builds its optimizer before them
    if (deepspeed := getattr(state, "deepspeed_plugin", None)) is not None:
        if (reason := refused(deepspeed.deepspeed_config)) is not None:
            raise ValueError(f"SCAO does not run under this DeepSpeed configuration: {reason}")
        return ZeroSCAO
    if (fsdp := getattr(state, "fsdp_plugin", None)) is not None and getattr(fsdp, "fsdp_version", 1) != 2:
        raise ValueError(f"SCAO does not run under FSDP1: it flattens the matrices that SCAO steps whole. {INSTEAD}")
    return SCAO


def updates_per_step(args: TrainingArguments) -> int:
    """Optimizer steps in one step of the Trainer's count: PPO takes many on one batch of answers."""
    return int(getattr(args, "num_ppo_epochs", 1) * getattr(args, "num_mini_batches", 1))


def unwrap(optimizer: Any) -> SCAO | ZeroSCAO | None:
    """The SCAO instance inside Accelerate's and DeepSpeed's wrappers, or None for another optimizer."""
    while optimizer is not None and not isinstance(optimizer, (SCAO, ZeroSCAO)):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


class SCAOCallback(TrainerCallback):
    """Adds ``SCAO.metrics()`` to every training log, before the console, TensorBoard or W&B read it.

    Next to ``trainer_state.json`` it keeps ``scao_statistics.jsonl``, the figures of every matrix at up to 100 of the
    logged steps, for ``scao-hf report``.

    Use ``SCAOCallback.attach(trainer)``: a callback that is passed as ``callbacks=[...]`` runs after the reporting
    backends, which then see none of the metrics. With another optimizer it does nothing.
    """

    def __init__(self) -> None:
        #: Where the parameter groups are told when training begins.
        self.log: Any = logger
        self._file: StatisticsFile | None = None
        self._start, self._began, self._step_began = 0, 0.0, 0.0
        self._ms: list[float] = []
        self._step_ms: list[float] = []
        self._stepped = False

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
        """Look at the run before its first step (``scao_hf.checks``), and warn about a resume without state."""
        optimizer = unwrap(kwargs.get("optimizer"))
        if optimizer is None:
            return
        # A partial resume may have brought the schedule of another number of groups.
        schedule: Any = getattr(kwargs.get("lr_scheduler"), "scheduler", kwargs.get("lr_scheduler"))
        if hasattr(schedule, "base_lrs") and len(schedule.base_lrs) != len(optimizer.param_groups):
            schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        about = _about(args, kwargs["model"], optimizer)
        self._file = StatisticsFile(Path(args.output_dir) / STATISTICS_NAME, state.max_steps, about)
        self._start, self._ms, self._step_ms, self._stepped = state.global_step, [], [], False
        if state.global_step > 0 and not optimizer.state:
            logger.warning(
                "resuming at step %d without SCAO's state: the checkpoint holds no optimizer.pt with scheduler.pt "
                "(save_only_model?), so moments and curvature start again from nothing",
                state.global_step,
            )
        checks.check_parameters(optimizer, kwargs["model"].named_parameters())
        if state.is_world_process_zero:
            self.log.info("SCAO's parameter groups:\n%s", optimizer.describe())
        checks.check_length(optimizer, (state.max_steps - state.global_step) * updates_per_step(args))

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
        # PPO logs one loss for the policy and one for the values.
        if optimizer is None or logs is None or not any(re.match("loss(/|$)", name) for name in logs):
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
            times = {"ms": self._ms, "whole": self._step_ms}
            self._file.append(self._start, state.global_step, options, rows, write=write, **times)
            self._ms, self._step_ms = [], []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock of the whole step."""
        self._step_began = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock of the optimizer's step. Before the first one, some parameter must have a gradient.

        DeepSpeed steps before this and keeps the gradients to itself.

        Raises:
            RuntimeError: none has.
        """
        optimizer = unwrap(kwargs.get("optimizer"))
        if isinstance(optimizer, SCAO) and not self._stepped:
            checks.check_gradients(optimizer)
        self._began = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Stop it. On a GPU this is the time of the host, which does not wait for the device."""
        if isinstance(unwrap(kwargs.get("optimizer")), SCAO):
            self._ms.append(1000 * (time.perf_counter() - self._began))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock; after the first step, check that the LoRA of every expert stack has had a gradient.

        Raises:
            RuntimeError: some had none.
        """
        optimizer = unwrap(kwargs.get("optimizer"))
        if isinstance(optimizer, SCAO):
            self._step_ms.append(1000 * (time.perf_counter() - self._step_began))
        if self._stepped or not isinstance(optimizer, SCAO) or not optimizer.state:
            return
        self._stepped = True
        checks.check_experts(optimizer, kwargs["model"].named_parameters())


def _about(args: TrainingArguments, model: nn.Module, optimizer: SCAO | ZeroSCAO) -> dict[str, Any]:
    """What a reader of the run's report should know about it."""
    config: Any = getattr(model, "config", None)
    ranks = {lora.r for lora in getattr(model, "peft_config", {}).values() if hasattr(lora, "r")}
    report = optimizer.memory_report() if isinstance(optimizer, SCAO) else {}  # under ZeRO it is spread
    return {
        "model": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "lora_r": max(ranks, default=None),
        "parameters": sum(entries_of(param) for param in model.parameters() if param.requires_grad),
        "learning_rate": args.learning_rate,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "batch": [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size],
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "state_bytes": report.get("peak"),
        "device": str(args.device.type),
        "versions": {"scao_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


@contextmanager
def swapped(owner: Any, **values: Any) -> Iterator[None]:
    """Give some attributes of ``owner`` other values inside the block."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def parameter_groups(optimizer: Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """The groups that a Trainer has made, with the names of their parameters, for SCAO.

    Learning rate and weight decay are always the group's; other options where they are not the optimizer's defaults.
    Empty groups are left out.
    """
    groups = [
        {
            name: value
            for name, value in group.items()
            if name in ("lr", "weight_decay") or name not in optimizer.defaults or value != optimizer.defaults[name]
            if name != "param_names"
        }
        for group in optimizer.param_groups
        if group["params"]
    ]
    named: list[dict[str, Any]] = with_names(groups, {param: name for name, param in model.named_parameters()})
    return named


class SCAOTrainerMixin(_AnyTrainer):
    """Gives any Trainer SCAO as its optimizer; put it first in the bases.

    ``class MySFT(SCAOTrainerMixin, SFTTrainer): pass`` is all that is needed. Learning rate, weight decay and epsilon
    come from the training arguments. ``adam_beta1`` and ``adam_beta2`` do too where they differ from the defaults of
    TrainingArguments; otherwise the rule's own betas hold (to force 0.9 and 0.999, pass ``betas`` in ``scao_kwargs``).
    Parameters are grouped by the Trainer's own ``create_optimizer``, with the learning rates and decays that it gives
    its groups. ``args.optim`` is left as it is and not used.

    Args:
        *args: positional arguments of the Trainer.
        scao_kwargs: options of ``SCAO`` (``scao_hf.options.OPTIONS``, ``betas`` and ``partial_resume``).
        **kwargs: keyword arguments of the Trainer.

    Raises:
        TypeError: a class has the Trainer before the mixin in its bases.
        ValueError: an option that is unknown or outside its range; a second optimizer; ``optim_args``; LOMO; FSDP1, or a
            DeepSpeed configuration with which SCAO does not run.
    """

    args: TrainingArguments
    optimizer: Optimizer | None
    _built = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(SCAOTrainerMixin)]
        for base in before:
            if issubclass(base, Trainer) and not issubclass(base, SCAOTrainerMixin):
                raise TypeError(
                    f"{cls.__name__} has {base.__name__} before SCAOTrainerMixin and would train with its optimizer: "
                    f"write class {cls.__name__}(SCAOTrainerMixin, {base.__name__})"
                )

    def __init__(self, *args: Any, scao_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        check_scao_kwargs({} if scao_kwargs is None else scao_kwargs)
        self.scao_kwargs = dict(scao_kwargs or {})
        super().__init__(*args, **kwargs)
        # Some Trainers build their optimizer before this point.
        if (self.optimizer is not None and not self._built) or self.optimizer_cls_and_kwargs is not None:
            raise ValueError("this trainer builds SCAO itself: pass neither optimizers nor optimizer_cls_and_kwargs")
        self._check_arguments()
        optimizer_class(self)
        SCAOCallback.attach(self)

    def _check_arguments(self) -> None:
        """Refuse or warn of training arguments that are meant for another optimizer."""
        args = self.args
        if args.optim_args:
            raise ValueError(f"optim_args={args.optim_args!r} is not read here: pass its options in scao_kwargs")
        name = str(getattr(args.optim, "value", args.optim))
        if "lomo" in name:
            raise ValueError(f"optim={name!r} steps inside the backward pass, where SCAO cannot: leave optim out")
        if args.optim_target_modules:
            logger.warning("optim_target_modules=%r is not used: GaLore and APOLLO have it", args.optim_target_modules)
        hint = eight_bit_hint(name, "moment_dtype='int8' and use_int8_ema=True in scao_kwargs")
        small = self.scao_kwargs.get("moment_dtype") == "int8"
        if not small if hint else not name.startswith(("adamw_torch", "scao")):
            logger.warning("optim=%r is not used: this trainer has SCAO%s", name, f". {hint}" if hint else "")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Build SCAO over the parameter groups that the Trainer makes of its model (or of the one that is passed)."""
        if self.optimizer is None:
            given = args[0] if args else kwargs.get("model")
            model = self.model if given is None else given
            trainable_parameters(model)
            kind, options = optimizer_class(self), self._options()
            # A Trainer with groups of its own may take the class from optim instead of optimizer_cls_and_kwargs.
            with swapped(self, optimizer_cls_and_kwargs=(kind, options)), swapped(self.args, optim="adamw_torch"):
                made: Any = super().create_optimizer(*args, **kwargs) or self.optimizer
            groups, experts, vocabulary = parameter_groups(made, model), find_experts(model), find_vocabulary(model)
            self.optimizer = kind(groups, experts=experts, vocabulary=vocabulary, **options)
            self._built = True
        return self.optimizer

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, which names the optimizer."""
        options = ", ".join(f"{name}={value}" for name, value in self.scao_kwargs.items())
        with swapped(self.args, optim="scao", optim_args=options or None):
            super().create_model_card(*args, **kwargs)

    def _options(self) -> dict[str, Any]:
        """The arguments of SCAO but the parameters."""
        options = {name: value for name, value in self.scao_kwargs.items() if name != "rule" or value is not None}
        if options.get("betas") is None:
            options["betas"] = choose_betas(options.get("rule"), *(self._chosen(f"adam_beta{n}") for n in (1, 2)))
        args = self.args
        return {"lr": args.learning_rate, "eps": args.adam_epsilon, "weight_decay": args.weight_decay, **options}

    def _chosen(self, name: str) -> float | None:
        """A training argument, or None where it has the default of TrainingArguments."""
        value: float = getattr(self.args, name)
        return None if value == inspect.signature(TrainingArguments).parameters[name].default else value


class SCAOTrainer(SCAOTrainerMixin, Trainer):
    """``transformers.Trainer`` with SCAO: ``SCAOTrainer(model=..., args=..., train_dataset=..., scao_kwargs={})``."""
