"""The tables of survival.jsonl: how many faults each optimizer survives, and what each one dies of."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from faults import FAULTS
from survival import COMPARED
from texts import cell, grid

FILE = "survival.jsonl"
#: Characters of a reason that the table shows; the file has all of it.
LONGEST = 80
Rows = dict[str, dict[str, dict[str, Any]]]


def read(paths: Iterable[Path]) -> tuple[Rows, dict[str, str]]:
    """Outcomes by optimizer and fault, and the optimizers that could not be tried with the reason."""
    rows: Rows = {}
    missing = {}
    for path in (path for path in paths if path.name == FILE):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "unavailable" in record:
                missing[record["optimizer"]] = record["unavailable"]
            else:
                rows.setdefault(record["optimizer"], {})[record["fault"]] = record
    return rows, missing


def _count(found: dict[str, dict[str, Any]], names: Iterable[str]) -> str:
    outcomes = [found[name]["outcome"] for name in names if name in found]
    counted = [outcome for outcome in outcomes if outcome != "inapplicable"]
    return f"{counted.count('survived')} / {len(counted)}"


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    if record["outcome"] == "survived":
        return "yes"
    reason = cell(textwrap.shorten(record["reason"], LONGEST, placeholder=" ..."))
    return f"({reason})" if record["outcome"] == "inapplicable" else f"**no**: {reason}"


def _notes(rows: Rows, missing: dict[str, str]) -> str:
    versions: dict[str, str] = {}
    for found in rows.values():
        for record in found.values():
            versions |= {k: v for k, v in record["versions"].items() if not k.startswith("scao_hf")}
    lines = ["", "Versions: " + ", ".join(f"{name} {number}" for name, number in sorted(versions.items())) + "."]
    lines += [f"Not tried: `{name}`: {reason}." for name, reason in sorted(missing.items())]
    return "\n".join(lines) + "\n"


def tables(paths: Iterable[Path]) -> dict[str, str]:
    """``survival``: faults survived of those that apply, by kind; ``survival-faults``: every fault with the reasons."""
    rows, missing = read(paths)
    if not rows:
        return {}
    optimizers = [name for name in COMPARED if name in rows]
    kinds: dict[str, list[str]] = {}
    for name, fault in FAULTS.items():
        kinds.setdefault(fault.kind, []).append(name)
    head = [f"`{name}`" for name in optimizers]
    lines = [[kind, *(_count(rows[optimizer], names) for optimizer in optimizers)] for kind, names in kinds.items()]
    lines.append(["**all**", *(f"**{_count(rows[optimizer], FAULTS)}**" for optimizer in optimizers)])
    faults = [
        [f"{fault.kind}: {fault.title}", *(_cell(rows[optimizer].get(name)) for optimizer in optimizers)]
        for name, fault in FAULTS.items()
    ]
    return {
        "survival": grid(["faults survived", *head], lines) + _notes(rows, missing),
        "survival-faults": grid(["fault", *head], faults),
    }
