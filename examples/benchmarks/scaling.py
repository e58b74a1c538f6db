"""What SCAO costs on many GPUs: bytes on the wire, refreshes and state per process, by arithmetic on the model's shapes.

``python examples/benchmarks/scaling.py`` prints the tables of docs/distributed.md; ``--write`` renews them there. Tests
hold the formulae to what two and four processes really send.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tables
import torch
from torch import Tensor, nn

from scao_hf import SCAO, backend
from scao_hf.distributed.exchange import chunks
from scao_hf.distributed.shards import balance, size_of
from scao_hf.rules import expected
from scao_hf.tools.shapes import builtin

DOCUMENT = Path(__file__).parents[2] / "docs" / "distributed.md"
TIMES = Path(__file__).parent / "results" / "scaling.json"
WORLDS = (8, 64, 1024)
MODEL, RANK = "Qwen2.5-3B", 16


def size(param: Tensor) -> int:
    """Bytes of a parameter."""
    return param.numel() * param.element_size()


def fsdp_step_bytes(params: Sequence[Tensor], costs: Sequence[int], world: int) -> list[int]:
    """Bytes that each process sends to others in a step under FSDP2.

    To the owner go the shard of the parameter and that of its gradient; back comes the new shard: in all
    ``3 (B - b)`` for a parameter of B bytes of which the owner holds b, on average ``3 P (w - 1) / w^2`` per process.
    """
    sent = [0] * world
    for param, owner in zip(params, balance(costs, [0] * world), strict=True):
        row = size(param) // param.shape[0]
        for rank, (first, last) in enumerate(chunks(param.shape[0], world)):
            if rank != owner:
                sent[rank] += 2 * row * (last - first)
                sent[owner] += row * (last - first)
    return sent


def state_bytes(param: Tensor, group: dict[str, Any], step: int = sys.maxsize) -> int:
    """Bytes of a parameter's state after ``step`` steps; by default in phase 2."""
    return sum(field.numel() * field.element_size() for field in expected(param, group, step).values())


def shared_step_bytes(states: int, world: int, precond_freq: int) -> float:
    """Bytes that each process receives in an average step of phase 2 under DDP with shared refreshes: ``S (w-1) / (w f)``.

    S is the state of all matrices, all of which are refreshed once in f steps.
    """
    return states * (world - 1) / world / precond_freq


def lora_factors(model: str, rank: int) -> list[nn.Parameter]:
    """Every LoRA factor on the seven linear layers of each block, on the meta device."""
    found = builtin(model)
    assert found is not None, model
    _, config = found
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layers = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    layers += [(hidden, inner), (hidden, inner), (inner, hidden)]
    sides = [side for inside, outside in layers for side in ((rank, inside), (outside, rank))]
    return [
        nn.Parameter(torch.empty(side, device="meta")) for _ in range(config["num_hidden_layers"]) for side in sides
    ]


def refresh_milliseconds(r: int, l: int, steps: int = 15) -> float:
    """Processor time of the refresh of one matrix, in milliseconds on one core, native kernels or not.

    Eight matrices that are all refreshed in every step, less eight of which one is: seven refreshes.
    """
    medians = []
    for frequency in (1, 8):
        params = [nn.Parameter(torch.zeros(r, l)) for _ in range(8)]
        optimizer = SCAO(params, warmup_steps=1, min_precond_updates=1, precond_freq=frequency, blend_steps=0)
        generator, times = torch.Generator().manual_seed(0), []
        for step in range(frequency + 2 + steps):
            for param in params:
                param.grad = torch.randn(r, l, generator=generator)
            before = time.process_time()
            optimizer.step()
            if step >= frequency + 2:
                times.append(time.process_time() - before)
        medians.append(statistics.median(times))
    return (medians[0] - medians[1]) / 7 * 1000


def measure(model: str = MODEL, rank: int = RANK) -> None:
    """Write the refresh time of each of the model's shapes."""
    torch.set_num_threads(1)
    shapes = sorted({(min(param.shape), max(param.shape)) for param in lora_factors(model, rank)})
    figures = {f"{r} x {l}": round(refresh_milliseconds(r, l), 3) for r, l in shapes}
    TIMES.write_text(
        json.dumps({"milliseconds": figures, "backend": backend()["cpu"], "torch": torch.__version__}) + "\n"
    )


def table(model: str = MODEL, rank: int = RANK) -> str:
    """The plan for one model as a Markdown table, one column for each number of GPUs."""
    params = lora_factors(model, rank)
    group = SCAO(params).param_groups[0]
    costs, states = [size_of(param, group) for param in params], [state_bytes(param, group) for param in params]
    total, frequency = sum(map(size, params)), group["precond_freq"]

    figures = json.loads(TIMES.read_text())["milliseconds"]
    times = [figures[f"{min(param.shape)} x {max(param.shape)}"] for param in params]

    def mib(value: float) -> str:
        return f"{value / 2**20:.2f} MiB"

    rows: dict[str, list[str]] = {}

    def add(name: str, value: str) -> None:
        rows.setdefault(name, []).append(value)

    for world in WORLDS:
        due = len(params) / frequency
        add("DDP: gradients, all-reduced (without SCAO too)", mib(2 * total * (world - 1) / world))
        add("DDP: shared refreshes, received", mib(shared_step_bytes(sum(states), world, frequency)))
        add("DDP: matrices refreshed per process and step, at most", str(-(-int(-(-due // 1)) // world)))
        # As long as a process has several matrices the work divides evenly; one matrix is the least.
        add("DDP: refresh time per step, shared", f"{max(sum(times) / frequency / world, max(times)):.1f} ms")
        add("DDP: refresh time per step, replicated", f"{sum(times) / frequency:.1f} ms")
        add("DDP: state per process", mib(sum(states)))
        sent = fsdp_step_bytes(params, costs, world)
        add("FSDP2: sent per process, mean", mib(sum(sent) / world))
        add("FSDP2: sent per process, largest", mib(max(sent)))
        owners = balance(costs, [0] * world)
        held = [
            sum(state for state, owner in zip(states, owners, strict=True) if owner == each) for each in range(world)
        ]
        add("FSDP2: state per process, mean", mib(sum(held) / world))
        add("FSDP2: state per process, largest", mib(max(held)))
        work = [sum(time for time, owner in zip(times, owners, strict=True) if owner == each) for each in range(world)]
        add("FSDP2: refresh time per step, largest", f"{max(max(work) / frequency, max(times)):.1f} ms")
        most = max(owners.count(each) for each in range(world))
        add("FSDP2: matrices per process, at most", str(most))
    head = f"| {model}, LoRA of rank {rank}: {len(params)} matrices, {mib(total)} | " + " | ".join(
        f"{world} GPUs" for world in WORLDS
    )
    lines = [head + " |", "|---|" + "---:|" * len(WORLDS)]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(values)} |" for name, values in rows.items())])


def renewed(text: str) -> str:
    """A document with the table between its marks replaced."""
    return tables.fill(text, {"scaling": f"\n{table()}\n\n"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the table in docs/distributed.md")
    parser.add_argument("--measure", action="store_true", help="measure the refresh times of this machine's core first")
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
    if arguments.write:
        DOCUMENT.write_text(renewed(DOCUMENT.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main()
