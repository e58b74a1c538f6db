"""A checksum for each parameter's saved state: ``torch.load`` silently reads a file with flipped bits."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

#: The key in a saved entry; the live state has none.
CHECKSUM = "checksum"
#: Words that are summed at a time, so that little memory is needed.
PORTION = 2**20


def checksum(entry: dict[str, Any]) -> int:
    """A 64-bit checksum of a parameter's state: every tensor's name, dtype, shape and bytes, numbers and strings.

    The words of a field are summed with odd weights modulo 2^64, on the field's device: a single flipped bit changes the
    sum by an odd multiple of a power of two, which is never zero (tests/test_security_states.py).
    """
    total = 0
    for name in sorted(entry, key=str):
        value = entry[name]
        if name == CHECKSUM:
            continue
        if isinstance(value, Tensor):
            label = f"{name} {value.dtype} {tuple(value.shape)}"
            content = _sum(value.detach().contiguous().view(-1).view(torch.uint8))
        elif isinstance(value, (int, float, str)):
            label, content = f"{name} {value!r}", 0
        else:
            continue  # kept here by a wrapper of the optimizer
        total = (total * 0x100000001B3 + zlib.crc32(label.encode()) + content) % 2**64
    return total - 2**63  # as an integer of 64 bits with a sign, which every format can hold


def _sum(data: Tensor) -> int:
    """``sum_i (2 i + 1) word_i`` modulo 2^64 over the 64-bit words of ``data``, uint8, the last one filled up."""
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for first in range(0, data.numel(), 8 * PORTION):
        part = data[first : first + 8 * PORTION]
        words = torch.zeros(-(-part.numel() // 8), dtype=torch.int64, device=data.device)
        words.view(torch.uint8)[: part.numel()] = part
        start = first // 8
        weights = torch.arange(2 * start + 1, 2 * (start + words.numel()), 2, device=data.device)
        total += (words * weights).sum()
    return int(total)
