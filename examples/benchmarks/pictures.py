"""Draw the pictures of README and docs from the result files, as SVG that follows the reader's light or dark theme.

    python examples/benchmarks/pictures.py      # write docs/pictures/*.svg

A picture is a function of the records alone: tests/test_benchmarks.py draws each one again and compares.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import costs
import sweep_tables
from runs import Record, Setting, best_lr, held_out, loss_of, step_seconds
from tables import HERE, ROOT, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = ROOT / "docs" / "pictures"
INK, PAPER, GRID = "#1b1f24", "#fdfdfd", "#d0d5db"
NAMES = {"adamw": "AdamW", "scao": "SCAO"}
COLOURS = {"adamw": "#b35400", "scao": "#1f5fbf"}
DARK = {INK: "#e8ebef", PAPER: "#16191d", GRID: "#3b424b", COLOURS["adamw"]: "#ffa657", COLOURS["scao"]: "#79b0ff"}
#: Diagrams in the same folder that show no record.
BY_HAND = ("how-it-works.svg",)
#: What the README says in a word: label, and where pyproject.toml has the value.
BADGES = {
    "license": r'^license = "(.*)"$',
    "python": r'^requires-python = "(.*)"$',
    "torch": r'"torch(>=[\d.]+)"',
    "axolotl": r'"axolotl(>=[\d.]+)"',
}
#: Bytes per parameter up to which an optimizer's state is drawn; the others are named below the bars.
LARGEST = 12


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last ``width`` values, from the first of which there are as many."""
    return [statistics.mean(values[end - width : end]) for end in range(width, len(values) + 1)]


