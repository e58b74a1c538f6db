"""Reading an Axolotl YAML: what the plugin's rules say about it, and what ``scao-hf plan`` makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from axolotl_plugin import rules
from axolotl_plugin.values import Findings, read_raw
from scao_hf.options import did_you_mean
from scao_hf.tools import ToolError
from scao_hf.tools.axolotl_keys import LESS, MORE, REASONS, unknown
from scao_hf.tools.settings import PREFERENCES, Settings, local_folder

#: Numbers that the rules calculate with; YAML reads 5e-4 as text, and Axolotl takes that as the number.
NUMBERS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("loraplus_lr_ratio", "max_steps", "warmup_steps"),
)
#: Whole numbers, which Axolotl takes as text ("16") and with a point (16.0) as well.
COUNTS = ("lora_r", "micro_batch_size", "sequence_len", "max_steps")
#: The line that a YAML needs for ``optimizer: scao`` to be this SCAO.
PLUGIN = "axolotl_plugin.SCAOPlugin"
#: Attention that needs 16-bit activations, for which Axolotl leaves no weight in 32 bit when everything is trained.
SIXTEEN_BIT_ATTENTION = ("flash_attention", "flex_attention", "sage_attention", "xformers_attention")
#: Endings of files with data, which no name on the hub has.
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")
#: Plugins that change nothing in memory beyond what their own keys say.
PLUGINS = ("axolotl_plugin", "cut_cross_entropy", "liger", "lm_eval", "swanlab", "spectrum", "grokfast")


def parse(text: str) -> Any:
    """What a YAML says, its whole numbers as Axolotl has them."""
    raw = yaml.safe_load(text)
    for key in COUNTS if isinstance(raw, dict) else ():
        if isinstance(raw.get(key), (str, float)):
            with contextlib.suppress(ValueError):
                number = float(raw[key])
                raw[key] = int(number) if number.is_integer() else raw[key]
    return raw


def read_yaml(path: Path, instead: str = "") -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: of the file.
        instead: what else may be passed, for the message where there is no file.

    Raises:
        ToolError: there is no such file, it is not a YAML mapping, or names no model.
    """
    if not path.is_file():
        raise ToolError(f"there is no file {path}: pass the path of an Axolotl YAML{instead}")
    try:
        raw = parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ToolError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict) or not raw.get("base_model"):
        strange = unknown(raw) if isinstance(raw, dict) else {}
        meant = f" (it has {', '.join(key + near for key, near in strange.items())})" if strange else ""
        raise ToolError(f"{path} has no base_model{meant}: add `base_model: Qwen/Qwen2.5-3B`, or another model")
    return raw


def collection(raw: dict[str, Any], key: str, kind: type) -> Any:
    """The list or the mapping under a key, empty where there is none."""
    value = raw.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ToolError(f"{key} is {value!r}: it must be a {'mapping' if kind is dict else 'list'}")
    return value


def missing_inputs(raw: dict[str, Any]) -> list[str]:
    """The model's folder and the files of data that are not there; Axolotl takes them for names on the hub."""
    problems = []
    try:
        local_folder(str(raw["base_model"]))
    except ToolError as error:
        problems.append(str(error))
    for key in ("datasets", "test_datasets"):
        parts: Any = raw.get(key)
        for part in parts if isinstance(parts, list) else ():
            path = str(part.get("path") or "") if isinstance(part, dict) else ""
            if Path(path).suffix in DATA_FILES and "://" not in path and not Path(path).expanduser().is_file():
                problems.append(f"{key}: {path} does not exist, seen from {Path.cwd()}")
    return problems


def optimizer_of(raw: dict[str, Any]) -> str:
    """The optimizer that the YAML names, in lower case; Axolotl's default where it names none."""
    return str(raw.get("optimizer") or "adamw_torch_fused").strip().lower()


def scao_options(raw: dict[str, Any], findings: Findings) -> dict[str, Any]:
    """The options of SCAO in a YAML, after the plugin's own rules have looked at all of it as they do before a run.

    A YAML with another optimizer is read as if it named SCAO, without the arguments of the other one.

    Args:
        raw: the YAML.
        findings: where the errors go.
    """
    own = optimizer_of(raw)
    meant = did_you_mean(own, ["scao"])  # it, or a misspelling that the rules name
    read = {"bf16": "auto"} | {key: value for key, value in raw.items() if meant or key != "optim_args"}
    read = {**read_raw({**read, "optimizer": own if meant else "scao"}, findings), "optimizer": "scao"}
    for key in NUMBERS:
        if isinstance(read.get(key), str):
            with contextlib.suppress(ValueError):
                read[key] = float(read[key])
    for key in ("max_steps", "loraplus_lr_ratio"):
        if isinstance(read.get(key), str):
            findings.errors.append(f"{key}: {read.pop(key)} must be a number")
    for key in ("fsdp_config", "peft"):  # which Axolotl has as objects by then
        if isinstance(read.get(key), dict):
            read[key] = SimpleNamespace(**{str(name).removeprefix("fsdp_"): value for name, value in read[key].items()})
            read[key].fsdp_version = getattr(read[key], "version", None)
    rules.check_sizes(read.get, findings)
    rules.check_config(read.get, findings)
    return rules.merged_options(read.get, [])


