"""SCAO inside transformers: any Trainer through a mixin, its metrics in every log through a callback."""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scao_hf.optimizer import SCAO
from scao_hf.options import OPTIONS, RULE_DEFAULTS, RULES, resolve
from scao_hf.update import curvature_start

if TYPE_CHECKING:
    from transformers import Trainer as _AnyTrainer
else:
    _AnyTrainer = object  # the other base is the Trainer; type checkers have to know that there is one

logger = logging.getLogger(__name__)

#: Optimizer options that have a home in TrainingArguments, and its name there.
TRAINING_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay", "eps": "adam_epsilon"}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'k_max'?)"`` for the nearest known word, or an empty string where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


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
    for name in scao_kwargs:
        if name in TRAINING_ARGUMENTS:
            raise ValueError(f"scao_kwargs: {name!r} belongs to the training arguments: set {TRAINING_ARGUMENTS[name]}")
        if name not in OPTIONS and name != "betas":
            near = did_you_mean(name, (*OPTIONS, "betas"))
            raise ValueError(f"scao_kwargs: {name!r} is not an option of SCAO{near}; they are: {', '.join(OPTIONS)}")
    passed = {name: value for name, value in scao_kwargs.items() if name != "rule"}
    resolve(scao_kwargs.get("rule") or RULES[0], passed)


def refuse_parallelism(trainer: Trainer) -> None:
    """Refuse the kinds of parallelism whose results have not been proved equal to one process.

    Raises:
        ValueError: DeepSpeed, FSDP or more than one process, with what to use instead.
    """
    why = "it has not been proved to give the result of one process yet"
    if trainer.is_deepspeed_enabled:
        kind, why = "DeepSpeed", "ZeRO flattens the matrices that SCAO needs whole"
    elif trainer.is_fsdp_enabled:
        kind = "FSDP"
    elif trainer.args.world_size > 1:
        kind = f"DDP ({trainer.args.world_size} processes)"
    else:
        return
    raise ValueError(f"SCAO does not run under {kind}: {why}. Train in one process on one GPU, or use adamw_torch")


def unwrap(optimizer: Any) -> SCAO | None:
    """The SCAO instance inside Accelerate's wrappers, or None for another optimizer."""
    while optimizer is not None and not isinstance(optimizer, SCAO):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


class SCAOCallback(TrainerCallback):
    """Adds ``SCAO.metrics()`` to every training log, before the console, TensorBoard or W&B read it.

    Use ``SCAOCallback.attach(trainer)``: a callback that is passed as ``callbacks=[...]`` runs after the reporting
    backends, which then see none of the metrics. With another optimizer it does nothing.
    """

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
        """Warn about a resume without optimizer state, and about a run that ends before its phase 2."""
        optimizer = unwrap(kwargs.get("optimizer"))
        if optimizer is None:
            return
        if state.global_step > 0 and not optimizer.state:
            logger.warning(
                "resuming at step %d without SCAO's state: the checkpoint holds no optimizer.pt with scheduler.pt "
                "(save_only_model?), so moments and curvature start again from nothing",
                state.global_step,
            )
        group = optimizer.param_groups[0]
        start = curvature_start(group["warmup_steps"], group["min_precond_updates"], group["precond_freq"])
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
        ValueError: an option that is unknown or outside its range; a second optimizer; DeepSpeed, FSDP or DDP.
    """

    args: TrainingArguments
    optimizer: Optimizer | None

    def __init__(self, *args: Any, scao_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.scao_kwargs = dict(scao_kwargs or {})
        check_scao_kwargs(self.scao_kwargs)
        super().__init__(*args, **kwargs)
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise ValueError("this trainer builds SCAO itself: pass neither optimizers nor optimizer_cls_and_kwargs")
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
        trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
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
            **{name: value for name, value in options.items() if name != "rule" or value is not None},
        )

    def _chosen(self, name: str) -> float | None:
        """A training argument, or None where it has the default of TrainingArguments."""
        value: float = getattr(self.args, name)
        return None if value == inspect.signature(TrainingArguments).parameters[name].default else value


class SCAOTrainer(SCAOTrainerMixin, Trainer):
    """``transformers.Trainer`` with SCAO: ``SCAOTrainer(model=..., args=..., train_dataset=..., scao_kwargs={})``."""
