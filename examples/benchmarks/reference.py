"""The published reference run: Qwen2.5-3B in 4 bit, LoRA r = 16 on the attention maps, 256 tokens, 100 steps, 16 GB.

    python examples/benchmarks/reference.py                       # one GPU, some hours on a T4
    python examples/benchmarks/reference.py --steps 3             # a first look

AdamW at the two rates that were compared (5e-5 and 2e-4), SCAO at AdamW's, SCAO with everything in int8, and the public
scao. Loss, seconds per step and peak memory go into one JSON line each, a run that is in the file is not run again. Where
there is no GPU, or the model cannot be had, SmolLM2-135M takes its place with fewer and smaller steps, and the record
says so: such a run shows that the script works, and nothing about the published figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data
import gpu
import peers
import provenance
import sweep
import torch

FILE = "reference.jsonl"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RUNS = (
    ("adamw", 5e-5),
    ("adamw", 2e-4),
    ("scao", 2e-4),
    ("scao:moment_dtype=int8:use_int8_ema=True", 2e-4),
    ("scao-pypi", 2e-4),
)


def cells(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every run; without a GPU the small model with two steps of two short rows."""
    here = torch.cuda.is_available()
    for optimizer, lr in RUNS:
        yield {
            "part": "reference",
            "model": arguments.model if here else gpu.SMALL,
            "data": arguments.data,
            "rank": 16,
            "targets": TARGETS,
            "batch": 2,
            "accumulate": 4 if here else 1,
            "max_tokens": 256 if here else 96,
            "steps": arguments.steps or (100 if here else 6),
            "lr": lr,
            "optimizer": optimizer,
            "optimizers": [optimizer],
            "options": peers.resolved(optimizer),
            "device": torch.cuda.get_device_name() if here else "cpu",
        }


def measure(cell: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """One run, flat; running out of memory is a result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    empty: dict[str, Any] = {"loss": [], "seconds_per_step": None, "state_bytes": None, "peak_allocated": None}
    try:
        found = gpu.qlora(cell, progress, device)
    except torch.OutOfMemoryError as error:
        return {**empty, "loaded": cell["model"], "replaced": "", "failure": str(error).splitlines()[0][:120]}
    (run,) = found.pop("runs").values()
    return {**found, **run, "failure": None}


def main(argv: list[str] | None = None) -> int:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=gpu.MODEL, help="default: %(default)s")
    parser.add_argument("--data", help="as for sweep.py (default: the demo's docstrings)")
    parser.add_argument("--steps", type=int, help="default: 100, without a GPU 6")
    parser.add_argument(
        "--out", type=sweep.writable, default=Path("runs/benchmarks") / FILE, help="result file, added to"
    )
    arguments = parser.parse_args(argv)
    if arguments.steps is not None and arguments.steps < 3:
        parser.error(f"--steps {arguments.steps} must be at least 3: the first two are not timed")
    if not torch.cuda.is_available():
        print(f"no GPU: {gpu.SMALL} on the processor instead of {arguments.model}, in fewer and smaller steps")
    done, _ = sweep.read(arguments.out)
    for cell in cells(arguments):
        if sweep.key(cell) in done:
            continue
        try:
            result = measure(cell, lambda text: None)
        except peers.Unavailable as reason:
            print(f"unavailable: {cell['optimizer']}: {reason}")
            continue
        except data.Unusable as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        origin = {"versions": provenance.versions(cell["optimizer"]), "machine": provenance.machine()}
        sweep.append(
            arguments.out, {"key": sweep.key(cell), "cell": cell, "device": cell["device"], **result, **origin}
        )
        last = result["failure"] or f"loss {result['loss'][-1]:.4f}, {result['seconds_per_step']:.2f} s/step"
        print(f"{cell['optimizer']} lr {cell['lr']:g} on {result['loaded']}: {last}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
