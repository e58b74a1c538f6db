"""The tables of docs/published-experiments.md: every published number next to ours, the losses included."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path

import models
import published
import sweep_tables
import verdict_tables
from runs import OTHER_MACHINE, Record, Setting, best_lr, crossing, enclosure, loss_of, step_seconds
from texts import grid, spread, table, value

#: Names of the optimizers where a spec would be too long for a column.
NAMES = {published.PUBLISHED: "`scao-published`", published.PYPI: "`scao-pypi`"}
#: Optimizers for matrices with two large sides whose best perplexity SCAO is held against, and their names in a sentence.
RIVALS = {"soap": "SOAP", "muon": "Muon", "normuon": "NorMuon"}
GB = 1024**3

Seeds = dict[int, Record]
#: An aim in words, what was found, and whether it was reached; None: the records do not decide it.
Goal = tuple[str, str, bool | None]


def _gains(ours: Sequence[Record], theirs: Sequence[Record]) -> list[float]:
    return [100 * (perplexity(a) / perplexity(b) - 1) for a, b in zip(ours, theirs, strict=True)]


def perplexity(record: Record) -> float:
    """Per byte, at the end; infinite for a run that diverged."""
    return math.exp(loss_of(record))


def auc(record: Record) -> float:
    """The mean training loss over all steps, as published; infinite for a run that did not come to its end."""
    losses = record["train_loss"]
    return math.inf if record["diverged"] else statistics.mean(losses)


def memory(record: Record) -> float:
    """Parameters, gradients and state in bytes, which is how the published figure is counted."""
    return 8 * record["trainable"] + record["state_bytes"]  # type: ignore[no-any-return]


def state_of(records: Iterable[Record]) -> int:
    """Bytes of optimizer state, the most of all runs."""
    return max(record["state_bytes"] for record in records)


def name_of(optimizer: str) -> str:
    """What a table calls an optimizer; the published options are said once, and their warm-up is a fifth of the run."""
    return NAMES.get(re.sub(r":warmup_steps=\d+$", "", optimizer), f"`{optimizer}`")


def of_size(found: Iterable[Setting], size: str, clip: float = 1.0) -> Setting | None:
    """The setting of a GPT's size."""
    for setting in found:
        cell = setting.cell
        usual = cell["task"] == "gpt" and cell["schedule"] == "cosine" and setting.usual_batch
        if usual and cell.get("size", "838k") == size and cell["clip"] == clip:
            return setting
    return None


def rates(setting: Setting, optimizer: str, steps: int) -> list[tuple[float, Seeds, str]]:
    """The rows of an optimizer: its best rate with a word on how it was found, and the published rates."""
    by_lr = setting.at(optimizer, steps)
    if not by_lr:
        return []
    best = best_lr(by_lr)
    rows = [(best, by_lr[best], enclosure(by_lr))]
    for lr in (published.ADAMW_RATE, published.SCAO_RATE):
        if lr in by_lr and lr != best:
            rows.append((lr, by_lr[lr], "published"))
    return rows


def _reference(setting: Setting, steps: int) -> Seeds:
    by_lr = setting.at("adamw", steps)
    return by_lr[best_lr(by_lr)] if by_lr else {}


