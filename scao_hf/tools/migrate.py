"""``scao-hf migrate``: an Axolotl YAML for another optimizer rewritten for SCAO, with the reason of every change."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]

from axolotl_plugin.values import PREFIX, Findings, misspelt, of_others
from scao_hf import SCAO
from scao_hf.namesake import other_package
from scao_hf.options import OPTIONS, eight_bit_hint
from scao_hf.tools import ToolError, axolotl_yaml
from scao_hf.tools.axolotl_yaml import PLUGIN
from scao_hf.tools.rivals import STATES, state_bytes

#: Kinds of AdamW whose rates are not AdamW's.
OTHER_RATES = ("galore", "apollo", "schedule_free")


@dataclass(frozen=True)
class Migration:
    """A rewritten YAML.

    Attributes:
        before: the text as it was.
        after: the text with ``optimizer: scao``; equal where there was nothing to change.
        reasons: what was changed, and why.
        warnings: what the reader should know; the run trains all the same.
        problems: what SCAO will refuse.
        former: the optimizer that the text named.
        newline: how the file ends its lines.
    """

    before: str
    after: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    problems: tuple[str, ...]
    former: str
    newline: str

    def diff(self, before: str, after: str) -> list[str]:
        """The changed lines, under the names of both files."""
        old, new = self.before.splitlines(), self.after.splitlines()
        return list(difflib.unified_diff(old, new, before, after, lineterm="", n=1))


def migrate(path: Path) -> Migration:
    """Rewrite a configuration for SCAO; comments and all other keys stay as they are.

    Raises:
        ToolError: the file is missing or no YAML with a ``base_model``, or is laid out so that it cannot be edited.
    """
    if path.suffix == ".py":
        raise ToolError(f"{path} is a script: use SCAOTrainerMixin there, as the README shows; migrate rewrites YAMLs")
    raw = axolotl_yaml.read_yaml(path)
    before = path.read_text(encoding="utf-8")
    own = axolotl_yaml.optimizer_of(raw)
    if said := misspelt(own):
        raise ToolError(f"{path}: {said}")
    chosen, reasons = _options(raw, own)
    gone = [] if own == "scao" else [key for key in raw if key in ("optim_args", *of_others(raw))]
    reasons += [f"{key}: removed, SCAO does not read it" for key in gone]
    wanted: dict[str, Any] = {key: value for key, value in raw.items() if key not in gone}
    if not axolotl_yaml.has_plugin(raw):
        wanted["plugins"] = [PLUGIN, *axolotl_yaml.collection(raw, "plugins", list)]
        reasons.insert(0, f"plugins: {PLUGIN}, without which `optimizer: scao` is not this SCAO")
    if own != "scao":
        wanted["optimizer"] = "scao"
    wanted |= {PREFIX + name: value for name, value in chosen.items()}
    after = _rewritten(before, raw, wanted)
    if _read(after) != wanted:
        raise ToolError(
            f"{path} cannot be edited as it is laid out: write each key once, on a line of its own that is not indented, "
            "without anchors, and nothing after `...`"
        )
    findings = Findings()
    options = axolotl_yaml.scao_options(wanted, findings)
    warnings = [*_rate(raw, own), *findings.warnings, *_notes(raw, own, options)]
    newline = "\r\n" if b"\r\n" in path.read_bytes() else "\n"
    return Migration(before, after, tuple(reasons), tuple(warnings), tuple(findings.errors), own, newline)


def _read(text: str) -> Any:
    """What a text says as YAML, None where it is none."""
    try:
        return axolotl_yaml.parse(text)
    except yaml.YAMLError:
        return None


def _options(raw: dict[str, Any], own: str) -> tuple[dict[str, Any], list[str]]:
    """The options that this run should have, and the reasons; none where the YAML sets any: its author has chosen."""
    chosen: dict[str, Any] = {}
    reasons: list[str] = []
    if any(str(key).startswith(PREFIX) for key in raw):
        return chosen, reasons
    if hint := eight_bit_hint(own, "`scao_moment_dtype: int8` and `scao_use_int8_ema: true`"):
        chosen |= {"moment_dtype": "int8", "use_int8_ema": True}
        reasons.append(f"int8 state: {hint}")
    elif not raw.get("adapter") and axolotl_yaml.half_precision(raw):
        chosen["moment_dtype"] = "bfloat16"
        reasons.append("scao_moment_dtype: bfloat16: what is trained is in 16 bit, and AdamW's moments are too")
    return chosen, reasons


def _rate(raw: dict[str, Any], own: str) -> list[str]:
    """What is said about the learning rate."""
    rate = raw.get("learning_rate")
    if rate is None or own == "scao" or ("adamw" in own and not any(word in own for word in OTHER_RATES)):
        return []
    return [
        f"learning_rate: {rate} was chosen for {own}, whose steps have another size than AdamW's: set the rate that you "
        "would use for AdamW, for LoRA often 1e-4 to 5e-4"
    ]


def _notes(raw: dict[str, Any], own: str, options: dict[str, Any]) -> list[str]:
    """Decay, memory, the namesake and unknown keys."""
    notes = []
    beta2 = raw.get("adam_beta2")
    if beta2 is not None and own != "scao":
        notes.append(f"adam_beta2: {beta2} is kept; SCAO's default, with which it was measured, is 0.99")
    if own in STATES:
        notes.append(_memory(raw, own, options))
    if folder := other_package():
        notes.append(f"the PyPI package scao, another project's, is installed in {folder}; the plugin's line decides")
    return notes + axolotl_yaml.unread(raw)


def _memory(raw: dict[str, Any], own: str, options: dict[str, Any]) -> str:
    """Bytes of state for each trained parameter, before and after, on matrices of a usual size."""
    rank = raw.get("lora_r") or 8
    rows = rank if raw.get("adapter") and isinstance(rank, int) and rank > 0 else 2048
    half = not raw.get("adapter") and axolotl_yaml.half_precision(raw)
    dtype = torch.bfloat16 if half else torch.float32
    params = [torch.empty(rows, 2048, device="meta", dtype=dtype, requires_grad=True)]
    passed = {name: value for name, value in options.items() if name in OPTIONS}
    report = SCAO(params, **passed).memory_report()
    before = state_bytes(own, params, ()) / report["parameters"]
    peak, rest = (report[name] / report["parameters"] for name in ("peak", "total"))
    shape = f"{rows} x 2048 weights"
    return f"optimizer state, bytes per parameter of {shape}: {own} {before:.1f}, SCAO {peak:.1f} at its peak, {rest:.1f} after"


def _rewritten(text: str, raw: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The text with the keys in which ``wanted`` differs from ``raw`` changed in place."""
    root = yaml.compose(text)
    if root.flow_style:
        raise ToolError("the YAML is written in braces: write each key on a line of its own")
    nodes = {key.value: (key, value) for key, value in root.value}

    def line_end(at: int) -> int:
        stop = text.find("\n", at)
        return len(text) if stop < 0 else stop + 1

    edits = [  # from, to, what to put there
        (nodes[key][0].start_mark.index, line_end(_last(nodes[key][1]).end_mark.index), "")
        for key in raw
        if key not in wanted and key in nodes  # a key that an anchor brings in cannot be taken out
    ]
    lines = [
        f"plugins:\n  - {PLUGIN}" if key == "plugins" else f"{key}: {yaml.safe_dump(value).splitlines()[0]}"
        for key, value in wanted.items()
        if key not in raw
    ]
    if "plugins" in nodes and wanted["plugins"] != raw["plugins"]:
        edits.append(_with_plugin(nodes["plugins"][1]))
    if "optimizer" in nodes and wanted["optimizer"] != raw["optimizer"]:
        value = nodes["optimizer"][1]
        edits.append((value.start_mark.index, value.end_mark.index, "scao" if value.value else " scao"))
    if lines:
        at = line_end(nodes["optimizer"][1].end_mark.index) if "optimizer" in nodes else len(text)
        begin = "" if not at or text[at - 1] == "\n" else "\n"
        edits.append((at, at, begin + "\n".join(lines) + "\n"))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _last(node: Any) -> Any:
    """The scalar in which a value ends; a collection's own end is where the next key begins."""
    while not isinstance(node, yaml.ScalarNode) and node.value and not node.flow_style:
        node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    return node


def _with_plugin(node: Any) -> tuple[int, int, str]:
    """How a list gets the plugin as its first entry."""
    at = node.start_mark.index
    if isinstance(node, yaml.ScalarNode):  # no value
        return (at, node.end_mark.index, f" [{PLUGIN}]")
    if node.flow_style:
        return (at + 1, at + 1, PLUGIN + (", " if node.value else ""))
    return (at, at, f"- {PLUGIN}\n{' ' * node.start_mark.column}")
