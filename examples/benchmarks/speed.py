"""Time the steps of SCAO and of other optimizers, one JSON line per measurement.

    python examples/benchmarks/speed.py                         # everything that is missing in results/speed.jsonl
    python examples/benchmarks/speed.py --parts load,growth --threads 1
    python examples/benchmarks/speed.py --reduced --out /tmp/speed.jsonl     # small shapes, seconds

All optimizers of a line take turns in one process, on the same parameters and gradients: what disturbs one disturbs all.
A measurement that is in the file is not repeated; ``--redo-stale`` repeats those of other code.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loads
import peers
import products
import provenance
import sweep
import torch
from torch import nn

PARTS = ("copy", "load", "pair", "gpt2", "growth", "training")
RESULTS = Path(__file__).resolve().parent / "results" / "speed.jsonl"

#: The load and who can step all of it in seconds.
LOAD = ("adamw", "adamw-foreach", "scao", "scao-pytorch", "muon", "polora")
#: Who cannot: on the factors of one query and one value map. The public scao in its second phase, refreshed as often.
PYPI = "scao-pypi:precond_freq=10:warmup_steps=10:blend_steps=0:min_precond_updates=1"
PAIR = ("adamw", "scao", "scao-pytorch", "muon", "polora", "soap", PYPI)
GPT2 = ("adamw", "scao", "scao:max_precond_dim=512", "scao-pytorch", "muon", "soap")
GROWTH = ("adamw", "scao")
RANKS, SIDES, DEPTHS = (4, 16, 64, 256), (256, 1024, 2048, 4096, 11008, 28672), (1, 5, 20, 40, 80)

Cell = dict[str, Any]


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Every measurement that the command line asks for."""
    small = arguments.reduced
    for threads in arguments.threads:
        base = {"benchmark": "speed", "threads": threads, "reduced": small}
        for part in arguments.parts:
            if part == "growth":
                if threads == arguments.threads[0]:  # the growth does not depend on threads
                    yield from ({**base, **cell} for cell in growth(small))
            elif part == "copy":
                yield {**base, "part": part, "megabytes": 16 if small else 256}
            elif part == "training":
                yield {**base, "part": part, "rounds": 1 if small else 6, "optimizers": ["adamw", "scao"]}
            else:
                names = {"load": LOAD, "pair": PAIR, "gpt2": GPT2}[part]
                periods = 1 if small or part == "pair" else 2
                yield {**base, "part": part, "periods": periods, "optimizers": list(names)}


def growth(small: bool) -> Iterator[Cell]:
    """One side at a time is varied: the rank, the long side, the number of layers (of two matrices each)."""
    base = {"part": "growth", "optimizers": list(GROWTH), "periods": 1 if small else 2}
    middle = {"rank": 16, "side": 256 if small else 2048, "layers": 4 if small else 20}
    # Enough matrices that a step is longer than what a clock can tell, few enough that the largest fits.
    for rank in (4, 16) if small else RANKS:
        yield {**base, **middle, "rank": rank, "varied": "rank"}
    for side in (256, 512) if small else SIDES:
        yield {**base, **middle, "side": side, "varied": "side"}
    for layers in (1, 4) if small else DEPTHS:
        yield {**base, **middle, "layers": layers, "varied": "layers"}


def model_of(cell: Cell) -> nn.Module:
    """The parameters that a measurement steps."""
    small = cell["reduced"]
    if cell["part"] == "load":
        return loads.qwen(layers=2, shrink=16) if small else loads.qwen()
    if cell["part"] == "pair":
        side, narrow = (64, 32) if small else (2048, 256)
        return loads.lora(16, [(side, side), (side, narrow)], 1)
    if cell["part"] == "gpt2":
        return loads.gpt2_block(48 if small else 768)
    return loads.lora(cell["rank"], [(cell["side"], cell["side"])], cell["layers"])


def step_times(cell: Cell, progress: Callable[[str], None], device: str = "cpu") -> dict[str, Any]:
    """Time the optimizers of a measurement in turn."""
    torch.manual_seed(0)
    model = model_of(cell).to(device)
    gradients = loads.Gradients(model)
    steppers, unavailable = [], {}
    for spec in cell["optimizers"]:
        try:
            steppers.append(loads.Stepper.of(spec, model))
        except peers.Unavailable as reason:
            unavailable[spec] = str(reason)
    loads.interleave(steppers, gradients, cell["periods"], progress)
    figures = {stepper.spec: stepper.figures() for stepper in steppers}
    for stepper in steppers:
        if stepper.spec.startswith(("adamw", "scao")) and stepper.spec != PYPI:
            figures[stepper.spec]["operations"] = stepper.operations(gradients)
    return {
        "parameters": loads.size(model),
        "matrices": sum(param.ndim == 2 for param in model.parameters()),
        "shapes": loads.shapes(model),
        "figures": figures,
        "unavailable": unavailable,
    }


