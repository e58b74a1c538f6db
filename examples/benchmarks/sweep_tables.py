"""The tables of sweeps: optimizers against each other, SCAO's options, every rate that was tried, and a summary."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import peers
import sweep
from runs import (
    EARLIER,
    OTHER_MACHINE,
    Record,
    Setting,
    beside,
    best_lr,
    crossing,
    enclosure,
    loss_of,
    optimizer_seconds,
    step_seconds,
)
from texts import grid, spread, table

from scao_hf.options import OPTIONS

REFERENCE = "adamw"
SUBJECT = "scao"
#: What the README rests on: the setting of its claim, and those of its table.
CLAIM = "qlora-r16-b16-cosine-300"
EVIDENCE = (CLAIM, "qlora-r8-b16-cosine-60", "qlora-r8-cosine-60", "full-cosine-60", "gpt-cosine-500")


#: The head of a column: how many times sooner AdamW's final loss is reached.
SPEED_UP = "speed-up to AdamW's loss: steps / seconds"


def of_subject(optimizer: str) -> bool:
    """Whether it is SCAO with options of its own, which belongs into the table of options."""
    return optimizer.startswith(f"{SUBJECT}:")


def reference_runs(setting: Setting) -> dict[int, Record]:
    """AdamW's runs at its best rate, by seed."""
    by_lr = setting.at(REFERENCE)
    return by_lr[best_lr(by_lr)] if by_lr else {}


def sooner(setting: Setting, optimizer: str, lr: float, reference: dict[int, Record]) -> str:
    """How many times sooner AdamW's final loss is reached, in steps and in seconds; shorter runs count as well."""
    steps = []
    for seed, record in reference.items():
        runs = [r for r in setting.runs[optimizer] if r["cell"]["lr"] == lr and r["cell"]["seed"] == seed]
        if not runs:
            continue
        found = crossing(runs, loss_of(record))
        if found is None:
            return "not reached"
        steps.append(setting.steps / found)
    if not steps:
        return ""
    factor = statistics.harmonic_mean(steps)
    theirs = list(reference.values())
    own, usual = (step_seconds(setting, of, theirs) for of in (setting.at(optimizer)[lr].values(), theirs))
    return f"{factor:.2f}x / " + (f"{factor * usual / own:.2f}x" if own and usual else OTHER_MACHINE)


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


def percent(gains: Sequence[float]) -> str:
    """Differences in per cent, seed by seed, as mean and deviation."""
    return spread(gains, 2, " %", sign=True) if gains else ""


def state(records: Iterable[Record]) -> str:
    """Bytes of optimizer state for each trained parameter."""
    return f"{max(record['state_bytes_per_parameter'] for record in records):.2f}"


def right(records: Iterable[Record]) -> str:
    """The share of held-out answers that are right in full, in per cent."""
    found = [100 * record["exact_match"] for record in records if record.get("exact_match") is not None]
    return spread(found, 1, " %") if found else ""


def milliseconds(records: Iterable[Record], reference: Sequence[Record] = ()) -> str:
    """Of the optimizer's part of a step, where it can be compared with the reference's."""
    comparable = beside(records, reference)
    return f"{1000 * statistics.median(map(optimizer_seconds, comparable)):.1f}" if comparable else OTHER_MACHINE


def comparison(setting: Setting) -> str:
    """Every optimizer at its best rate, the largest gain on AdamW first; SCAO as it comes, without options."""
    reference = reference_runs(setting)
    if not reference:
        return "(no AdamW runs of this length yet: nothing to compare with)\n"
    answers = any(record.get("exact_match") for records in setting.runs.values() for record in records)
    lines = []
    for optimizer in list(setting.runs):
        by_lr = setting.at(optimizer)
        if not by_lr or of_subject(optimizer):
            continue
        lr, usual = best_lr(by_lr), optimizer == REFERENCE
        records = by_lr[lr]
        losses = [loss_of(record) for record in records.values()]
        gains = change(records, reference, loss_of)
        row = {
            "optimizer": setting.label(optimizer),
            "best rate": f"{lr:g} ({enclosure(by_lr)})",
            "held-out loss (seeds)": f"{spread(losses, 4)} ({len(losses)})",
            "against AdamW": "" if usual else percent(gains),
            "training loss": "" if usual else percent(change(records, reference, fresh_loss)),
            SPEED_UP: "" if usual else sooner(setting, optimizer, lr, reference),
            "ms/step": milliseconds(records.values(), () if usual else list(reference.values())),
            "state, bytes/parameter": state(records.values()),
            **({"right answers": right(records.values())} if answers else {}),
        }
        # By the difference on the same seeds: means over other seeds would not be comparable.
        lines.append(((not gains, statistics.mean(gains or losses)), row))
    rows = [row for _, row in sorted(lines, key=lambda line: line[0])]
    notes = [f"Not run: `{name}`: {reason}." for name, reason in sorted(setting.unavailable.items())]
    return table(rows, caption(setting), "", diverged(setting), *notes)


