"""What ``scao-hf plan`` is asked about: from an Axolotl YAML, from the command line, and the model's config."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scao_hf.namesake import foreign_option
from scao_hf.options import OPTIONS, SWITCHES, read_value
from scao_hf.tools import ToolError
from scao_hf.tools.shapes import SHAPES, builtin

#: Keys of runs whose largest parts this cannot count, and what those are.
STACKED = {"lora_target_parameters": "LoRA on stacked experts", "quantize_moe_experts": "stacked experts in 4 bit"}
#: Targets that stand for every linear layer but the output layer.
ALL_LINEAR = ("all", "all-linear")


@dataclass(frozen=True)
class Settings:
    """What decides the memory of a training run.

    Attributes:
        model: a local folder or a name on the hub.
        adapter: whether LoRA is trained; without it every parameter is.
        four_bit: NF4 weights in the linear layers.
        double_quant: the quantisation constants are themselves quantised.
        rank: LoRA rank.
        targets: names of the layers with LoRA, or "all"; one regular expression over the full name is possible too.
        modules_to_save: layers that are trained whole beside the adapter.
        dropout: LoRA dropout.
        batch: sequences in a micro-batch.
        sequence: tokens in a sequence.
        checkpointing: gradient checkpointing.
        upcast: embeddings, norms and output layer in float32, as ``peft.prepare_model_for_kbit_training`` leaves them.
        scao: options of SCAO.
        notes: what the reader should know about how this was read.
    """

    model: str
    adapter: bool = True
    four_bit: bool = True
    double_quant: bool = True
    rank: int = 16
    targets: str | tuple[str, ...] = "all"
    modules_to_save: tuple[str, ...] = ()
    dropout: float = 0.0
    batch: int = 1
    sequence: int = 2048
    checkpointing: bool = True
    upcast: bool = False
    scao: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, flag in (("rank", "--lora-r"), ("batch", "--batch"), ("sequence", "--seq")):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ToolError(f"{name} is {value!r}: it must be an integer of at least 1 ({flag})")
        if self.four_bit and not self.adapter:
            raise ToolError(
                "4-bit weights cannot be trained without an adapter: add `adapter: qlora`, or drop load_in_4bit"
            )

        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                raise ToolError(f"the LoRA targets {self.targets!r} are no regular expression: {error}") from error

    def targeted(self, name: str) -> bool:
        """Whether the linear layer of that full name gets LoRA, by peft's rules."""
        if isinstance(self.targets, str):
            return self.targets in ALL_LINEAR or re.fullmatch(self.targets, name) is not None
        return any(name == target or name.endswith("." + target) for target in self.targets)


