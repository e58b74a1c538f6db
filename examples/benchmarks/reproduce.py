"""Run the published experiments again, with honest learning rates: `make reproduce-quick`, `make reproduce`.

    python examples/benchmarks/reproduce.py --data wikitext2.txt --out runs/benchmarks/reproduce     # hours; resumable
    python examples/benchmarks/reproduce.py --quick                                                  # minutes
    python examples/benchmarks/reproduce.py --parts scale --sizes 838k --optimizers adamw,scao,soap

``scale``: a GPT from scratch at three sizes, 500 steps; each optimizer's rate is doubled or halved until the best one has
a worse neighbour on both sides, then that rate gets the other seeds. ``short``: the 50 steps that were published for the
two larger sizes, at the published rates. ``ablations``: A1 to A7 for the published rule and their counterparts for the
default. ``stability``: second-order optimizers on 4-bit LoRA (stability.py). ``reference``: the QLoRA run (reference.py).
Nothing that is in a result file is run again: stop the command whenever you like and repeat it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import models
import reference
import runs
import stability
import sweep
import torch
from published import (
    ABLATION_RATE,
    ABLATION_STEPS,
    ABLATIONS,
    ADAMW_RATE,
    EVERY,
    PUBLISHED,
    PYPI,
    SCALE,
    SCAO_RATE,
    STEPS,
)

PARTS = ("scale", "short", "ablations", "stability", "reference")
HUB = "Salesforce/wikitext:wikitext-2-raw-v1"
#: The most rates that a search tries before it is given up.
TRIES = 9


class Runner:
    """Calls the sweep with what all runs of this command share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out = arguments.out / "gpt.jsonl"
        where = arguments.data or (None if arguments.quick else HUB)
        self.fixed = ["--task", "gpt", "--out", str(self.out), *(["--data", where] if where else [])]
        self.deadline = time.monotonic() + 60 * arguments.minutes

    def run(
        self,
        optimizers: Sequence[str],
        rates: Sequence[float],
        steps: int,
        size: str = "838k",
        seeds: Sequence[int] = (0,),
        every: int = EVERY,
        clip: float = 1.0,
    ) -> None:
        """Run what is missing.

        Raises:
            TimeoutError: the minutes are over.
            ValueError: the sweep refuses; its message is printed.
        """
        left = (self.deadline - time.monotonic()) / 60
        if left <= 0:
            raise TimeoutError
        arguments = [*self.fixed, "--size", size, "--steps", str(steps), "--eval-every", str(every)]
        arguments += ["--clip", str(clip), "--minutes", str(left)]
        arguments += ["--optimizers", ",".join(optimizers), "--lrs", ",".join(map(repr, rates))]
        if sweep.main([*arguments, "--seeds", ",".join(map(str, seeds))]):
            raise ValueError("the sweep has stopped")

    def at(self, optimizer: str, steps: int, size: str) -> dict[float, dict[int, runs.Record]]:
        """The runs of an optimizer by rate and seed, with the usual clipping."""
        for setting in runs.settings([self.out]):
            cell = setting.cell
            if cell.get("size", "838k") == size and cell["clip"] == sweep.CLIP and optimizer in setting.runs:
                return setting.at(optimizer, steps)
        return {}

    def bracket(self, optimizer: str, start: float, steps: int, size: str) -> float | None:
        """Double or halve the rate, on seed 0, until the best one is inside; None if the optimizer cannot run."""
        tried = [start, 2 * start]
        while True:
            self.run([optimizer], tried[-2:], steps, size)
            by_lr = self.at(optimizer, steps, size)
            if not by_lr:
                return None
            losses = {rate: runs.loss_of(seeds[0]) for rate, seeds in by_lr.items() if 0 in seeds}
            best, tried = next_rate(losses)
            if not tried or len(losses) >= TRIES:
                return best


def next_rate(losses: dict[float, float]) -> tuple[float, list[float]]:
    """The best rate so far, and the rate to try next: beyond the end at which the best one lies; none if it is inside."""
    best = min(losses, key=lambda rate: losses[rate])
    if losses[best] == math.inf or best == min(losses):
        return best, [min(losses) / 2]
    return best, [2 * best] if best == max(losses) else []


