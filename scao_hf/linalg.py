"""Eigendecompositions of stacks of curvature factors, how many directions to keep, and products in full float32."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scao_hf import ops


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
                found = ops.eigh(scaled)
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


def adaptive_rank(values: Tensor, total: Tensor, epsilon_sparse: float, k_min: int, k_max: int) -> Tensor:
    """(E4) The smallest k in ``[k_min, k_max]`` whose eigenvalues hold at least ``1 - epsilon_sparse`` of the mass.

    Args:
        values: ``[N, d]``, falling.
        total: ``[N]``, the trace (larger than the sum of ``values`` where these are truncated already).

    Returns:
        ``[N]``, int64, at most d.
    """
    # The tolerance keeps a rounding error in the running sum from costing one more direction.
    threshold = (1 - epsilon_sparse) * total * (1 - 1e-6)
    side = values.shape[-1]
    # A product, because torch.use_deterministic_algorithms refuses cumsum on CUDA.
    running = values @ torch.ones(side, side, dtype=values.dtype, device=values.device).triu_()
    rank = (running < threshold[:, None]).sum(-1) + 1
    return rank.clamp(min(k_min, side), min(k_max, side))


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