def from_yaml(path: Path) -> Settings:
    """Settings of an Axolotl configuration; keys that it leaves out take Axolotl's defaults.

    Raises:
        ToolError: the file is missing, is not a YAML mapping, lacks ``base_model``, would not train with SCAO, or asks for what
            cannot be planned; everything that is wrong is named.
    """
    if path.suffix == ".py":
        raise ToolError(f"{path} is a script, which cannot be planned: pass --model NAME, or an Axolotl YAML")
    raw = read_yaml(path, instead=", or --model NAME instead of a file")
    findings = Findings()
    values: dict[str, Any] = {"scao": scao_options(raw, findings)}
    problems = [*findings.errors, *_refusals(raw)]
    for name, read in _READERS.items():
        try:
            values[name] = read(raw)
        except (TypeError, ValueError) as error:  # ToolError among them
            problems.append(str(error))
    if not problems:
        try:
            return Settings(**values)
        except ToolError as error:
            problems.append(str(error))
    raise ToolError(f"{path}: {'; '.join(problems)}")


_READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "model": lambda raw: str(raw["base_model"]),
    "shape": lambda raw: collection(raw, "model_config", dict),
    "adapter": lambda raw: raw.get("adapter") is not None,
    "four_bit": lambda raw: bool(raw.get("load_in_4bit")),
    "eight_bit": lambda raw: bool(raw.get("load_in_8bit")),
    "double_quant": lambda raw: bool(collection(raw, "bnb_config_kwargs", dict).get("bnb_4bit_use_double_quant", True)),
    "rank": lambda raw: raw.get("lora_r") or 8,
    "targets": lambda raw: _targets(raw) if raw.get("adapter") else "all",
    "modules_to_save": lambda raw: tuple(map(str, collection(raw, "lora_modules_to_save", list))),
    "tied_copies": lambda raw: bool(raw.get("peft_ensure_weight_tying")),
    "half_adapter": lambda raw: raw.get("peft_autocast_adapter_dtype") is False,
    "dropout": lambda raw: float(raw.get("lora_dropout") or 0.0),
    "batch": lambda raw: raw.get("micro_batch_size") or 1,
    "sequence": lambda raw: raw.get("sequence_len") or 512,
    "checkpointing": lambda raw: bool(raw.get("gradient_checkpointing", False)),
    "float32": lambda raw: not half_precision(raw),
    "reentrant": lambda raw: _reentrant(raw),
    "upcast": lambda raw: not raw.get("adapter") and not _sixteen_bit(raw),
    "objective": lambda raw: str(raw.get("rl") or "sft"),
    "reference": lambda raw: raw.get("rl") in PREFERENCES and not raw.get("precompute_ref_log_probs"),
    "rival": lambda raw: "adamw_torch" if optimizer_of(raw) == "scao" else optimizer_of(raw),
    "notes": lambda raw: tuple(_notes(raw)),
}


def _refusals(raw: dict[str, Any]) -> list[str]:
    """Everything in the YAML that cannot be planned, each by its key."""
    problems: list[str] = []
    for reason, refused in REASONS.items():
        if keys := list(filter(raw.get, refused.split())):
            problems.append(f"{', '.join(keys)} cannot be planned: {reason}")
    adapter, kind = raw.get("adapter"), raw.get("rl")
    if adapter not in (None, "lora", "qlora"):
        problems.append(f"adapter {adapter!r} cannot be planned: it must be lora, qlora or absent")
    if adapter == "qlora" and not raw.get("load_in_4bit"):
        problems.append("adapter: qlora needs load_in_4bit: true")
    if adapter == "lora" and raw.get("load_in_4bit"):
        problems.append("load_in_4bit has no effect in Axolotl with adapter: lora: write adapter: qlora")
    if kind in rules.ON_POLICY:
        problems.append(f"rl: {kind} cannot be planned: {_generation(raw)}")
    elif kind not in (None, False, *PREFERENCES):
        problems.append(f"rl: {kind} cannot be planned: only {', '.join(PREFERENCES)} and plain fine-tuning can")
    if raw.get("eager_attention") or raw.get("attn_implementation") == "eager":
        problems.append("eager attention cannot be planned: its matrices of scores are not counted; use sdpa")
    if "llm_int8_skip_modules" in (raw.get("bnb_config_kwargs") or {}):
        problems.append("llm_int8_skip_modules cannot be planned: layers that are not quantised are not told apart")
    return problems


