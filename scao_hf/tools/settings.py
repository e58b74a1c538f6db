"""What ``scao-hf plan`` is asked about: from an Axolotl YAML, from the command line, and the model's config."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from scao_hf.tools import ToolError
from scao_hf.tools.shapes import SHAPES, builtin

#: Kinds of preference tuning that can be planned, and how many sequences they have where plain fine-tuning has one.
PREFERENCES = {"dpo": 2, "ipo": 2}
#: Targets that stand for every linear layer but the output layer.
ALL_LINEAR = ("all", "all-linear")


@dataclass(frozen=True)
class Settings:
    """What decides the memory of a training run.

    Attributes:
        model: a local folder or a name on the hub.
        shape: fields of the model's config that are set otherwise.
        adapter: whether LoRA is trained; without it every parameter is.
        four_bit: NF4 weights in the linear layers.
        eight_bit: int8 weights there.
        double_quant: the quantisation constants are themselves quantised.
        rank: LoRA rank.
        targets: names of the layers with LoRA, or "all"; one regular expression over the full name is possible too.
        modules_to_save: layers that are trained whole besides the adapter.
        tied_copies: of these, tied ones share one copy.
        half_adapter: LoRA in 16 bit, not 32.
        dropout: LoRA dropout.
        batch: sequences in a micro-batch.
        sequence: tokens in a sequence.
        checkpointing: gradient checkpointing.
        reentrant: of the older kind, with which int8 products let go of their inputs.
        float32: weights and activations in 32 bit, where they are in 16 bit else.
        upcast: embeddings, norms and output layer in float32, as ``peft.prepare_model_for_kbit_training`` leaves them.
        objective: "sft", or one of ``PREFERENCES``.
        reference: preference tuning with a pass through the model as it was before.
        rival: the optimizer that SCAO's state is compared with.
        scao: options of SCAO.
        notes: what the reader should know about how this was read.
    """

    model: str
    _: KW_ONLY
    shape: dict[str, Any] = field(default_factory=dict)
    adapter: bool = True
    four_bit: bool = True
    eight_bit: bool = False
    double_quant: bool = True
    rank: int = 16
    targets: str | tuple[str, ...] = "all"
    modules_to_save: tuple[str, ...] = ()
    tied_copies: bool = False
    half_adapter: bool = False
    dropout: float = 0.0
    batch: int = 1
    sequence: int = 2048
    checkpointing: bool = True
    reentrant: bool = False
    float32: bool = False
    upcast: bool = False
    objective: str = "sft"
    reference: bool = False
    rival: str = "adamw_torch"
    scao: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sources = {
            "rank": "lora_r or --lora-r",
            "batch": "micro_batch_size or --batch",
            "sequence": "sequence_len or --seq",
        }
        for name, source in sources.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ToolError(f"{name} is {value!r}: it must be an integer of at least 1 ({source})")
        if (self.four_bit or self.eight_bit) and not self.adapter:
            raise ToolError(
                f"{4 if self.four_bit else 8}-bit weights cannot be trained without an adapter: add one, or drop load_in_4bit "
                "and load_in_8bit"
            )
        if self.four_bit and self.eight_bit:
            raise ToolError("load_in_4bit and load_in_8bit exclude each other: keep one of the two")
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                raise ToolError(
                    f"the LoRA targets {self.targets!r} are not a valid regular expression: {error}"
                ) from error

    @property
    def sequences(self) -> int:
        """How many go through the model at once: a preference is two."""
        return self.batch * PREFERENCES.get(self.objective, 1)

    @property
    def quantised(self) -> bool:
        return self.four_bit or self.eight_bit

    def targeted(self, name: str) -> bool:
        """Whether the linear layer of that full name gets LoRA, by peft's rules."""
        return len(self.unmatched([name])) < len(self._targets)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The targets that none of the linear layers of those full names matches."""
        names = list(names)
        return [target for target in self._targets if not any(self._matches(target, name) for name in names)]

    @property
    def _targets(self) -> tuple[str, ...]:
        return (self.targets,) if isinstance(self.targets, str) else self.targets

    def _matches(self, target: str, name: str) -> bool:
        if isinstance(self.targets, str):
            return target in ALL_LINEAR or re.fullmatch(target, name) is not None
        return name == target or name.endswith("." + target)


def parse_targets(text: str) -> str | tuple[str, ...]:
    """``--targets``: "all", or layer names separated by commas."""
    if text in ALL_LINEAR:
        return "all"
    return tuple(name.strip() for name in text.split(",") if name.strip())


def with_overrides(settings: Settings, **chosen: Any) -> Settings:
    """The settings with every value that is not None put in place."""
    return dataclasses.replace(settings, **{name: value for name, value in chosen.items() if value is not None})


def local_folder(model: str) -> Path | None:
    """The folder that a model's name means, None for a name on the hub.

    Raises:
        ToolError: there is no such folder, or no model in it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ToolError(f"{model} holds no config.json: pass the folder that save_pretrained wrote")
        return folder
    if model.startswith((".", "/", "~")):
        raise ToolError(
            f"{model} does not exist, seen from {Path.cwd()}: pass a folder with a config.json, or a model name"
        )
    return None


def load_config(model: str) -> tuple[Any, str]:
    """The transformers config of a model, and in words where it comes from.

    A local folder is read; a model that is built in needs no network; any other comes from the hub or its cache.

    Raises:
        ToolError: no such folder or model, or the hub cannot be reached.
    """
    import transformers
    from transformers import AutoConfig

    folder, known = local_folder(model), builtin(model)
    if folder is None and known is not None:
        return AutoConfig.for_model(known[0], **known[1]), "the shapes built into scao-hf"
    name, source = (str(folder), "the local folder") if folder else (_hub_config(model), "the hub")
    transformers.logging.set_verbosity_error()
    try:
        return AutoConfig.from_pretrained(name), source
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ToolError(
            f"{model}: transformers {transformers.__version__} cannot use its config.json: {reason}"
        ) from error


def _hub_config(model: str) -> str:
    """Folder of a hub model's config.json; gives up after seconds where there is no network."""
    from huggingface_hub import errors, hf_hub_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, line by line
    try:
        return os.path.dirname(hf_hub_download(model, "config.json", etag_timeout=5))
    except errors.HFValidationError as error:
        raise ToolError(f"{model!r} is neither a folder nor a model name (publisher/name)") from error
    except errors.HfHubHTTPError as error:
        raise ToolError(
            f"the Hugging Face hub has no {model} that may be read here: check the spelling, or for a private or gated "
            "one run `hf auth login`"
        ) from error
    except (OSError, RuntimeError) as error:  # a client without a network fails in either way
        raise ToolError(
            f"{model} is not built in and the Hugging Face hub cannot be reached: pass a folder with its config.json, "
            f"or one of {', '.join(SHAPES)}"
        ) from error
