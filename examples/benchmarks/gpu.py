"""Everything about SCAO that only a GPU can tell, in one command: `make gpu`, on a T4, an H100 or anything between.

    python examples/benchmarks/gpu.py                              # minutes; results/gpu.jsonl
    python examples/benchmarks/gpu.py --model Qwen/Qwen2.5-3B --steps 60 --lr 2e-4

``kernels``: where they were built, each native CUDA kernel in the calls that the optimizer makes of it, against PyTorch.
``load``, ``gpt2``: step times next to fused AdamW and others, as in speed.py. ``copy``: the memory's speed.
``qlora``: 4-bit LoRA r = 16 of Qwen2.5-3B with AdamW and with SCAO at one learning rate: loss, seconds, peak memory. Where
the model cannot be had, SmolLM2-135M takes its place, and the record says so.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import data
import loads
import models
import peers
import speed
import sweep
import torch
from torch import Tensor, nn

from scao_hf import SCAO, ops, quantization
from scao_hf.rules import rule_of
from scao_hf.rules.base import Step, step_adamw

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.jsonl"
PARTS = ("kernels", "copy", "load", "gpt2", "qlora")
MODEL = "Qwen/Qwen2.5-3B"
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"
OPTIMIZERS = {
    "load": ("adamw", "adamw-foreach", "scao", "scao-pytorch", "muon", "polora", "adamw8bit"),
    "gpt2": ("adamw", "scao", "muon", "soap"),
}

#: What the kernels are checked on: shapes with both orientations, ragged ends, small and large r; options of SCAO.
SHAPES = ((16, 2048), (2048, 16), (16, 257), (4, 100), (64, 520), (37, 16), (8, 8), (300,))
SCENARIOS: tuple[dict[str, Any], ...] = ({}, {"use_int8_ema": True}, {"rule": "published", "use_int8_ema": True})
QUICK = {"warmup_steps": 4, "blend_steps": 2, "precond_freq": 5, "min_precond_updates": 1, "max_precond_dim": 128}
#: Largest difference of a kernel from its twin, relative to the largest entry of a tensor.
TOLERANCE = 2e-5


class NoGpu(Exception):
    """Nothing here can be measured on this machine; the message says why and what to do."""


def require_gpu() -> None:
    """Raise ``NoGpu`` unless torch sees a GPU."""
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        raise NoGpu(
            f"no GPU: torch {torch.__version__} {built} and sees no CUDA device. Run this on a machine with an NVIDIA GPU of "
            "compute capability 7.5 or later (T4, A10, L4, A100, H100), its driver, and a torch that is built for CUDA"
        )


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry, beyond one rounding; of int8 codes, codes beyond one."""
    if not found.is_floating_point():
        return max(0.0, float((found.double() - expected.double()).abs().max()) - 1)
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return math.inf
    one, other = (torch.where(finite, tensor.double(), 0.0) for tensor in (found, expected))
    scale = max(float(other.abs().max()), 1e-30)
    return max(0.0, float((one - other).abs().max()) - torch.finfo(found.dtype).eps * scale) / scale


#: So many entries of a matrix's step may have another sign: those that are zero but for rounding.
TIES = 2


def flipped(found: Tensor, expected: Tensor, entries: int) -> float:
    """Largest difference of two shares of agreeing signs (U16) among so many entries, beyond ``TIES`` of them."""
    return max(0.0, float((found.double() - expected.double()).abs().max()) - (TIES + 0.5) / entries)


def twin_of(step: Step) -> Step:
    """The same step with parameters and state of its own, without a refresh."""

    def copy(param: Tensor) -> Tensor:
        other = param.detach().clone()
        other.grad = param.grad
        return other

    members = [member._replace(param=copy(member.param)) for member in step.bucket.members]
    state = {name: field.clone() for name, field in step.state.items()}
    return replace(step, bucket=replace(step.bucket, members=members), state=state, due=slice(0, 0))


