"""Which parameters are stepped together, and their state as stacks of tensors and as the entries of ``optimizer.state``.

``optimizer.param_groups`` and ``optimizer.state`` belong to the user, who may replace anything in them between two
steps. ``Stacks`` notices that at the next step. In between it holds no tensor of the state: what is removed is freed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from operator import index, is_, itemgetter
from typing import Any, TypeGuard

import torch
from torch import Tensor

from scao_hf import options
from scao_hf.blocks import arithmetic_dtype, offsets_of
from scao_hf.distributed.shards import BYTES, Shards
from scao_hf.names import name_of
from scao_hf.rules import Groups, State, Wholes, create, low_bit, members, rule_of
from scao_hf.rules.base import Bucket

META = torch.device("meta")
#: Entries of a bucket on a CPU, in whose caches its intermediates stay then, and elsewhere where moments are decoded for a
#: step. Otherwise a GPU wants few and large operations.
CPU_ENTRIES, DECODED_ENTRIES = 2**20, 2**25


class Stacks:
    """The buckets of some parameters, with their state in them until ``close``.

    Args:
        groups: the parameter groups.
        state: the optimizer's state.
        include: which parameters.
        before: the options under which each group's state was laid out, for the error that names an edited one.

    Attributes:
        buckets: what this process steps.
        shards: the sharded parameters, None where there are none.
        idle: whether no parameter has a gradient.

    Raises:
        RuntimeError: a sparse gradient.
        ValueError: a state that does not fit its parameter or the options of its group. Nothing is changed then.
    """

    def __init__(
        self, groups: Groups, state: State, include: Callable[[Tensor], bool], before: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.shards = Shards.of(groups, state)
        self.buckets = build_buckets(groups, state, include, self.shards.wholes if self.shards else None, before)
        if self.shards:
            self.shards.claim(state)
        self._groups = list(groups)
        self._signature = _signature(groups)
        self.idle = all(len(parts) == 1 for parts in self._signature)

    def fits(self, groups: Groups) -> bool:
        """Whether these are still the groups, with the same parameters and gradients of the same kind."""
        same = len(groups) == len(self._groups) and all(map(is_, groups, self._groups))
        return same and _signature(groups) == self._signature

    def open(self, state: State) -> bool:
        """Fill the buckets with the state as it is now; False, and nothing filled, if any of it has been replaced."""
        elsewhere = self.shards.elsewhere if self.shards else ()
        complete = all("step" in state.get(param, ()) for param in elsewhere if param.grad is not None)
        complete = complete and all(_open(bucket, state) for bucket in self.buckets)
        if not complete:
            self.close()
        return complete

    def close(self) -> None:
        """Let go of the state."""
        for bucket in self.buckets:
            bucket.entries, bucket.state = [], {}


def _signature(groups: Groups) -> list[Any]:
    """What decides which parameters are stepped together, apart from options and state."""
    return [
        [len(group["params"])]
        + [
            (id(param), param.dtype, param.device, param.shape, grad.layout)
            for param in group["params"]
            if (grad := param.grad) is not None
        ]
        for group in groups
    ]


@torch.no_grad()
def build_buckets(
    groups: Groups,
    state: State,
    include: Callable[[Tensor], bool],
    wholes: Wholes | None = None,
    before: Sequence[dict[str, Any]] = (),
) -> list[Bucket]:
    """Group the blocks of the included parameters by shape, dtype, device, age and parameter group.

    Existing state is stacked (without a copy where it already is), missing state is created and entered in ``state``.

    Args:
        groups, state, include, before: as for ``Stacks``.
        wholes: for each sharded parameter the whole one that this process steps in its place, None where another
            process does. Its state is then entered as ``state[param]["bytes"]``, empty in the other processes.

    Raises:
        RuntimeError, ValueError: as ``Stacks``.
    """
    found: dict[tuple[Any, ...], Bucket] = {}
    sizes: Counter[tuple[Any, ...]] = Counter()
    outer: list[tuple[Tensor, dict[str, Any], dict[str, Any]]] = []
    for place, group in enumerate(groups):
        offsets, cycle = offsets_of(block for param in group["params"] for block in members(param, group))
        for param in group["params"]:
            if not include(param) or param.numel() == 0:
                continue
            _check_gradient(param)
            entry, dtype = state.get(param, {}), arithmetic_dtype(param)
            step, own = _step(param, entry), {}
            whole: Tensor | None = param
            if wholes is not None and param in wholes:
                own = {"step": step, BYTES: entry.get(BYTES, {})}
                whole = wholes[param]
            outer.append((param, entry, own))
            for shape, member in [] if whole is None else members(whole, group):
                key: tuple[Any, ...] = (place, shape, dtype, param.dtype, param.device, step, member.block is None)
                key += (sizes[key] // _most_entries(group, param.device),)
                sizes[key[:-1]] += member.size * shape[0] * shape[1]
                rule = rule_of(group, member.block is not None, shape)
                bucket = found.setdefault(key, Bucket(group, shape, step, dtype, rule, cycle=cycle))
                bucket.members.append(member)
                bucket.owners.append(param)
                bucket.entries.append(own.get(BYTES, entry))
                first = offsets.get((id(param), member.suffix), 0)
                bucket.offsets.extend(first + matrix * shape[0] * shape[1] for matrix in range(member.size))
    read: list[Tensor] = []
    for (place, *_), bucket in found.items():
        if bucket.step:
            read += _fill(bucket, before[place] if place < len(before) else {})
        else:
            bucket.state = create(bucket, bucket.members[0].param.device)
    # The entries change only when every block has been read: the blocks of one parameter may lie in several buckets. New ones
    # become part of the state when they are complete.
    for _, entry, own in outer:
        entry.update(own)
    for bucket in found.values():
        _enter(bucket)
        publish(bucket)
    state.update((param, entry) for param, entry, _ in outer)
    _detach(state, _storages(read) - _storages(field for bucket in found.values() for field in bucket.state.values()))
    return list(found.values())


def _most_entries(group: dict[str, Any], device: torch.device) -> int:
    """How many entries a bucket has, give or take a matrix."""
    if device.type == "cpu":
        return CPU_ENTRIES
    return sys.maxsize if group["moment_dtype"] == "float32" else DECODED_ENTRIES


def _check_gradient(param: Tensor) -> None:
    if param.grad is not None and param.grad.layout != torch.strided:
        raise RuntimeError(
            f"SCAO does not support sparse gradients (parameter of shape {tuple(param.shape)}): use "
            "torch.optim.SparseAdam for it, or an embedding with sparse=False"
        )


def _step(param: Tensor, entry: dict[str, Any]) -> int:
    try:
        step = index(entry.get("step", 0))
    except TypeError:
        step = -1
    if step < 0:
        raise ValueError(
            f"optimizer.state has step={entry['step']!r} for a parameter of shape {tuple(param.shape)}: it must be an "
            "integer of at least 0"
        )
    return step


def _fill(bucket: Bucket, before: dict[str, Any]) -> list[Tensor]:
    """Stack what the entries hold, on the parameters' device and in the rule's dtypes; returns the tensors found there."""
    own, device, found = create(bucket, META), bucket.members[0].param.device, []
    bucket.fields = fields = own if _holds(bucket, own) else _other_form(bucket, own)
    for name, like in fields.items():
        part = bucket.split(like)[0]
        pieces: list[Tensor] = []
        for entry, member, owner in zip(bucket.entries, bucket.members, bucket.owners, strict=True):
            value = entry.get(name + member.suffix)
            if not _alike(value, part):
                raise _misfit(bucket, owner, name + member.suffix, value, part, before)
            pieces.append(value)
        found += pieces
        if _is_stack(pieces, like, device):
            bucket.state[name] = pieces[0].as_strided(like.shape, like.stride())
        else:
            pieces = [piece.to(device, like.dtype) for piece in pieces]
            bucket.state[name] = torch.cat(pieces) if bucket.packed else torch.stack(pieces)
    if fields.keys() != own.keys():
        low_bit.convert(bucket)
    return found


def _alike(value: Any, like: Tensor) -> TypeGuard[Tensor]:
    """Whether ``value`` can be converted to ``like`` by another precision and device."""
    if not isinstance(value, Tensor) or value.shape != like.shape:
        return False
    return value.dtype == like.dtype or (value.is_floating_point() and like.is_floating_point())


def _holds(bucket: Bucket, fields: Iterable[str]) -> bool:
    return all(name + bucket.members[0].suffix in bucket.entries[0] for name in fields)


def _other_form(bucket: Bucket, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fields under the ``moment_dtype`` that the entries are in, where the group's has been edited; else ``own``."""
    kinds = options.OPTIONS["moment_dtype"].choices
    forms = (create(replace(bucket, group={**bucket.group, "moment_dtype": kind}), META) for kind in kinds)
    return next((form for form in forms if _holds(bucket, form)), own)