def runs_table(setting: Setting | None, scale: published.Scale | None, steps: int) -> str | None:
    """All runs of a size and length, the published ones first, then ours with the lowest perplexity first."""
    lines: list[tuple[float, dict[str, str]]] = []
    if scale:
        theirs = {"AdamW": (published.ADAMW_RATE, scale.adamw), "SCAO": (published.SCAO_RATE, scale.scao)}
        for name, (lr, run) in theirs.items():
            apart = 100 * (run.perplexity / scale.adamw.perplexity - 1)
            row = {
                "run": f"_published {name}_",
                "learning rate": f"{lr:g}",
                "perplexity (seeds)": f"{run.perplexity:.2f} (1)",
                "against AdamW": "" if name == "AdamW" else f"{apart:+.1f} %",
                "mean training loss": value(run.auc, ".3f"),
                "tokens/s": value(run.tokens, ",.0f"),
                "seconds": value(run.seconds, ",.0f"),
                "parameters, gradients, state": f"{value(run.memory, '.3f')} GB",
                "state / AdamW's": "",
            }
            lines.append((0.0, row))
    reference = _reference(setting, steps) if setting else {}
    for optimizer in list(setting.runs) if setting and reference else ():
        if steps == published.ABLATION_STEPS and name_of(optimizer) not in map(name_of, published.SCALE):
            continue  # the ablations have a table of their own
        for lr, seeds, word in rates(setting, optimizer, steps):
            records, shared = list(seeds.values()), [seed for seed in seeds if seed in reference]
            gains = _gains([seeds[seed] for seed in shared], [reference[seed] for seed in shared])
            told = gains and (optimizer != "adamw" or word == "published")
            values = [perplexity(record) for record in records]
            pace = step_seconds(setting, records, list(reference.values()))
            tokens = setting.cell["batch"] * setting.cell["max_tokens"]
            row = {
                "run": name_of(optimizer),
                "learning rate": f"{lr:.3g} ({word})",
                "perplexity (seeds)": f"{spread(values, 3)} ({len(values)})",
                "against AdamW": spread(gains, 1, " %", sign=True) if told else "",
                "mean training loss": spread([auc(record) for record in records], 3),
                "tokens/s": f"{tokens / pace:,.0f}" if pace else OTHER_MACHINE,
                "seconds": f"{steps * pace:,.0f}" if pace else OTHER_MACHINE,
                "parameters, gradients, state": f"{max(map(memory, records)) / GB:.4f} GB",
                "state / AdamW's": f"{state_of(records) / state_of(reference.values()):.2f}",
            }
            lines.append((statistics.mean(values), row))
    return table([row for _, row in sorted(lines, key=lambda line: line[0])]) if lines else None


def reach(records: Sequence[Record], losses: Sequence[float]) -> float | None:
    """The mean step at which each run first reaches its loss; None if one of them does not."""
    found = [crossing([record], loss) for record, loss in zip(records, losses, strict=True)]
    steps = [step for step in found if step is not None]
    return statistics.mean(steps) if steps and len(steps) == len(found) else None


def shared_best(setting: Setting, optimizers: Sequence[str], steps: int) -> dict[str, list[Record]]:
    """The best runs of optimizers, on the seeds that all of them have."""
    best = {name: by_lr[best_lr(by_lr)] for name in optimizers if (by_lr := setting.at(name, steps))}
    seeds = set.intersection(*(set(found) for found in best.values())) if best else set()
    return {name: [found[seed] for seed in sorted(seeds)] for name, found in best.items()}


def targets_table(setting: Setting, steps: int, optimizers: Sequence[str] = ("scao", "soap")) -> str | None:
    """Time to a perplexity in the shape of the published table: targets are what AdamW has on its way, seed by seed."""
    pairs = {name: shared_best(setting, ["adamw", name], steps) for name in optimizers}
    pairs = {name: pair for name, pair in pairs.items() if pair.get(name) and "adamw" in pair}
    if not pairs:
        return None
    whole = shared_best(setting, ["adamw"], steps)["adamw"]
    usual = step_seconds(setting, whole, whole)
    paces = {name: step_seconds(setting, pair[name], whole) for name, pair in pairs.items()}
    head = ["target perplexity", f"`adamw` ({len(whole)})"]
    for name, pair in pairs.items():
        head += [f"{name_of(name)} ({len(pair[name])})", "times as fast, seconds"]
    rows = []
    for at in range(100, steps + 1, 50):
        if any(after(record, at) is None for record in whole):
            continue
        row = [f"<= {statistics.mean(math.exp(after(r, at)['loss']) for r in whole):.2f}", moment(at, usual)]  # type: ignore[index]
        for name, pair in pairs.items():
            entries = [entry for record in pair["adamw"] if (entry := after(record, at))]
            quick = reach(pair[name], [entry["loss"] for entry in entries])
            own = paces[name]
            if quick is None:
                row += ["not reached", ""]
            else:
                row += [moment(quick, own), f"{at * usual / (quick * own):.2f}" if usual and own else OTHER_MACHINE]
        rows.append(row)
    return grid(head, rows) if rows else None


def moment(step: float, pace: float | None) -> str:
    """When a step was, with the seconds until then where they can be compared."""
    return f"{step * pace:.1f} s (step {step:.0f})" if pace else f"step {step:.0f}"


def after(record: Record, step: int) -> dict[str, float] | None:
    """The measurement after a step."""
    return next((entry for entry in record["evals"] if entry["step"] == step), None)


