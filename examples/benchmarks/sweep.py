"""Run a sweep: one task, several optimizers, learning rates and seeds, one JSON line per run.

    python examples/benchmarks/sweep.py --task tiny --optimizers adamw,scao --lrs 1e-3,2e-3,4e-3 --seeds 0,1,2 \\
        --steps 200 --out runs/benchmarks/tiny.jsonl

A run that is in the file is never run twice: stop the command whenever you like and repeat it. All optimizers of a
seed see the same initial values, the same data in the same order, the same learning-rate schedule and the same
clipping. Options of an optimizer follow its name: ``scao:k_max=8:warmup_steps=5``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data
import models
import peers
import products
import provenance
import tasks
import torch
from tqdm import tqdm

WARMUP = 10
CLIP = 1.0
BATCH = {"qlora": 4, "full": 16, "tiny": 4, "gpt": 16}  # rows per step unless --batch is given
# Parts of a run after which the held-out loss is taken; at 1/1.4 an optimizer that is 1.4 times as fast would be done.
EVAL_AT = {
    "qlora": (0.5, 1 / 1.4, 1.0),
    "full": (0.5, 1 / 1.4, 1.0),
    "tiny": (0.2, 0.3, 0.4, 0.5, 0.6, 1 / 1.4, 0.8, 0.9, 1.0),
    "gpt": (0.2, 0.3, 0.4, 0.5, 0.6, 1 / 1.4, 0.8, 0.9, 1.0),
}


def schedule(name: str, step: int, steps: int) -> float:
    """The factor on the learning rate at a step (from 0): linear warm-up, then constant or a cosine down to zero."""
    warmup = min(WARMUP, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def key(cell: dict[str, Any]) -> str:
    """What identifies a run: everything that defines it."""
    return hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]


def cells(task: tasks.Task, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every run of the sweep; all of a seed before the next seed, so that a sweep cut short is still whole."""
    for seed, lr, optimizer in itertools.product(arguments.seeds, arguments.lrs, arguments.optimizers):
        yield {
            **task.definition,
            "optimizer": optimizer,
            "options": peers.resolved(optimizer, task.model),
            "lr": lr,
            "seed": seed,
            "steps": arguments.steps,
            "schedule": arguments.schedule,
            "warmup": WARMUP,
            "clip": arguments.clip,
            "weight_decay": 0.0,
            "eval_steps": eval_steps(arguments.task, arguments.steps, arguments.eval_every),
        }


def eval_steps(task: str, steps: int, every: int | None = None) -> list[int]:
    """After which steps the held-out loss is taken: every so many, or after the task's parts of a run."""
    if every:
        return sorted({*range(every, steps + 1, every), steps})
    return sorted({max(1, round(part * steps)) for part in EVAL_AT[task]})