class Watch:
    """Does what each native kernel does a second time in PyTorch, on copies, and keeps the largest difference."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.differences: dict[str, float] = {}

    @contextlib.contextmanager
    def on(self, device: str) -> Iterator[None]:
        """Watch all operations that have a native kernel on ``device``."""
        kernels = {name: getattr(ops, name) for name in ops.KERNELS[device]}
        twins: dict[str, Callable[..., Any]] = {"int8_ema_": quantization.ema_}
        run = Step.run_native

        def step(own: Step, kernel: Callable[..., None], fields: list[Tensor], *options: bool, **more: Any) -> None:
            twin = twin_of(own)
            run(own, kernel, fields, *options, **more)
            phase1 = "vectors" not in own.state
            with mock.patch.object(ops, "NATIVE", frozenset()):
                rule = rule_of(own.group, own.bucket.matrix, own.bucket.shape)
                (step_adamw if phase1 else rule.step)(twin)
            name = "adamw_step_" if phase1 else "eigenbasis_step_"
            pairs = [(own.state[field], twin.state[field]) for field in twin.state if field != "agreement"]
            members = zip(own.bucket.members, twin.bucket.members, strict=True)
            self._note(name, *itertools.starmap(difference, pairs))
            self._note(name, *(difference(one.param.detach(), other.param) for one, other in members))
            if "agreement" in own.state:
                r, l = own.bucket.shape
                self._note(name, flipped(own.state["agreement"], twin.state["agreement"], r * l))

        with contextlib.ExitStack() as stack:
            for name, kernel in kernels.items():
                stack.enter_context(mock.patch.object(ops, name, self._both(name, kernel, twins.get(name))))
            stack.enter_context(mock.patch.object(Step, "run_native", step))
            yield

    def _both(self, name: str, kernel: Callable[..., Any], twin: Callable[..., Any] | None) -> Callable[..., Any]:
        """The kernel, counted. Without a ``twin`` it is compared elsewhere: a step as a whole, and what is fixed up to the
        signs of eigenvectors in tests/test_ops.py."""

        def both(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            if twin is None:
                return kernel(*arguments)
            others = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
            found, expected = [*arguments, kernel(*arguments)], [*others, twin(*others)]
            pairs = [pair for pair in zip(found, expected, strict=True) if isinstance(pair[0], Tensor)]
            self._note(name, *itertools.starmap(difference, pairs))
            return found[-1]

        return both

    def _note(self, name: str, *differences: float) -> None:
        self.differences[name] = max(self.differences.get(name, 0.0), *differences)


def kernels(device: str) -> dict[str, Any]:
    """Let SCAO step matrices of many shapes and dtypes in every phase, with a non-finite gradient among them."""
    watch = Watch()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for options in SCENARIOS:
            generator = torch.Generator().manual_seed(0)
            params = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
            params = [nn.Parameter(param) for param in params]
            optimizer = SCAO(params, lr=1e-2, **{**QUICK, **options})
            with watch.on(device):
                for step in range(16):
                    for param in params:
                        param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
                    if step in (2, 10):
                        assert params[2].grad is not None
                        params[2].grad[3, 5] = math.nan
                    optimizer.step()
    missed = sorted(set(ops.KERNELS[device]) - set(watch.calls))
    wrong = sorted(name for name, value in watch.differences.items() if not value <= TOLERANCE)
    return {
        "calls": watch.calls,
        "differences": watch.differences,
        "tolerance": TOLERANCE,
        "never_called": missed,
        "passed": not missed and not wrong,
    }


def base_4bit(name: str, device: str) -> Any:
    """The model in NF4 with double quantisation."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = compute_dtype(device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=quantization, dtype=dtype, device_map={"": 0 if device == "cuda" else device}
    )
    model.config.use_cache = False
    return model


def load_4bit(name: str, rank: int, device: str, targets: Sequence[str] = models.TARGETS) -> Any:
    """The model in NF4 with LoRA on linear maps, with gradient checkpointing."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(base_4bit(name, device), use_gradient_checkpointing=True)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
    return get_peft_model(model, config).train()  # transformers checkpoints nothing in a model that is being evaluated


def compute_dtype(device: str) -> torch.dtype:
    """bfloat16 where the GPU computes in it, float16 on older ones."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return torch.float16
    return torch.bfloat16 if device == "cuda" else torch.float32


