"""What the operations are done by: native kernels where they were built and suit the tensors, else PyTorch; and how exactly.

Only here the extension is loaded.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    "full_precision",
    "has",
    "int8_ema_",
    "steps",
    "symmetric_eigh",
]

#: What parameters and gradients may be for a native kernel.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Each operation does what a rule's PyTorch code does, on one bucket, in place. ``state`` are stacked fields in the order of the
# rule's table after the counters, ``numbers`` lr, betas, eps, weight decay and rho, and in the ramp its weight. csrc checks
# what it is given.
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

#: Largest r and k that the CUDA kernels take: beyond it shared memory ends.
LARGEST_SIDE = 64
#: Long sides, and vectors, that they do not count in their integers.
LONGEST_SIDE = 2**30
#: The operations that have a native kernel.
KERNELS = {"cpu": ("symmetric_eigh",), "cuda": ("adamw_step_", "eigenbasis_step_", "int8_ema_")}
#: Largest side of matrices that are decomposed natively.
LARGEST_DECOMPOSED = 64
OLDEST_TORCH = (2, 10)
#: What the operations take; as in csrc/state.h.
INTERFACE = 5
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


def has(kernel: str, device: torch.device) -> bool:
    """Whether an operation has a native kernel on a device."""
    return kernel in KERNELS.get(device.type, ()) and _is_native(device)


def steps(kernel: str, params: Sequence[Tensor], moments: Tensor, long_basis: Tensor | None = None) -> bool:
    """Whether a native kernel can step these parameters.

    Args:
        kernel: of one of the steps.
        params: of one dtype and device.
        moments: ``[N, r, l]``, of vectors ``[N, 1, numel]``.
        long_basis: ``[N, k, l]``.
    """
    r, l = moments.shape[1:]
    if long_basis is not None and (long_basis.shape[1] > LARGEST_SIDE or long_basis.dtype == torch.float16):
        return False
    return (
        has(kernel, moments.device)
        and params[0].dtype in DTYPES
        and moments.dtype == torch.float32
        and l < LONGEST_SIDE
        and (r <= LARGEST_SIDE if r > 1 else all(param.is_contiguous() for param in params))
    )


def eigh(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues of ``L + damping I`` in falling order, at least ``damping``, and eigenvectors; None if it fails.

    It is done on the CPU whatever the device: the solvers of other devices differ in speed and in how they fail. Each
    matrix is scaled to a trace of d first, so that float32 neither over- nor underflows. A stack on which the
    decomposition fails, or for which memory does not suffice, is tried once more in float64 with a thousandth of the
    mean eigenvalue on the diagonal. A factor that int8 rounding has made slightly indefinite comes out
    with the damping in place of its negative eigenvalues.

    Args:
        factor: L, symmetric, ``[N, d, d]``.
        damping: ``[N]``, not negative.
    """
    side, device = factor.shape[-1], factor.device
    factor, damping = factor.cpu(), damping.cpu()
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(factor.dtype).tiny)[:, None, None]
    scaled = factor / mean
    for last in (False, True):
        try:
            if last:
                identity = torch.eye(side, dtype=torch.float64, device="cpu")
                found = torch.linalg.eigh(scaled.double() + 1e-3 * identity)
            else:
                found = _decomposed(scaled)
            values, vectors = (part.flip(-1).to(factor) for part in found)
        except (torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:  # type: ignore[attr-defined]
            # Python shows a warning once for each place and text: not at every refresh.
            warnings.warn(
                f"a decomposition of curvature factors of side {side} failed ({type(error).__name__}): "
                + ("the matrices keep their last basis" if last else "tried again in float64"),
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        return (values.clamp_min(0) * mean[:, 0] + damping[:, None]).to(device), vectors.to(device)
    return None


def _decomposed(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` of ``[N, d, d]``, with the native kernel where there is one, as exact as LAPACK's."""
    native = has("symmetric_eigh", matrices.device) and matrices.dtype == torch.float32
    if not native or matrices.shape[-1] > LARGEST_DECOMPOSED:
        found: tuple[Tensor, Tensor] = torch.linalg.eigh(matrices)
        return found
    values, vectors = symmetric_eigh(matrices.contiguous())
    if not bool(values.isfinite().all()):
        raise torch.linalg.LinAlgError("a matrix is not finite")  # type: ignore[attr-defined]
    return values, vectors


#: What decides how float32 matrices are multiplied, from torch 2.9 on. torch.set_float32_matmul_precision sets these, too, but
#: it refuses to be asked once one of them has been set by itself, as transformers does for ``tf32=True``.
_MATMULS: tuple[Any, ...] = tuple(
    backend.matmul
    for backend in (torch.backends.cuda, torch.backends.mkldnn)
    if hasattr(getattr(backend, "matmul", None), "fp32_precision")
)
_lock = threading.Lock()
_inside = 0
_before: Any = None


def _set_full() -> Any:
    if not _MATMULS:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return before
    values = [matmul.fp32_precision for matmul in _MATMULS]
    for matmul in _MATMULS:
        matmul.fp32_precision = "ieee"
    return values


def _restore(before: Any) -> None:
    if not _MATMULS:
        torch.set_float32_matmul_precision(before)
        return
    for matmul, value in zip(_MATMULS, before, strict=True):
        matmul.fp32_precision = "none"  # what torch.backends.fp32_precision says, now and later
        if matmul.fp32_precision != value:
            matmul.fp32_precision = value


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32: TF32, which training frameworks switch on, is too coarse for Gram matrices.

    The setting belongs to the process: of several threads the last one that leaves restores it.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = _set_full()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _restore(_before)
