"""Make Markdown tables and plots of the result files, and put the tables where a README asks for them.

    python examples/benchmarks/tables.py                          # print every table
    python examples/benchmarks/tables.py --write                  # bring the READMEs up to date
    python examples/benchmarks/tables.py --plots runs/benchmarks  # loss curves and learning-rate basins as PNG

A README asks with ``<!-- benchmark:NAME -->`` and ``<!-- /benchmark -->`` on lines of their own; what stands between
them is replaced. The names are printed above the tables.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import costs
import moe_tables
import published_tables
import survival_tables
import verdict_tables
from runs import Record, Setting, best_lr, crossing, loss_of, means, reversed_pairs, seconds, settings

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = ("benchmarks", "moe", "published-experiments", "survival")
READMES = (ROOT / "README.md", HERE / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES))
REFERENCE = "adamw"
MARKER = re.compile(r"(<!-- benchmark:(\S+) -->\n)(.*?)(<!-- /benchmark -->)", re.DOTALL)


def spread(values: Sequence[float], digits: int, unit: str = "", sign: bool = False) -> str:
    """Mean and standard deviation, as text."""
    mean = statistics.mean(values)
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "") + unit


def speed(setting: Setting, optimizer: str, lr: float, reference: dict[int, Record]) -> tuple[str, str]:
    """How many times fewer steps and seconds to AdamW's final loss at a learning rate; shorter runs count as well."""
    steps, times = [], []
    for seed, record in reference.items():
        runs = [r for r in setting.runs[optimizer] if r["cell"]["lr"] == lr and r["cell"]["seed"] == seed]
        if not runs:
            continue
        found = crossing(runs, loss_of(record))
        if found is None:
            return "not reached", "not reached"
        steps.append(setting.steps / found[0])
        times.append(seconds(record, record["evals"][-1]) / found[1])
    if not steps:
        return "", ""
    return f"{statistics.harmonic_mean(steps):.2f}x", f"{statistics.harmonic_mean(times):.2f}x"


def fresh(runs: dict[int, Record], reference: dict[int, Record], seed: int) -> bool:
    """Whether both have a training loss of the last third to compare."""
    return seed in reference and bool(runs[seed]["fresh_loss"] and reference[seed]["fresh_loss"])


def table(setting: Setting, variants: bool = True) -> str:
    """The comparison of a setting, one row per optimizer, the lowest loss first; with or without options of one."""
    if REFERENCE not in setting.runs or not setting.at(REFERENCE):
        return "(no AdamW runs of this length yet: nothing to compare with)\n"
    reference_lrs = setting.at(REFERENCE)
    reference_lr = best_lr(reference_lrs)
    reference = reference_lrs[reference_lr]
    lines = []
    for optimizer in list(setting.runs):
        by_lr = setting.at(optimizer)
        if not by_lr or (":" in optimizer and not variants):
            continue
        lr = best_lr(by_lr)
        records = by_lr[lr]
        lrs = list(by_lr)
        inside = "" if lrs[0] < lr < lrs[-1] else " (edge)" if len(lrs) > 1 else " (only one)"
        losses = [loss_of(record) for record in records.values()]
        shared = [seed for seed in records if seed in reference]
        gains = [100 * (loss_of(records[seed]) / loss_of(reference[seed]) - 1) for seed in shared]
        moved = by_lr.get(reference_lr, {})
        moved_gains = [100 * (loss_of(moved[s]) / loss_of(reference[s]) - 1) for s in moved if s in reference]
        moved_fresh = [
            100 * (moved[s]["fresh_loss"] / reference[s]["fresh_loss"] - 1) for s in moved if fresh(moved, reference, s)
        ]
        steps, times = speed(setting, optimizer, reference_lr, reference)
        own_steps, own_times = speed(setting, optimizer, lr, reference)
        everything = [record for seeds in by_lr.values() for record in seeds.values()]
        diverged = [record for record in everything if record["diverged"]]
        per_step = [
            1000
            * record["optimizer_cpu_seconds" if record["machine"]["threads"] == 1 else "optimizer_seconds"]
            / len(record["train_loss"])
            for record in records.values()
        ]
        lines.append(
            (
                statistics.mean(losses),
                [
                    f"`{optimizer}`",
                    f"{lr:g}{inside}",
                    f"{spread(losses, 4)} ({len(losses)})",
                    spread(gains, 2, " %", sign=True) if gains and optimizer != REFERENCE else "",
                    f"{own_steps} / {own_times}" if own_steps and optimizer != REFERENCE else "",
                    spread(moved_gains, 2, " %", sign=True) if moved_gains and optimizer != REFERENCE else "",
                    f"{steps} / {times}" if steps and optimizer != REFERENCE else "",
                    spread(moved_fresh, 2, " %", sign=True) if moved_fresh and optimizer != REFERENCE else "",
                    f"{statistics.median(per_step):.1f}",
                    f"{max(record['state_bytes_per_parameter'] for record in records.values()):.2f}",
                    f"{len(diverged)}/{len(everything)}",
                ],
            )
        )
    head = [
        "optimizer",
        "best lr",
        "held-out loss (seeds)",
        "against AdamW",
        "steps / seconds to AdamW's loss",
        f"at AdamW's lr {reference_lr:g}",
        "steps / seconds there",
        "training loss there",
        "optimizer ms/step",
        "state bytes/parameter",
        "diverged",
    ]
    rows = [row for _, row in sorted(lines, key=lambda line: line[0])]
    out = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    notes = [f"Not run: `{name}`: {reason}." for name, reason in sorted(setting.unavailable.items())]
    return "\n".join([*out, "", caption(setting), *(["", *notes] if notes else [])]) + "\n"