def read(path: Path) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The runs of a result file, by key (of two with one key the later one), and the optimizers that could not run."""
    lines = data.json_lines(path, path.read_text(encoding="utf-8")) if path.is_file() else []
    records = [line for line in lines if isinstance(line, dict)]
    runs = {record["key"]: record for record in records if "key" in record}
    return runs, [record for record in records if "unavailable" in record]


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a result file in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


class Clock:
    """Wall and processor seconds, with the GPU's work waited for."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> Clock:
        self._wait()
        self.started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.wall += time.perf_counter() - self.started[0]
        self.cpu += time.process_time() - self.started[1]

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def run(task: tasks.Task, cell: dict[str, Any], bar: tqdm[Any]) -> dict[str, Any]:
    """Train once.

    Args:
        task: the task, in any state.
        cell: which run; see ``cells``.
        bar: moves one on with every step.

    Returns:
        The result without the cell: losses, seconds, state.

    Raises:
        peers.Unavailable: the optimizer cannot run here.
    """
    task.reset(cell["seed"])
    torch.manual_seed(cell["seed"])  # for optimizers that draw numbers
    optimizer = peers.create(cell["optimizer"], task.model, cell["lr"])
    initial_lrs = [group["lr"] for group in optimizer.param_groups]
    params = [param for _, param in task.trainable()]
    step_clock, optimizer_clock = Clock(), Clock()
    losses: list[float] = []
    evals: list[dict[str, float]] = []
    failure = None
    for step in range(cell["steps"]):
        for group, initial in zip(optimizer.param_groups, initial_lrs, strict=True):
            group["lr"] = initial * schedule(cell["schedule"], step, cell["steps"])
        with step_clock:
            loss = task.loss(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, cell["clip"] or math.inf)
            try:
                with optimizer_clock:
                    optimizer.step()
            except (RuntimeError, ValueError) as error:  # a decomposition that failed is a result too
                failure = f"{type(error).__name__}: {error}"[:200]
            optimizer.zero_grad()
            losses.append(round(loss.item(), 5))
        bar.update()
        if failure or not math.isfinite(losses[-1]):
            break
        if step + 1 in cell["eval_steps"]:
            held_out = task.evaluate()
            bar.set_postfix_str(f"{cell['optimizer']} lr {cell['lr']:g} seed {cell['seed']}: {held_out:.4f}")
            if not math.isfinite(held_out):
                break
            seconds = {"seconds": round(step_clock.wall, 3), "cpu_seconds": round(step_clock.cpu, 3)}
            evals.append({"step": step + 1, "loss": round(held_out, 5), **seconds})
    bar.update(cell["steps"] - len(losses))
    count = sum(param.numel() for param in params)
    state = peers.state_bytes(optimizer, task.model)
    complete = bool(evals) and evals[-1]["step"] == cell["steps"]
    third = losses[-max(1, cell["steps"] // 3) :]
    return {
        "train_loss": [value if math.isfinite(value) else None for value in losses],
        "fresh_loss": round(sum(third) / len(third), 5) if complete else None,
        "evals": evals,
        "eval_loss": evals[-1]["loss"] if complete else None,
        "exact_match": task.exact_match() if complete else None,
        "diverged": not complete or evals[-1]["loss"] > task.untrained(),
        "failure": failure,
        "seconds": round(step_clock.wall, 3),
        "cpu_seconds": round(step_clock.cpu, 3),
        "optimizer_seconds": round(optimizer_clock.wall, 4),
        "optimizer_cpu_seconds": round(optimizer_clock.cpu, 4),
        "trainable": count,
        "state_bytes": state,
        "state_bytes_per_parameter": round(state / count, 3),
    }


def numbers(kind: type, above: float | None = None) -> Any:
    """A command-line type: values separated by commas; those in parentheses belong to a value.

    Args:
        kind: of the values.
        above: what each of them has to be larger than.
    """
    words = {int: "whole numbers", float: "numbers", str: "names"}[kind] + " with commas between them"
    words += "" if above is None else f", each above {above:g}"

    def read_values(text: str) -> list[Any]:
        try:
            found = [kind(part) for part in re.split(r",(?![^(]*\))", text) if part]
        except ValueError:
            found = []
        if not found or (above is not None and not all(above < value < math.inf for value in found)):
            raise argparse.ArgumentTypeError(f"{text!r} must be {words}")
        return found

    return read_values


def at_least(least: int) -> Any:
    """A command-line type: a whole number of at least so much."""

    def read_value(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
        return int(text)

    return read_value


def writable(text: str) -> Path:
    """A command-line type: a file that can be added to, which is found out before anything is run."""
    path = Path(text)
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written to: {error.strerror}") from error
    if not there:
        path.unlink()
    return path


def check_optimizers(parser: argparse.ArgumentParser, specs: list[str]) -> None:
    """End with the parser's usage and the reason unless every optimizer and option is known."""
    try:
        for spec in specs:
            peers.resolved(spec)
    except ValueError as error:
        parser.error(str(error))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(BATCH), required=True)
    parser.add_argument("--optimizers", type=numbers(str), required=True, help=f"of {', '.join(peers.PEERS)}")
    parser.add_argument("--lrs", type=numbers(float, 0), required=True, help="learning rates, with commas between them")
    parser.add_argument("--seeds", type=numbers(int, -1), default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument("--steps", type=at_least(2), default=60, help="default: %(default)s")
    parser.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help="default: %(default)s")
    parser.add_argument("--rank", type=at_least(1), default=16, help="of the LoRA factors (default: %(default)s)")
    parser.add_argument(
        "--batch", type=at_least(1), help="rows per step (default: 4 for qlora and tiny, 16 for full and gpt)"
    )
    parser.add_argument(
        "--max-tokens", type=at_least(1), help="longest row that is used (default: 128, or the size's context)"
    )
    parser.add_argument(
        "--model", choices=tuple(tasks.QLORA), default=tasks.USUAL_MODEL, help="of qlora (default: %(default)s)"
    )
    parser.add_argument("--size", choices=models.GPT_SIZES, default="838k", help="of gpt (default: %(default)s)")
    parser.add_argument("--clip", type=float, default=CLIP, help="norm of a step's gradient, 0: none (default: 1)")
    parser.add_argument(
        "--eval-every", type=at_least(1), help="steps between held-out losses (default: parts of the run)"
    )
    parser.add_argument(
        "--held-out", type=at_least(1), default=tasks.EVAL_ROWS, help="rows of the held-out loss (default: %(default)s)"
    )
    parser.add_argument("--data", help="a .jsonl or text file, a hub name, or 'sums' (default: the demo's docstrings)")
    parser.add_argument("--out", type=writable, required=True, help="result file, added to")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    arguments = parser.parse_args(argv)
    check_optimizers(parser, arguments.optimizers)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run what is missing."""
    arguments = parse(argv)
    started = time.monotonic()
    batch = arguments.batch or BATCH[arguments.task]
    try:
        source = data.load(arguments.data)
        task = tasks.build(
            arguments.task,
            source,
            arguments.rank,
            batch,
            arguments.max_tokens,
            arguments.size,
            arguments.held_out,
            arguments.model,
        )
        if arguments.steps > task.steps_available:
            raise ValueError(f"--steps {arguments.steps} is more than the {task.steps_available} batches of the data")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    wanted = list(cells(task, arguments))
    done, not_run = read(arguments.out)
    noted = {record["unavailable"] for record in not_run}
    missing = [cell for cell in wanted if key(cell) not in done]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} finished before", file=sys.stderr)
    unavailable: dict[str, str] = {}
    steps = len(missing) * arguments.steps
    with products.in_float32(), tqdm(total=steps, unit="step", smoothing=0.05) as bar:
        for cell in missing:
            if (time.monotonic() - started) / 60 > arguments.minutes:
                print("out of time: repeat the command for the rest", file=sys.stderr)
                break
            if cell["optimizer"] in unavailable:
                continue
            bar.set_postfix_str(f"{cell['optimizer']} lr {cell['lr']:g} seed {cell['seed']}")
            try:
                result = run(task, cell, bar)
            except peers.Unavailable as reason:
                unavailable[cell["optimizer"]] = str(reason)
                bar.total -= arguments.steps * sum(cell["optimizer"] == other["optimizer"] for other in missing)
                continue
            except peers.UnknownOption as error:  # of an optimizer whose package is asked only when it is built
                print(f"error: {error}", file=sys.stderr)
                return 1
            origin = {"versions": provenance.versions(cell["optimizer"]), "machine": provenance.machine()}
            append(arguments.out, {"key": key(cell), "cell": cell, **result, **origin})
    for optimizer, reason in unavailable.items():
        print(f"unavailable: {optimizer}: {reason}")
        if reason not in noted:
            append(arguments.out, {"task": arguments.task, "optimizer": optimizer, "unavailable": reason})
    return 0


if __name__ == "__main__":
    sys.exit(main())