def diverged(setting: Setting) -> str:
    """Which runs of a setting diverged, at whatever rate."""
    found = []
    for optimizer in setting.runs:
        for lr, seeds in setting.at(optimizer).items():
            if count := sum(record["diverged"] for record in seeds.values()):
                found.append(f"`{optimizer}` at {lr:g} ({count} of {len(seeds)})")
    return f"Diverged: {', '.join(found)}." if found else "No run diverged at any rate."


def caption(setting: Setting) -> str:
    """What was run, on what."""
    cell = setting.cell
    records = [record for runs in setting.runs.values() for record in runs]
    rank = f", LoRA r={cell['rank']}, alpha={cell['alpha']}" if "rank" in cell else ""
    cpus = sorted(
        {f"{r['machine']['gpu'] or r['machine']['cpu']}, {r['machine']['threads']} thread(s)" for r in records}
    )
    torches = sorted({record["versions"]["torch"] for record in records})
    backends = [json.loads(r["versions"]["scao_hf backend"]) for r in records if "scao_hf backend" in r["versions"]]
    device = "cuda" if any(r["machine"]["gpu"] for r in records) else "cpu"
    kernels = sorted({backend[device] for backend in backends})
    shorter = f"`{SUBJECT}` in shorter runs: {found}; " if (found := shorter_runs(setting)) else ""
    return (
        f"{cell['model']}{rank}; {cell['data']} ({cell['data_sha256']}), held out: {cell['held_out']}; "
        f"{setting.steps} steps of {cell['batch']} rows of at most {cell['max_tokens']} tokens, {cell['schedule']} "
        f"schedule after {cell['warmup']} warm-up steps, clipping at {cell['clip']:g}, no weight decay; "
        f"{shorter}{'; '.join(cpus)}; torch {', '.join(torches)}"
        + (f"; SCAO's kernels: {', '.join(kernels)}." if kernels else ".")
    )


def shorter_runs(setting: Setting) -> str:
    """How SCAO's runs ended that were shorter than the setting's, at its best rate of each length."""
    found = []
    for steps in sorted({run["cell"]["steps"] for run in setting.runs[SUBJECT]} - {setting.steps}):
        by_lr = setting.at(SUBJECT, steps)
        lr = best_lr(by_lr)
        losses = [loss_of(record) for record in by_lr[lr].values()]
        found.append(f"{steps} steps at rate {lr:g}, {spread(losses, 4)} ({len(losses)})")
    return "; ".join(found)


def rates(setting: Setting) -> str:
    """The mean held-out loss of each optimizer at each rate that was tried, the best one in bold."""
    rows = []
    for optimizer in list(setting.runs):
        by_lr = setting.at(optimizer)
        if not by_lr or (of_subject(optimizer) and len(by_lr) == 1):
            continue  # a single rate of an option is in the table of options
        texts = []
        for lr, seeds in by_lr.items():
            bad = sum(record["diverged"] for record in seeds.values())
            loss = "" if bad else f"{statistics.mean(map(loss_of, seeds.values())):.4f} ({len(seeds)})"
            text = f"{lr:g}: " + (f"diverged ({bad}/{len(seeds)})" if bad else loss)
            texts.append(f"**{text}**" if lr == best_lr(by_lr) else text)
        rows.append([setting.label(optimizer), ", ".join(texts)])
    return grid(["optimizer", "rate: held-out loss (seeds)"], rows)