def caption(setting: Setting) -> str:
    """What was run, on what."""
    cell = setting.cell
    records = [record for runs in setting.runs.values() for record in runs]
    rank = f", LoRA r={cell['rank']}, alpha={cell['alpha']}" if "rank" in cell else ""
    cpus = sorted(
        {f"{r['machine']['gpu'] or r['machine']['cpu']}, {r['machine']['threads']} thread(s)" for r in records}
    )
    torches = sorted({record["versions"]["torch"] for record in records})
    return (
        f"{cell['model']}{rank}; {cell['data']} ({cell['data_sha256']}), held out: {cell['held_out']}; "
        f"{setting.steps} steps of {cell['batch']} rows of at most {cell['max_tokens']} tokens, {cell['schedule']} "
        f"schedule after {cell['warmup']} warm-up steps, clipping at {cell['clip']:g}, no weight decay; "
        f"{'; '.join(cpus)}; torch {', '.join(torches)}."
    )


def basin(setting: Setting) -> str:
    """Mean held-out loss of each optimizer at each learning rate."""
    grid = {optimizer: setting.at(optimizer) for optimizer in setting.runs}
    lrs = sorted({lr for by_lr in grid.values() for lr in by_lr})
    out = [f"| optimizer | {' | '.join(f'{lr:g}' for lr in lrs)} |", "|" + "---|" * (len(lrs) + 1)]
    for optimizer, by_lr in grid.items():
        if not by_lr:
            continue
        texts = []
        for lr in lrs:
            records = by_lr.get(lr, {}).values()
            if any(record["diverged"] for record in records):
                texts.append(f"diverged ({sum(record['diverged'] for record in records)}/{len(records)})")
            else:
                texts.append(f"{statistics.mean(map(loss_of, records)):.4f} ({len(records)})" if records else "")
        out.append(f"| `{optimizer}` | {' | '.join(texts)} |")
    return "\n".join(out) + "\n"


def compare(found: Iterable[Setting], committed: Iterable[Setting]) -> int:
    """Print whether tables order the optimizers as the committed ones do; 1 if not."""
    there = {setting.name: means(setting) for setting in committed}
    status = 0
    for setting in found:
        ours = means(setting)
        print(f"order in {setting.name}: {' < '.join(f'{name} {loss:.4f}' for name, loss in ours.items())}")
        if setting.name not in there:
            print("  no committed table has this name")
            continue
        theirs = there[setting.name]
        print(f"  committed: {' < '.join(f'{name} {loss:.4f}' for name, loss in theirs.items())}")
        for first, second in reversed_pairs(ours, theirs):
            print(f"  {first} and {second} have changed places")
            status = 1
    return status


