"""Count the memory of SCAO and of other optimizers, one JSON line per measurement.

    python examples/benchmarks/memory.py                        # everything that is missing in results/memory.jsonl
    python examples/benchmarks/memory.py --reduced --out /tmp/memory.jsonl

``state``: bytes of optimizer state on the reference load. One matrix of each shape is stepped, all that the optimizer
holds afterwards is counted, and the sum is taken over the load; SCAO's own count (``memory_report``) is shown next to it.
``bfloat16``: the same of parameters in bfloat16, after each step, for LoRA and for the whole matrices of Llama-3.1-8B.
``scratch``: what a step allocates beyond what it leaves behind, from torch's allocator: the peak of a step and the
largest single allocation, for each kind of step.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of every start and stop

import loads
import peers
import speed
import sweep
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from scao_hf import SCAO
from scao_hf.rules import rule_of

RESULTS = Path(__file__).resolve().parent / "results" / "memory.jsonl"
PARTS = ("state", "bfloat16", "scratch")

#: SCAO and its options, then the others, in the order of the table.
STATE = (
    "scao",
    "scao:use_int8_ema=True",
    "scao:moment_dtype='bfloat16'",
    "scao:moment_dtype='bfloat16':use_int8_ema=True",
    "scao:moment_dtype='int8'",
    "scao:moment_dtype='int8':use_int8_ema=True",
    "adamw",
    "adamw8bit",
    "muon",
    "polora",
    "soap",
    "scao-pypi",
    "scao-pypi:use_int8_ema=True",
)
BFLOAT16 = ("scao", "scao:moment_dtype='bfloat16'", "scao:moment_dtype='int8'", "adamw", "adamw8bit")
SCRATCH = ("scao", "scao-pytorch", "scao:moment_dtype='int8':use_int8_ema=True", "adamw-foreach", "muon", "polora")


class OneMatrix(nn.Module):
    """A single LoRA factor under the name that PEFT gives it."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.register_parameter("lora_A", nn.Parameter(torch.randn(shape)))
        loads.as_trained(self)


def state_bytes(spec: str, model: nn.Module) -> int:
    """Bytes that an optimizer holds after it has stepped ``model``: SCAO in phase 2, the others after the first step."""
    return list(bytes_held(spec, model))[-1]


def bytes_held(spec: str, model: nn.Module) -> Iterator[int]:
    """The same after each step up to that one."""
    stepper = loads.Stepper.of(spec, model)
    gradients = loads.Gradients(model)
    for _ in range(stepper.settle if isinstance(stepper.optimizer, SCAO) else 1):
        stepper.step(gradients)
        yield peers.state_bytes(stepper.optimizer, model)


def bfloat16(cell: speed.Cell, progress: Callable[[str], None]) -> dict[str, Any]:
    """State of parameters in bfloat16, at rest and at its largest; of a large matrix a strip is stepped and scaled."""
    spec, found = cell["optimizers"][0], {}
    shrink = 16 if cell["reduced"] else 1
    with torch.device("meta"):
        kinds = {"LoRA": loads.qwen(rank=cell["rank"], shrink=shrink), "full": loads.llama_layer(shrink)}
    for kind, model in kinds.items():
        totals: Counter[int] = Counter()
        for (rows, cols), count in Counter(tuple(param.shape) for param in model.parameters()).items():
            progress(f"{spec} {kind} {rows} x {cols}")
            # Blocks of the small side have states of their own, so that a strip of them takes its share of the memory.
            strip = (min(rows, 256), cols) if rows <= cols else (rows, min(cols, 256))
            times = count * rows * cols // math.prod(strip)
            for step, held in enumerate(bytes_held(spec, OneMatrix(strip).to(torch.bfloat16))):
                totals[step] += times * held
            gc.collect()
        found[kind] = {"parameters": loads.size(model), "bytes": totals[max(totals)], "largest": max(totals.values())}
    return found


def state(cell: speed.Cell, progress: Callable[[str], None]) -> dict[str, Any]:
    """State on the load, shape by shape; pairs together where the rule is defined for pairs."""
    model = load(cell)
    spec = cell["optimizers"][0]
    total = 0
    if spec.split(":")[0] == "polora":
        kinds = Counter((pair.lora_A.shape[1], pair.lora_B.shape[0]) for pair in pairs(model))
        for (inputs, outputs), count in kinds.items():
            total += count * state_bytes(spec, loads.Pair(cell["rank"], inputs, outputs))
    else:
        for shape, count in Counter(tuple(param.shape) for param in model.parameters()).items():
            progress(f"{spec} {shape}")
            total += count * state_bytes(spec, OneMatrix(shape))
            gc.collect()
    found: dict[str, Any] = {"parameters": loads.size(model), "bytes": total}
    if spec.split(":")[0] == "scao":
        found["report"] = SCAO(model.parameters(), **peers.parse(spec)[1]).memory_report()
    return found