def options(found: Iterable[Setting]) -> str:
    """What options change: runs of SCAO with options against SCAO without, at one rate, on the same seeds.

    ``scao`` and its options have to have run for the same number of steps, and both be today's or both of an earlier
    version; single options come first.
    """
    rows: list[list[str]] = []
    alone = set()
    for setting in found:
        for optimizer in filter(of_subject, list(setting.runs)):
            passed, today = optimizer.split(":")[1:], setting.is_current(optimizer)
            if setting.is_current(SUBJECT) != today:
                continue
            for steps in sorted({record["cell"]["steps"] for record in setting.runs[optimizer]}):
                usual = setting.at(SUBJECT, steps)
                for lr, seeds in setting.at(optimizer, steps).items():
                    gains = change(seeds, usual.get(lr, {}), loss_of)
                    if not gains:
                        continue
                    if len(passed) == 1:
                        alone.add(passed[0].partition("=")[0])
                    ours, theirs = list(seeds.values()), [usual[lr][seed] for seed in seeds if seed in usual[lr]]
                    where = f"{brief(setting, steps)}, rate {lr:g}" + ("" if today else f" ({EARLIER})")
                    row = [", ".join(f"`{option}`" for option in passed), where, f"{percent(gains)} ({len(gains)})"]
                    times = f"{milliseconds(ours)} ({milliseconds(theirs, ours)})"
                    rows.append([*row, times, f"{state(ours)} ({state(theirs)})"])
    head = ["set", "in", "held-out loss against the default's (seeds)"]
    head += ["ms/step (default)", "state, bytes/parameter (default)"]
    rows.sort(key=lambda row: (row[0].count(","), row))
    missing = [f"`{name}`" for name in ("betas", *OPTIONS) if name not in alone]
    note = f"\nWithout a record of its own so far: {', '.join(missing)}.\n" if missing else ""
    return grid(head, rows) + note


def brief(setting: Setting, steps: int) -> str:
    """A setting in a few words."""
    cell = setting.cell
    rank = f", r = {cell['rank']}" if "rank" in cell else ""
    shape = "" if cell["schedule"] == "cosine" else f", {cell['schedule']}"
    rows = "" if setting.usual_batch else f" of {cell['batch']} rows"
    return f"{' '.join(setting.trained)}{rank}{shape}, {steps} steps{rows}"


def glance(found: Iterable[Setting]) -> str:
    """One row per setting: AdamW at its best rate against SCAO at the same rate, and what has to be known about it.

    Only settings in which both have run at that rate are there, with the seeds that both have, and AdamW with two or more.
    """
    rows, elsewhere, ahead = [], [], []
    order = list(sweep.BATCH)  # fine-tuning, what SCAO is meant for, before training from scratch
    for setting in sorted(found, key=lambda it: (order.index(it.cell["task"]), it.cell.get("rank", 0), it.name)):
        ours, theirs = setting.at(SUBJECT), setting.at(REFERENCE)
        reference, moved = same_rate(setting)
        if not reference or len(reference_runs(setting)) < 2:
            continue
        lr, name = best_lr(theirs), title(setting)
        words = {"AdamW": enclosure(theirs), "SCAO": enclosure(ours)}
        marks = ", ".join(f"{who}: {word}" for who, word in words.items() if word != "enclosed")
        row = [name, str(len(reference)), f"{lr:g}" + (f" ({marks})" if marks else "")]
        row += [*both_losses(reference, moved, 4), sooner(setting, SUBJECT, lr, reference)]
        rows.append([*row, f"{state(moved.values())} ({state(reference.values())})"])
        if best_lr(ours) != lr:
            elsewhere.append(f"{name}: {best_lr(ours):g}")
        for optimizer, gains in ahead_in(setting):
            ahead.append(f"`{optimizer}` in {name}: loss {percent(gains)} (seeds: {len(gains)})")
    notes = ""
    for words, found_there in (
        ("Settings in which another rate than AdamW's best suits SCAO better, with that rate:", elsewhere),
        ("Where another optimizer wins, each at its own best rate:", ahead or ["none of those that were run"]),
    ):
        if found_there:
            notes += "\n" + words + "\n\n" + "".join(f"- {item}\n" for item in found_there)
    head = ["setting", "seeds", "rate", "AdamW", "SCAO", "difference", SPEED_UP]
    return grid([*head, "state in phase 2, bytes/parameter: SCAO (AdamW)"], rows) + notes


def both_losses(theirs: dict[int, Record], ours: dict[int, Record], digits: int) -> list[str]:
    """AdamW's held-out loss, SCAO's, and the difference."""
    both = [spread([loss_of(record) for record in runs.values()], digits) for runs in (theirs, ours)]
    return [*both, percent(change(ours, theirs, loss_of))]