def _generation(raw: dict[str, Any]) -> str:
    """Why a run that generates cannot be planned, with the share of the card that vLLM takes."""
    engine, trl = (part if isinstance(part, dict) else {} for part in (raw.get("vllm"), raw.get("trl")))
    share = trl.get("vllm_gpu_memory_utilization", engine.get("gpu_memory_utilization"))
    if engine or trl.get("use_vllm"):
        taken = f"{share:.0%} of its card" if isinstance(share, float) else "most of its card"
        return f"it generates with vLLM, which takes {taken} for itself (gpu_memory_utilization)"
    return "it generates with the model in training, whose cache of keys and values is not counted"


def half_precision(raw: dict[str, Any]) -> bool:
    """Whether the weights are loaded in 16 bit; Axolotl's default for ``bf16`` is auto."""
    return rules.half_precision({"bf16": "auto", **raw}.get)


def _sixteen_bit(raw: dict[str, Any]) -> bool:
    """Whether embeddings and norms are in 16 bit, as the rest, when all weights are trained."""
    named = str(raw.get("attn_implementation") or "sdpa")
    return named != "sdpa" or any(raw.get(key) for key in (*SIXTEEN_BIT_ATTENTION, "cut_cross_entropy"))


def _reentrant(raw: dict[str, Any]) -> bool:
    """Whether checkpointing is of the older kind, Axolotl's default outside of reinforcement learning."""
    if raw.get("gradient_checkpointing_kwargs") is None:
        return not raw.get("rl")
    return bool(collection(raw, "gradient_checkpointing_kwargs", dict).get("use_reentrant", True))


def _targets(raw: dict[str, Any]) -> str | tuple[str, ...]:
    if raw.get("lora_target_linear"):
        return "all"
    targets = raw.get("lora_target_modules")
    if not targets:
        raise ToolError("there is no LoRA target: add `lora_target_linear: true`, or list lora_target_modules")
    return targets if isinstance(targets, str) else tuple(map(str, collection(raw, "lora_target_modules", list)))


def has_plugin(raw: dict[str, Any]) -> bool:
    """Whether the YAML loads this SCAO."""
    return any("axolotl_plugin" in str(plugin) for plugin in collection(raw, "plugins", list))


def plugin_note(raw: dict[str, Any]) -> str | None:
    """What a YAML with ``optimizer: scao`` trains with where it lacks the plugin's line; None for any other."""
    if has_plugin(raw) or optimizer_of(raw) != "scao":
        return None
    return (
        f"the YAML lacks `plugins: [{PLUGIN}]`, without which `optimizer: scao` is not this SCAO: Axolotl "
        "up to 0.19 refuses it, later releases take the PyPI package scao, another project's"
    )


def _notes(raw: dict[str, Any]) -> list[str]:
    notes, plugins = [note] if (note := plugin_note(raw)) else [], list(map(str, collection(raw, "plugins", list)))
    if optimizer_of(raw) != "scao":
        notes.append(
            f"the YAML says `optimizer: {optimizer_of(raw)}`: planned as if it said scao, with the line `plugins: [{PLUGIN}]`"
        )
    if others := [plugin for plugin in plugins if not any(known in plugin for known in PLUGINS)]:
        notes.append(f"what these plugins change is not counted: {', '.join(others)}")
    if less := [key for key in sorted((*LESS, "cut_cross_entropy", "chunked_cross_entropy")) if raw.get(key)]:
        notes.append(f"the run needs less than is counted here, because of {', '.join(less)}")
    if str(raw.get("gradient_checkpointing")).startswith("offload"):
        notes.append(
            f"the run needs less: gradient_checkpointing: {raw['gradient_checkpointing']} moves activations away"
        )
    if more := [key for key in sorted(MORE) if raw.get(key)]:
        notes.append(f"what these keys add is not counted: {', '.join(more)}")
    return notes + unread(raw)


def unread(raw: dict[str, Any]) -> list[str]:
    """A note for each key that Axolotl does not know, which it would ignore."""
    return [f"Axolotl does not read `{key}`{near}" for key, near in unknown(raw).items()]
