"""The tables of stability.jsonl and reference.jsonl: which optimizer fails on 4-bit LoRA, and the published QLoRA run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import reference
import stability
from runs import Record, records
from texts import cell, grid, table, value

FILES = (stability.FILE, reference.FILE)
GB = 1024**3


def stability_tables(paths: Iterable[Path]) -> dict[str, str]:
    """Who fails where, per part: optimizers down, scenarios across."""
    found: dict[str, dict[str, dict[str, Record]]] = {}
    for record in records(paths, stability.FILE):
        run = record["cell"]
        found.setdefault(run["part"], {}).setdefault(run["optimizer"], {})[run["scenario"]] = record
    made = {}
    for part, rows in found.items():
        scenarios = [name for name in stability.SCENARIOS if any(name in runs for runs in rows.values())]
        head = ["optimizer", *(stability.SCENARIOS[name][0] for name in scenarios)]
        lines = [
            [f"`{name.replace(':' + stability.EARLY, '')}`", *(_outcome(runs.get(scenario)) for scenario in scenarios)]
            for name, runs in rows.items()
        ]
        made[f"published-stability-{part}"] = grid(head, lines)
    return made


def _outcome(record: Record | None) -> str:
    if record is None:
        return ""
    if record["outcome"] == "trained":
        return f"trained, loss {record['losses'][0]:.2f} to {record['losses'][-1]:.2f}"
    return f"**failed in step {record['step']}**: {cell(record['message'])}"


def reference_table(paths: Iterable[Path]) -> str | None:
    """The QLoRA run next to the published figures."""
    rows = []
    for record in records(paths, reference.FILE):
        losses, peak, state = record["loss"], record["peak_allocated"], record["state_bytes"]
        rows.append(
            {
                "optimizer": f"`{record['cell']['optimizer']}`",
                "lr": f"{record['cell']['lr']:g}",
                "model": record["loaded"],
                "device": record["device"],
                "mean loss": f"{statistics.mean(losses):.3f}" if losses else "",
                "last loss": f"{losses[-1]:.3f}" if losses else "",
                "s/step": value(record["seconds_per_step"], ".2f"),
                "peak memory": f"{peak / GB:.2f} GB" if peak else "not measured",
                "state": f"{state / 1024**2:.1f} MiB" if state else "",
                "failure": record["failure"] or "",
            }
        )
    return table(rows) if rows else None


def tables(paths: Sequence[Path]) -> dict[str, str | None]:
    """Every table; None without records."""
    made = stability_tables(paths)
    return {
        **{f"published-stability-{part}": made.get(f"published-stability-{part}") for part in stability.PARTS},
        "published-reference": reference_table(paths),
    }
