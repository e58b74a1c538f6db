"""What the cost benchmarks step: models' parameters as bare tensors, random gradients, and how a step is timed.

No model is needed: the cost of a step depends on the shapes of the parameters, not on what they do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import data
import peers
import products
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from scao_hf import notices, ops
from scao_hf.rules import rule_of

#: How many sets of gradients take turns: with one alone, momentum and gradient would be the same and residuals zero.
GRADIENT_SETS = 3


class Pair(nn.Module):
    """The two factors of a LoRA layer, ``A [r, inputs]`` and ``B [outputs, r]``."""

    def __init__(self, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.lora_B = nn.Parameter(torch.randn(outputs, rank) / math.sqrt(outputs))


def lora(rank: int, linears: Sequence[tuple[int, int]], layers: int) -> nn.Module:
    """LoRA factors of ``layers`` equal layers, each with the given linear maps ``(inputs, outputs)``."""
    return as_trained(nn.ModuleList(nn.ModuleList(Pair(rank, *sides) for sides in linears) for _ in range(layers)))


#: Hidden 2048, two key-value heads of 128, MLP 11008.
QWEN_3B = ((2048, 2048), (2048, 256), (2048, 256), (2048, 2048), (2048, 11008), (2048, 11008), (11008, 2048))


def qwen(layers: int = 36, rank: int = 16, shrink: int = 1) -> nn.Module:
    """LoRA on all seven linear maps of Qwen2.5-3B: 504 matrices of 29,933,568 parameters at full size."""
    return lora(rank, [(inputs // shrink, outputs // shrink) for inputs, outputs in QWEN_3B], layers)


def llama_layer(shrink: int = 1) -> nn.Module:
    """The matrices of one layer of Llama-3.1-8B: hidden 4096, eight key-value heads of 128, MLP 14336."""
    hidden, values, inner = 4096 // shrink, 1024 // shrink, 14336 // shrink
    sides = [(hidden, hidden), (hidden, values), (hidden, values), (hidden, hidden)]
    sides += [(hidden, inner), (hidden, inner), (inner, hidden)]
    return as_trained(nn.ModuleList(nn.Linear(*side, bias=False) for side in sides))


def as_trained(model: nn.Module) -> nn.Module:
    """Rows of different sizes, as training leaves them, by which SCAO knows that it does not begin from scratch."""
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 2 and not param.is_meta:
                param.mul_(torch.linspace(0.5, 1.5, len(param), dtype=param.dtype)[:, None])
    return model


def gpt2_block(width: int = 768) -> nn.Module:
    """One transformer block of GPT-2 small: four matrices with both sides large, and its vectors."""
    block = nn.ModuleDict(
        {
            "attention": nn.Linear(width, 3 * width),
            "out": nn.Linear(width, width),
            "up": nn.Linear(width, 4 * width),
            "down": nn.Linear(4 * width, width),
            "norm1": nn.LayerNorm(width),
            "norm2": nn.LayerNorm(width),
        }
    )
    return as_trained(block)


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(param.numel() for param in model.parameters())


def shapes(model: nn.Module) -> int:
    """Number of distinct shapes, a matrix and its transpose counted once."""
    return len({tuple(sorted(param.shape)) for param in model.parameters()})


class Gradients:
    """Random gradients of the trainable parameters, a few sets of them in turn."""

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        self.params = [param for param in model.parameters() if param.requires_grad]
        self.sets = [
            [
                torch.randn(param.shape, generator=generator, device=device).mul_(1e-3).to(param.dtype)
                for param in self.params
            ]
            for _ in range(GRADIENT_SETS)
        ]

    def put(self, turn: int) -> None:
        """Give every parameter its gradient of that turn."""
        for param, grad in zip(self.params, self.sets[turn % GRADIENT_SETS], strict=True):
            param.grad = grad


@contextlib.contextmanager
def without_native() -> Iterator[None]:
    """SCAO's steps in PyTorch alone, as with SCAO_DISABLE_EXT=1, in a process that has loaded the native kernels."""
    with mock.patch.object(ops, "NATIVE", frozenset()), mock.patch.object(ops, "KERNELS", {}):
        yield