def tables(found: Iterable[Setting]) -> dict[str, str]:
    """Every table by the name that a README asks for."""
    result = {}
    for setting in found:
        result[setting.name] = table(setting)
        result[f"{setting.name}:plain"] = table(setting, variants=False)
        result[f"{setting.name}:basin"] = basin(setting)
    return result


def read(paths: Iterable[Path]) -> tuple[list[Setting], list[costs.Record]]:
    """The settings of the sweeps and the measurements of speed and memory in result files."""
    sweeps, measured = [], []
    for path in paths:
        if path.name not in (moe_tables.FILE, survival_tables.FILE, *verdict_tables.FILES):
            (measured if path.name in costs.FILES else sweeps).append(path)
    return settings(sweeps), costs.records(measured)


def everything(paths: Sequence[Path]) -> dict[str, str]:
    """The tables of all result files, whatever was measured."""
    found, cost = read(paths)
    mixtures = moe_tables.tables(path for path in paths if path.name == moe_tables.FILE)
    survived = survival_tables.tables(path for path in paths if path.name == survival_tables.FILE)
    experiments = published_tables.tables(found, paths)
    return {**tables(found), **costs.tables(cost), **mixtures, **survived, **experiments}


def fill(text: str, made: dict[str, str]) -> str:
    """Put the tables between their markers.

    Raises:
        ValueError: a marker asks for a table that the result files do not give.
    """

    def one(match: re.Match[str]) -> str:
        if match[2] not in made:
            raise ValueError(f"no result file gives benchmark:{match[2]}; there are {', '.join(sorted(made))}")
        return f"{match[1]}{made[match[2]]}{match[4]}"

    return MARKER.sub(one, text)


def plot(setting: Setting, folder: Path) -> Path:
    """Loss against steps and seconds (each optimizer at its best learning rate) and the basin, in one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 4.5), constrained_layout=True)
    for optimizer in setting.runs:
        by_lr = setting.at(optimizer)
        if not by_lr:
            continue
        lr = best_lr(by_lr)
        runs = [record for record in by_lr[lr].values() if not record["diverged"]]
        if runs:
            points = [list(entries) for entries in zip(*(record["evals"] for record in runs), strict=True)]
            losses = [statistics.mean(entry["loss"] for entry in entries) for entries in points]
            times = [statistics.mean(map(seconds, runs, entries)) for entries in points]
            label = f"{optimizer} (lr {lr:g})"
            axes[0].plot([entries[0]["step"] for entries in points], losses, marker=".", label=label)
            axes[1].plot(times, losses, marker=".", label=label)
        finite = [(lr, [loss_of(r) for r in seeds.values()]) for lr, seeds in by_lr.items()]
        finite = [(lr, values) for lr, values in finite if max(values) < float("inf")]
        axes[2].plot(*zip(*((lr, statistics.mean(v)) for lr, v in finite), strict=True), marker=".", label=optimizer)
    for axis, label in zip(axes, ("step", "training seconds", "learning rate"), strict=True):
        axis.set(xlabel=label, ylabel="held-out loss")
        axis.grid(alpha=0.3)
    axes[2].set_xscale("log")
    axes[0].legend(fontsize="small")
    figure.suptitle(setting.name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{setting.name}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def main(argv: list[str] | None = None) -> int:
    """Print, write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="result files (default: examples/benchmarks/results)")
    parser.add_argument("--write", action="store_true", help="fill the READMEs in")
    parser.add_argument("--plots", type=Path, help="folder for plots")
    parser.add_argument("--compare", action="store_true", help="with the order of the committed tables")
    arguments = parser.parse_args(argv)
    committed = sorted((HERE / "results").glob("*.jsonl"))
    found, cost = read(arguments.results or committed)
    made = everything(arguments.results or committed)
    for name, text in made.items():
        print(f"## {name}\n\n{text}")
    if arguments.plots:
        for setting in found:
            print(f"plot: {plot(setting, arguments.plots)}")
        if growth := costs.plot(cost, arguments.plots):
            print(f"plot: {growth}")
    if arguments.compare and compare(found, read(committed)[0]):
        return 1
    for path in READMES if arguments.write else ():
        try:
            path.write_text(fill(path.read_text(encoding="utf-8"), made), encoding="utf-8")
        except ValueError as error:
            print(f"error: {path.name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