def _is_stack(pieces: Sequence[Tensor], like: Tensor, device: torch.device) -> bool:
    """Whether ``pieces``, one after the other, are the whole of a tensor like ``like`` in memory of its own."""
    first, size = pieces[0], pieces[0].numel() * like.element_size()
    if first.dtype != like.dtype or first.device != device or first.storage_offset():
        return False
    if first.untyped_storage().nbytes() != len(pieces) * size:
        return False
    start = first.data_ptr()
    return all(piece.is_contiguous() and piece.data_ptr() == start + i * size for i, piece in enumerate(pieces))


def _misfit(bucket: Bucket, owner: Tensor, name: str, value: Any, like: Tensor, before: dict[str, Any]) -> ValueError:
    whose = f"the parameter{name_of(owner, bucket.group)} of shape {tuple(owner.shape)}"
    edited = [option for option in options.SHAPING if before and before[option] != bucket.group[option]]
    if edited:
        now, then = (
            ", ".join(f"{option}={values[option]!r}" for option in edited) for values in (bucket.group, before)
        )
        return ValueError(
            f"{now} cannot be followed: the state of {whose} has taken {bucket.step} steps with {then}. Restore that value, "
            "or drop the state (optimizer.state.pop(parameter)) to start it from zero"
        )
    found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return ValueError(
        f"optimizer.state has {name}={found} for {whose} after {bucket.step} steps: it must be {like.dtype} "
        f"{tuple(like.shape)}. Restore it, or drop the entry (optimizer.state.pop(parameter)) to start it from zero"
    )