def parse_targets(text: str) -> str | tuple[str, ...]:
    """``--targets``: "all", or layer names separated by commas."""
    if text in ALL_LINEAR:
        return "all"
    return tuple(name.strip() for name in text.split(",") if name.strip())


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ToolError: it is no YAML mapping, or names no model.
    """
    import yaml  # type: ignore[import-untyped, unused-ignore]

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ToolError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict) or not raw.get("base_model"):
        raise ToolError(f"{path} has no base_model: add `base_model: Qwen/Qwen2.5-3B`, or another model")
    return raw


def from_yaml(path: Path) -> Settings:
    """Settings of an Axolotl configuration; keys that it leaves out take Axolotl's defaults.

    Raises:
        ToolError: the file is missing, is no YAML mapping, lacks ``base_model``, or asks for what cannot be planned.
    """
    if not path.is_file():
        raise ToolError(f"there is no file {path}: pass the path of an Axolotl YAML, or --model NAME instead of a file")
    raw = read_yaml(path)
    adapter = raw.get("adapter")
    if adapter not in (None, "lora", "qlora"):
        raise ToolError(f"{path}: adapter {adapter!r} cannot be planned: it must be lora, qlora or absent")
    if raw.get("load_in_8bit"):
        raise ToolError(f"{path}: load_in_8bit cannot be planned: use load_in_4bit: true, or 16-bit weights")
    for key, what in STACKED.items():
        if raw.get(key):
            raise ToolError(
                f"{path}: {key} cannot be planned: {what} would not be counted; docs/moe.md has measured figures"
            )
    try:
        return Settings(
            model=str(raw["base_model"]),
            adapter=adapter is not None,
            four_bit=bool(raw.get("load_in_4bit", False)),
            double_quant=bool(collection(raw, "bnb_config_kwargs", dict).get("bnb_4bit_use_double_quant", True)),
            rank=raw.get("lora_r") or 8,
            targets=_targets(raw) if adapter else "all",
            modules_to_save=tuple(map(str, collection(raw, "lora_modules_to_save", list))),
            dropout=float(raw.get("lora_dropout") or 0.0),
            batch=raw.get("micro_batch_size") or 1,
            sequence=raw.get("sequence_len") or 512,
            checkpointing=bool(raw.get("gradient_checkpointing", False)),
            scao=scao_options(raw),
            notes=tuple(_notes(raw)),
        )
    except (TypeError, ValueError) as error:  # ToolError among them
        raise ToolError(f"{path}: {error}") from error


def collection(raw: dict[str, Any], key: str, kind: type) -> Any:
    """The list or the mapping under a key, empty where there is none."""
    value = raw.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ToolError(f"{key} is {value!r}: it must be a {'mapping' if kind is dict else 'list'}")
    return value


def _targets(raw: dict[str, Any]) -> str | tuple[str, ...]:
    if raw.get("lora_target_linear"):
        return "all"
    targets = raw.get("lora_target_modules")
    if not targets:
        raise ToolError("there is no LoRA target: add `lora_target_linear: true`, or list lora_target_modules")
    return targets if isinstance(targets, str) else tuple(map(str, collection(raw, "lora_target_modules", list)))


def scao_options(raw: dict[str, Any]) -> dict[str, Any]:
    """The options of SCAO in a YAML's ``scao_*`` keys.

    Raises:
        ToolError: no such option.
        ValueError: a value outside its range.
    """
    options = {}
    for key, value in raw.items():
        name = str(key).removeprefix("scao_")
        if name == str(key) or name in SWITCHES or value is None:
            continue
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"did you mean scao_{near[0]}?" if near else f"the options are {', '.join(OPTIONS)}"
            raise ToolError(f"scao_{name} is not an option of SCAO{foreign_option(name, 'scao_') or f': {hint}'}")
        options[name] = read_value(str(key), value, OPTIONS[name])
    return options


def plugin_note(raw: dict[str, Any]) -> str | None:
    """What a YAML with ``optimizer: scao`` trains with where it lacks the plugin's line; None for any other."""
    named = any("axolotl_plugin" in str(plugin) for plugin in collection(raw, "plugins", list))
    if named or str(raw.get("optimizer")).strip().lower() != "scao":
        return None
    return (
        "the YAML lacks `plugins: [axolotl_plugin.SCAOPlugin]`, without which `optimizer: scao` is not this SCAO: Axolotl "
        "up to 0.19 refuses it, later releases take the PyPI package scao, another project's"
    )


def _notes(raw: dict[str, Any]) -> list[str]:
    notes = []
    if note := plugin_note(raw):
        notes.append(note)
    if str(raw.get("optimizer")).strip().lower() != "scao":
        notes.append(
            f"the YAML says `optimizer: {raw.get('optimizer', 'adamw_torch_fused')}`: planned as if it said scao, with the "
            "line `plugins: [axolotl_plugin.SCAOPlugin]`"
        )
    savers = ("cut_cross_entropy", "chunked_cross_entropy", "liger_fused_linear_cross_entropy")
    if any(raw.get(key) for key in savers):
        notes.append("the fused cross-entropy of this YAML needs less for logits and loss than is counted here")
    if raw.get("peft_use_dora"):
        notes.append("DoRA's magnitudes and activations are not counted")
    return notes


def with_overrides(settings: Settings, **chosen: Any) -> Settings:
    """The settings with every value that is not None put in place."""
    return dataclasses.replace(settings, **{name: value for name, value in chosen.items() if value is not None})


def load_config(model: str) -> tuple[Any, str]:
    """The transformers config of a model, and in words where it comes from.

    A local folder is read; a model that is built in needs no network; any other comes from the hub or its cache.

    Raises:
        ToolError: no such folder or model, or the hub cannot be reached.
    """
    import transformers
    from transformers import AutoConfig

    folder = Path(model).expanduser()
    known = builtin(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ToolError(f"{model} holds no config.json: pass the folder that save_pretrained wrote")
        name, source = str(folder), "the local folder"
    elif model.startswith((".", "/", "~")):
        raise ToolError(f"{model} does not exist: pass a folder with a config.json, or a model name")
    elif known is not None:
        config = AutoConfig.for_model(known[0], **known[1])
        return config, "the shapes built into scao-hf"
    else:
        name, source = _hub_config(model), "the hub"
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