def published_targets() -> str:
    """The published table of times to a target."""
    rows = [
        {
            "target perplexity": f"<= {target:.2f}",
            "AdamW": f"{slow} s (step {slow_step})",
            "SCAO": f"{quick} s (step {quick_step})",
            "times as fast, seconds": f"{slow / quick:.2f}",
            "times as fast, steps": f"{slow_step / quick_step:.2f}",
        }
        for target, slow, slow_step, quick, quick_step in published.TIME_TO_TARGET
    ]
    return table(rows)


def curve_table(setting: Setting, steps: int) -> str | None:
    """Perplexity every 25 steps, published and ours."""
    best = {name: runs[name] for name in published.SCALE if (runs := shared_best(setting, [name], steps))}
    if "adamw" not in best:
        return None
    rows = []
    for at, (slow, quick) in enumerate(published.CURVE):
        step = published.EVERY * (at + 1)
        row = [str(step), f"{slow:.2f}", f"{quick:.2f}"]
        for records in best.values():
            losses = [entry["loss"] for record in records if (entry := after(record, step))]
            row.append(f"{statistics.mean(map(math.exp, losses)):.2f}" if losses else "")
        rows.append(row)
    head = [f"{name_of(name)} ({len(records)})" for name, records in best.items()]
    return grid(["step", "published AdamW", "published SCAO", *head], rows)


def ablations_table(found: Sequence[Setting]) -> str | None:
    """A1 to A7: published, with the published rule here, and with the default rule."""

    def run_of(change: published.Change | None) -> float | None:
        setting = of_size(found, "838k", change.clip) if change else None
        if change is None or setting is None:
            return None
        seeds = setting.at(change.optimizer, published.ABLATION_STEPS).get(change.rate)
        return perplexity(seeds[0]) if seeds else None

    full = published.ABLATIONS["full"]
    base = [run_of(full.published_rule), run_of(full.default_rule)]
    if None in base:
        return None
    rows = []
    for name, ablation in published.ABLATIONS.items():
        row = [name, ablation.words, value(ablation.perplexity, ".2f"), f"{ablation.worse:+.2f}"]
        for change, usual in zip((ablation.published_rule, ablation.default_rule), base, strict=True):
            ours = run_of(change)
            row += ["not applicable" if change is None else value(ours, ".3f")]
            row += ["" if ours is None or usual is None else f"{ours - usual:+.3f}"]
        rows.append(row)
    head = ["", "changed"]
    for whose in ("published", "`scao-published` here", "`scao` here"):
        head += [whose, "above full"]
    return grid(head, rows)


def _seeds(found: Sized) -> str:
    return f"{len(found)} seed{'s' if len(found) > 1 else ''}"


def judged(reached: bool, word: str) -> bool | None:
    """A rate that is not enclosed may not be the best one: then only a defeat is certain."""
    return False if not reached else True if word == "enclosed" else None


def goals_against_peers(setting: Setting, steps: int) -> Iterator[Goal]:
    """Perplexity against AdamW's and the best of the rivals, each at its own best rate."""
    best = shared_best(setting, ["adamw", "scao"], steps)
    gain = statistics.mean(_gains(best["scao"], best["adamw"]))
    outside = [name for name in best if enclosure(setting.at(name, steps)) != "enclosed"]
    said = _seeds(best["scao"]) + "".join(f", best rate of `{name}` not enclosed" for name in outside)
    yield "perplexity at least 5 % below AdamW's best", f"{gain:+.1f} % ({said})", gain <= -5
    for rival, name in RIVALS.items():
        pair = shared_best(setting, ["scao", rival], steps)
        if len(pair) == 2:
            above = statistics.mean(_gains(pair["scao"], pair[rival]))
            word = enclosure(setting.at(rival, steps))
            said = f"{above:+.1f} % ({_seeds(pair[rival])}; {name}'s rate: {word})"
            yield f"not above {name}'s best", said, judged(above <= 0, word)


