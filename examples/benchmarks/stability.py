"""The published verdict on second-order optimizers and 4-bit LoRA: who fails, at which step, with what message.

    python examples/benchmarks/stability.py --out examples/benchmarks/results/stability.jsonl
    python examples/benchmarks/stability.py --parts stress

``qlora``: SmolLM2-135M in NF4 through bitsandbytes' 4-bit layers, LoRA r = 16 on the attention maps as published.
``stress``: LoRA on the model of task ``tiny``, with what is known to break decompositions. Every run takes the same steps
on the same rows; one JSON line each, and a run that is in the file is not run again. The result is 1 if SCAO fails.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data
import gpu
import models
import peers
import products
import provenance
import sweep
import tasks
import torch
from torch import Tensor
from torch.optim import Optimizer

FILE = "stability.jsonl"
PARTS = ("qlora", "stress")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
#: Curvature from step 3 on, so that short runs test it.
EARLY = "warmup_steps=2:blend_steps=2:min_precond_updates=1:precond_freq=2"

#: Optimizers with their learning rates: the published one for Shampoo, which has no relation to AdamW's, and for the rest
#: one that AdamW trains at.
OPTIMIZERS: dict[str, float] = {
    "adamw": 2e-3,
    f"scao:{EARLY}": 2e-3,
    f"scao:{EARLY}:use_int8_ema=True": 2e-3,
    f"scao-published:{EARLY}": 2e-3,
    f"scao-pypi:{EARLY}": 2e-3,
    "plain-shampoo:decomposition=svd": 2e-4,
    "plain-shampoo:decomposition=eigh": 2e-4,
    "shampoo-svd": 2e-4,
    "shampoo": 2e-3,
    "soap:precondition_frequency=2": 2e-3,
}

#: A loss this many times the first one is a run that has gone wrong.
LOST = 3.0


def nothing(task: tasks.LoraTask) -> None:
    """Leave the task as it is."""


def repeat_rows(task: tasks.LoraTask) -> None:
    """Make each batch one row, repeated."""
    task.order = [[rows[0]] * len(rows) for rows in task.order]


def rank_one_factors(task: tasks.LoraTask) -> None:
    """Make every A of rank one; B is zero as ever, so that A has no gradient in the first step."""
    for name, param in task.trainable():
        if "lora_A" in name:
            param.data.copy_(param.data[:1].expand_as(param))


def spike(step: int, grads: list[Tensor]) -> None:
    """Gradients times 1e6 in every fifth step."""
    if step % 5 == 4:
        torch._foreach_mul_(grads, 1e6)


def overflow(step: int, grads: list[Tensor]) -> None:
    """One Inf, as float16 leaves where nothing scales the loss, in step 4."""
    if step == 3:
        grads[0].view(-1)[0] = math.inf


#: name -> (what it is, what is done to the task, what is done to the gradients)
Damage = tuple[str, Callable[[tasks.LoraTask], None], Callable[[int, list[Tensor]], None] | None]
SCENARIOS: dict[str, Damage] = {
    "plain": ("nothing added", nothing, None),
    "identical": ("a batch of identical rows", repeat_rows, None),
    "rank": ("rank-deficient factors", rank_one_factors, None),
    "spike": ("gradients times 1e6 in every fifth step", nothing, spike),
    "overflow": ("one Inf in the gradient of step 4", nothing, overflow),
    "fp16": ("float16 gradients under loss scaling from 2^16", nothing, None),
}
#: The scenarios of the real model; the rest is tried on the small one.
ON_QLORA = ("plain", "overflow")
#: Steps of a run; curvature acts in more than half of them.
STEPS = {"qlora": 5, "stress": 15}


class HalfGradients:
    """Gradients as float16 training has them: of a scaled loss, rounded, unscaled; steps that overflow are left out."""

    def __init__(self) -> None:
        self.scale = 2.0**16

    def __call__(self, grads: list[Tensor]) -> bool:
        """Round the gradients in place; whether the step is to be taken."""
        for grad in grads:
            grad.copy_((grad * self.scale).half().float() / self.scale)
        usable = all(bool(torch.isfinite(grad).all()) for grad in grads)
        if not usable:
            self.scale /= 2
        return usable


def build(spec: str, task: tasks.Task, lr: float) -> Optimizer:
    """The optimizer of a spec; ``shampoo-svd`` is the unguarded Shampoo of pytorch-optimizer."""
    if spec == "shampoo-svd":
        module = peers.imported("pytorch_optimizer", "pytorch-optimizer")
        return module.Shampoo(peers.parameters(task.model), lr=lr)  # type: ignore[no-any-return]
    return peers.create(spec, task.model, lr)


def trial(task: tasks.LoraTask, cell: dict[str, Any]) -> dict[str, Any]:
    """Train once with a scenario's damage.

    Returns:
        ``outcome`` (``trained``, ``raised``, ``not finite`` or ``lost``), the step at which it ended (from 1), the
        message of what was raised, and the losses.

    Raises:
        peers.Unavailable: the optimizer cannot run here.
    """
    _, prepare, spoil = SCENARIOS[cell["scenario"]]
    task.reset(0)
    torch.manual_seed(0)
    prepare(task)
    task.model.zero_grad()  # what a run that has failed leaves
    params = [param for _, param in task.trainable()]
    optimizer = build(cell["optimizer"], task, cell["lr"])
    half = HalfGradients() if cell["scenario"] == "fp16" else None
    losses: list[float] = []

    def ended(outcome: str, step: int, message: str = "") -> dict[str, Any]:
        return {"outcome": outcome, "step": step, "message": message, "losses": losses}

    for step in range(cell["steps"]):
        loss = task.loss(step)
        losses.append(round(loss.item(), 5) if math.isfinite(loss.item()) else math.inf)
        if losses[-1] > LOST * losses[0]:
            losses[-1] = round(min(losses[-1], 1e30), 5)  # JSON has no infinity
            return ended("lost", step + 1, f"loss {losses[-1]:.3g}")
        loss.backward()
        grads = [param.grad for param in params if param.grad is not None]
        usable = half(grads) if half else True
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        if spoil:
            spoil(step, grads)
        if usable:
            try:
                optimizer.step()
            except (RuntimeError, ValueError) as error:  # a decomposition that fails is the finding
                return ended("raised", step + 1, f"{type(error).__name__}: {error}"[:200])
        optimizer.zero_grad()
        if not all(bool(torch.isfinite(param).all()) for param in params):
            return ended("not finite", step + 1, "weights are NaN or Inf")
    return ended("trained", cell["steps"])


def task_of(part: str, where: str | None) -> tasks.LoraTask:
    """The model and the rows of a part."""
    source = data.load(where)
    if part == "stress":
        task = tasks.build("tiny", source, 8, 4)
        assert isinstance(task, tasks.LoraTask)
        return task
    from transformers import AutoTokenizer

    name, _ = gpu.available(gpu.SMALL)
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = data.encode(
        source.rows, lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id
    )
    identity = {
        "task": "qlora-4bit",
        "data": source.name,
        "data_sha256": source.fingerprint,
        "model": "SmolLM2-135M, NF4",
    }
    return tasks.LoraTask(gpu.base_4bit(name, models.device().type), rows, 16, 2, 64, identity, ATTENTION)


def cells(part: str, definition: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every run of a part."""
    scenarios = ON_QLORA if part == "qlora" else tuple(SCENARIOS)
    for scenario, optimizer in itertools.product(scenarios, OPTIMIZERS):
        lr = OPTIMIZERS[optimizer]
        named = {} if optimizer == "shampoo-svd" else {"options": peers.resolved(optimizer)}
        cell = {
            **definition,
            "part": part,
            "scenario": scenario,
            "optimizer": optimizer,
            "lr": lr,
            "steps": STEPS[part],
        }
        yield cell | named


