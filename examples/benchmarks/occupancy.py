"""Resident warps and bank conflicts of the CUDA kernels, without a GPU: the table in csrc/README.md.

The kernels and their glue run in csrc/emulator, which notes the threads and the shared memory of each launch and the bank of
every access. How many registers a kernel takes is what ptxas says of it; the rest is the architectures' limits.

    python examples/benchmarks/occupancy.py            # some seconds; needs g++
    python examples/benchmarks/occupancy.py --write    # into csrc/README.md
    python examples/benchmarks/occupancy.py --registers    # asks ptxas; needs nvcc
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import tables
import torch
from torch import Tensor

from scao_hf import ops
from scao_hf.rules import rule_of

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PAGE = CSRC / "README.md"
#: Most registers that a thread of any kernel takes on each architecture, by ptxas of CUDA 13.0, without a spill.
REGISTERS = {"75": 64, "80": 40, "86": 40, "89": 40, "90": 48, "100": 40, "120": 46}


class Limits(NamedTuple):
    """Of one multiprocessor (CUDA C++ programming guide, compute capabilities).

    Attributes:
        shared: bytes of shared memory.
        reserved: of them taken by the system in each block.
    """

    name: str
    warps: int
    blocks: int
    shared: int
    reserved: int


REGISTER_FILE, WARP, REGISTER_UNIT = 65536, 32, 256
LIMITS = {
    "75": Limits("T4", 32, 16, 64 * 1024, 0),
    "80": Limits("A100", 64, 32, 164 * 1024, 1024),
    "86": Limits("A10, RTX 30", 48, 16, 100 * 1024, 1024),
    "89": Limits("L4, RTX 40", 48, 24, 100 * 1024, 1024),
    "90": Limits("H100", 64, 32, 228 * 1024, 1024),
    "100": Limits("B200", 64, 32, 228 * 1024, 1024),
    "120": Limits("RTX 50", 48, 24, 100 * 1024, 1024),
}


class Launch(ctypes.Structure):
    """What the emulator notes of a launch; as in csrc/emulator/cuda_emulator.h."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("threads", "shared_bytes", "accesses", "wavefronts", "worst"))


#: The kernels of a step, in the order of their launches.
STEPS = {
    "adamw_step_": ("project", "settle", "adamw"),
    "eigenbasis_step_": ("project", "settle", "residual", "apply", "finish"),
}


def build(folder: Path, *flags: str, source: Path = CSRC) -> ctypes.CDLL:
    """Compile kernels, launchers and glue for the emulator, and register the operations as ``torch.ops.scao_emulated``."""
    torch_root = Path(torch.__file__).parent
    target = folder / "emulated.so"
    common = ["g++", "-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", *flags]
    common += ["-DSCAO_EMULATE", "-DTORCH_TARGET_VERSION=0x020A000000000000", "-isystem", str(torch_root / "include")]
    files = ["-x", "c++", str(source / "launch.cu"), str(source / "cuda.cpp"), "-o", str(target)]
    subprocess.run([*common, "-shared", *files, f"-L{torch_root / 'lib'}", "-ltorch_cpu"], check=True)
    _define()
    torch.ops.load_library(str(target))
    return ctypes.CDLL(str(target))


@functools.cache
def _define() -> torch.library.Library:
    library = torch.library.Library("scao_emulated", "DEF")
    for schema in ops._OPERATIONS:
        if schema.partition("(")[0] in ops.KERNELS["cuda"]:
            library.define(schema)
    return library


@functools.cache
def emulator() -> ctypes.CDLL:
    """The emulator of this process."""
    with tempfile.TemporaryDirectory() as folder:
        return build(Path(folder))


def launches(library: ctypes.CDLL, first: int = 0) -> list[Launch]:
    """All launches so far, from the ``first`` on."""
    found = [Launch() for _ in range(first, library.scao_emulator_launches())]
    for index, launch in enumerate(found, first):
        library.scao_emulator_launch(ctypes.c_long(index), ctypes.byref(launch))
    return found


