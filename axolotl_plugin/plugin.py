"""The hooks through which Axolotl's own trainers, of any kind, get SCAO as their optimizer."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

# scao_hf is imported inside the hooks: an ImportError here would be swallowed by Axolotl, and the user would be told
# that "scao" is not a valid optimizer name.

LOG = get_logger(__name__)


class _Builtin(str):
    """The optimizer that Axolotl's builder is told to take, marked as one that ``post_trainer_create`` replaces."""


def _is_scao(cfg: Any) -> bool:
    return cfg.optimizer == "scao" or isinstance(cfg.optimizer, _Builtin)


class SCAOPlugin(BasePlugin):
    """``optimizer: scao``, and ``scao_fuse_moe: true`` with any optimizer. Else every hook is a no-op."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Check that the optimizer can be imported, before anything slow happens.

        Raises:
            RuntimeError: it cannot, with the command that installs it.
        """
        try:
            import scao_hf  # noqa: F401
        except ImportError as error:
            raise RuntimeError(
                f"axolotl_plugin.SCAOPlugin needs scao_hf, which cannot be imported here ({error}). Install it into "
                "this environment with: pip install 'scao-hf[axolotl]'"
            ) from error

    def get_input_args(self) -> str:
        """The pydantic model of the ``scao_*`` options and their rules."""
        return "axolotl_plugin.args.SCAOArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Take ``scao`` out of the config before a builder reads it: later releases than 0.19 build one of their own."""
        if cfg.optimizer == "scao":
            cfg.optimizer = _Builtin("adamw_torch")

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """A name that TrainingArguments accepts, without the options of SCAO; ``post_trainer_create`` replaces it."""
        return {"optim": "adamw_torch", "optim_args": None} if _is_scao(cfg) else None

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Hand SCAO and its options to the trainer that Axolotl has built, and fuse LoRA on experts if that is asked for.

        Raises:
            ValueError: the run, whose length and precision are known only now, breaks a rule of the validation; or there
                is nothing to fuse.
        """
        if cfg.scao_fuse_moe:
            from scao_hf.moe import fuse_moe_lora

            LOG.info("scao_fuse_moe: fused the LoRA of %d expert modules", len(fuse_moe_lora(trainer.model)))
        if not _is_scao(cfg):
            return
        cfg.optimizer = "scao"
        from axolotl_plugin.rules import check_run, optimizer_kwargs
        from axolotl_plugin.values import Findings
        from scao_hf.experts import find_experts, find_vocabulary
        from scao_hf.trainer import SCAOCallback, optimizer_class

        kind = optimizer_class(trainer)
        kwargs = optimizer_kwargs(cfg, trainer.args)
        findings = Findings()
        check_run(cfg.get, trainer.args, kwargs, findings)
        findings.report(LOG)
        told = ", ".join(f"{name}={value}" for name, value in kwargs.items())
        if experts := find_experts(trainer.model):
            kwargs["experts"] = experts
            told += f", expert by expert in {len(experts)} packed LoRA factors"
        kwargs["vocabulary"] = find_vocabulary(trainer.model)
        kwargs["names"] = {param: name for name, param in trainer.model.named_parameters()}
        kwargs["partial_resume"] = bool(cfg.scao_partial_resume)
        trainer.optimizer_cls_and_kwargs = (kind, kwargs)
        trainer.args.optim = "scao"
        SCAOCallback.attach(trainer).log = LOG
        _log_choice(trainer, kwargs, told)


def _log_choice(trainer: Trainer, kwargs: dict[str, Any], told: str) -> None:
    """Which SCAO trains, with which options, and what its state takes."""
    from scao_hf import SCAO, __version__
    from scao_hf.namesake import other_package
    from scao_hf.report import entries_of

    folder, other = Path(inspect.getfile(SCAO)).parent, other_package()
    not_this = f", not the package scao in {other}, another project's" if other else ""
    LOG.info("optimizer: scao is SCAO of scao-hf %s in %s%s", __version__, folder, not_this)
    trainable = [param for param in trainer.model.parameters() if param.requires_grad]
    own = {name: value for name, value in kwargs.items() if not name.startswith(("loraplus_", "partial_resume"))}
    int8 = {**own, "moment_dtype": "int8", "use_int8_ema": True}
    state, least = (_peak(trainable, options) for options in (own, int8))
    smaller = f", or {least / 2**20:.1f} MiB with scao_moment_dtype: int8 and scao_use_int8_ema: true"
    numbers = [entries_of(param) for param in trainable]
    adamw = sum(2 * number * param.element_size() for number, param in zip(numbers, trainable, strict=True))
    LOG.log(
        logging.WARNING if state > 4 * adamw else logging.INFO,
        "optimizer: scao with %s. Its state takes %.1f MiB%s (AdamW's %.1f MiB) for %d trainable parameters",
        told,
        state / 2**20,
        smaller if least < state else "",
        adamw / 2**20,
        sum(numbers),
    )


def _peak(params: list[Tensor], options: dict[str, Any]) -> int:
    """Bytes of the state, of all processes together, also where DeepSpeed has cut the parameters while they were loaded."""
    from scao_hf.report import memory_report
    from scao_hf.zero import ZeroSCAO

    groups = ZeroSCAO(params, **options).shapes
    return memory_report(groups, {shape for group in groups for shape in group["params"]})["peak"]