def publish(bucket: Bucket) -> None:
    """Enter the step and, where there are other fields now, these, for each parameter."""
    if bucket.fields.keys() != bucket.state.keys():
        _enter(bucket)
    for entry in bucket.entries:
        entry["step"] = bucket.step


def _enter(bucket: Bucket) -> None:
    """Put each parameter's part of the stacks into its entry, instead of the fields that it had."""
    for entry, member in zip(bucket.entries, bucket.members, strict=True):
        for name in bucket.fields.keys() - bucket.state.keys():
            del entry[name + member.suffix]
    for name, stack in bucket.state.items():
        stack = bucket.state[name] = stack.contiguous()
        for entry, member, part in zip(bucket.entries, bucket.members, bucket.split(stack), strict=True):
            # Detached: a view keeps its base, even where a user moves it to the CPU by its ``data``.
            entry[name + member.suffix] = part.detach()
    bucket.fields = {name: torch.empty_like(stack, device=META) for name, stack in bucket.state.items()}
    bucket.pointers = _pointers(bucket)


def _pointers(bucket: Bucket) -> list[int]:
    """Where in memory each field of each entry is; KeyError or TypeError where one is missing or no tensor."""
    readers = {suffix: itemgetter(*(name + suffix for name in bucket.fields)) for _, suffix, _ in bucket.members}
    fields = [readers[member.suffix](entry) for member, entry in zip(bucket.members, bucket.entries, strict=True)]
    return [*map(Tensor.data_ptr, chain.from_iterable(fields))]


def _open(bucket: Bucket, state: State) -> bool:
    """Fill a bucket with the stacks behind the entries; False if these have been replaced, be it in part."""
    outer = [state.get(owner, {}) for owner in bucket.owners]
    try:
        bucket.entries = [
            entry if member.param is owner else entry[BYTES]
            for entry, member, owner in zip(outer, bucket.members, bucket.owners, strict=True)
        ]
        if any(entry["step"] != bucket.step for entry in outer) or _pointers(bucket) != bucket.pointers:
            return False
    except (KeyError, TypeError):
        return False
    for name, like in bucket.fields.items():
        first = bucket.entries[0][name + bucket.members[0].suffix]
        end = (first.storage_offset() + like.numel()) * first.element_size()
        # Memory that was freed may be given out again for parts of the same sizes, each on its own.
        if first.dtype != like.dtype or first.untyped_storage().nbytes() < end:
            return False
        bucket.state[name] = first.detach().as_strided(like.shape, like.stride())
    return True


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _detach(state: State, left: set[int]) -> None:
    """Copy what is still in the stacks ``left``, whose other members have gone: a part would keep the whole alive."""
    for entry in state.values() if left else ():
        fields = entry.get(BYTES, entry)
        for name, value in fields.items():
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in left:
                fields[name] = value.clone()