def main(argv: list[str] | None = None) -> int:
    """Run what is missing; 1 if SCAO fails anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=sweep.numbers(str), default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--data", help="as for sweep.py (default: the demo's docstrings)")
    parser.add_argument(
        "--out", type=sweep.writable, default=Path("runs/benchmarks") / FILE, help="result file, added to"
    )
    arguments = parser.parse_args(argv)
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"--parts: {unknown[0]!r} is not one of {', '.join(PARTS)}")
    failed = False
    for part in arguments.parts:
        try:
            task = task_of(part, arguments.data)
        except data.Unusable as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        done, _ = sweep.read(arguments.out)
        for cell in cells(part, task.definition):
            result = done.get(sweep.key(cell))
            if result is None:
                started = time.monotonic()
                try:
                    with products.in_float32():
                        found = trial(task, cell)
                except peers.Unavailable as reason:
                    print(f"unavailable: {cell['optimizer']}: {reason}")
                    continue
                peer = "shampoo" if cell["optimizer"] == "shampoo-svd" else cell["optimizer"]
                origin = {"versions": provenance.versions(peer), "machine": provenance.machine()}
                result = {"key": sweep.key(cell), "cell": cell, **found, **origin}
                sweep.append(arguments.out, result)
                spent = f" ({time.monotonic() - started:.0f} s)"
                print(
                    f"{part} {cell['scenario']} {cell['optimizer']}: {found['outcome']} {found['message']}{spent}",
                    flush=True,
                )
            ours = cell["optimizer"].startswith("scao:")
            failed |= ours and result["outcome"] != "trained"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