def scale(runner: Runner, sizes: Sequence[str], optimizers: Sequence[str], seeds: Sequence[int]) -> None:
    """All sizes, the smallest first; of each, every optimizer's best rate, then its other seeds."""
    for size in sizes:
        for optimizer in optimizers:
            best = runner.bracket(optimizer, SCALE.get(optimizer, 2e-3), STEPS, size)
            if best is not None and seeds:
                runner.run([optimizer], [best], STEPS, size, seeds)
    runner.run(["adamw"], [ADAMW_RATE], STEPS)
    runner.run([PUBLISHED], [SCAO_RATE], STEPS)


def short(runner: Runner, sizes: Sequence[str]) -> None:
    """50 steps at the published rates; AdamW at both of them, because SCAO had the higher one."""
    for size in sizes:
        if size != "838k":
            runner.run(["adamw"], [ADAMW_RATE, SCAO_RATE], 50, size, every=10)
            # The warm-up was a fifth of the run.
            runner.run([f"{PUBLISHED}:warmup_steps=10", "scao"], [SCAO_RATE], 50, size, every=10)
            runner.run(["adamw", "scao"], [2e-3], 50, size, every=10)


def ablations(runner: Runner, steps: int = ABLATION_STEPS) -> None:
    """The published rule at its published rates, the default at one rate."""
    for ablation in ABLATIONS.values():
        for change in (ablation.published_rule, ablation.default_rule):
            if change:
                runner.run([change.optimizer], [change.rate], steps, clip=change.clip)
    runner.run(["adamw"], [ADAMW_RATE, ABLATION_RATE], steps)


def quick(runner: Runner) -> None:
    """A reduced form of ``scale``: fixed rates, one seed, 60 steps."""
    for rates, optimizers in (
        ([2e-3, 4e-3], ["adamw", "scao"]),
        ([2e-3], ["soap", f"{PUBLISHED}:warmup_steps=12", PYPI, "shampoo"]),
    ):
        runner.run(optimizers, rates, 60, every=10)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = sweep.numbers(str)
    parser.add_argument("--parts", type=words, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--sizes", type=words, default=list(models.GPT_SIZES), help=f"of {','.join(models.GPT_SIZES)}")
    parser.add_argument("--optimizers", type=words, default=list(SCALE), help="of scale (default: all)")
    parser.add_argument("--seeds", type=sweep.numbers(int, -1), default=[1, 2], help="at the best rate, besides 0")
    parser.add_argument(
        "--data", help=f"a text file or a hub name (default: {HUB}; with --quick the demo's docstrings)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/reproduce"), help="folder of result files")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing after so many minutes")
    parser.add_argument("--quick", action="store_true", help="minutes: one size, few rates and steps, one seed")
    arguments = parser.parse_args(argv)
    for name, given, known in (("parts", arguments.parts, PARTS), ("sizes", arguments.sizes, models.GPT_SIZES)):
        if unknown := [value for value in given if value not in known]:
            parser.error(f"--{name}: {unknown[0]!r} is not one of {', '.join(known)}")
    sweep.check_optimizers(parser, arguments.optimizers)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run what is missing; 1 where data or a model is."""
    arguments = parse(argv)
    if torch.get_num_threads() != 1 and not torch.cuda.is_available():
        torch.set_num_threads(1)  # what the committed runs had: then seconds can be compared
    runner = Runner(arguments)
    try:
        if "scale" in arguments.parts:
            if arguments.quick:
                quick(runner)
            else:
                scale(runner, arguments.sizes, arguments.optimizers, arguments.seeds)
        if not arguments.quick and "short" in arguments.parts:
            short(runner, arguments.sizes)
        if not arguments.quick and "ablations" in arguments.parts:
            ablations(runner)
    except TimeoutError:
        print("out of time: repeat the command for the rest", file=sys.stderr)
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    status = 0
    if "stability" in arguments.parts:
        status = stability.main(
            ["--out", str(arguments.out / stability.FILE), *(["--parts", "stress"] if arguments.quick else [])]
        )
    if "reference" in arguments.parts and not arguments.quick:
        status = reference.main(["--out", str(arguments.out / reference.FILE)]) or status
    return status


if __name__ == "__main__":
    sys.exit(main())
