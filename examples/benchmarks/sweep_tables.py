"""The tables of sweeps: one comparison and one learning-rate basin per setting, and a summary of all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from runs import Record, Setting, best_lr, crossing, loss_of, seconds
from texts import spread, table

REFERENCE = "adamw"


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


def change(
    runs: dict[int, Record], reference: dict[int, Record], loss: Callable[[Record], float | None]
) -> list[float]:
    """By how many per cent a loss differs from the reference's, seed by seed, where both have one."""
    pairs = [(loss(runs[seed]), loss(reference[seed])) for seed in runs if seed in reference]
    return [100 * (ours / theirs - 1) for ours, theirs in pairs if ours and theirs]


def fresh_loss(record: Record) -> float | None:
    """The training loss of the last third, None for a run that is not whole."""
    found: float | None = record["fresh_loss"]
    return found


def rate(lr: float, lrs: Collection[float]) -> str:
    """A best learning rate, with a mark where no worse one was tried on both sides."""
    inside = "" if min(lrs) < lr < max(lrs) else " (edge)" if len(lrs) > 1 else " (only one)"
    return f"{lr:g}{inside}"


def comparison(setting: Setting, variants: bool = True) -> str:
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
        losses = [loss_of(record) for record in records.values()]
        gains = change(records, reference, loss_of)
        moved = by_lr.get(reference_lr, {})
        moved_gains = change(moved, reference, loss_of)
        moved_fresh = change(moved, reference, fresh_loss)
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
                    rate(lr, by_lr),
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
    notes = [f"Not run: `{name}`: {reason}." for name, reason in sorted(setting.unavailable.items())]
    return "\n".join([table(head, rows), caption(setting), *(["", *notes] if notes else [])]) + "\n"


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
    rows = []
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
        rows.append([f"`{optimizer}`", *texts])
    return table(["optimizer", *(f"{lr:g}" for lr in lrs)], rows)


def glance(found: Iterable[Setting], subject: str = "scao") -> str:
    """One row per setting: AdamW at its best learning rate against ``subject`` at the same rate, and at its own.

    Only settings in which both have run at that rate are there, with the seeds that both have.
    """
    head = [
        "setting",
        "seeds",
        "lr",
        "AdamW",
        f"`{subject}` at the same lr",
        "difference",
        "training loss",
        "steps / seconds to AdamW's loss",
        f"`{subject}` at its best lr",
    ]
    rows = []
    for setting in sorted(found, key=lambda setting: (setting.cell["task"], setting.cell.get("rank", 0), setting.name)):
        ours, theirs = setting.at(subject), setting.at(REFERENCE)
        lr = best_lr(theirs) if theirs else 0.0
        shared = sorted(set(ours.get(lr, {})) & set(theirs.get(lr, {})))
        if not shared:
            continue
        reference = {seed: theirs[lr][seed] for seed in shared}
        moved = ours[lr]
        gains, trained = change(moved, reference, loss_of), change(moved, reference, fresh_loss)
        steps, times = speed(setting, subject, lr, reference)
        own = best_lr(ours)
        rows.append(
            [
                title(setting),
                str(len(shared)),
                rate(lr, theirs),
                spread([loss_of(reference[seed]) for seed in shared], 4),
                spread([loss_of(moved[seed]) for seed in shared], 4),
                spread(gains, 2, " %", sign=True),
                spread(trained, 2, " %", sign=True) if trained else "",
                f"{steps} / {times}",
                f"{statistics.mean(map(loss_of, ours[own].values())):.4f} at {own:g}",
            ]
        )
    return table(head, rows)


def title(setting: Setting) -> str:
    """What a row of the summary calls a setting."""
    cell = setting.cell
    rank = f", LoRA r={cell['rank']}" if "rank" in cell else ""
    model = cell["model"].split(",")[0].split(" (")[0]
    return f"{model}{rank}, {Path(cell['data']).stem}, {cell['schedule']}, {setting.steps} steps"


def tables(found: Sequence[Setting]) -> dict[str, str]:
    """Every table by the name that a README asks for."""
    result = {}
    for setting in found:
        result[setting.name] = comparison(setting)
        result[f"{setting.name}:plain"] = comparison(setting, variants=False)
        result[f"{setting.name}:basin"] = basin(setting)
    result["glance"] = glance(found)
    return result
