"""What the documentation is made of or checked against: options, equations and messages, from the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from formulas import FORMULAS

from scao_hf.options import OPTIONS, RULE_DEFAULTS, RULES, TORCH_OPTIONS
from scao_hf.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
#: Equations are read in this order: where a label is defined comes before where it is used.
SOURCES = [
    *(ROOT / "scao_hf" / name for name in ("rules/base.py", "blocks.py", "initial.py")),
    *sorted((ROOT / "scao_hf" / "moe").glob("*.py")),
    *(ROOT / "scao_hf" / "rules" / f"{name}.py" for name in ("eigenbasis", "published", "orthogonal")),
]
FAMILIES = {
    "E": "Curvature",
    "U": "The step",
    "O": "Matrices with two large sides",
    "S": "When a basis is refreshed",
    "X": "Stacked experts",
}


def options_table() -> str:
    """The table of options, from the tables that the code itself reads."""
    rows = ["| option | default | meaning | legal values |", "|---|---|---|---|"]
    rows.append(f"| `rule` | {RULES[0]} | {OPTIONS['rule'].doc} | {OPTIONS['rule'].valid} |")
    betas = f"two numbers, each {TORCH_OPTIONS['beta'].valid}"
    for name in ("betas", *(name for name in OPTIONS if name != "rule")):
        valid = betas if name == "betas" else OPTIONS[name].valid
        doc = "decays of Adam's moments; in a YAML `adam_beta1`, `adam_beta2`" if name == "betas" else OPTIONS[name].doc
        rows.append(f"| `{name}` | {RULE_DEFAULTS[RULES[0]][name]} | {doc} | {valid} |")
    return "\n".join(rows) + "\n"


def published_defaults() -> str:
    """The options whose default is another one with the published rule."""
    ours, theirs = (RULE_DEFAULTS[rule] for rule in (RULES[0], "published"))
    rows = ["| option | default of SCAO's own rule | with `published` |", "|---|---|---|"]
    rows += [f"| `{name}` | {ours[name]} | {theirs[name]} |" for name in ours if ours[name] != theirs[name]]
    return "\n".join(rows) + "\n"


def edits_table() -> str:
    """What an edit of each option in a parameter group does."""
    effects: dict[str, list[str]] = {}
    for name, option in OPTIONS.items():
        effects.setdefault(option.edited, []).append(f"`{name}`")
    rows = [f"| {', '.join(names)} | {effect} |" for effect, names in effects.items()]
    return "\n".join(["| option | an edit |", "|---|---|", *rows]) + "\n"


def presets_table() -> str:
    """The recommended options by size, for each rule."""
    rows = ["| rule | trained parameters | options |", "|---|---|---|"]
    low = 0
    for preset in PRESETS:
        high = f"below {preset.below:,}" if preset.below else "any" if low == 0 else f"{low:,} or more"
        bounds = f"{low:,} to {high}" if low and preset.below else high
        words = ", ".join(f"`{name}={value}`" for name, value in preset.options.items()) or "the defaults"
        rows.append(f"| `{preset.rule}` | {bounds} | {words} |")
        low = preset.below or 0
    return "\n".join(rows) + "\n"


def equations() -> str:
    """Every labelled equation with the docstring that states it, up to its arguments, and where it is implemented."""
    found: dict[str, tuple[str, str]] = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            text = ast.get_docstring(node) or ""
            text = re.split(r"\n\n(?:Args|Returns|Raises|Attributes):", text)[0]
            place = ".".join((*path.relative_to(ROOT).with_suffix("").parts, node.name))
            # A label at the beginning of a docstring states an equation; further on, "(U1) is ..." states another.
            for stated in re.split(r"\n\n(?=\([A-Z]\d+\) is )", text):
                label = re.match(r"\(([A-Z]\d+)\) (?=\S)", stated)
                if label and label[1] not in found:
                    words = stated[label.end() :] if text.startswith(stated) else stated
                    found[label[1]] = (words.strip().replace("``", "`"), place)
    parts = []
    for family, title in FAMILIES.items():
        labels = sorted((label for label in found if label[0] == family), key=lambda label: int(label[1:]))
        if labels:
            parts.append(f"## {title}\n")
        for label in labels:
            name, tex = FORMULAS[label]
            words, place = found[label]
            parts.append(f"### {label} {name}\n\n$$\n{tex}\n$$\n\n{words}\n\nImplemented in `{place}`.\n")
    return "\n".join(parts)


class Message(NamedTuple):
    """A message that a user can be shown: its text with … for what is put in, and where it is raised."""

    text: str
    place: str


#: Exceptions that are no messages: re-raised, control flow of the command line, protocol of Python.
_SILENT = ("Exit", "SystemExit", "StopIteration", "NotImplementedError")


def _template(node: ast.expr) -> str | None:
    """The text of a string expression with … for every part that is worked out; None for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _template(node.left), _template(node.right)
        return None if left is None and right is None else (left or "…") + (right or "…")
    return None


def tidy(text: str) -> str:
    """Runs of placeholders and of white space as one."""
    return re.sub(r"\s+", " ", re.sub(r"%[sd.\w]+|…+", "…", text)).strip()


def messages() -> list[Message]:
    """Every message of an exception or a warning in the packages, in the order of the sources."""
    found = {}
    for package in ("scao_hf", "axolotl_plugin"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name == "reference.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                for text in _said(node):
                    shown = tidy(text)
                    if len(re.findall(r"[A-Za-z]{2,}", shown)) > 1:
                        found.setdefault(shown, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    for path in sorted((ROOT / "csrc").iterdir()):
        for check in re.finditer(r"STD_TORCH_CHECK\((.*?)\);", _code(path), re.DOTALL):
            said = check[1][check[1].find('"scao: ') :]
            parts = re.findall(r'"([^"]*)"|([^",\s][^",]*)', said)
            found.setdefault(tidy("".join(text or "…" for text, _ in parts)), f"csrc/{path.name}")
    return [Message(text, place) for text, place in found.items()]


def _code(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.suffix in (".cpp", ".h", ".cu", ".cuh") else ""


def _said(node: ast.AST) -> Iterator[str]:
    """The texts that a statement raises, logs as a warning or adds to the plugin's findings."""
    call: ast.expr | None = None
    if isinstance(node, ast.Raise):
        call = node.exc
    elif isinstance(node, ast.Return):
        call = node.value  # a function may return the exception that its caller raises
        if not (isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("Error", "Exception"))):
            return
    elif isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if (
            name.endswith(("errors.append", "warnings.append", "problems.append", ".warning", "sys.exit"))
            or name == "warn"
        ):
            call = node
    if not isinstance(call, ast.Call) or ast.unparse(call.func).rpartition(".")[2] in _SILENT:
        return
    for argument in call.args[:1]:
        text = _template(argument)
        if text is not None:
            yield text


def documented() -> list[str]:
    """The messages that the page on troubleshooting explains: the code at the beginning of a list item."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return [tidy(entry) for entry in re.findall(r"^- `` ?(.*?) ?``$", text, re.MULTILINE)]
