"""What the processes of the distributed tests do: small training runs over gloo on the CPU, and how they are started."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from scao_hf import SCAO, create_scao_optimizer, ops, stacks
from scao_hf.blocks import Packing, unpack

#: Curvature from step 3 on, a refresh of every matrix within 2 steps.
QUICK: dict[str, Any] = {"warmup_steps": 3, "blend_steps": 2, "precond_freq": 2, "min_precond_updates": 1, "k_max": 4}
STEPS = 12
#: What says which model it is.
MODEL: dict[str, Any] = {"lora": False, "dtype": torch.float64, "deep": 0, "experts": 0, "four_bit": False}
BATCH = 8
CPU = torch.device("cpu")
SCENARIOS: dict[str, Callable[..., Any]] = {}


def scenario(function: Callable[..., Any]) -> Callable[..., Any]:
    SCENARIOS[function.__name__] = function
    return function


def in_four_bits(layer: nn.Linear) -> nn.Module:
    """A frozen layer of bitsandbytes, which FSDP2 can shard with the patch that Axolotl trains QLoRA with."""
    import bitsandbytes as bnb
    from axolotl.monkeypatch import fsdp2_qlora

    fsdp2_qlora.apply_init_sharded_param_patch()
    fsdp2_qlora.apply_init_unsharded_param_patch()
    packed = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        quant_type="nf4",
        quant_storage=torch.float32,
        compute_dtype=torch.float32,
    )
    packed.load_state_dict(layer.state_dict())
    result: nn.Module = packed.requires_grad_(False).to(CPU)
    return result


class Lora(nn.Module):
    """A frozen linear layer with a trainable pair of rank 3."""

    def __init__(self, inside: int, outside: int, four_bit: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(inside, outside).requires_grad_(False)
        if four_bit:
            self.base = in_four_bits(self.base)
        self.lora_A = nn.Linear(inside, 3, bias=False)
        self.lora_B = nn.Linear(3, outside, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.lora_B(self.lora_A(x))
        return result


class Experts(nn.Module):
    """Frozen experts, all of them for every input, with trainable pairs of rank 2 packed as PEFT packs them."""

    def __init__(self, inside: int, outside: int, experts: int) -> None:
        super().__init__()
        self.parameter_name, self.num_experts = "weight", experts
        self.base = nn.Parameter(torch.randn(experts, outside, inside) / 4, requires_grad=False)
        self.gate = nn.Linear(inside, experts).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inside, 2 * experts, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2 * experts, outside, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        a = unpack(self.lora_A["default"].weight, Packing("A", self.num_experts))
        b = unpack(self.lora_B["default"].weight, Packing("B", self.num_experts))
        return torch.einsum("xe,eoi,xi->xo", self.gate(x).softmax(-1), self.base + b @ a, x)


def build(
    lora: bool = False, dtype: torch.dtype = torch.float64, deep: int = 0, experts: int = 0, four_bit: bool = False
) -> nn.Module:
    """Sides that no number of processes divides, biases, and a first dimension that is smaller than four."""
    torch.manual_seed(0)
    if experts:
        layers: list[nn.Module] = [Experts(10, 13, experts), nn.Tanh(), Experts(13, 2, experts)]
    elif deep:
        layers = [Lora(10, 13), *(Lora(13, 13) for _ in range(deep)), Lora(13, 2)]
    elif lora:
        inner = 16 if four_bit else 13  # packed weights fill whole numbers of float32
        layers = [Lora(10, inner, four_bit), nn.Tanh(), Lora(inner, 10, four_bit), nn.Tanh(), Lora(10, 2)]
    else:
        layers = [nn.Linear(10, 13), nn.Tanh(), nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 2)]
    return nn.Sequential(*layers).to(dtype)


def shard(model: nn.Module, mesh: Any = None) -> nn.Module:
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batch(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """This process's part of a step's batch."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(BATCH, 10, generator=generator), torch.randn(BATCH, 2, generator=generator)
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return x[part], y[part]


def backward(model: nn.Module, step: int, rank: int, world: int, poisoned: int) -> None:
    """One process's part of a step; at the step ``poisoned`` the last one's loss is not a number."""
    dtype = next(model.parameters()).dtype
    x, y = (part.to(dtype) for part in batch(step, rank, world))
    loss = (model(x) - y).square().mean()
    if step == poisoned and rank == world - 1:
        loss = loss * float("nan")
    loss.backward()