def available(name: str) -> tuple[str, str]:
    """A model that can be had, and why it is not the one that was asked for (empty where it is)."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name)
        return name, ""
    except (OSError, ValueError) as error:
        folder = models.cached("smollm2-135m", lambda path: models.prepare_smollm2(path, four_bit=False))
        return str(folder), f"{name} could not be loaded ({str(error).splitlines()[0]})"


def qlora(cell: speed.Cell, progress: Callable[[str], None], device: str = "cuda") -> dict[str, Any]:
    """Train with each optimizer from the same initial factors on the same rows; the first two steps are not timed."""
    from transformers import AutoTokenizer

    name, replaced = available(cell["model"])
    tokenizer = AutoTokenizer.from_pretrained(name)
    end = tokenizer.eos_token_id
    source = data.load(cell["data"])
    rows = data.encode(source.rows, lambda text: tokenizer.encode(text, add_special_tokens=False), end)
    rows = [row for row in rows if sum(map(len, row)) <= cell["max_tokens"]]
    order = data.batch_order(rows, cell["batch"], 0)
    parts = cell.get("accumulate", 1)
    if len(order) < cell["steps"] * parts:
        raise ValueError(f"--steps {cell['steps']} is more than the {len(order) // parts} batches of the data")
    runs = {}
    for spec in cell["optimizers"]:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        model = load_4bit(name, cell["rank"], device, cell.get("targets", models.TARGETS))
        optimizer = peers.create(spec, model, cell["lr"])
        losses, times, own = [], [], []
        scaler = torch.amp.GradScaler(device, enabled=compute_dtype(device) == torch.float16)
        for step in range(cell["steps"]):
            progress(f"{spec}: step {step + 1} of {cell['steps']}")
            loads.synchronize()
            started = time.perf_counter()
            mean = 0.0
            for part in order[step * parts : (step + 1) * parts]:
                with torch.autocast(device, compute_dtype(device), enabled=compute_dtype(device) != torch.float32):
                    loss = model(**batch_of([rows[row] for row in part], device)).loss / parts
                scaler.scale(loss).backward()
                mean += loss.detach()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(peers.parameters(model), 1.0)
            loads.synchronize()
            before = time.perf_counter()
            scaler.step(optimizer)
            scaler.update()
            loads.synchronize()
            own.append(time.perf_counter() - before)
            optimizer.zero_grad()
            times.append(time.perf_counter() - started)
            losses.append(round(float(mean), 5))
        runs[spec] = {
            "loss": losses,
            "seconds_per_step": round(statistics.median(times[2:]), 5),
            "seconds_total": round(sum(times), 3),
            "optimizer_seconds_per_step": round(statistics.mean(own[2:]), 6),
            "optimizer_seconds_worst": round(max(own[2:]), 6),
            "state_bytes": peers.state_bytes(optimizer, model),
            "peak_allocated": torch.cuda.max_memory_allocated() if device == "cuda" else None,
            "peak_reserved": torch.cuda.max_memory_reserved() if device == "cuda" else None,
        }
        trained = sum(param.numel() for param in peers.parameters(model))
        del model, optimizer
    return {"loaded": Path(name).name, "replaced": replaced, "trained": trained, "runs": runs, "data": source.name}


def batch_of(rows: list[data.Tokens], device: str) -> dict[str, Tensor]:
    """Padded tokens; the labels cover the answers."""
    width = max(sum(map(len, row)) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    labels, mask = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    for at, (prompt, answer) in enumerate(rows):
        whole = torch.tensor(prompt + answer)
        tokens[at, : len(whole)], mask[at, : len(whole)] = whole, 1
        labels[at, len(prompt) : len(whole)] = whole[len(prompt) :]
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def cells(arguments: argparse.Namespace) -> Iterator[speed.Cell]:
    """Every measurement that the command line asks for; the device is part of what defines it."""
    base = {
        "benchmark": "gpu",
        "reduced": False,
        "device": torch.cuda.get_device_name(),
        "native": "cuda" in ops.NATIVE,
    }
    for part in arguments.parts:
        cell = {**base, "part": part}
        if part == "qlora":
            cell |= {"model": arguments.model, "steps": arguments.steps, "lr": arguments.lr, "data": arguments.data}
            cell |= {"batch": arguments.batch, "max_tokens": arguments.max_tokens, "rank": 16}
            cell |= {"optimizers": ["adamw", "scao", "scao:moment_dtype='int8':use_int8_ema=True"]}
        elif part in OPTIMIZERS:
            cell |= {"optimizers": list(OPTIMIZERS[part]), "periods": 5}
        yield cell


def measure(cell: speed.Cell, progress: Callable[[str], None]) -> dict[str, Any]:
    """One measurement."""
    if cell["part"] == "kernels":
        return kernels("cuda")
    if cell["part"] == "copy":
        return {"bytes_per_second": round(loads.copy_bandwidth(1024))}
    return qlora(cell, progress) if cell["part"] == "qlora" else speed.step_times(cell, progress, "cuda")


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing; 1 where there is no GPU, a measurement failed or a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=speed.words(PARTS), default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--model", default=MODEL, help="of the qlora run (default: %(default)s)")
    parser.add_argument("--data", help="as for sweep.py (default: the demo's docstrings)")
    parser.add_argument("--steps", type=int, default=60, help="of the qlora run (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, help="of the qlora run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="rows per step (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest row (default: %(default)s)")
    parser.add_argument(
        "--out", type=sweep.writable, default=RESULTS, help="result file, added to (default: results/gpu.jsonl)"
    )
    parser.add_argument("--redo-stale", action="store_true", help="measure again what other code has measured")
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    arguments = parser.parse_args(argv)
    try:
        require_gpu()
    except NoGpu as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.check:
        print(torch.cuda.get_device_name())
        return 0
    if "kernels" in arguments.parts and "cuda" not in ops.NATIVE:
        print(
            f"kernels: left out: the native CUDA kernels are not in use ({ops.backend()['cuda']}): "
            "`SCAO_BUILD_EXT=cuda python setup.py build_ext --inplace` builds them (nvcc 12.8 or later)",
            file=sys.stderr,
        )
        arguments.parts.remove("kernels")
    command = shlex.join(["python", "examples/benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)])
    wanted = list(cells(arguments))
    failed = speed.run(wanted, measure, arguments.out, arguments.redo_stale, command)
    done, _ = sweep.read(arguments.out)
    # One that is in the file from an earlier run counts as well.
    verdicts = [done[sweep.key(cell)] for cell in wanted if cell["part"] == "kernels" and sweep.key(cell) in done]
    for verdict in verdicts:
        for name, value in verdict["differences"].items():
            print(f"{name}: {verdict['calls'][name]} calls, largest difference {value:.2g} of the largest entry")
        for name in verdict["never_called"]:
            print(f"{name}: never called")
    return failed or int(not all(verdict["passed"] for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
