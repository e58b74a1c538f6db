"""The tables of stability.jsonl and reference.jsonl: which optimizer fails on 4-bit LoRA, and the published QLoRA run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import reference
import stability
import sweep
from runs import Record
from texts import table

FILES = (stability.FILE, reference.FILE)
GB = 1024**3


def value(number: float | None, form: str) -> str:
    """A number as text, nothing for None."""
    return "" if number is None else format(number, form)


def stability_tables(paths: Iterable[Path]) -> dict[str, str]:
    """Who fails where, per part: optimizers down, scenarios across."""
    grid: dict[str, dict[str, dict[str, Record]]] = {}
    for path in paths:
        for record in sweep.read(path)[0].values():
            cell = record["cell"]
            grid.setdefault(cell["part"], {}).setdefault(cell["optimizer"], {})[cell["scenario"]] = record
    made = {}
    for part, rows in grid.items():
        scenarios = [name for name in stability.SCENARIOS if any(name in found for found in rows.values())]
        head = ["optimizer", *(stability.SCENARIOS[name][0] for name in scenarios)]
        lines = [
            [f"`{name.replace(':' + stability.EARLY, '')}`", *(_outcome(found.get(scenario)) for scenario in scenarios)]
            for name, found in rows.items()
        ]
        made[f"published-stability-{part}"] = table(head, lines)
    return made


def _outcome(record: Record | None) -> str:
    if record is None:
        return ""
    if record["outcome"] == "trained":
        return f"trained, loss {record['losses'][0]:.2f} to {record['losses'][-1]:.2f}"
    message = record["message"].replace("|", "/").replace("<", "(").replace(">", ")")
    return f"**failed in step {record['step']}**: {message}"


def reference_table(paths: Iterable[Path]) -> str | None:
    """The QLoRA run next to the published figures."""
    rows = []
    for path in paths:
        for record in sweep.read(path)[0].values():
            cell = record["cell"]
            peak = record["peak_allocated"]
            losses = record["loss"]
            rows.append(
                [f"`{cell['optimizer']}`", f"{cell['lr']:g}", record["loaded"], record["device"]]
                + ([f"{statistics.mean(losses):.3f}", f"{losses[-1]:.3f}"] if losses else ["", ""])
                + [value(record["seconds_per_step"], ".2f"), f"{peak / GB:.2f} GB" if peak else "not measured"]
                + [
                    f"{record['state_bytes'] / 1024**2:.1f} MiB" if record["state_bytes"] else "",
                    record["failure"] or "",
                ]
            )
    head = ["optimizer", "lr", "model", "device", "mean loss", "last loss", "s/step", "peak memory", "state", "failure"]
    return table(head, rows) if rows else None


def tables(paths: Sequence[Path]) -> dict[str, str | None]:
    """Every table; None without records."""
    made = stability_tables(path for path in paths if path.name == stability.FILE)
    return {
        **{f"published-stability-{part}": made.get(f"published-stability-{part}") for part in stability.PARTS},
        "published-reference": reference_table(path for path in paths if path.name == reference.FILE),
    }