def training(cell: Cell, progress: Callable[[str], None]) -> dict[str, Any]:
    """Whole steps of SmolLM2-135M in 4 bit with LoRA r=16, the optimizers in turn on the same factors.

    The rest of a step is the same whichever optimizer follows, and varies by more than an optimizer takes. So the two
    are timed apart, and a whole step is the median of the rest of all of them and the optimizer's own figures.
    """
    import data
    import tasks

    if cell["reduced"]:
        task = tasks.build("tiny", data.load(None), 8, 4, 128)
    else:
        task = tasks.build("qlora", data.load(None), 16, 4, 128)
    task.reset(0)
    steppers = [loads.Stepper.of(spec, task.model) for spec in cell["optimizers"]]
    gradients = loads.Gradients(task.model)
    for stepper in steppers:
        progress(f"{stepper.spec}: settling")
        for _ in range(stepper.settle):
            stepper.step(gradients)
    rest: list[tuple[float, float]] = []
    rounds = cell["rounds"]
    turns = max(stepper.period for stepper in steppers) * -(-rounds // 6)
    for turn in range(turns):
        progress(f"round {turn + 1} of {turns}")
        task.model.zero_grad()
        loads.synchronize()
        wall, processor = time.perf_counter(), time.process_time()
        if turn < rounds:  # the rest of a step once more would tell nothing new
            with products.in_float32():
                task.loss(turn).backward()
            loads.synchronize()
            rest.append((time.process_time() - processor, time.perf_counter() - wall))
        for stepper in steppers:
            stepper.step(gradients)
    return {
        "parameters": sum(param.numel() for _, param in task.trainable()),
        "model": task.definition["model"],
        "rest": {
            "cpu_ms": round(1e3 * statistics.median(times[0] for times in rest), 2),
            "wall_ms": round(1e3 * statistics.median(times[1] for times in rest), 2),
        },
        "figures": {stepper.spec: stepper.figures() for stepper in steppers},
    }


def measure(cell: Cell, progress: Callable[[str], None]) -> dict[str, Any]:
    """One measurement."""
    before = torch.get_num_threads()
    torch.set_num_threads(cell["threads"])
    try:
        if cell["part"] == "copy":
            return {"bytes_per_second": round(loads.copy_bandwidth(cell["megabytes"]))}
        return (training if cell["part"] == "training" else step_times)(cell, progress)
    finally:
        torch.set_num_threads(before)
        gc.collect()


def origin(command: str, optimizers: list[str], threads: int) -> dict[str, Any]:
    """Machine, versions, code and command of a record."""
    versions: dict[str, str] = provenance.versions("scao")
    for spec in optimizers:
        if spec.split(":")[0] in peers.PEERS:
            versions |= provenance.versions(spec)
    versions["code"] = loads.code_fingerprint()
    return {"versions": versions, "machine": {**provenance.machine(), "threads": threads}, "command": command}


def is_stale(record: dict[str, Any]) -> bool:
    """Whether other code than today's has made a record."""
    return bool(record["versions"].get("code") != loads.code_fingerprint())


def words(choices: tuple[str, ...] | None = None) -> Callable[[str], list[str]]:
    """A command-line type: names separated by commas."""

    def read(text: str) -> list[str]:
        found = [part for part in text.split(",") if part]
        unknown = [part for part in found if choices and part not in choices]
        if unknown or not found:
            raise argparse.ArgumentTypeError(f"{text!r} must be some of {', '.join(choices or ())}")
        return found

    return read


def run(
    wanted: list[Cell],
    measure: Callable[[Cell, Callable[[str], None]], dict[str, Any]],
    out: Path,
    redo_stale: bool,
    command: str,
) -> int:
    """Measure what is missing in a result file and append it, one line per measurement.

    One that fails is shown and left out, and the others are made.

    Returns:
        1 where one has failed.
    """
    loads.code_fingerprint()
    done, _ = sweep.read(out)
    stale = [name for name, record in done.items() if is_stale(record)]
    for name in stale if redo_stale else ():
        del done[name]
    missing = [cell for cell in wanted if sweep.key(cell) not in done]
    if not redo_stale and any(sweep.key(cell) in stale for cell in wanted):
        print("some of the finished measurements are of other code: see --redo-stale", file=sys.stderr)
    print(f"{len(wanted)} measurements, {len(wanted) - len(missing)} finished before", file=sys.stderr)
    failed = 0
    for index, cell in enumerate(missing):
        name = " ".join(
            f"{key}={cell[key]}" for key in ("part", "threads", "varied", "rank", "side", "layers") if key in cell
        )

        def progress(text: str, name: str = name, index: int = index) -> None:
            if sys.stderr.isatty():
                print(f"\r\033[K[{index + 1}/{len(missing)}] {name}: {text}", end="", file=sys.stderr, flush=True)

        started = time.monotonic()
        try:
            result = measure(cell, progress)
        except (RuntimeError, ValueError, OSError, ImportError):
            print(
                f"[{index + 1}/{len(missing)}] {name}: failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True
            )
            failed = 1
            continue
        print(f"[{index + 1}/{len(missing)}] {name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        where = origin(command, cell.get("optimizers", []), cell.get("threads", torch.get_num_threads()))
        sweep.append(out, {"key": sweep.key(cell), "cell": cell, **result, **where})
    return failed


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=words(PARTS), default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--threads", type=sweep.numbers(int, 0), default=[1], help="default: 1")
    parser.add_argument("--reduced", action="store_true", help="small shapes, for a test of the script")
    parser.add_argument(
        "--out", type=sweep.writable, default=RESULTS, help="result file, added to (default: results/speed.jsonl)"
    )
    parser.add_argument("--redo-stale", action="store_true", help="measure again what other code has measured")
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "examples/benchmarks/speed.py", *(sys.argv[1:] if argv is None else argv)])
    return run(list(cells(arguments)), measure, arguments.out, arguments.redo_stale, command)


if __name__ == "__main__":
    sys.exit(main())
