"""The part of ``scao-hf report`` that looks at single matrices: scao_statistics.jsonl as heat maps and sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from scao_hf.options import LARGEST_RANK, OPTIONS, resolve
from scao_hf.report import METRICS, STATISTICS_NAME
from scao_hf.rules import rule_of
from scao_hf.tools import ToolError, json_rows, logged
from scao_hf.tools import page as html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A curvature norm that grows this many times between two records is out of the ordinary.
JUMP = 100.0
#: Captured mass below which a larger k_max is worth a try; in our runs it changed next to nothing above that.
LITTLE = 0.6
#: The figures that are drawn as heat maps: a title, and what each tells in plain words.
MAPS = {
    "rank": ("Rank by layer", "Directions in use, layer by layer over time; bright: many. Dark until phase 2."),
    "captured_mass": (
        "Captured mass by layer",
        "The share of the curvature that those directions hold: bright where few directions say nearly all.",
    ),
    "curvature_norm": (
        "Curvature norm by layer",
        "How large the curvature is. A bright stripe across all layers is an unusual batch, a bright row a layer that "
        "learns most.",
    ),
}


@dataclass
class Matrices:
    """What scao_statistics.jsonl holds of the latest run in it.

    Attributes:
        names: of the matrices.
        options: of the optimizer.
        steps: of the records.
        figures: by name, a row for each record, a number for each matrix.
        milliseconds: of each optimizer step, by step.
        whole: of each whole step, in the order in which they came.
        about: what the run is, in rows of name and value.
    """

    names: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    figures: dict[str, list[list[float]]] = field(default_factory=lambda: {key: [] for key in (*METRICS, "skipped")})
    milliseconds: dict[int, float] = field(default_factory=dict)
    whole: list[float] = field(default_factory=list)
    about: list[tuple[str, str]] = field(default_factory=list)

    def begin(self, header: dict[str, Any]) -> None:
        """Take in a header: what came after its step is forgotten, for the run was resumed there."""
        names = list(map(str, header["matrices"]))
        last = (
            header["from"] if names == self.names else 0
        )  # records of other matrices cannot be drawn in the same rows
        keep = sum(step <= last for step in self.steps)
        del self.steps[keep:]
        for rows in self.figures.values():
            del rows[keep:]
        self.milliseconds = {step: ms for step, ms in self.milliseconds.items() if step <= last}
        known = {name: value for name, value in header["options"].items() if name in OPTIONS and name != "rule"}
        self.names, self.options = names, resolve(header["options"]["rule"], known)
        self.about = _settings(header["run"], self.options) if header.get("run") else []

    def add(self, record: dict[str, Any]) -> None:
        """Take in a record."""
        step = int(record["step"])
        self.steps.append(step)
        for key, rows in self.figures.items():
            rows.append([logged(value) for _, value in zip(self.names, record[key], strict=True)])
        self.milliseconds.update(enumerate(map(logged, record["optimizer_ms"]), step - len(record["optimizer_ms"]) + 1))
        self.whole += map(logged, record.get("step_ms") or ())


def read_matrices(folder: Path) -> Matrices | None:
    """The file of the run whose state lies in that folder, or None where there is none.

    Raises:
        ToolError: the file is damaged.
    """
    path = next((p for p in (folder / STATISTICS_NAME, folder.parent / STATISTICS_NAME) if p.is_file()), None)
    if path is None:
        return None
    found = Matrices()
    try:
        for row in json_rows(path):
            (found.begin if "matrices" in row else found.add)(row)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ToolError(f"{path} is damaged: delete it to have the report without its heat maps") from error
    return found if found.steps and found.names else None


def _settings(about: dict[str, Any], options: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run is, from the header of its statistics."""
    sequences, accumulation, processes = about["batch"]
    batch = f"{sequences} x {accumulation} accumulated" + (f" x {processes} processes" if processes > 1 else "")
    rank = f", LoRA r = {about['lora_r']}" if about["lora_r"] else ""
    rule = options["rule"]
    defaults = resolve(rule, {})
    changed = {name: value for name, value in options.items() if defaults.get(name, value) != value}
    chosen = ", ".join(f"{name}={value}" for name, value in changed.items()) or "all options at their defaults"
    return [
        ("model", f"{about['model']}{rank}"),
        ("trained", f"{about['parameters']:,} parameters; {about['precision']} on {about['device']}"),
        ("learning rate", f"{about['learning_rate']:g}, {about['schedule']}"),
        ("batch", batch),
        ("SCAO", f"rule {rule}, {chosen}"),
        *([("optimizer state", f"{size / 2**20:,.1f} MiB at its peak")] if (size := about["state_bytes"]) else []),
        ("versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())),
    ]


def place(name: str) -> tuple[str, int | None]:
    """(side, layer) of a matrix by its name: A or B of a LoRA pair, else no side; the layer's number if it has one."""
    side = next((letter for letter in "AB" if f"lora_{letter}" in name or f"lora_embedding_{letter}" in name), "")
    number = re.search(r"\.(\d+)\.", name)
    return side, int(number[1]) if number else None


def grid(found: Matrices, key: str) -> dict[str, tuple[list[str], list[list[float]]]]:
    """For each side the labels of its rows and the means of the matrices in each row, a column for each record.

    A row is a layer; matrices outside of layers make a row of their own, called "other".
    """
    members: dict[str, dict[int, list[int]]] = {}
    for index, name in enumerate(found.names):
        side, layer = place(name)
        members.setdefault(side, {}).setdefault(-1 if layer is None else layer, []).append(index)
    result = {}
    for side, rows in sorted(members.items()):
        labels = ["other" if layer < 0 else str(layer) for layer in sorted(rows)]
        values = [[fmean(record[i] for i in rows[layer]) for record in found.figures[key]] for layer in sorted(rows)]
        result[side] = (labels, values)
    return result


def charts(found: Matrices) -> list[html.Chart]:
    """The heat maps."""
    return [html.Chart(title, words, partial(_draw, found, key)) for key, (title, words) in MAPS.items()]


def _draw(found: Matrices, key: str, figure: Figure) -> None:
    """Draw one heat map, a panel for each side; its colours are logarithmic where a curvature norm's range asks for it."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    grids = grid(found, key)
    above = [value for _, rows in grids.values() for row in rows for value in row if 0 < value < math.inf]
    if key == "curvature_norm" and above and max(above) > 3 * min(above):
        norm: Normalize = LogNorm(min(above), max(above))
    else:
        norm = Normalize(0, 1 if key == "captured_mass" else max([*above, 1e-30]))
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    between = [(a + b) / 2 for a, b in pairwise(found.steps)]
    edges = [found.steps[0] - 0.5, *between, found.steps[-1] + 0.5]
    mesh: Any = None
    for axes, (side, (labels, rows)) in zip(panels, grids.items(), strict=True):
        shown = [[value if norm.vmin is None or value >= norm.vmin else norm.vmin for value in row] for row in rows]
        mesh = axes.pcolormesh(edges, range(len(labels) + 1), shown, norm=norm, cmap="viridis", rasterized=True)
        every = max(1, -(-len(labels) // 12))
        axes.set_yticks([index + 0.5 for index in range(0, len(labels), every)], labels[::every])
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.set_title(f"LoRA {side}" if side else "", color=html.INK, fontsize=10)
        html.tidy(axes, "step", filled=True)
    panels[0].set_ylabel("layer", color=html.INK, fontsize=10)
    bar = figure.colorbar(mesh, ax=list(panels))
    bar.ax.tick_params(colors=html.INK, labelsize=10)
    bar.outline.set_edgecolor(html.INK)


def findings(found: Matrices, skipped: bool) -> list[str]:
    """What is out of the ordinary about single matrices, and when bases are refreshed, in plain sentences."""
    said = [_refreshes(found), *_times(found), *_limited(found), *_damped(found)]
    if skipped:
        said += _worst(found, "skipped", lambda rows: rows[-1], "was left as it was for {value:.0f} steps")
    return said + _worst(
        found, "curvature_norm", _jump, "has seen its curvature jump {value:.0f}-fold between two records", JUMP
    )


def _refreshes(found: Matrices) -> str:
    options = found.options
    turns = (
        "all at once"
        if options["rule"] == "published"
        else "at staggered steps, so that no step has to wait for all of them"
    )
    return (
        f"Each of the {len(found.names)} matrices refreshes its basis every {options['precond_freq']} steps, {turns}; "
        f"phase 2 begins after step {rule_of(options, matrix=True).phase1_steps(options)}."
    )


def _times(found: Matrices) -> list[str]:
    """A sentence about the usual and the slowest optimizer step, where they were timed."""
    if not found.milliseconds:
        return []
    slowest, usual = max(found.milliseconds, key=found.milliseconds.__getitem__), median(found.milliseconds.values())
    whole = median(found.whole) if found.whole else 0.0
    share = f" of {whole:,.0f} ms for the whole step: {usual / whole:.1%}" if whole else ""
    return [
        f"An optimizer step took {_three_digits(usual)} ms (median){share}; the slowest was step {slowest} with "
        f"{_three_digits(found.milliseconds[slowest])} ms."
    ]


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _limited(found: Matrices) -> list[str]:
    """A sentence where k_max leaves out most of the curvature of most matrices."""
    if not found.options:
        return []
    limit = found.options["k_max"] or LARGEST_RANK
    last = zip(found.figures["rank"][-1], found.figures["captured_mass"][-1], strict=True)
    held = [mass for rank, mass in last if rank >= limit]
    if 2 * len(held) <= len(found.names) or fmean(held) >= LITTLE:
        return []
    return [
        f"{len(held)} of {len(found.names)} matrices use all {limit} directions that k_max allows, and these hold only "
        f"{fmean(held):.0%} of the curvature: compare with k_max {2 * limit}, which takes about as much more state as the "
        "bases have now."
    ]


def _damped(found: Matrices) -> list[str]:
    """Of how many matrices the curvature is damped, and those that have none to damp in phase 2."""
    count, total = sum(value > 0 for value in found.figures["damped"][-1]), len(found.names)
    if found.options["rule"] == "published":
        said = [
            f"{count} of {total} matrices have a factor that is damped by a ten-thousandth of its mean, which is above eps: "
            "usual, but where gradients are tiny."
        ]
    elif count:
        said = [
            f"{count} of {total} matrices are damped at the end: to be as large as AdamW's, their steps would have to be "
            "scaled by more than two either way, and two is the bound."
        ]
    else:
        said = [
            "No matrix is damped at the end: every step is scaled to the size of AdamW's within the bounds of that."
        ]
    idle = sum(rank == 0 for rank in found.figures["rank"][-1])
    if 0 < idle < total:
        said.append(
            f"{idle} of {total} matrices have no direction in use: hardly any gradient has reached them so far."
        )
    return said


def _jump(values: list[float]) -> float:
    """The largest ratio of a record to the one before, leaving out the first tenth, in which an average builds up."""
    later = [value for value in values[len(values) // 10 :] if math.isfinite(value)]
    return max((b / a for a, b in pairwise(later) if a > 0), default=0.0)


def _worst(
    found: Matrices, key: str, measure: Callable[[list[float]], float], words: str, least: float = 0.0
) -> list[str]:
    """A sentence about the matrices, three at most, that have the largest figure above ``least``."""
    columns = zip(*found.figures[key], strict=True)
    values = {name: measure(list(column)) for name, column in zip(found.names, columns, strict=True)}
    worst = sorted((name for name in values if values[name] > least), key=lambda name: -values[name])
    said = [f"{name or 'A matrix'} {words.format(value=values[name])}." for name in worst[:3]]
    return [*said, f"So have {len(worst) - 3} more matrices."] if len(worst) > 3 else said
