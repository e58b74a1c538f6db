"""Mixtures of experts: what per-expert curvature is worth, and what the fused LoRA forward and 4-bit experts cost.

    python examples/benchmarks/moe.py toy small forward four-bit    # one thread, about a quarter of an hour
    python examples/benchmarks/tables.py --write                    # the tables of docs/moe.md

``toy``: one mixture learns another that differs from it by low-rank terms. ``small``: a mixture of 8 experts is
pretrained on one half of Python's standard library, then fine-tuned with LoRA on another kind of text. ``forward``: a
layer of experts with LoRA, against PEFT with each of transformers' implementations. ``four-bit``: the same in NF4.

What is in the file is not repeated. A training run's key holds all that defines it, for SCAO a fingerprint of what the
rule does; the times of a layer carry a fingerprint of the code, and ``--redo-stale`` repeats those of other code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data
import loads
import moe_layers
import moe_tasks
import peers
import provenance
import sweep
import torch

OUT = Path(__file__).resolve().parent / "results" / "moe.jsonl"
PARTS = ("toy", "small", "forward", "four-bit")
#: Learning rates and the number of seeds of the parts that train.
RATES = {"toy": (5e-3, 1e-2, 2e-2, 4e-2), "small": (4e-3, 8e-3, 1.6e-2, 3.2e-2)}
SEEDS = {"toy": 5, "small": 3}
#: The last one of the toy only shows what experts that are not told apart would give.
OPTIMIZERS = {"toy": ("adamw", "scao", "scao, one matrix"), "small": ("adamw", "scao")}
#: How many experts the layers have.
LAYERS = (16, 64)

Cell = dict[str, Any]


def code_fingerprint() -> str:
    """Of the code that the times of a layer depend on."""
    package = data.ROOT / "scao_hf"
    return loads.fingerprint([*(package / "moe").glob("*.py"), package / "experts.py"])


def training_cells(part: str, definition: Cell) -> Iterator[Cell]:
    """Every run of a task, all of a seed before the next seed."""
    for seed in range(SEEDS[part]):
        for lr in RATES[part]:
            for name in OPTIMIZERS[part]:
                options = peers.resolved(name.partition(",")[0])
                yield {"part": part, **definition, "optimizer": name, "options": options, "lr": lr, "seed": seed}


def measurements(part: str) -> Iterator[tuple[Cell, Callable[[], dict[str, Any]]]]:
    """What a part measures: what defines each measurement, and the measurement."""
    if part == "toy":
        for cell in training_cells(part, moe_tasks.TOY):
            yield cell, lambda cell=cell: moe_tasks.toy(cell["optimizer"], cell["lr"], cell["seed"])
    elif part == "small":
        task = moe_tasks.Small()
        for cell in training_cells(part, task.definition):
            yield cell, lambda cell=cell: task.run(cell["optimizer"], cell["lr"], cell["seed"])
    elif part == "forward":
        for experts in LAYERS:
            yield {"part": part, "experts": experts}, lambda count=experts: moe_layers.forward(count)
    else:
        yield {"part": part, "experts": LAYERS[0]}, lambda: moe_layers.four_bit(LAYERS[0])


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument(
        "--out", type=sweep.writable, default=OUT, help="result file, added to (default: results/moe.jsonl)"
    )
    parser.add_argument("--redo-stale", action="store_true", help="time again what other code has been timed with")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    done, _ = sweep.read(arguments.out)
    code = code_fingerprint()
    for part in arguments.parts:
        where = {
            "machine": provenance.machine(),
            "versions": {**provenance.versions("scao"), "code": code},
            "command": f"python examples/benchmarks/moe.py {part}",
        }
        for cell, measure in measurements(part):
            before = done.get(sweep.key(cell))
            stale = before is not None and part in ("forward", "four-bit") and before["versions"]["code"] != code
            if before is not None and not (stale and arguments.redo_stale):
                if stale:
                    print(f"{part}: timed with other code, see --redo-stale", file=sys.stderr)
                continue
            figures = measure()
            print(part, cell, figures, flush=True)
            sweep.append(arguments.out, {"key": sweep.key(cell), "cell": cell, "figures": figures, **where})
    return 0


if __name__ == "__main__":
    sys.exit(main())