def train(model: nn.Module, optimizer: SCAO, steps: range, rank: int = 0, world: int = 1, poisoned: int = -1) -> None:
    for step in steps:
        backward(model, step, rank, world, poisoned)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole."""
    whole = {}
    for name, param in model.named_parameters():
        value = param.detach()
        whole[name.removeprefix("module.")] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
    return whole


def train_parts(model: nn.Module, optimizer: SCAO, steps: range, world: int, poisoned: int = -1) -> None:
    """What ``train`` does in ``world`` processes, in one, whose gradient is the mean over the same parts of each batch."""
    for step in steps:
        for rank in range(world):
            backward(model, step, rank, world, poisoned)
        for param in model.parameters():
            if param.grad is not None:
                param.grad /= world
        optimizer.step()
        optimizer.zero_grad()


def alone(
    world: int,
    lora: bool = False,
    dtype: torch.dtype = torch.float64,
    deep: int = 0,
    experts: int = 0,
    four_bit: bool = False,
    poisoned: int = -1,
    steps: int = STEPS,
    **options: Any,
) -> tuple[dict[str, Tensor], SCAO]:
    """The same run in one process."""
    model = build(lora, dtype, deep, experts, four_bit)
    optimizer = create_scao_optimizer(model, lr=0.02, **{**QUICK, **options})
    train_parts(model, optimizer, range(steps), world, poisoned)
    return weights(model), optimizer


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts, for this process, the bytes that SCAO's collectives send to others, and the decomposed matrices."""
    counts = {"sent": 0, "received": 0, "decomposed": 0}
    exchange, broadcast, eigh = dist.all_to_all_single, dist.broadcast, torch.linalg.eigh
    eigh_natively = ops.symmetric_eigh

    def all_to_all(output: Tensor, input: Tensor, out: list[int], sent: list[int], group: Any = None) -> Any:
        rank = dist.get_rank(group)
        counts["sent"] += (sum(sent) - sent[rank]) * input.element_size()
        counts["received"] += (sum(out) - out[rank]) * input.element_size()
        return exchange(output, input, out, sent, group=group)

    def broadcast_counted(tensor: Tensor, source: int, **kwargs: Any) -> Any:
        if source != dist.get_rank():
            counts["received"] += tensor.numel() * tensor.element_size()
        return broadcast(tensor, source, **kwargs)

    def decompose(matrices: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts["decomposed"] += matrices.numel() // matrices.shape[-1] ** 2
        return eigh(matrices, *args, **kwargs)

    def decompose_natively(matrices: Tensor) -> Any:
        counts["decomposed"] += len(matrices)
        return eigh_natively(matrices)

    dist.all_to_all_single, dist.broadcast, torch.linalg.eigh = all_to_all, broadcast_counted, decompose
    ops.symmetric_eigh = decompose_natively
    try:
        yield counts
    finally:
        dist.all_to_all_single, dist.broadcast, torch.linalg.eigh = exchange, broadcast, eigh
        ops.symmetric_eigh = eigh_natively


def held(optimizer: SCAO) -> int:
    """Bytes of state in this process."""

    def size(value: Any) -> int:
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return value.numel() * value.element_size() if isinstance(value, Tensor) else 0

    return sum(size(entry) for entry in optimizer.state.values())


def sharded(
    lora: bool = False,
    dtype: torch.dtype = torch.float64,
    deep: int = 0,
    experts: int = 0,
    four_bit: bool = False,
    late: bool = False,
    mesh: tuple[int, ...] = (),
    **options: Any,
) -> tuple[nn.Module, SCAO]:
    """A model under FSDP2 and its optimizer.

    ``late``: the optimizer is built before the model is sharded, and its parameters are swapped, as Accelerate does.
    """
    model = build(lora, dtype, deep, experts, four_bit)
    grid = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")) if mesh else None
    if not late:
        return shard(model, grid), create_scao_optimizer(model, lr=0.02, **{**QUICK, **options})
    optimizer = create_scao_optimizer(model, lr=0.02, **{**QUICK, **options})
    names = {param: name for name, param in model.named_parameters()}
    fresh = dict(shard(model, grid).named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [fresh[names[param]] for param in group["params"]]
    return model, optimizer


@scenario
def trajectories(rank: int, world: int, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The end of several runs by name: weights, and what they took."""
    results = {}
    for name, run in runs.items():
        settings = dict(run)
        kind, poisoned, share = settings.pop("kind"), settings.pop("poisoned", -1), settings.pop("share", False)
        if kind == "ddp":
            model = build(*(settings.pop(key, usual) for key, usual in MODEL.items()))
            optimizer = create_scao_optimizer(model, lr=0.02, **{**QUICK, **settings})
            model = nn.parallel.DistributedDataParallel(model)
            if share:
                optimizer.share_refresh()
        else:
            model, optimizer = sharded(**settings)
        with counted() as counts:
            train(model, optimizer, range(STEPS), rank, world, poisoned)
        report = {
            "held": held(optimizer),
            "memory": optimizer.memory_report(),
            "metrics": optimizer.metrics(),
            "rows": optimizer.statistics(),
        }
        results[name] = weights(model), {**counts, **report}
    return results


def saved(model: nn.Module, optimizer: SCAO, flat: bool) -> dict[str, Any]:
    """What torch.distributed.checkpoint saves of a run."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


@scenario
def checkpoint(
    rank: int,
    world: int,
    steps: range,
    source: Path | None = None,
    target: Path | None = None,
    flat: tuple[bool, bool] = (False, False),
    after: int = 0,
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Load where there is a ``source``, train, save where there is a ``target``, train on for ``after`` steps.

    Returns weights and state, whole, before and after the last part. ``flat`` is for the source and for the target.
    """
    model, optimizer = sharded(lora=True, dtype=torch.float32)
    if source is not None:
        state = saved(model, optimizer, flat[0])
        dcp.load(state, checkpoint_id=source)
        options = StateDictOptions(flatten_optimizer_state_dict=flat[0])
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    train(model, optimizer, steps, rank, world)
    if target is not None:
        dcp.save(saved(model, optimizer, flat[1]), checkpoint_id=target)
    results = []
    for more in (0, after):
        train(model, optimizer, range(steps.stop, steps.stop + more), rank, world)
        state = get_optimizer_state_dict(model, optimizer)["state"]
        results.append((weights(model), {name: entry["bytes"].full_tensor() for name, entry in state.items()}))
    return results


@scenario
def replicated(
    rank: int, world: int, steps: range, source: Path | None = None, target: Path | None = None, mixed: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``checkpoint`` without FSDP2: DDP, or one process alone; ``mixed``: FSDP2 for one of the layers.

    All processes read the same batches. Returns weights and state at the end.
    """
    model: nn.Module = build(lora=True, dtype=torch.float32)
    layers = list(model.children())
    for layer in layers if mixed else ():
        if layer is layers[0]:
            fully_shard(layer)
    optimizer = create_scao_optimizer(model, lr=0.02, **QUICK)
    if world > 1 and not mixed:
        model = nn.parallel.DistributedDataParallel(model)
    if source is not None:
        state = saved(model, optimizer, flat=False)
        dcp.load(state, checkpoint_id=source)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, steps)
    if target is not None:
        dcp.save(saved(model, optimizer, flat=False), checkpoint_id=target)
    entries = get_optimizer_state_dict(model, optimizer)["state"]
    vectors = {name: entry["bytes"] for name, entry in entries.items()}
    whole = {
        name: vector.full_tensor() if hasattr(vector, "full_tensor") else vector for name, vector in vectors.items()
    }
    return weights(model), whole


@scenario
def killed(rank: int, world: int, folder: Path, every: int, at: int, share: bool) -> None:
    """A run with a checkpoint at every so many steps, whose last process is killed at the step ``at``.

    Under FSDP2, or with ``share`` under DDP with shared refreshes, where the first process writes.
    """
    if share:
        model = build(lora=True, dtype=torch.float32)
        optimizer = create_scao_optimizer(model, lr=0.02, **QUICK)
        optimizer.share_refresh()
        run: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        model, optimizer = sharded(lora=True, dtype=torch.float32)
        run = model
    for step in range(STEPS):
        backward(run, step, rank, world, poisoned=-1)
        if step == at and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0 and not share:
            dcp.save(saved(model, optimizer, flat=False), checkpoint_id=folder / str(step + 1))
        elif (step + 1) % every == 0 and rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"{step + 1}.pt")


@scenario
def gone_on(rank: int, world: int, source: Path, first: int) -> dict[str, Tensor]:
    """The end of a DDP run with shared refreshes that resumes from a checkpoint."""
    model = build(lora=True, dtype=torch.float32)
    optimizer = create_scao_optimizer(model, lr=0.02, **QUICK)
    state = torch.load(source, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    optimizer.share_refresh()
    train(nn.parallel.DistributedDataParallel(model), optimizer, range(first, STEPS), rank, world)
    return weights(model)


@scenario
def refusals(rank: int, world: int) -> dict[str, str]:
    """What is refused, and how."""
    mesh = init_device_mesh("cpu", (world,))
    weight = torch.ones(4, 6)

    def shared(model: nn.Module) -> None:
        SCAO(model.parameters()).share_refresh()

    def stepped(**options: Any) -> None:
        model, optimizer = sharded(**options)
        before = weights(model)
        backward(model, 0, rank, world, poisoned=0)
        try:
            optimizer.step()
        finally:
            assert all(torch.equal(value, before[name]) for name, value in weights(model).items())

    def flattened() -> None:
        param = nn.Parameter(weight.clone())
        optimizer = SCAO([param])
        flat = nn.Parameter(param.detach().flatten()[:12])
        flat.grad = torch.ones(12)
        optimizer.param_groups[0]["params"] = [flat]
        optimizer.step()

    zero3 = nn.Parameter(torch.ones(0))
    zero3.ds_id = 0
    attempts: dict[str, Callable[[], Any]] = {
        "columns": lambda: SCAO([distribute_tensor(weight, mesh, [Shard(1)])]),
        "fsdp1": lambda: SCAO(FullyShardedDataParallel(build(), use_orig_params=True, device_id=CPU).parameters()),
        "fsdp1 flat": lambda: SCAO(FullyShardedDataParallel(build(), device_id=CPU).parameters()),
        "zero-3": lambda: SCAO([zero3]),
        "zero-1": flattened,
        "share sharded": lambda: shared(shard(build())),
        "share different": lambda: shared(nn.Linear(3 + rank, 2)),
        "nan": lambda: stepped(on_nonfinite="raise"),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@scenario
def alone_with_it(rank: int, world: int, mesh: tuple[int, ...]) -> dict[str, str]:
    """What the last process alone cannot do, with a sharded parameter and an ordinary one, and what the others say then."""
    grid = init_device_mesh("cpu", mesh or (world,))
    placements = [*[Replicate()] * (len(mesh) - 1), Shard(0)] if mesh else [Shard(0)]
    last = rank == world - 1

    def both(**options: Any) -> tuple[nn.Parameter, nn.Parameter, SCAO]:
        cut, whole = nn.Parameter(distribute_tensor(torch.ones(8, 6), grid, placements)), nn.Parameter(torch.ones(8, 6))
        cut.grad, whole.grad = torch.ones_like(cut), torch.ones_like(whole)
        groups = [{"params": [("cut", cut)]}, {"params": [("whole", whole)]}]
        return cut, whole, SCAO(groups, **{**QUICK, **options})

    def stepped(spoil: Callable[[nn.Parameter, nn.Parameter, SCAO], Any], **options: Any) -> None:
        cut, whole, optimizer = both(**options)
        if last:
            spoil(cut, whole, optimizer)
        for _ in range(30):
            optimizer.step()

    def loaded(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        _, _, optimizer = both()
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(change(state) if last else state)

    def nan(param: nn.Parameter) -> None:
        assert param.grad is not None
        (param.grad.to_local() if hasattr(param.grad, "to_local") else param.grad).fill_(float("nan"))

    def flat(optimizer: SCAO) -> None:
        optimizer.param_groups[1]["params"] = [nn.Parameter(torch.ones(48))]

    def negative(state: dict[str, Any]) -> dict[str, Any]:
        state["state"][1]["exp_avg_sq"].fill_(-1)
        del state["state"][1]["checksum"]
        return state

    attempts: dict[str, Callable[[], Any]] = {
        "nan in a whole gradient": lambda: stepped(lambda _, whole, __: nan(whole), on_nonfinite="raise"),
        "nan in a shard": lambda: stepped(lambda cut, *_: nan(cut), on_nonfinite="raise"),
        "sparse": lambda: stepped(lambda _, whole, __: setattr(whole, "grad", torch.ones(8, 6).to_sparse())),
        "stuck": lambda: stepped(lambda _, whole, __: nan(whole)),
        "flattened": lambda: stepped(lambda *spoilt: flat(spoilt[2])),
        "no state": lambda: loaded(lambda _: {"weights": 1}),
        "no step": lambda: loaded(lambda state: (state["state"][0].pop("step"), state)[1]),
        "negative": lambda: loaded(negative),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@scenario
def seconds(rank: int, world: int) -> dict[str, float]:
    """Processor seconds of the optimizer in this process, refreshes replicated and shared, where refreshes are the work."""
    results = {}
    for share in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.zeros(192, 256)) for _ in range(12)]
        optimizer = SCAO(params, warmup_steps=1, min_precond_updates=1, precond_freq=2, blend_steps=0)
        if share:
            optimizer.share_refresh()
        total = 0.0
        for step in range(16):
            for param in params:
                param.grad = torch.randn(192, 256, generator=generator)
            before = time.process_time()
            optimizer.step()
            total += (time.process_time() - before) * (step >= 4)
        results["shared" if share else "replicated"] = total
    return results


@scenario
def forms(rank: int, world: int, single: dict[str, Any]) -> dict[str, Any]:
    """State dicts of one process and of several in both directions; ``single`` has one process's weights and state."""
    results: dict[str, Any] = {}
    model, optimizer = sharded()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(distribute_tensor(single["weights"][name], param.device_mesh, param.placements))
    optimizer.load_state_dict(single["state"])
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    results["full"] = get_optimizer_state_dict(model, optimizer, options=options)
    train(model, optimizer, range(7, STEPS), rank, world)
    results["from one"] = weights(model)

    model, optimizer = sharded()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(distribute_tensor(single["weights"][name], param.device_mesh, param.placements))
    everything = results["full"] if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(everything), options=options)
    train(model, optimizer, range(7, STEPS), rank, world)
    results["from full"] = weights(model)

    before = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    results["refused"] = []
    for spoil in SPOILS:
        state = optimizer.state_dict()
        if rank == world - 1:
            spoil(state)
        try:
            optimizer.load_state_dict(state)
        except (ValueError, RuntimeError) as error:
            results["refused"].append(str(error))
    after = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    results["unchanged"] = all(
        torch.equal(after["state"][name]["bytes"], entry["bytes"]) for name, entry in before["state"].items()
    )
    train(model, optimizer, range(STEPS, STEPS + 1), rank, world)

    for param, entry in optimizer.state.items():  # as a wrapper does
        entry["slow_param"] = param.detach().clone()
    _, other = sharded()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pairs = zip(optimizer.state.values(), other.state.values(), strict=True)
    results["foreign"] = [torch.equal(a["slow_param"].to_local(), b["slow_param"].to_local()) for a, b in pairs]
    model.to(torch.float32).to(torch.float64)  # which swaps the tensors of the parameters
    train(model, optimizer, range(STEPS + 1, STEPS + 2), rank, world)
    results["kept"] = ["slow_param" in entry and entry["step"] for entry in optimizer.state.values()]
    return results


def changed(how: str, rank: int, world: int, several: bool) -> tuple[dict[str, Tensor], list[int]]:
    """A run in which the sizes of some states change while they exist: the weights and the steps of each parameter.

    Args:
        how: ``edited`` and ``removed`` are done to the groups in the middle of the run, ``loaded`` goes on with a new optimizer
            of other options.
        several: under FSDP2 in ``world`` processes; otherwise in this one.
    """
    model = shard(build()) if several else build()
    named = list(model.named_parameters())

    def built(**options: Any) -> SCAO:
        return SCAO([{"params": named[:2], **options}, {"params": named[2:]}], lr=0.02, **QUICK)

    def on(steps: range) -> None:
        if several:
            train(model, optimizer, steps, rank, world)
        else:
            train_parts(model, optimizer, steps, world)

    optimizer = built(**({"k_min": 1, "k_max": 1} if how == "loaded" else {}))
    on(range(7))
    first = optimizer.param_groups[0]
    if how == "edited":
        first["moment_dtype"] = "bfloat16"
    elif how == "removed":
        del first["params"][0], first["param_names"][0]
    else:
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = built()
        optimizer.load_state_dict(state)
    on(range(7, STEPS))
    return weights(model), [entry["step"] for entry in optimizer.state.values()]


@scenario
def moved(rank: int, world: int) -> dict[str, Any]:
    return {how: changed(how, rank, world, several=True) for how in ("edited", "removed", "loaded")}


@scenario
def partial(rank: int, world: int, saved_to: Path, single: dict[str, Any]) -> dict[str, Any]:
    """The state of a run, in several forms, in one that trains other parameters of the same model.

    ``single`` is the state dict of one process. Returns whole states by name, the numbers of steps after two more, the
    warnings, and what is refused.
    """
    stacks.CPU_ENTRIES = 1  # each matrix alone, so that one process takes the same steps to the bit
    model, optimizer = sharded(lora=True, dtype=torch.float32)
    train(model, optimizer, range(7), rank, world)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=saved_to)
    if rank == 0:
        dcp_to_torch_save(saved_to, saved_to / "whole.pt")
    dist.barrier()
    whole = StateDictOptions(full_state_dict=True)
    forms: dict[str, Any] = {
        "several": copy.deepcopy(optimizer.state_dict()),
        "full": get_optimizer_state_dict(model, optimizer, options=whole),
        "converted": torch.load(saved_to / "whole.pt", weights_only=True)["optimizer"],
        "one": single,
    }

    def changed(more: bool = True) -> tuple[nn.Module, SCAO]:
        """One matrix is frozen; one is new, and two have another shape."""
        model = build(lora=True, dtype=torch.float32)
        model[0].lora_A.requires_grad_(False)
        if more:
            model[2].base.weight.requires_grad_(True)
            model[4].lora_A, model[4].lora_B = nn.Linear(10, 4, bias=False), nn.Linear(4, 2, bias=False)
        shard(model)
        return model, create_scao_optimizer(model, lr=0.02, partial_resume=more, **QUICK)

    def states(optimizer: SCAO) -> dict[str, Tensor]:
        names = optimizer.param_groups[0]["param_names"]
        return {names[key]: entry["bytes"].full_tensor() for key, entry in optimizer.state_dict()["state"].items()}

    results: dict[str, Any] = {"before": states(optimizer), "warnings": [], "refused": []}
    for name, state in forms.items():
        model, optimizer = changed()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.load_state_dict(state)
        results["warnings"] += [str(each.message) for each in caught if "partial_resume" in str(each.message)]
        loaded = states(optimizer)
        train(model, optimizer, range(7, 9), rank, world)
        results[name] = loaded, [optimizer.state[param]["step"] for param in optimizer.param_groups[0]["params"]]

    model, optimizer = changed(more=False)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=saved_to)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    results["read"] = states(optimizer)

    def renamed(state: dict[str, Any]) -> None:
        state["param_groups"][0]["param_names"] = [f"other.{name}" for name in range(6)]

    def shortened(state: dict[str, Any]) -> None:
        del state["state"][1]

    for spoil in (renamed, shortened):
        state = copy.deepcopy(forms["several"])
        if rank == world - 1:
            spoil(state)
        model, optimizer = changed()
        try:
            optimizer.load_state_dict(state)
        except ValueError as error:
            results["refused"].append(str(error))
        assert not optimizer.state
    return results


#: What is done to one process's part of a state dict before it is loaded.
SPOILS: list[Callable[[dict[str, Any]], Any]] = [
    lambda state: state["state"][0]["bytes"].to_local().fill_(255),  # no finite numbers
    lambda state: state["state"][0].update(bytes=torch.zeros(3, dtype=torch.uint8)),
    lambda state: state["state"][0].update(exp_avg=torch.zeros(3)),
    lambda state: state["param_groups"][0].update(rule="published"),
]


def main(name: str, rank: int, world: int, folder: Path, arguments: dict[str, Any]) -> None:
    """One process: joins the others, runs the scenario, leaves its result or its error in ``folder``."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        result = SCENARIOS[name](rank, world, **arguments)
    except Exception:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start(name: str, world: int, folder: Path, arguments: dict[str, Any]) -> tuple[Path, list[Any]]:
    """Processes that run a scenario, and the folder of their own in which they leave results and errors."""
    folder = folder / f"{name}-{world}-{len(list(folder.iterdir()))}"
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_worker"])
    processes = [context.Process(target=main, args=(name, rank, world, folder, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    return folder, processes


def ended(processes: list[Any], seconds: float) -> list[int]:
    """Wait for the end of all, and kill those that are late; which ones were."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    return late


def launch(name: str, world: int, folder: Path, seconds: float = 300, **arguments: Any) -> list[Any]:
    """Each process's result of a scenario.

    Raises:
        AssertionError: a process has failed, with its traceback, or not ended in time.
    """
    folder, processes = start(name, world, folder, arguments)
    late = ended(processes, seconds)
    errors = "\n".join(file.read_text() for file in sorted(folder.glob("*.error")))
    assert not errors and not late, f"processes {late} had not ended after {seconds} s\n{errors}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
