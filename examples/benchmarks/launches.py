"""What a step of SCAO asks of a GPU: kernel launches, waits of the host, bytes. Counted, on a GPU that does not exist.

Shapes, dtypes and devices are real, numbers are not (torch's FakeTensorMode): nothing is computed, and no GPU is needed.
How many kernels CUDA takes for an operation is modelled in ``_launches``; a step's time is not known from it.

    python examples/benchmarks/launches.py                            # the reference load, some minutes
    python examples/benchmarks/launches.py --layers 2 moment_dtype=int8 use_int8_ema=true
    python examples/benchmarks/launches.py --native                   # as if the CUDA kernels were built
    python examples/benchmarks/launches.py --write                    # the table of docs/gpu.md, some minutes
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import loads
import tables
import texts
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # type: ignore[attr-defined, unused-ignore]

from scao_hf import SCAO, ops
from scao_hf.rules import rule_of

DEVICE = "fictive"
#: Operations that make a tensor or a view and launch nothing.
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh", "alias", "set_", "resize_")
#: Operations that are two kernels, the first of which copies or fills.
TWICE = ("addmm", "baddbmm", "eye")
#: Tensors for which one kernel of a foreach operation has room, by the number of its lists.
ROOM = {1: 110, 2: 64, 3: 48, 4: 36}
#: Launches of a native operation, and how many matrices they take at most (csrc/launch.cu, tests/test_emulator.py).
NATIVE = {"adamw_step_": 3, "eigenbasis_step_": 5, "int8_ema_": 1}
BATCH = 504
PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
#: The columns of the page's table.
COLUMNS: dict[str, dict[str, Any]] = {
    "PyTorch": {},
    "PyTorch, int8": {"moment_dtype": "int8", "use_int8_ema": True},
    "native kernels": {"native": True},
}


def _launches(name: str, args: Sequence[Any], outputs: list[Tensor]) -> int:
    """How many kernels an operation takes on CUDA: a model of PyTorch's backend, which has not been held to a profile."""
    if name.startswith("_foreach_"):
        lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
        layouts = [{(each.dtype, each.shape, each.stride()) for each in row} for row in zip(*lists, strict=True)]
        fast = all(len(row) == 1 for row in layouts) and len({each.dtype for each in lists[0]}) == 1
        fast = fast and all(each.numel() == 0 or _dense(each) for each in lists[0])
        outer = lists if name.endswith("_") else [*lists, lists[0]]
        return -(-len(lists[0]) // ROOM[min(4, len(outer))]) if fast else len(lists[0])
    if name in ("cat", "stack"):
        pieces = args[0]
        # Strided pieces are gathered half as many at a time, pieces of several dtypes one by one.
        if len({piece.dtype for piece in pieces}) > 1:
            return len(pieces)
        return -(-len(pieces) // (128 if all(piece.is_contiguous() for piece in pieces) else 64))
    if name in NATIVE:
        return NATIVE[name] * (-(-len(args[0]) // BATCH) if isinstance(args[0], list) else 1)
    if name in FREE or not outputs:
        return 0
    return 2 if name in TWICE else 1


def _dense(tensor: Tensor) -> bool:
    return torch.ops.aten.is_non_overlapping_and_dense(tensor) if tensor.ndim else True


@dataclass
class Count:
    """Of one step.

    Attributes:
        launches: kernels and copies.
        waits: how often the host waits for the device: copies between the two and numbers that are asked for.
        moved: bytes that the kernels read and write, each of their tensors once.
        decompositions: of which on the device.
        wide: tensors in float64 that were made on the device.
        names: launches by operation.
    """

    launches: int = 0
    waits: int = 0
    moved: int = 0
    decompositions: int = 0
    wide: int = 0
    names: Counter[str] = field(default_factory=Counter)


class Accelerator(TorchDispatchMode):
    """Counts what is dispatched to the device.

    Questions to the host's numbers are answered with yes (they are finite), to the device's with no (nothing is stuck).
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, count = func.__name__.split(".")[0], self.count
        if func.namespace == "prim":
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(each.device.type == DEVICE for each in given)
        if name == "_local_scalar_dense":
            count.waits += on_device
            return not on_device if given[0].dtype == torch.bool else 1
        outcome = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(outcome) if isinstance(leaf, Tensor)]
        if not (on_device or any(each.device.type == DEVICE for each in made)):
            return outcome
        count.wide += sum(each.dtype == torch.float64 for each in made)
        copied = given[:2] if name == "copy_" else [*given[:1], *made[:1]]
        if name in ("_to_copy", "copy_") and len({each.device.type for each in copied}) > 1:
            count.waits += not (kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2]))
        if "linalg" in name and "vector_norm" not in name:
            count.decompositions += 1
            count.waits += 1
        view = func.is_view or (name in ("_unsafe_view", "view", "reshape", "_reshape_alias"))
        launches = 0 if view else _launches(name, args, made or given[:1])
        count.launches += launches
        count.names[name] += launches
        if launches:
            count.moved += sum(each.nbytes for each in {id(each): each for each in (*given, *made)}.values())
        return outcome


def counted(
    layers: int, rank: int = 16, weight_decay: float = 0.01, native: bool = False, **options: Any
) -> dict[str, Count]:
    """Steps with LoRA on ``layers`` layers of Qwen2.5-3B: of phase 1, the one that enters phase 2, of the ramp and after it.

    The last two are means, of all steps of the ramp and of a whole cycle of refreshes.
    """
    model = loads.qwen(layers, rank).to("meta")
    kernels = mock.patch.multiple(
        ops,
        NATIVE=frozenset({DEVICE} if native else ()),
        KERNELS=ops.KERNELS | {DEVICE: ops.KERNELS["cuda"]},
    )
    with FakeTensorMode(allow_non_fake_inputs=True), kernels:
        params = [torch.nn.Parameter(torch.empty(each.shape, device=DEVICE)) for each in model.parameters()]
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer = SCAO(params, lr=1e-4, weight_decay=weight_decay, **options)
        group = optimizer.param_groups[0]
        period = group["precond_freq"]
        start = rule_of(group, matrix=True).phase1_steps(group)
        first = start + group["blend_steps"] + 1
        counts = {}
        for step in range(1, first + period):
            with Accelerator() as seen:
                optimizer.step()
            counts[step] = seen.count
    ramp = {"ramp": _mean([counts[step] for step in range(start + 1, first)])} if first > start + 1 else {}
    cycle = [counts[step] for step in range(first, first + period)]
    return {"phase 1": counts[start - 1], "entering phase 2": counts[start], **ramp, "phase 2": _mean(cycle)}


def _mean(steps: list[Count]) -> Count:
    """Of the figures; launches by operation are summed."""
    figures = list(vars(Count()))[:5]
    mean = Count(*(round(sum(getattr(each, name) for each in steps) / len(steps), 1) for name in figures))
    mean.names = sum((each.names for each in steps), Counter())
    return mean


def table(counts: dict[str, Count]) -> str:
    """In Markdown."""
    rows = [
        {
            "step": step,
            "launches": f"{count.launches:,.0f}",
            "waits": f"{count.waits:.1f}",
            "GB moved": f"{count.moved / 1e9:.1f}",
            "decompositions": f"{count.decompositions:.1f}",
            "float64 tensors": f"{count.wide:.0f}",
        }
        for step, count in counts.items()
    ]
    return texts.table(rows)


def page_table(layers: int) -> str:
    """Launches and waits in Markdown, in columns for those who have native kernels or int8 state and those who do not."""
    found = {name: counted(layers, **options) for name, options in COLUMNS.items()}
    rows = []
    for step in found["PyTorch"]:
        row = {"step": step}
        for name, counts in found.items():
            row |= {name: f"{counts[step].launches:,.0f}", f"waits: {name}": f"{counts[step].waits:.1f}"}
        rows.append(row)
    return texts.table(rows)


def fictive() -> None:
    """Make the device known to torch, once a process."""
    _setup_privateuseone_for_python_backend(DEVICE)
    torch.fictive.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]


def main() -> None:
    """Print the table, or write that of the page."""
    fictive()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--native", action="store_true", help="with the CUDA kernels")
    parser.add_argument("--names", action="store_true", help="launches by operation, too")
    parser.add_argument("--write", action="store_true", help="renew the table in docs/gpu.md")
    parser.add_argument("options", nargs="*", metavar="option=value")
    args = parser.parse_args()
    if args.write:
        made = {"launches": page_table(args.layers)}
        PAGE.write_text(tables.fill(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
        return
    options = {}
    for option in args.options:
        name, _, value = option.partition("=")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    rows = counted(args.layers, args.rank, args.weight_decay, args.native, **options)
    print(table(rows), end="")
    for name, count in rows.items() if args.names else ():
        print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in count.names.most_common(25) if value))


if __name__ == "__main__":
    main()