class Operations(TorchDispatchMode):
    """Counts the dispatched operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def synchronize() -> None:
    """Wait for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Stepper:
    """An optimizer with what it takes to time it.

    Attributes:
        spec: as in ``peers``; ``scao-pytorch`` is ``scao`` without native kernels, ``adamw-foreach`` torch's other AdamW.
        period: steps after which its work repeats.
        settle: steps before the first one that is timed as usual; a multiple of the period.
        times: (processor, wall) seconds of every step so far, the settling ones included.
    """

    spec: str
    optimizer: Optimizer
    period: int
    settle: int
    context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    times: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def of(cls, spec: str, model: nn.Module) -> Stepper:
        """Build the optimizer of a spec over a model's parameters, with a learning rate that moves nothing far.

        Raises:
            peers.Unavailable: it cannot run here.
        """
        context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        if spec == "adamw-foreach":
            return cls(spec, torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, foreach=True), 1, 2)
        name, options = spec, ""
        if spec.startswith("scao-pytorch"):
            name, options, context = "scao", spec.removeprefix("scao-pytorch"), without_native
        optimizer = peers.create(name + options, model, 1e-6)
        group = optimizer.param_groups[0]
        if name.startswith("scao") and "scao_version" in group:
            period = group["precond_freq"]
            start = rule_of(group, matrix=True).phase1_steps(group)
            settle = max(start + group["blend_steps"] + 1, notices.PATIENCE)  # its watch over gradients holds counters
            return cls(spec, optimizer, period, -(-settle // period) * period, context)
        period = next((group[key] for key in ("precondition_frequency", "precond_freq") if key in group), 1)
        if spec.startswith("muon"):  # its products are in bfloat16
            context = products.in_float32
        return cls(spec, optimizer, period, max(2, period), context)

    def step(self, gradients: Gradients) -> None:
        """One timed step."""
        gradients.put(len(self.times))
        with self.context():
            synchronize()
            wall, processor = time.perf_counter(), time.process_time()
            self.optimizer.step()
            synchronize()
            self.times.append((time.process_time() - processor, time.perf_counter() - wall))

    def operations(self, gradients: Gradients) -> int:
        """Dispatched operations of the cheapest step of a period."""
        least = None
        for _ in range(min(self.period, 10)):
            gradients.put(len(self.times))
            with self.context(), Operations() as seen:
                self.optimizer.step()
            self.times.append((math.nan, math.nan))
            total = sum(seen.counts.values())
            least = total if least is None else min(least, total)
        assert least is not None
        return least

    def figures(self) -> dict[str, Any]:
        """Milliseconds: the typical step, the mean over a period, and the slowest step of a period, medians over periods."""
        timed = [times for times in self.times[self.settle :] if not math.isnan(times[0])]
        found: dict[str, Any] = {"period": self.period, "steps": len(timed)}
        for index, clock in enumerate(("cpu", "wall")):
            later = [times[index] * 1e3 for times in timed]
            places = [statistics.median(later[place :: self.period]) for place in range(self.period)]
            found[f"{clock}_ms"] = round(statistics.median(places), 4)
            found[f"{clock}_ms_amortised"] = round(statistics.mean(places), 4)
            found[f"{clock}_ms_worst"] = round(max(places), 4)
            first = [times[index] * 1e3 for times in self.times[: self.settle]]
            found[f"{clock}_ms_worst_settling"] = round(max(first[1:], default=0.0), 4)
        return found


def interleave(
    steppers: Sequence[Stepper], gradients: Gradients, periods: int, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Settle each optimizer, then let them take turns for ``periods`` of each one's own periods.

    One with a shorter period than the longest takes its steps in the same rounds, more periods of them.
    """
    for stepper in steppers:
        progress(f"{stepper.spec}: settling")
        for _ in range(stepper.settle):
            stepper.step(gradients)
    longest = max(stepper.period for stepper in steppers)
    for turn in range(periods * longest):
        progress(f"round {turn + 1} of {periods * longest}")
        for stepper in steppers:
            stepper.step(gradients)


def copy_bandwidth(megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes per second that a copy reads and writes, together, of arrays that no cache holds.

    In processor time on one CPU thread, as the steps: other processes do not lengthen that.
    """
    gpu = torch.cuda.is_available()
    clock = time.process_time if torch.get_num_threads() == 1 and not gpu else time.perf_counter
    source = torch.zeros(megabytes * 2**18, device="cuda" if gpu else "cpu").add_(1)
    target = torch.empty_like(source)
    rates = []
    for _ in range(repeats):
        synchronize()
        started = clock()
        target.copy_(source)
        synchronize()
        rates.append(2 * source.nbytes / (clock() - started))
    return statistics.median(rates)


def fingerprint(files: Iterable[Path]) -> str:
    """Of the content of files, whatever their order."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache  # of the code that was imported, whatever is written to the files later
def code_fingerprint() -> str:
    """A fingerprint of all code that takes part in a step, native kernels included, to see which a result belongs to."""
    native = [path for path in (data.ROOT / "csrc").glob("*.*") if path.suffix != ".md"]
    python = [path for path in (data.ROOT / "scao_hf").rglob("*.py") if "tools" not in path.parts]
    return fingerprint([*native, *python])
