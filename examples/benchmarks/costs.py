"""Tables and a plot of what speed.py, memory.py and gpu.py have measured; tables.py puts them where a README asks for them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sweep
from texts import grid, table

#: The result files that this module reads; all others are sweeps.
FILES = ("speed.jsonl", "memory.jsonl", "gpu.jsonl")
#: Bytes per parameter that any optimizer with one float32 momentum reads and writes: gradient, parameter, momentum.
LEAST_BYTES = 4 + 8 + 8
MIB = 2**20

Record = dict[str, Any]


def records(paths: Iterable[Path], reduced: bool = False) -> list[Record]:
    """The measurements of result files, of two of the same thing the later one."""
    found: list[Record] = []
    for path in paths:
        found += sweep.read(path)[0].values()
    return [record for record in found if record["cell"]["reduced"] == reduced]


def clock(record: Record) -> str:
    """Processor time of one thread, which other processes do not lengthen; wall time of several."""
    return "cpu" if record["cell"].get("threads") == 1 else "wall"


def origin(found: Sequence[Record]) -> str:
    """Machine and versions, in words."""
    cpus = sorted({record["machine"]["gpu"] or record["machine"]["cpu"] for record in found})
    torches = sorted({record["versions"]["torch"] for record in found})
    codes = {record["versions"]["code"] for record in found}
    mixed = " Measurements of several versions of the code: repeat them with --redo-stale." if len(codes) > 1 else ""
    return f"{'; '.join(cpus)}; torch {', '.join(torches)}.{mixed}"


def part(found: Sequence[Record], name: str) -> dict[str, Record]:
    """The measurements of a part, by what it ran on: the number of threads, or the GPU."""
    result = {}
    for record in found:
        if record["cell"]["part"] == name:
            threads = record["cell"].get("threads")
            words = f"{threads} thread{'s' if threads != 1 else ''}"
            result[record["cell"].get("device", words)] = record
    return result


def amortised(record: Record) -> dict[str, float]:
    """Milliseconds of each optimizer's step, refreshes included."""
    return {name: figures[f"{clock(record)}_ms_amortised"] for name, figures in record["figures"].items()}


