"""Float32 products in float32, whatever the process allows elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

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
