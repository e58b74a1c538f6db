"""Which kernels do the operations: native ones where the extension was built and the tensors suit it, else PyTorch's.

Only here the extension is loaded.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "adamw_step_",
    "backend",
    "eigenbasis_step_",
    "eigh",
    "has",
    "int8_ema_",
    "numbers",
    "supports",
    "symmetric_eigh",
]

#: What parameters and gradients may be for a native kernel.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Each operation does what a rule's PyTorch code does, on one bucket, in place. ``state`` are stacked fields in the order of the
# rule's table after the counters, ``numbers`` those of ``numbers(group)``, in the ramp with its weight. csrc checks what it is
# given.
_LIBRARY = torch.library.Library("scao", "DEF")
#: Schemas, and what an operation returns where tensors have no numbers (FakeTensorMode).
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, float[] numbers) -> ()": lambda *_: None,
    "eigenbasis_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, float[] numbers, bool cautious) -> ()": (
        lambda *_: None
    ),
    "symmetric_eigh(Tensor matrices) -> (Tensor, Tensor)": (
        lambda matrices: (matrices.new_empty(matrices.shape[:2]), matrices.new_empty(matrices.shape))
    ),
    "int8_ema_(Tensor(a!) codes, Tensor(b!) scales, Tensor values, Tensor weights, int seed) -> ()": lambda *_: None,
}
for _schema, _fake in _OPERATIONS.items():
    _LIBRARY.define(_schema)
    torch.library.register_fake(f"scao::{_schema.partition('(')[0]}", _fake, lib=_LIBRARY)

adamw_step_ = torch.ops.scao.adamw_step_
eigenbasis_step_ = torch.ops.scao.eigenbasis_step_
int8_ema_ = torch.ops.scao.int8_ema_
symmetric_eigh = torch.ops.scao.symmetric_eigh

#: Largest r and k that the native kernels take: beyond it the library's products are faster, or shared memory ends.
LARGEST_SIDE = {"cpu": 128, "cuda": 64}
#: Long sides, and vectors, that the CUDA kernels do not count in their integers.
LONGEST_CUDA = 2**30
#: The operations that have a native kernel.
KERNELS = {
    "cpu": ("adamw_step_", "eigenbasis_step_", "symmetric_eigh", "int8_ema_"),
    "cuda": ("adamw_step_", "eigenbasis_step_", "int8_ema_"),
}
#: Largest side of matrices that are decomposed natively.
LARGEST_DECOMPOSED = 64
OLDEST_TORCH = (2, 10)
#: Kinds of devices whose ``eigenbasis_step_`` takes the steps of the ramp, too: with one more number, its weight.
RAMPS = ("cuda",)
#: What the operations take; as in csrc/state.h.
INTERFACE = 4
#: What builds the kernels for a device and installs them, in a clone of the repository.
BUILD_COMMAND = "SCAO_BUILD_EXT={} pip install ."
#: Compute capability below which there is no device code.
OLDEST_CUDA = (7, 5)


def _refusal(device: str, path: Path) -> str | None:
    """Why the extension at ``path`` is not loaded, or None. A kernel cannot be withdrawn once it is registered."""
    if os.environ.get("SCAO_DISABLE_EXT", "0") not in ("", "0"):
        return "SCAO_DISABLE_EXT is set"
    if not path.exists():
        return f"not built (in a clone of the repository, `{BUILD_COMMAND.format(device)}` builds and installs it)"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if device == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        capability = torch.backends.cpu.get_cpu_capability()
        return None if capability.startswith("AVX") else f"they need AVX2, and torch finds {capability}"
    if device == "cuda":
        # No question to a device: after one, a process that is forked could not use CUDA.
        if torch.version.hip is not None:
            return "there is no device code for ROCm"
        if torch.version.cuda is None:
            return "torch is built without CUDA"
    return None


def _load(device: str) -> tuple[ctypes.CDLL | None, str]:
    path = Path(__file__).with_name(f"_C_{device}.so")
    reason = _refusal(device, path)
    if reason is not None:
        return None, reason
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return None, f"{path.name} could not be loaded: {error}"
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "scao_interface") or library.scao_interface() != INTERFACE:
        return None, f"{path.name} was built from another version of the sources: build it again"
    return library, ""


_CPU, _CPU_REASON = _load("cpu")
_CUDA, _CUDA_REASON = _load("cuda")

#: Kinds of devices whose kernels are loaded; settled when this module is imported.
NATIVE = frozenset(name for name, library in (("cpu", _CPU), ("cuda", _CUDA)) if library is not None)


@cache
def _refused_by(index: int) -> str | None:
    """Why a CUDA device does not run the native kernels, or None; asked once it is in use."""
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CUDA:
        return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}"
    with torch.cuda.device(index):
        error = _CUDA.scao_cuda_probe() if _CUDA is not None else 0
    advice = "update it (530 or later), or build them with an older toolkit"
    return f"its driver does not load them (CUDA error {error}): {advice}" if error else None


def _is_native(device: torch.device) -> bool:
    return device.type in NATIVE and (device.type != "cuda" or _refused_by(device.index) is None)


def backend() -> dict[str, str]:
    """Which kernels are in use on each kind of device, and why where they are PyTorch's.

    Returns:
        For "cpu" and "cuda" either "native" (with several GPUs those that are not) or "pytorch: " and the reason.
    """
    cuda = "native" if _CUDA is not None else f"pytorch: {_CUDA_REASON}"
    if _CUDA is not None and not torch.cuda.is_available():
        cuda = "pytorch: torch sees no CUDA device"
    elif _CUDA is not None:
        asked = {index: _refused_by(index) for index in range(torch.cuda.device_count())}
        refused = {index: reason for index, reason in asked.items() if reason}
        if len(refused) == len(asked):
            cuda = f"pytorch: {refused[0]}"
        elif refused:
            cuda = "native: not on " + ", ".join(f"cuda:{index} ({reason})" for index, reason in refused.items())
    return {
        "cpu": "native" if _CPU is not None else f"pytorch: {_CPU_REASON}",
        "cuda": cuda,
    }


_REQUIRED = os.environ.get("SCAO_REQUIRE_EXT", "")
for _device in filter(None, _REQUIRED.split(",")):
    if _device not in ("cpu", "cuda"):
        raise ValueError(f"SCAO_REQUIRE_EXT={_REQUIRED!r} is not valid: it must be cpu, cuda or cpu,cuda")
    _kernels, _, _reason = backend()[_device].partition(": ")
    if _kernels == "pytorch":
        raise ImportError(f"SCAO_REQUIRE_EXT={_REQUIRED}: no native {_device} kernels: {_reason}")


def numbers(group: dict[str, Any]) -> list[float]:
    """lr, betas, eps, weight decay and rho of a parameter group, in the order in which the operations take them."""
    return [float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"], group["rho"]]


def supports(params: Sequence[Tensor], shape: tuple[int, int], matrix: bool) -> bool:
    """Whether the native kernels can step these parameters (device, dtype, size, layout); settled when a plan is made."""
    first = params[0]
    if (
        not _is_native(first.device)
        or first.dtype not in DTYPES
        or (first.device.type == "cuda" and shape[1] >= LONGEST_CUDA)
    ):
        return False
    if not matrix:
        return all(param.is_contiguous() for param in params)
    return 1 < shape[0] <= LARGEST_SIDE[first.device.type]


def has(name: str, moments: Tensor, long_basis: Tensor | None = None) -> bool:
    """Whether the operation has a native kernel for such moments ``[N, r, l]`` and a long basis ``[N, k, l]``."""
    device = moments.device.type
    if not _is_native(moments.device) or name not in KERNELS[device] or moments.dtype != torch.float32:
        return False
    if long_basis is None:
        return True
    return max(moments.shape[1], long_basis.shape[1]) <= LARGEST_SIDE[device] and long_basis.dtype != torch.float16


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` of ``[N, d, d]``, with the native kernel where there is one.

    Returns:
        Eigenvalues ``[N, d]``, rising, and eigenvectors in columns, as exact as LAPACK's (``test_eigh_kernel``).

    Raises:
        torch.linalg.LinAlgError: a matrix is not finite, or its decomposition does not converge.
    """
    if not has("symmetric_eigh", matrices) or matrices.shape[-1] > LARGEST_DECOMPOSED:
        found: tuple[Tensor, Tensor] = torch.linalg.eigh(matrices)
        return found
    values, vectors = symmetric_eigh(matrices.contiguous())
    if not bool(values.isfinite().all()):
        message = "a matrix is not finite, or its decomposition does not converge"
        raise torch.linalg.LinAlgError(message)  # type: ignore[attr-defined]
    return values, vectors
