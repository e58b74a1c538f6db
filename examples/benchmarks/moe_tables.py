"""Tables of what moe.py has measured; tables.py puts them where a page asks for them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: The result file that this module reads.
FILE = "moe.jsonl"
MIB = 2**20

Record = dict[str, Any]


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def origin(found: list[Record]) -> str:
    """Where the measurements come from, and the command that repeats them."""
    names = sorted({f"{record['machine']['cpu']}, {record['machine']['threads']} thread" for record in found})
    packages = ("torch", "transformers", "peft")
    versions = sorted({", ".join(f"{name} {record['versions'][name]}" for name in packages) for record in found})
    commands = sorted({record["command"] for record in found})
    return f"{'; '.join(names)}; {'; '.join(versions)}. `{'`, `'.join(commands)}`.\n"


def training(found: list[Record], what: str, digits: int) -> str:
    """Each optimizer at its best learning rate, against AdamW at its own."""
    losses: dict[str, dict[float, dict[int, float]]] = {}
    for record in found:
        cell = record["cell"]
        losses.setdefault(cell["optimizer"], {}).setdefault(cell["lr"], {})[cell["seed"]] = record["figures"]["loss"]
    best = {name: min(rates, key=lambda lr: statistics.mean(rates[lr].values())) for name, rates in losses.items()}
    reference = losses["adamw"][best["adamw"]]
    rows = []
    for name, rates in losses.items():
        seeds = rates[best[name]]
        mean = statistics.mean(seeds.values())
        ratios = [loss / reference[seed] for seed, loss in seeds.items()]
        edge = " (edge)" if best[name] in (min(rates), max(rates)) else ""
        tried = ", ".join(f"{lr:g}: {statistics.mean(rates[lr].values()):.{digits}f}" for lr in sorted(rates))
        spread = f"{mean:.{digits}f} ± {statistics.stdev(seeds.values()):.{digits}f} ({len(seeds)})"
        against = "" if name == "adamw" else f"{statistics.mean(ratios):.{digits}f}x"
        rows.append([f"`{name}`", f"{best[name]:g}{edge}", spread, against, tried])
    return markdown(["optimizer", "best lr", f"{what} (seeds)", "against AdamW", "all rates tried"], rows)


def layer(found: list[Record]) -> str:
    """Times and peaks of the implementations."""
    rows = []
    for record in sorted(found, key=lambda record: record["cell"]["experts"]):
        ms, extra = record["figures"]["ms"], record["figures"]["extra_bytes"]
        for name in sorted(ms, key=ms.__getitem__):
            words = name if name == "without LoRA" else "fused" if name == "fused" else f"PEFT, `{name}`"
            ratio = f"{ms[name] / ms['fused']:.2f}x"
            peak = f"{extra[name] / MIB:.0f} MiB" if name in extra else "not measured"
            rows.append([str(record["cell"]["experts"]), words, f"{ms[name]:.0f}", ratio, peak])
    head = ["experts", "forward", "ms, forward and backward", "against fused", "peak beyond what was held"]
    return markdown(head, rows)


def coded(found: list[Record]) -> str:
    """4 bit against full precision."""
    figures = found[-1]["figures"]
    ms = figures["ms"]
    rows = [
        ["ms, forward and backward, float32 experts", f"{ms['float32']:.1f}"],
        ["the same, NF4 experts", f"{ms['nf4']:.1f} ({ms['nf4'] / ms['float32']:.2f}x)"],
        ["bytes against bfloat16", f"{figures['bytes_of_bfloat16']:.3f}"],
        [
            "largest relative difference of a gradient to that with the decoded weights",
            f"{figures['gradient_difference']:.1e}",
        ],
    ]
    return markdown(["16 experts, r = 8", ""], rows)


def tables(paths: Iterable[Path]) -> dict[str, str]:
    """All tables by name."""
    found: dict[str, list[Record]] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found.setdefault(record["part"], []).append(record)
    makers = {
        "toy": lambda records: training(records, "relative error", 3),
        "small": lambda records: training(records, "held-out loss", 4),
        "forward": layer,
        "four-bit": coded,
    }
    return {f"moe-{part}": f"{makers[part](records)}\n{origin(records)}" for part, records in found.items()}