def step_table(by_place: dict[str, Record], what: str) -> str:
    """Step times of one set of parameters, one row per optimizer, one thread next to several."""
    first = next(iter(by_place.values()))
    head = ["optimizer", "PyTorch calls"]
    for words in by_place:
        head += [f"{words}: ms/step", "/ AdamW fused", "slowest / typical step"]
    rows = []
    for name in sorted(first["figures"], key=lambda name: amortised(first)[name]):
        row = [f"`{name}`", str(first["figures"][name].get("operations", ""))]
        for record in by_place.values():
            unit, own, times = clock(record), record["figures"][name], amortised(record)
            row.append(f"{times[name]:.3g}" if times[name] < 1000 else f"{times[name]:,.0f}")
            row.append(f"{times[name] / times['adamw']:.2f}")
            row.append(f"{own[f'{unit}_ms_worst'] / own[f'{unit}_ms']:.2f}")
        rows.append(row)
    notes = [f"Not run: `{name}`: {reason}." for name, reason in first["unavailable"].items()]
    caption = (
        f"{what}: {first['matrices']} matrices, {first['parameters']:,} parameters. All take turns in one process; ms/step "
        "is the mean over a period of refreshes, of medians; processor time on one thread, wall time on several. "
        f"{origin(list(by_place.values()))}"
    )
    return grid(head, rows, caption, *notes)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Exponent p of the power law y ~ x^p that fits best."""
    xs, ys = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    return statistics.linear_regression(xs, ys).slope


def growth_cells(found: Sequence[Record], varied: str) -> list[Record]:
    """The measurements in which one of rank, side and layers was varied, in rising order."""
    chosen = [record for record in found if record["cell"].get("varied") == varied]
    return sorted(chosen, key=lambda record: record["cell"][varied])


def growth_table(found: Sequence[Record]) -> str:
    """Nanoseconds per parameter against rank, side and number of layers, and the exponents of the growth."""
    rows, exponents = [], []
    for varied in ("rank", "side", "layers"):
        chosen = growth_cells(found, varied)
        for record in chosen:
            cell, count, times = record["cell"], record["parameters"], amortised(record)
            rows.append(
                {
                    "varied": varied,
                    "r": cell["rank"],
                    "l": f"{cell['side']:,}",
                    "layers": cell["layers"],
                    "parameters": f"{count:,}",
                    "SCAO ns/parameter": f"{times['scao'] * 1e6 / count:.2f}",
                    "AdamW ns/parameter": f"{times['adamw'] * 1e6 / count:.2f}",
                    "ratio": f"{times['scao'] / times['adamw']:.2f}",
                }
            )
        if len(chosen) > 1:
            exponent = slope([(record["parameters"], amortised(record)["scao"]) for record in chosen])
            exponents.append(f"{exponent:.2f} over {varied}")
    caption = (
        f"Pairs of LoRA factors r x l, refreshes included. SCAO's step time grows with the number of parameters to the power "
        f"{', '.join(exponents)} (1 is linear). {origin(found)}"
    )
    return table(rows, caption)


def roofline_table(found: Sequence[Record]) -> str:
    """How far the steps are from the time that their memory traffic needs at the speed of a copy."""
    rows = []
    copies, loads = part(found, "copy"), part(found, "load")
    for place in (place for place in copies if place in loads):
        record, rate = loads[place], copies[place]["bytes_per_second"]
        least, times = 1e3 * record["parameters"] * LEAST_BYTES / rate, amortised(record)
        usual = record["figures"]["scao"][f"{clock(record)}_ms"]
        rows.append(
            {
                "threads": place,
                "copy, GB/s": f"{rate / 1e9:.1f}",
                f"{LEAST_BYTES} B/parameter, ms": f"{least:.1f}",
                "AdamW fused, ms": f"{times['adamw']:.1f} ({times['adamw'] / least:.1f}x)",
                "SCAO, typical step, ms": f"{usual:.1f} ({usual / least:.1f}x)",
                "SCAO, mean, ms": f"{times['scao']:.1f} ({times['scao'] / least:.1f}x)",
            }
        )
    caption = (
        f"The reference load. Any optimizer with one float32 momentum moves {LEAST_BYTES} bytes per parameter: it reads "
        "gradient, parameter and momentum and writes the last two. What SCAO's kernels move and compute is counted in "
        f"`csrc/README.md`. {origin([*copies.values(), *loads.values()])}"
    )
    return table(rows, caption)


def training_table(by_place: dict[str, Record]) -> str:
    """A whole training step with each optimizer."""
    rows = []
    for place, record in by_place.items():
        rest, times = record["rest"][f"{clock(record)}_ms"], amortised(record)
        rows.append(
            {
                "on": place,
                "forward and backward, ms": f"{rest:,.0f}",
                "AdamW, ms": f"{times['adamw']:.1f}",
                "SCAO, ms": f"{times['scao']:.1f}",
                "whole step, SCAO / AdamW": f"{(rest + times['scao']) / (rest + times['adamw']):.4f}",
            }
        )
    first, where = next(iter(by_place.values())), origin(list(by_place.values()))
    return table(rows, f"{first['model']}; {first['parameters']:,} trained parameters, batches of 4 rows. {where}")


def claim(state: Sequence[Record], training: dict[str, Record]) -> str:
    """State and time in one paragraph."""
    by_name = {record["cell"]["optimizers"][0]: record for record in state if "bytes" in record}
    held = {name: record["bytes"] / record["parameters"] for name, record in by_name.items()}
    peak = by_name["scao"]["report"]["peak"] / by_name["scao"]["parameters"]
    place, record = next(iter(training.items()))
    rest, times = record["rest"][f"{clock(record)}_ms"], amortised(record)
    longer = 100 * (times["scao"] - times["adamw"]) / (rest + times["adamw"])
    small = "scao:moment_dtype='int8':use_int8_ema=True"
    return (
        f"Bytes of state per parameter, LoRA r = {state[0]['cell']['rank']} in float32: AdamW {held['adamw']:.2f}; SCAO "
        f'{peak:.2f} in phase 1 and {held["scao"]:.2f} in phase 2; SCAO with `moment_dtype="int8"` and '
        f"`use_int8_ema=True` {held[small]:.2f}, 8-bit AdamW {held['adamw8bit']:.2f}. A whole training step of "
        f"{record['model'].split(',')[0]} in 4 bit takes {longer:.1f} % "
        f"longer than with AdamW ({place}).\n"
    )


def state_table(found: Sequence[Record]) -> str:
    """Bytes of state on the load."""
    rows, notes = [], []
    for record in found:
        name = f"`{record['cell']['optimizers'][0]}`"
        if "unavailable_here" in record:
            notes.append(f"Not run: {name}: {record['unavailable_here']}.")
            continue
        count, report = record["parameters"], record.get("report")
        rows.append(
            {
                "optimizer": name,
                "bytes/parameter": f"{record['bytes'] / count:.2f}",
                "MiB": f"{record['bytes'] / MIB:,.0f}",
                "largest at any time, bytes/parameter": f"{report['peak'] / count:.2f}" if report else "",
            }
        )
    caption = (
        f"LoRA r = {found[0]['cell']['rank']} of Qwen2.5-3B on seven linear maps, {found[0]['parameters']:,} parameters. "
        f"Measured on one matrix of each shape and summed. {origin(found)}"
    )
    return table(rows, caption, *notes)


def bfloat16_table(found: Sequence[Record]) -> str:
    """Bytes of state of parameters in bfloat16."""
    kinds = {"full": "all matrices of Llama-3.1-8B", "LoRA": "LoRA r = 16 of Qwen2.5-3B"}
    rows = []
    for record in found:
        if "unavailable_here" not in record:
            parts = [record[kind] for kind in kinds]
            sizes = [f"{part[name] / part['parameters']:.2f}" for part in parts for name in ("bytes", "largest")]
            rows.append([f"`{record['cell']['optimizers'][0]}`", *sizes])
    head = ["optimizer", *(name for words in kinds.values() for name in (words, "largest at any time"))]
    caption = "Bytes per parameter, measured after each step on a matrix of each shape or a strip of it."
    return grid(head, rows, f"{caption} {origin(found)}")


def scratch_table(found: Sequence[Record]) -> str:
    """Peak of what steps allocate."""
    rows = [
        {
            "optimizer": f"`{record['cell']['optimizers'][0]}`",
            "step": kind,
            "peak MiB": f"{figures['peak'] / MIB:,.1f}",
            "bytes/parameter": f"{figures['peak'] / record['parameters']:.2f}",
            "bytes/parameter of the largest shape": f"{figures['peak'] / record['largest_group']:.2f}",
            "largest allocation, MiB": f"{figures['largest_allocation'] / MIB:,.1f}",
        }
        for record in found
        for kind, figures in record["steps"].items()
    ]
    caption = f"The same load; above what was held before the step, through torch's allocator. {origin(found)}"
    return table(rows, caption)


def kernel_table(found: Sequence[Record]) -> str:
    """The native CUDA kernels against their PyTorch twins."""
    rows = [
        {
            "GPU": record["cell"]["device"],
            "kernel": f"`{name}`",
            "calls": record["calls"].get(name, 0),
            "largest difference / largest entry": "" if value is None else f"{value:.1e}",
            "within tolerance": "yes" if value is not None and value <= record["tolerance"] else "NO",
        }
        for record in found
        for name, value in [*record["differences"].items(), *((name, None) for name in record["never_called"])]
    ]
    return table(rows, origin(found))


def qlora_table(found: Sequence[Record]) -> str:
    """The 4-bit runs on a GPU."""
    rows = [
        {
            "GPU": record["cell"]["device"],
            "model": record["loaded"],
            "optimizer": f"`{name}`",
            "training loss, last third": f"{statistics.mean(run['loss'][-max(1, len(run['loss']) // 3) :]):.4f}",
            "s/step": f"{run['seconds_per_step']:.3f}",
            "/ AdamW": f"{run['seconds_per_step'] / record['runs']['adamw']['seconds_per_step']:.3f}",
            "optimizer, ms/step": f"{1e3 * run['optimizer_seconds_per_step']:.2f}",
            "peak GiB": f"{run['peak_allocated'] / 2**30:.2f}" if run["peak_allocated"] else "",
        }
        for record in found
        for name, run in record["runs"].items()
    ]
    cell = found[0]["cell"]
    notes = [f"{record['replaced']}." for record in found if record["replaced"]]
    caption = (
        f"NF4 with double quantisation, LoRA r = {cell['rank']}, {cell['steps']} steps of {cell['batch']} rows of at most "
        f"{cell['max_tokens']} tokens, gradient checkpointing, lr {cell['lr']:g}. {origin(found)}"
    )
    return table(rows, caption, *notes)


def tables(found: Sequence[Record]) -> dict[str, str]:
    """Every table by the name that a README asks for."""
    made: dict[str, str] = {}
    speed, gpu, memory = (
        [record for record in found if record["cell"]["benchmark"] == kind] for kind in ("speed", "gpu", "memory")
    )
    loads = {
        "load": "LoRA r = 16 of Qwen2.5-3B on all seven linear maps",
        "pair": "The LoRA r = 16 factors of one query and one value map of the same model, the part that the slowest can hold",
        "gpt2": "One block of GPT-2 small, both sides of each matrix large",
    }
    for name, words in loads.items():
        for kind, chosen in (("speed", speed), ("gpu", gpu)):
            if by_place := part(chosen, name):
                made[f"{kind}-{name}"] = step_table(by_place, words)
    for name, make in (("kernels", kernel_table), ("qlora", qlora_table)):
        if by_place := part(gpu, name):
            made[f"gpu-{name}"] = make(list(by_place.values()))
    sizes = {"state": state_table, "bfloat16": bfloat16_table, "scratch": scratch_table}
    for kind, chosen, makers in (("speed", speed, {"growth": growth_table}), ("memory", memory, sizes)):
        for name, make in makers.items():
            if measured := [record for record in chosen if record["cell"]["part"] == name]:
                made[f"{kind}-{name}"] = make(measured)
    if part(speed, "copy").keys() & part(speed, "load").keys():
        made["speed-roofline"] = roofline_table(speed)
    if training := part(speed, "training"):
        made["speed-training"] = training_table(training)
        if state := [record for record in memory if record["cell"]["part"] == "state"]:
            made["costs:claim"] = claim(state, training)
    return made


def plot(found: Sequence[Record], folder: Path) -> Path | None:
    """Step time against rank, side and layers, as one PNG; None where nothing was measured."""
    growth = [record for record in found if record["cell"]["part"] == "growth"]
    if not growth:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    for axis, varied in zip(axes, ("rank", "side", "layers"), strict=True):
        chosen = growth_cells(growth, varied)
        for name in ("scao", "adamw"):
            points = [(r["cell"][varied], r["figures"][name][f"{clock(r)}_ms_amortised"]) for r in chosen]
            axis.loglog(*zip(*points, strict=True), marker=".", label=name)
        axis.set(xlabel={"rank": "r", "side": "l", "layers": "layers"}[varied], ylabel="ms per step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "speed-growth.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