def pairs(model: nn.Module) -> list[loads.Pair]:
    """The LoRA layers of a load."""
    return [module for module in model.modules() if isinstance(module, loads.Pair)]


def allocations(action: Callable[[], object]) -> list[int]:
    """Every allocation (bytes) and release (negative) through torch's allocator, in order, of any thread."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, profile_memory=True, acc_events=True) as seen:
        action()
        loads.synchronize()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak(changes: list[int]) -> tuple[int, int, int]:
    """Highest sum of a list of allocations and releases, where it ends, and the largest single allocation."""
    level = highest = 0
    for change in changes:
        level += change
        highest = max(highest, level)
    return highest, level, max(changes, default=0)


def scratch(cell: speed.Cell, progress: Callable[[str], None]) -> dict[str, Any]:
    """The peak of each kind of step, in bytes above what was there before it."""
    torch.manual_seed(0)
    model = load(cell)
    gradients = loads.Gradients(model)
    stepper = loads.Stepper.of(cell["optimizers"][0], model)
    groups: Counter[tuple[int, ...]] = Counter()
    for param in model.parameters():
        groups[tuple(sorted(param.shape))] += param.numel()
    found: dict[str, Any] = {"parameters": loads.size(model), "largest_group": max(groups.values())}
    kinds: dict[str, dict[str, int]] = {}
    for step in range(1, stepper.settle + stepper.period + 1):
        kind = kind_of(stepper, step)
        if kind is None:
            stepper.step(gradients)
            continue
        progress(f"{stepper.spec} step {step}")
        highest, left, largest = peak(allocations(lambda: stepper.step(gradients)))
        seen = kinds.setdefault(kind, {"peak": 0, "largest_allocation": 0, "left": 0})
        for name, value in (("peak", highest), ("largest_allocation", largest), ("left", left)):
            seen[name] = max(seen[name], value)
    return {**found, "steps": kinds}


def kind_of(stepper: loads.Stepper, step: int) -> str | None:
    """What kind of step a step (from 1) is; None for one that is not looked at."""
    optimizer = stepper.optimizer
    if not isinstance(optimizer, SCAO):
        return "step" if step > stepper.settle else None
    group = optimizer.param_groups[0]
    start = rule_of(group, matrix=True).phase1_steps(group)
    if step > stepper.settle:
        return "phase 2, refresh included"
    return {start - 1: "phase 1", start: "entry into phase 2", start + 1: "ramp"}.get(step)


def load(cell: speed.Cell) -> nn.Module:
    """The reference load, or a small one of the same kind."""
    return loads.qwen(layers=2, rank=cell["rank"], shrink=16) if cell["reduced"] else loads.qwen(rank=cell["rank"])


def cells(arguments: argparse.Namespace) -> Iterator[speed.Cell]:
    """Every measurement that the command line asks for."""
    for part in arguments.parts:
        for spec in {"state": STATE, "bfloat16": BFLOAT16, "scratch": SCRATCH}[part]:
            yield {
                "benchmark": "memory",
                "part": part,
                "rank": 16,
                "reduced": arguments.reduced,
                "optimizers": [spec],
            }


def measure(cell: speed.Cell, progress: Callable[[str], None]) -> dict[str, Any]:
    """One measurement; why it could not be made where an optimizer does not run here."""
    try:
        return {"state": state, "bfloat16": bfloat16, "scratch": scratch}[cell["part"]](cell, progress)
    except peers.Unavailable as reason:
        return {"unavailable_here": str(reason)}
    finally:
        gc.collect()


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=speed.words(PARTS), default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--reduced", action="store_true", help="a small load, for a test of the script")
    parser.add_argument(
        "--out", type=sweep.writable, default=RESULTS, help="result file, added to (default: results/memory.jsonl)"
    )
    parser.add_argument("--redo-stale", action="store_true", help="measure again what other code has measured")
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "examples/benchmarks/memory.py", *(sys.argv[1:] if argv is None else argv)])
    return speed.run(list(cells(arguments)), measure, arguments.out, arguments.redo_stale, command)


if __name__ == "__main__":
    sys.exit(main())