def same_rate(setting: Setting) -> tuple[dict[int, Record], dict[int, Record]]:
    """AdamW's and SCAO's runs at AdamW's best rate, on the seeds that both have."""
    reference = reference_runs(setting)
    ours = setting.at(SUBJECT).get(best_lr(setting.at(REFERENCE)), {}) if reference else {}
    shared = sorted(reference.keys() & ours.keys())
    return {seed: reference[seed] for seed in shared}, {seed: ours[seed] for seed in shared}


def claim(setting: Setting) -> str:
    """What SCAO is worth in one setting, with everything that it depends on, in one paragraph."""
    theirs, ours = same_rate(setting)
    cell, lr = setting.cell, best_lr(setting.at(REFERENCE))
    steps, _, times = sooner(setting, SUBJECT, lr, theirs).partition(" / ")
    gains = change(ours, theirs, loss_of)
    lower = statistics.mean(gains) < 0
    end = f"{spread([-gain if lower else gain for gain in gains], 2, ' %')} {'lower' if lower else 'higher'}"
    speed = {"not reached": "does not reach AdamW's final held-out loss"}.get(
        steps,
        f"reaches AdamW's final held-out loss {steps} sooner in steps" + (f", {times} in time" if "x" in times else ""),
    )
    marks = "" if enclosure(setting.at(SUBJECT)) == "enclosed" else "; SCAO was not tried at rates on both sides of it"
    marks += "" if setting.is_current(SUBJECT) else f"; SCAO of an {EARLIER}"
    return (
        f"**At AdamW's best learning rate SCAO {speed}, and ends {end}**: "
        f"{cell['model'].split(',')[0].split(' (')[0]} in 4 bit, LoRA r = {cell['rank']}, {Path(cell['data']).stem}, "
        f"{setting.steps} steps of {cell['batch']} rows, {len(theirs)} seeds (mean and standard deviation), on a CPU"
        f"{marks}.\n"
    )


def evidence(found: Sequence[Setting]) -> str:
    """The settings of the README, and where other optimizers end lower than SCAO in any setting."""
    rows = []
    for setting in (setting for name in EVIDENCE for setting in found if setting.name == name):
        theirs, ours = same_rate(setting)
        ahead = ", ".join(f"`{name}` {percent(gains)}" for name, gains in ahead_in(setting)) or "none"
        speed = sooner(setting, SUBJECT, best_lr(setting.at(REFERENCE)), theirs)
        rows.append([title(setting), *both_losses(theirs, ours, 3), speed, ahead])
    head = ["setting", "AdamW", "SCAO", "difference", "speed-up: steps / time", "ends lower than SCAO"]
    return grid(head, rows)


def ahead_in(setting: Setting) -> list[tuple[str, list[float]]]:
    """The optimizers whose loss at their best rate is below SCAO's at its own, with the differences by seed."""
    ours = setting.at(SUBJECT)
    found = []
    for optimizer in list(setting.runs):
        by_lr = setting.at(optimizer)
        if ours and by_lr and optimizer.split(":")[0] not in {SUBJECT, *peers.ABLATIONS}:
            gains = change(by_lr[best_lr(by_lr)], ours[best_lr(ours)], loss_of)
            if gains and statistics.mean(gains) < 0:
                found.append((optimizer, gains))
    return found


def title(setting: Setting) -> str:
    """What a row of the summary calls a setting."""
    cell = setting.cell
    rank = f", LoRA r={cell['rank']}" if "rank" in cell else ""
    model = cell["model"].split(",")[0].split(" (")[0]
    model += f" of {cell.get('size', '838k').upper()} from scratch" if cell["task"] == "gpt" else ""
    model += ", every weight" if cell["task"] == "full" else ""
    steps = f"{setting.steps} steps of {cell['batch']} rows"
    mark = "" if setting.is_current(SUBJECT) else f" (SCAO: {EARLIER})"
    return f"{model}{rank}, {Path(cell['data']).stem}, {cell['schedule']}, {steps}{mark}"


def tables(found: Sequence[Setting]) -> dict[str, str]:
    """Every table by the name that a README asks for."""
    result = {}
    for setting in found:
        result[setting.name] = comparison(setting)
        result[f"{setting.name}:rates"] = rates(setting)
    result |= {
        f"{setting.name}:claim": claim(setting) for setting in found if setting.name == CLAIM and same_rate(setting)[0]
    }
    return {**result, "options": options(found), "glance": glance(found), "evidence": evidence(found)} if found else {}