@functools.cache
def measured(r: int, k: int, tall: bool, l: int = 64) -> dict[str, Launch]:
    """The kernels of both phases in a step of one matrix, stored ``[r, l]`` or (``tall``) ``[l, r]``."""
    library, found = emulator(), {}
    group = {"warmup_steps": 1, "k_max": k, "use_int8_ema": False, "min_precond_updates": 1, "precond_freq": 1}
    for name, step in (("adamw_step_", 0), ("eigenbasis_step_", 10)):
        rule = rule_of({"rule": "eigenbasis"}, True)
        counters = {"taken": torch.ones(1), "level": torch.ones(1)}
        fields = counters | rule.create(1, (r, l), torch.float32, torch.device("cpu"), group, step)
        names = ("exp_avg", "exp_avg_sq", "factor") if step == 0 else tuple(rule.native_fields[2:])
        state: list[Tensor] = [fields[each].contiguous() for each in ("taken", "level", *names)]
        param, grad = (torch.ones(l, r) if tall else torch.ones(r, l) for _ in range(2))
        before = library.scao_emulator_launches()
        library.scao_emulator_count(True)
        numbers = [1e-4, 0.9, 0.999, 1e-8, 0.0, 0.95]
        if step:  # of the ramp, as it has all the accesses of a later one
            torch.ops.scao_emulated.eigenbasis_step_([param], [grad], state, [*numbers, 0.5], True)
        else:
            torch.ops.scao_emulated.adamw_step_([param], [grad], state, numbers)
        library.scao_emulator_count(False)
        kernels = (f"{kernel} of phase 1" if step == 0 and kernel != "adamw" else kernel for kernel in STEPS[name])
        found |= dict(zip(kernels, launches(library, before), strict=True))
    return found


def resident(launch: Launch, architecture: str) -> int:
    """Warps of a kernel that one multiprocessor holds at a time."""
    limits, warps = LIMITS[architecture], launch.threads // WARP
    registers = -(-REGISTERS[architecture] * WARP // REGISTER_UNIT) * REGISTER_UNIT
    shared = -(-launch.shared_bytes // 256) * 256 + limits.reserved
    blocks = min(limits.blocks, limits.warps // warps, REGISTER_FILE // registers // warps, limits.shared // shared)
    return blocks * warps


def table() -> str:
    """In Markdown: of the kernels of a step the one with fewest resident warps, and the worst and the mean access."""
    names = " | ".join(limits.name for limits in LIMITS.values())
    lines = [f"| r = k | bytes a block | threads | {names} | worst | mean |", "|" + "---|" * (len(LIMITS) + 5)]
    for side in (8, 16, 32, 64):
        kernels = [
            launch for tall in (False, True) for launch in measured(side, side, tall).values() if launch.accesses
        ]
        largest = max(kernels, key=lambda launch: launch.shared_bytes)
        warps = " | ".join(
            f"{min(resident(kernel, each) for kernel in kernels)} of {LIMITS[each].warps}" for each in LIMITS
        )
        mean = sum(kernel.wavefronts for kernel in kernels) / sum(kernel.accesses for kernel in kernels)
        worst = max(kernel.worst for kernel in kernels)
        lines.append(f"| {side} | {largest.shared_bytes:,} | {largest.threads} | {warps} | {worst} | {mean:.2f} |")
    return "\n".join(lines) + "\n"


def registers(architecture: str) -> dict[str, int]:
    """Registers of each kernel by ptxas; RuntimeError where one spills."""
    flags = [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v", "-o", "/dev/null"]
    command = ["nvcc", "-std=c++17", "-O3", *flags, "-c", str(CSRC / "launch.cu")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    if set(re.findall(r"(\d+) bytes spill", said)) != {"0"}:
        raise RuntimeError(f"a kernel spills:\n{said}")
    kernels = re.findall(r"entry function '_ZN4scao\d+(\w+?)E", said)
    return dict(zip(kernels, map(int, re.findall(r"Used (\d+) registers", said)), strict=True))


def main() -> None:
    """Print or write the table, or print the registers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--registers", action="store_true")
    args = parser.parse_args()
    if args.registers:
        for architecture in LIMITS:
            print(f"sm_{architecture}", registers(architecture), flush=True)
        return
    made = table()
    print(made, end="")
    if args.write:
        PAGE.write_text(tables.fill(PAGE.read_text(encoding="utf-8"), {"occupancy": made}), encoding="utf-8")


if __name__ == "__main__":
    main()
