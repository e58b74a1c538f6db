"""Make Markdown tables and plots of the result files, and put the tables where a README asks for them.

    python examples/benchmarks/tables.py                          # print every table
    python examples/benchmarks/tables.py --write                  # bring the READMEs up to date
    python examples/benchmarks/tables.py --plots runs/benchmarks  # loss curves, and losses by learning rate, as PNG

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
import sweep_tables
import verdict_tables
from runs import Setting, best_lr, held_out, loss_of, means, reversed_pairs, settings, step_seconds

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = ("index", "benchmarks", "choosing", "costs", "moe", "records", "published-experiments", "survival")
READMES = (ROOT / "README.md", HERE / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES))
MARKER = re.compile(r"(<!-- benchmark:(\S+) -->\n)(.*?)(<!-- /benchmark -->)", re.DOTALL)


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
    others = {**moe_tables.tables(paths), **survival_tables.tables(paths), **published_tables.tables(found, paths)}
    return {**sweep_tables.tables(found), **costs.tables(cost), **others}


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
    """Loss against steps and seconds (each optimizer at its best learning rate) and by learning rate, in one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 4.5), constrained_layout=True)
    drawn = 0
    for optimizer in setting.runs:
        by_lr = setting.at(optimizer)
        if not by_lr or sweep_tables.of_subject(optimizer):  # its options have a table
            continue
        lr = best_lr(by_lr)
        color = pyplot.get_cmap("tab20")(2 * drawn % 20 + drawn // 10)
        drawn += 1
        runs = [record for record in by_lr[lr].values() if not record["diverged"]]
        if runs:
            losses = held_out(runs)
            step = step_seconds(setting, runs, runs[:1])
            label = f"{optimizer} (lr {lr:g})"
            axes[0].plot(list(losses), list(losses.values()), marker=".", color=color, label=label)
            axes[1].plot([at * step for at in losses], list(losses.values()), marker=".", color=color)
        finite = [(lr, [loss_of(r) for r in seeds.values()]) for lr, seeds in by_lr.items()]
        finite = [(lr, values) for lr, values in finite if max(values) < float("inf")]
        axes[2].plot(*zip(*((lr, statistics.mean(v)) for lr, v in finite), strict=True), marker=".", color=color)
    for axis, label in zip(axes, ("step", "training seconds", "learning rate"), strict=True):
        axis.set(xlabel=label, ylabel="held-out loss")
        axis.grid(alpha=0.3)
    axes[2].set_xscale("log")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
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
    for path in arguments.results:
        if not path.is_file():
            parser.error(f"there is no result file {path}")
    committed = sorted((HERE / "results").glob("*.jsonl"))
    try:
        found, cost = read(arguments.results or committed)
        made = everything(arguments.results or committed)
    except ValueError as error:  # a line that is not JSON, two settings of one name
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, text in made.items():
        print(f"## {name}\n\n{text}")
    if arguments.plots:
        for setting in found:
            print(f"plot: {plot(setting, arguments.plots)}")
        if growth := costs.plot(cost, arguments.plots):
            print(f"plot: {growth}")
    if arguments.compare and compare(found, read(committed)[0]):
        return 1
    status = 0
    for path in READMES if arguments.write else ():
        try:
            path.write_text(fill(path.read_text(encoding="utf-8"), made), encoding="utf-8")
        except ValueError as error:
            print(f"error: {path.name}: {error}", file=sys.stderr)
            status = 1  # the other pages are still brought up to date
    return status


if __name__ == "__main__":
    sys.exit(main())
