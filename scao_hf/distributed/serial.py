"""The state of one parameter as one vector of bytes, whose length is the same in both phases.

A checkpoint that is read by other numbers of processes needs tensors whose shapes are known before it is read. The
fields of SCAO's state differ between the phases; the vector is as long as the larger of the two.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from scao_hf.integrity import CHECKSUM, checksum
from scao_hf.state import EARLIER, Groups, expected, pairs

#: The key under which a parameter's state holds its vector.
BYTES = "bytes"
#: The key of the step in a flattened state dict, where the bytes are below the step.
COUNT = "count"
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


def for_checkpoint(state_dict: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """``state_dict`` as torch.distributed.checkpoint needs it, where its ``get_optimizer_state_dict`` is the caller.

    It reads a checkpoint into the state dict of an optimizer that was just built, so keys and shapes must be those of both
    phases: every parameter's fields become bytes. Nothing but the call stack tells it from other callers. In a flattened
    state dict it knows no keys but those of the live state, of which the step alone is always there: the bytes go below it.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") != "torch.distributed.checkpoint.state_dict":
        frame = frame.f_back
    if frame is None:
        return state_dict
    flat = getattr(frame.f_locals.get("info"), "flatten_optimizer_state_dict", False)
    entries = dict(state_dict["state"])
    for key, param, group in pairs(state_dict, groups):
        entry = entries.get(key, {})
        if "step" not in entry or BYTES in entry:
            continue
        fields = {name: entry[name] for name in expected(param, group, entry["step"])}
        if fields:
            vector = to_bytes(fields, entry["step"], size_of(param, group))
            others = {name: value for name, value in entry.items() if name not in fields and name != CHECKSUM}
            below = {"step": {COUNT: entry["step"], BYTES: vector}}
            entries[key] = {**others, **(below if flat else {BYTES: vector})}
    return {**state_dict, "state": entries}


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


def named(where: str, entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """A parameter's saved state with its fields by name, whether they were saved by name or as bytes.

    Raises:
        ValueError: bytes of another number, besides fields by name, or that do not fit their checksum.
    """
    below = entry.get("step")
    if isinstance(below, dict) and below.keys() == {COUNT, BYTES}:
        # Live keys without anything below them in the file have become empty dicts.
        others = {name: value for name, value in entry.items() if not (isinstance(value, dict) and not value)}
        entry = {**others, "step": below[COUNT], BYTES: below[BYTES]}
    if BYTES not in entry:
        return entry
    check_bytes(where, entry, param, group)
    vector = entry[BYTES]
    if hasattr(vector, "full_tensor"):
        vector = vector.full_tensor()
    others = {name: value for name, value in entry.items() if name != BYTES}
    return {**others, **from_bytes(where, vector, param, group, entry["step"])}


def check_bytes(where: str, entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    """Raise ``ValueError`` where a saved entry mixes forms, or has another number of bytes than the state of ``param``."""
    vector, step, size = entry[BYTES], entry.get("step"), size_of(param, group)
    if not isinstance(step, int) or step < 0 or entry.keys() & expected(param, group, step).keys():
        raise ValueError(
            f"{where}: the saved state has {sorted(map(str, entry))} with step={step!r}: besides its bytes there must be a "
            "step, an integer of at least 0, and no field by name. A state dict of one process goes to "
            "optimizer.load_state_dict in every process, not through set_optimizer_state_dict"
        )
    if not isinstance(vector, Tensor) or vector.dtype != torch.uint8 or tuple(vector.shape) != (size,):
        found = f"{vector.dtype} {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(
            f"{where}: the saved state is {found}, expected {size} bytes: the run that was saved had another shape here (LoRA "
            "rank, vocabulary) or other options (k_max, use_int8_ema, moment_dtype, max_precond_dim). Build model and "
            "optimizer as they were, or start from the weights alone"
        )