def goals_at_adamws_rate(setting: Setting, steps: int) -> Iterator[Goal]:
    """What the user who keeps AdamW's rate gives away, in loss."""
    by_lr, usual = setting.at("scao", steps), best_lr(setting.at("adamw", steps))
    best = best_lr(by_lr)
    gains = sweep_tables.change(by_lr.get(usual, {}), by_lr[best], loss_of)
    if gains:
        above, word = statistics.mean(gains), enclosure(by_lr)
        said = f"{above:+.1f} % at {usual:g} ({_seeds(gains)}; SCAO's best {best:g}: {word})"
        yield "at AdamW's best rate, loss within 1 % of the own best", said, judged(above <= 1, word)


def goals_of_cost(setting: Setting, steps: int) -> Iterator[Goal]:
    """Seconds to AdamW's final perplexity, and bytes of state per parameter."""
    best = shared_best(setting, ["adamw", "scao"], steps)
    aim = "AdamW's final perplexity in 1/1.5 of its seconds"
    quick = reach(best["scao"], list(map(loss_of, best["adamw"])))
    own, usual = (step_seconds(setting, best[name], best["adamw"]) for name in ("scao", "adamw"))
    if quick is None:
        yield aim, "not reached", False
    elif own and usual:
        times = steps * usual / (quick * own)
        yield aim, f"1/{times:.2f}", times >= 1.5
    else:
        yield aim, f"1/{steps / quick:.2f} of its steps; seconds on another machine", None
    size = state_of(best["scao"]) / best["scao"][0]["trainable"]
    yield "state at most 4.4 bytes per parameter", f"{size:.2f}", size <= 4.4
    by_lr = setting.at("scao:moment_dtype=int8", steps)
    if by_lr:
        records = list(by_lr[best_lr(by_lr)].values())
        size = state_of(records) / records[0]["trainable"]
        said = f"{size:.2f}, perplexity {spread([perplexity(record) for record in records], 3)} ({_seeds(records)})"
        yield "state at most 1.3 bytes per parameter with momentum in int8", said, size <= 1.3


def goals(found: Sequence[Setting], steps: int) -> str | None:
    """What was aimed at, per size, and what came out."""
    rows = []
    for size in models.GPT_SIZES:
        setting = of_size(found, size)
        if setting is None or len(shared_best(setting, ["adamw", "scao"], steps)) < 2:
            continue
        for make in (goals_against_peers, goals_at_adamws_rate, goals_of_cost):
            for aim, said, reached in make(setting, steps):
                word = {None: "open", True: "yes", False: "**no**"}[reached]
                rows.append({"aim": f"{size}: {aim}", "found": said, "reached": word})
    return table(rows) if rows else None


def not_run() -> str:
    """What was published and is not repeated."""
    why = {
        f"GPT of {scale.label}, {scale.steps} steps: perplexity {scale.adamw.perplexity:.2f} with AdamW, "
        f"{scale.scao.perplexity:.2f} with SCAO, {scale.scao_int8.perplexity:.2f} with its int8 state; memory "
        f"{scale.adamw.memory:.2f}, {scale.scao.memory:.2f} and {scale.scao_int8.memory:.2f} GB": published.TOO_SHORT
        for scale in published.SCALES
        if scale.scao_int8
    }
    return grid(["published", "why it is not repeated"], {**why, **published.NOT_RUN}.items())


def tables(found: Sequence[Setting], paths: Sequence[Path]) -> dict[str, str]:
    """Every table of the page; one without records says so. Nothing where the result files are of other experiments."""
    verdicts = verdict_tables.tables(paths)
    if not any(setting.cell["task"] == "gpt" for setting in found) and not any(verdicts.values()):
        return {}
    made: dict[str, str | None] = {
        "published-targets": published_targets(),
        "published-qlora": grid(["", "published"], published.QLORA.items()),
        "published-not-run": not_run(),
        "published-ablations": ablations_table(found),
        "published-goals": goals(found, published.STEPS),
        **verdicts,
    }
    for size in models.GPT_SIZES:
        setting = of_size(found, size)
        scales = {scale.steps: scale for scale in published.SCALES if scale.size == size}
        for steps in sorted({*scales, published.STEPS}):
            made[f"published-{size}-{steps}"] = runs_table(setting, scales.get(steps), steps)
        make: dict[str, Callable[[Setting, int], str | None]] = {"targets": targets_table, "curve": curve_table}
        for name, made_of in make.items():
            made[f"published-{size}-{name}"] = made_of(setting, published.STEPS) if setting else None
    return {name: text or "Not run so far.\n" for name, text in made.items()}
