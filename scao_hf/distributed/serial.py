"""The state of one parameter as one vector of bytes, whose length is the same in both phases.

A checkpoint that is read by other numbers of processes needs tensors whose shapes are known before it is read. The
fields of SCAO's state differ between the phases; the vector is as long as the larger of the two.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from scao_hf.integrity import checksum
from scao_hf.state import EARLIER, expected

#: The key under which a parameter's state holds its vector.
BYTES = "bytes"
#: Bytes of the checksum; every field begins at a multiple of as many, so that it can be read in its own dtype.
ALIGNMENT = 8


def _places(fields: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, slice]]:
    """Name, field and place in the vector, in alphabetical order of the names; the checksum comes before the first."""
    end = ALIGNMENT
    for name in sorted(fields):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + fields[name].numel() * fields[name].element_size()
        yield name, fields[name], slice(start, end)


def size_of(param: Tensor, group: dict[str, Any]) -> int:
    """Bytes of the vector for ``param``: what the larger of the two phases needs."""
    ends = (place.stop for step in (0, sys.maxsize) for *_, place in _places(expected(param, group, step)))
    return max(ends, default=0)


def to_bytes(fields: Mapping[str, Tensor], step: int, size: int) -> Tensor:
    """A checksum and the fields after ``step`` steps as ``uint8[size]`` on their device; what they leave free is zero."""
    device = next(iter(fields.values())).device
    vector = torch.zeros(size, dtype=torch.uint8, device=device)
    for _, field, place in _places(fields):
        vector[place] = as_bytes(field)
    vector[:ALIGNMENT] = as_bytes(torch.tensor(checksum({"step": step, **fields})))
    return vector


def from_bytes(where: str, vector: Tensor, param: Tensor, group: dict[str, Any], step: int) -> dict[str, Tensor]:
    """Copies of the fields of ``param``'s state after ``step`` steps, from the ``uint8`` vector.

    Args:
        where: what messages call it.

    Raises:
        ValueError: they do not fit their checksum.
    """
    fields = {
        name: vector[place].clone().view(field.dtype).view(field.shape)
        for name, field, place in _places(expected(param, group, step))
    }
    if int(vector[:ALIGNMENT].clone().view(torch.int64)) != checksum({"step": step, **fields}):
        raise ValueError(
            f"{where}: the saved bytes do not fit their checksum: the file is damaged or was edited, or options in its groups "
            f"were; {EARLIER}"
        )
    return fields


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's numbers as ``uint8[n]``, row by row; a view where its memory allows it."""
    return tensor.contiguous().view(-1).view(torch.uint8)
