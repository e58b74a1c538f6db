"""Tables of what moe.py has measured; tables.py puts them where a page asks for them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from runs import Record, records
from texts import grid, spread, table

#: The result file that this module reads.
FILE = "moe.jsonl"
MIB = 2**20


def origin(found: list[Record]) -> str:
    """Where the measurements come from, and the command that repeats them."""
    names = sorted({f"{record['machine']['cpu']}, {record['machine']['threads']} thread" for record in found})
    packages = ("torch", "transformers", "peft")
    versions = sorted({", ".join(f"{name} {record['versions'][name]}" for name in packages) for record in found})
    commands = sorted({record["command"] for record in found})
    return f"{'; '.join(names)}; {'; '.join(versions)}. `{'`, `'.join(commands)}`.\n"


def training(found: list[Record], what: str, digits: int) -> str:
    """Each optimizer at its best learning rate, against AdamW at its own.

    Of an optimizer whose rule has changed since, the runs of the rule that ran last count.
    """
    latest = {record["cell"]["optimizer"]: record["cell"]["options"] for record in found}
    losses: dict[str, dict[float, dict[int, float]]] = {}
    for record in found:
        cell = record["cell"]
        if cell["options"] == latest[cell["optimizer"]]:
            runs = losses.setdefault(cell["optimizer"], {}).setdefault(cell["lr"], {})
            runs[cell["seed"]] = record["figures"]["loss"]
    best = {}
    for name, rates in losses.items():
        most = max(map(len, rates.values()))  # means over different seeds would not be comparable
        whole = [lr for lr in rates if len(rates[lr]) == most]
        best[name] = min(whole, key=lambda lr, rates=rates: statistics.mean(rates[lr].values()))  # type: ignore[misc]
    reference = losses["adamw"][best["adamw"]]
    counts = " or ".join(map(str, sorted({len(rates[best[name]]) for name, rates in losses.items()})))
    rows = []
    for name, rates in losses.items():
        seeds = rates[best[name]]
        ratios = [loss / reference[seed] for seed, loss in seeds.items() if seed in reference]
        edge = " (edge)" if best[name] in (min(rates), max(rates)) else ""
        tried = [f"{lr:g}: {statistics.mean(rates[lr].values()):.{digits}f}" for lr in sorted(rates)]
        rows.append(
            {
                "optimizer": f"`{name}`",
                "best lr": f"{best[name]:g}{edge}",
                f"{what} ({counts} seeds)": spread(list(seeds.values()), digits),
                "against AdamW, seed by seed": "" if name == "adamw" else f"{spread(ratios, digits)}x",
                "all rates tried": ", ".join(tried),
            }
        )
    return table(rows)


def layer(found: list[Record]) -> str:
    """Times and peaks of the implementations."""
    rows = []
    for record in sorted(found, key=lambda record: record["cell"]["experts"]):
        ms, extra = record["figures"]["ms"], record["figures"]["extra_bytes"]
        for name in sorted(ms, key=ms.__getitem__):
            rows.append(
                {
                    "experts": record["cell"]["experts"],
                    "forward": name if name == "fused" or name.startswith("without") else f"PEFT, `{name}`",
                    "ms, forward and backward": f"{ms[name]:.0f}",
                    "against fused": f"{ms[name] / ms['fused']:.2f}x",
                    "peak beyond what was held": f"{extra[name] / MIB:.0f} MiB" if name in extra else "not measured",
                }
            )
    return table(rows)


def coded(found: list[Record]) -> str:
    """4 bit against full precision."""
    figures = found[-1]["figures"]
    ms, difference = figures["ms"], "largest relative difference of a gradient to that with the decoded weights"
    rows = [
        ["ms, forward and backward, float32 experts", f"{ms['float32']:.1f}"],
        ["the same, NF4 experts", f"{ms['nf4']:.1f} ({ms['nf4'] / ms['float32']:.2f}x)"],
        ["bytes against bfloat16", f"{figures['bytes_of_bfloat16']:.3f}"],
        [difference, f"{figures['gradient_difference']:.1e}"],
    ]
    return grid(["16 experts, r = 8", ""], rows)


def tables(paths: Iterable[Path]) -> dict[str, str]:
    """All tables by name."""
    found: dict[str, list[Record]] = {}
    for record in records(paths, FILE):
        found.setdefault(record["cell"]["part"], []).append(record)
    makers = {
        "toy": lambda measured: training(measured, "relative error", 3),
        "small": lambda measured: training(measured, "held-out loss", 4),
        "forward": layer,
        "four-bit": coded,
    }
    return {f"moe-{part}": f"{makers[part](measured)}\n{origin(measured)}" for part, measured in found.items()}