def loss(setting: Setting, figure: Figure) -> str:
    """Training and held-out loss at AdamW's best rate, over steps and, if measured on one machine, over minutes."""
    width = max(1, setting.steps // 15)
    both = dict(zip(NAMES, (list(runs.values()) for runs in sweep_tables.same_rate(setting)), strict=True))
    reference = both["adamw"]
    seconds = {optimizer: step_seconds(setting, runs, reference) for optimizer, runs in both.items()}
    scales = {"step": dict.fromkeys(NAMES, 1.0)}  # of a step, by optimizer
    minutes = {optimizer: second / 60 for optimizer, second in seconds.items() if second}
    if len(minutes) == len(NAMES):
        scales["minutes on one CPU thread"] = minutes
    axes = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    said = []
    for optimizer, name in NAMES.items():
        found = both[optimizer]
        curves = [smooth(record["train_loss"], width) for record in found]
        by_step = list(zip(*curves, strict=True))
        means = [statistics.mean(values) for values in by_step]
        losses = held_out(found)
        for axis, unit in zip(axes, scales.values(), strict=True):
            times = [step * unit[optimizer] for step in range(width, width + len(by_step))]
            axis.fill_between(times, *map(list, zip(*((min(v), max(v)) for v in by_step), strict=True)), alpha=0.25)
            axis.collections[-1].set(facecolor=COLOURS[optimizer], linewidth=0)
            axis.plot(times, means, color=COLOURS[optimizer], linewidth=1.8, label=f"{name}, training")
            axis.plot(
                [step * unit[optimizer] for step in losses],
                list(losses.values()),
                **{"color": COLOURS[optimizer], "marker": "o", "linestyle": ":", "label": f"{name}, held out"},
            )
        said.append(f"{name} {statistics.mean(map(loss_of, found)):.4f}")
    for axis, label in zip(axes, scales, strict=True):
        axis.set(xlabel=label, xlim=(0, None))
    axes[0].set_ylabel("loss")
    early = axes[0].lines[0].get_ydata()[setting.steps // 15]  # what comes before is much higher, and the same for both
    axes[0].set_ylim(None, 1.05 * early)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    rate = best_lr(setting.at("adamw"))
    seeds = len(reference)
    figure.suptitle(f"{brief(setting)}, rate {rate:g}, {seeds} seeds (band: lowest to highest)", fontsize=10)
    return f"Held-out loss at the end, {sweep_tables.title(setting)}: {', '.join(said)}"


def brief(setting: Setting) -> str:
    """What a picture calls a setting."""
    cell = setting.cell
    rank = f", LoRA r = {cell['rank']}" if "rank" in cell else ""
    shape = "" if cell["schedule"] == "cosine" else f", {cell['schedule']} rate"
    model = cell["model"].split(",")[0].split(" (")[0].removesuffix("-Instruct")
    return (
        f"{model}{rank}, {Path(cell['data']).stem.split('_')[0]}{shape}, {setting.steps} steps of {cell['batch']} rows"
    )


def rates(found: Iterable[Setting], figure: Figure) -> str:
    """Held-out loss by learning rate: a line through the seed that every rate has, a dot for each other run."""
    order = sorted(found, key=lambda it: (it.cell["task"], it.cell["schedule"], it.cell.get("rank", 0), it.steps))
    drawn = [(setting, curves) for setting in order if (curves := basins(setting))]
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure.set_figheight(0.5 + 1.75 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    said = []
    for axis in axes[len(drawn) :]:
        axis.set_axis_off()
    for axis, (setting, curves) in zip(axes, drawn, strict=False):
        for optimizer, (seed, by_lr) in curves.items():
            line = [(lr, loss_of(seeds[seed])) for lr, seeds in by_lr.items() if seed in seeds]
            others = [(lr, loss_of(r)) for lr, seeds in by_lr.items() for key, r in seeds.items() if key != seed]
            axis.plot(*zip(*line, strict=True), color=COLOURS[optimizer], marker="o", label=NAMES[optimizer])
            if others:
                axis.plot(*zip(*others, strict=True), color=COLOURS[optimizer], marker=".", linestyle="", alpha=0.6)
        lowest = [min(line.get_ydata()) for line in axis.lines]
        axis.set_ylim(None, min(axis.get_ylim()[1], max(1.1 * min(lowest), 1.02 * max(lowest))))
        axis.set_xscale("log", base=2)
        rates = sorted({lr for _, by_lr in curves.values() for lr in by_lr})
        axis.set_xticks(rates, [f"{lr:g}" for lr in rates])
        axis.minorticks_off()
        axis.set_title(brief(setting).replace(", LoRA", "\nLoRA"), fontsize=8, color=INK)
        said.append(
            f"{brief(setting)}: best " + ", ".join(f"{NAMES[o]} {best_lr(b):g}" for o, (_, b) in curves.items())
        )
    axes[0].set_ylabel("held-out loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return "; ".join(said)


def basins(setting: Setting) -> dict[str, tuple[int, dict[float, dict[int, Record]]]]:
    """AdamW's and SCAO's runs by rate with the seed of the line; nothing where one has fewer than three rates."""
    found = {}
    for optimizer in NAMES:
        by_lr = {
            lr: seeds for lr, seeds in setting.at(optimizer).items() if max(map(loss_of, seeds.values())) < math.inf
        }
        counts = {seed: sum(seed in seeds for seeds in by_lr.values()) for seeds in by_lr.values() for seed in seeds}
        seed = max(counts, key=lambda seed: (counts[seed], -seed), default=0)
        if counts.get(seed, 0) < 3 or setting.cell["task"] == "gpt":
            return {}
        found[optimizer] = (seed, by_lr)
    return found


def state(records: Iterable[costs.Record], figure: Figure) -> str:
    """Bytes of state per parameter of one LoRA load: while phase 2 holds, and the largest at any time."""
    held = {}
    for record in records:
        if record["cell"]["benchmark"] == "memory" and record["cell"]["part"] == "state":
            peak = record.get("report", {}).get("peak", record["bytes"])
            held[record["cell"]["optimizers"][0]] = [v / record["parameters"] for v in (record["bytes"], peak)]
            rank, count = record["cell"]["rank"], record["parameters"]
    shown = sorted((name for name, values in held.items() if max(values) < LARGEST), key=lambda n: (held[n][1], n))
    axis = figure.subplots()
    for at, name in enumerate(shown):
        rest, peak = held[name]
        colour = COLOURS["scao" if name.startswith("scao") else "adamw"]
        axis.barh(at, peak, color=colour, alpha=0.35, height=0.7)
        axis.barh(at, rest, color=colour, height=0.7)
        axis.text(max(rest, peak) + 0.1, at, f"{rest:.2f}" + (f" (peak {peak:.2f})" if peak > rest + 0.01 else ""))
        axis.texts[-1].set(va="center", fontsize=9, color=INK)
    labels = [name.replace(":", "\n", 1).replace(":", ", ").replace("'", "") for name in shown]
    axis.set_yticks(range(len(shown)), labels)
    axis.set(xlabel="bytes of optimizer state per trained parameter", xlim=(0, 10))
    more = ", ".join(
        f"{name} {values[0]:.0f}" for name, values in held.items() if name not in shown and ":" not in name
    )
    figure.suptitle(f"LoRA r = {rank}, {count / 1e6:.1f} million parameters in float32; not drawn: {more}", fontsize=10)
    return "; ".join(f"{name} {held[name][0]:.2f}, peak {held[name][1]:.2f}" for name in shown)


def ranks(found: dict[str, Any], figure: Figure) -> str:
    """Directions in use and the share of the curvature that they hold, over a run: mean and range of the layers."""
    axes = figure.subplots(1, 2)
    said = []
    for axis, (key, label) in zip(
        axes, (("rank", "directions in use"), ("captured_mass", "captured mass")), strict=True
    ):
        for (side, layers), colour in zip(sorted(found[key].items()), COLOURS.values(), strict=True):
            columns = list(zip(*layers, strict=True))
            axis.fill_between(found["steps"], list(map(min, columns)), list(map(max, columns)), alpha=0.25)
            axis.collections[-1].set(facecolor=colour, linewidth=0)
            means = [statistics.mean(values) for values in columns]
            axis.plot(found["steps"], means, color=colour, linewidth=1.8, label=f"LoRA {side}")
            said.append(f"{label} of {side} {means[-1]:.2f}")
        axis.set(xlabel="step", ylabel=label, xlim=(0, None), ylim=(0, None))
    axes[0].axhline(found["k_max"], color=INK, linewidth=0.8, linestyle="--")
    axes[0].text(1, found["k_max"], "k_max", va="bottom", fontsize=8, color=INK)
    axes[0].set_ylim(0, 1.15 * found["k_max"])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    rate = found["run"]["learning rate"]
    figure.suptitle(f"{found['title']}, rate {rate} (band: lowest to highest layer)", fontsize=10)
    return f"At the end of {found['steps'][-1]} steps: {', '.join(said)}"


def badge(label: str, value: str) -> str:
    """A word and its value on two fields; it needs no service."""
    left, right = (10 + 7 * len(text) for text in (label, value))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}: {escape(value)}" width="{left + right}" '
        f'height="20" font-family="sans-serif" font-size="11" text-anchor="middle" fill="#ffffff">'
        f'<rect width="{left + right}" height="20" rx="3" fill="#3f4753"/>'
        f'<rect x="{left}" width="{right}" height="20" rx="3" fill="{COLOURS["scao"]}"/>'
        f'<text x="{left / 2}" y="14">{label}</text><text x="{left + right / 2}" y="14">{escape(value)}</text></svg>\n'
    )


def finish(figure: Figure, text: str, name: str) -> str:
    """A figure as SVG: text stays text, and every colour has one for dark surroundings."""
    for axis in figure.axes:
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(colors=INK, labelsize=8)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        plain(axis)
    for legend in figure.legends:
        for label in legend.get_texts():
            label.set_color(INK)
    if figure.get_suptitle():
        figure.suptitle(figure.get_suptitle(), fontsize=10, color=INK)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Description": text})
    svg = buffer.getvalue()
    names = {INK: "ink", PAPER: "paper", GRID: "grid", COLOURS["adamw"]: "adamw", COLOURS["scao"]: "scao"}
    for colour, variable in names.items():
        svg = svg.replace(colour, f"var(--{variable})")
    light, dark = (
        " ".join(f"--{variable}: {(DARK[colour] if other else colour)};" for colour, variable in names.items())
        for other in (False, True)
    )
    style = f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    svg = svg.replace(" <defs>", f" {style}\n <defs>", 1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}: {text}" ', 1)


def plain(axis: Axes) -> None:
    """Only the left and the lower frame, on the paper's colour."""
    axis.patch.set_alpha(0)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def draw(paths: Sequence[Path]) -> dict[str, str]:
    """Every picture by its file's name."""
    import matplotlib
    from matplotlib.figure import Figure

    found, measured = read(paths)
    claimed = next(setting for setting in found if setting.name == sweep_tables.CLAIM)
    pictures = {
        "loss.svg": ((9, 3.6), lambda figure: loss(claimed, figure)),
        "rates.svg": ((9, 3.6), lambda figure: rates(found, figure)),
        "state.svg": ((9, 4.2), lambda figure: state(measured, figure)),
        "ranks.svg": (
            (9, 3.4),
            lambda figure: ranks(json.loads((HERE / "results" / "ranks.json").read_text()), figure),
        ),
    }
    made = {}
    for name, (size, fill) in pictures.items():
        settings = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "text.color": INK}
        with matplotlib.rc_context(settings):
            figure = Figure(figsize=size, layout="constrained", facecolor=PAPER)
            made[name] = finish(figure, fill(figure), name.removesuffix(".svg"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for label, pattern in BADGES.items():
        value = re.findall(pattern, project, re.MULTILINE)[0].replace(">=", ">= ")
        made[f"badge-{label}.svg"] = badge(label, value)
    return made


def main() -> None:
    """Write the pictures."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, svg in draw(sorted((HERE / "results").glob("*.jsonl"))).items():
        (FOLDER / name).write_text(svg, encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
