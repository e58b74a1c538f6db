"""Matrices that are sharded over processes (FSDP2): every one is stepped whole, by the one process that owns it.

Each step sends the shards of a parameter and of its gradient to its owner and the new shards back: two exchanges,
whatever the number of parameters. The state of a parameter lives with its owner alone. A state dict holds it as bytes
in a DTensor that is cut like the parameter, so that checkpoints can be read by any number of processes. For that the
shapes must be known before it is read: the fields differ between the phases, the bytes are as many as the larger needs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from scao_hf.distributed.exchange import Exchange, as_bytes, chunks, from_all, is_sharded, local_gradient, shard_dim
from scao_hf.integrity import checksum
from scao_hf.names import few, labels, pairs
from scao_hf.rules import Groups, State, Wholes, expected, only_foreign

EARLIER = "take an earlier checkpoint, or start from the weights alone"

#: The key under which a parameter's state holds its vector. In memory these are its fields, in the process that has them, and
#: in all processes the number of that one.
BYTES, OWNER = "bytes", "owner"
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


def balance(costs: Sequence[int], loads: list[int], among: Sequence[Sequence[int]] | None = None) -> list[int]:
    """For each cost the process that takes it: the largest first, each to the process that has least so far.

    Args:
        costs: one per parameter.
        loads: what each process has already; added to in place.
        among: for each cost the processes that may take it; None for all.
    """
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = min(range(len(loads)) if among is None else among[index], key=loads.__getitem__)
        loads[owners[index]] += costs[index]
    return owners


def owners_of(groups: Groups, world: int, state: State) -> dict[Tensor, int]:
    """Which process owns which sharded parameter: the one that has its state, or by the bytes of it (``balance``).

    A group that is added later changes nothing for the groups before it. Options that are edited or loaded would, and so
    would a parameter that is taken out, as they change the sizes.
    """
    sharded = [(param, group) for group in groups for param in group["params"] if is_sharded(param)]
    owners = {param: state[param][BYTES][OWNER] for param, _ in sharded if OWNER in state.get(param, {}).get(BYTES, ())}
    loads = [0] * world
    for param, group in sharded:
        if param in owners:
            loads[owners[param]] += size_of(param, group)
    for group in groups:
        new = [param for param in group["params"] if is_sharded(param) and param not in owners]
        ranks = balance([size_of(param, group) for param in new], loads)
        owners |= dict(zip(new, ranks, strict=True))
    return owners


class Shards:
    """The sharded parameters of an optimizer, in one order in all processes.

    Attributes:
        wholes: for each of them the whole parameter where this process owns it, None where another one does.
        elsewhere: those that other processes own.

    Raises:
        ValueError: parameters on different meshes, or not sharded on their first dimension.
    """

    def __init__(self, groups: Groups, state: State) -> None:
        self.params: list[Any] = [param for group in groups for param in group["params"] if is_sharded(param)]
        meshes = {param.device_mesh for param in self.params}
        if len(meshes) > 1:
            raise ValueError(
                f"the parameters are sharded over {len(meshes)} device meshes: SCAO steps those of one; build one SCAO for each"
            )
        self.group = self.params[0].device_mesh.get_group(shard_dim(self.params[0]))
        self.device = self.params[0].to_local().device
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.owners = owners_of(groups, self.world, state)
        self.wholes: Wholes = {}
        for param in self.params:
            mine = self.owners[param] == self.rank
            self.wholes[param] = torch.empty(param.shape, dtype=param.dtype, device=self.device) if mine else None
            self._release(param)
        self.elsewhere = {param for param, whole in self.wholes.items() if whole is None}

    @classmethod
    def of(cls, groups: Groups, state: State) -> Shards | None:
        """The sharded parameters among ``groups``, or None where there are none."""
        return cls(groups, state) if any(is_sharded(param) for group in groups for param in group["params"]) else None

    def _exchange(self, params: Sequence[Any]) -> Exchange:
        """An exchange of the parameters, cut along their first dimension, as bytes."""
        sizes = [
            [_row_bytes(param) * (last - first) for first, last in chunks(param.shape[0], self.world)]
            for param in params
        ]
        return Exchange([self.owners[param] for param in params], sizes, self.group)

    def _bytes(self, params: Sequence[Any], sizes: Sequence[int]) -> Exchange:
        """An exchange of one vector of ``sizes`` bytes per parameter."""
        cuts = [[last - first for first, last in chunks(size, self.world)] for size in sizes]
        return Exchange([self.owners[param] for param in params], cuts, self.group)

    def _active(self) -> tuple[list[Any], list[Tensor]]:
        """The parameters with gradients, and of those that this process owns the wholes."""
        active = [param for param in self.params if param.grad is not None]
        return active, [whole for param in active if (whole := self.wholes[param]) is not None]

    def _parts(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """Views of the bytes that each process has of whole tensors, process by process."""
        ranks = range(self.world)
        return [as_bytes(whole[slice(*chunks(len(whole), self.world)[rank])]) for rank in ranks for whole in wholes]

    def gather(self) -> None:
        """Fill the whole parameters and gradients that this process owns from the shards of all."""
        active, wholes = self._active()
        if not active:
            return
        pieces = [as_bytes(param.to_local()) for param in active]
        pieces += [as_bytes(local_gradient(param)) for param in active]
        received = self._exchange(active * 2).to_owners(pieces)
        for whole in wholes:
            whole.untyped_storage().resize_(whole.numel() * whole.element_size())
            whole.grad = torch.empty_like(whole)
        if wholes:
            grads = [cast(Tensor, whole.grad) for whole in wholes]
            torch._foreach_copy_(self._parts([*wholes, *grads]), received)

    def scatter(self, state: State) -> None:
        """Return the stepped parameters to their shards, count the step, and let go of the wholes."""
        active, wholes = self._active()
        if not active:
            return
        received = self._exchange(active).to_parts(self._parts(wholes), self.device)
        torch._foreach_copy_([as_bytes(param.to_local()) for param in active], received)
        for param in active:
            state[param]["step"] += 1
            self._release(param)

    def _release(self, param: Tensor) -> None:
        """Free the memory of a whole parameter, which keeps its shape."""
        if (whole := self.wholes[param]) is not None:
            whole.grad = None
            whole.untyped_storage().resize_(0)

    def to_bytes(self, state_dict: dict[str, Any], groups: Groups) -> dict[str, Any]:
        """``state_dict`` with each sharded parameter's state as one DTensor of bytes under ``"bytes"``. Collective."""
        from torch.distributed.tensor import DTensor

        entries = dict(state_dict["state"])
        found: list[tuple[Any, Any, int]] = [
            (key, param, size_of(param, group)) for key, param, group in self.saved(state_dict, groups)
        ]
        if not found:
            return state_dict
        exchange = self._bytes([param for _, param, _ in found], [size for *_, size in found])
        pieces: list[list[Tensor]] = []
        for key, param, size in found:
            if param not in self.elsewhere:
                fields = {name: value for name, value in entries[key][BYTES].items() if name not in ("step", OWNER)}
                pieces.append(_cut(to_bytes(fields, entries[key]["step"], size), self.world))
        received = exchange.to_parts([piece[target] for target in range(self.world) for piece in pieces], self.device)
        for (key, param, size), local in zip(found, received, strict=True):
            vector = DTensor.from_local(
                local.clone(),
                param.device_mesh,
                param.placements,
                run_check=False,
                shape=torch.Size([size]),
                stride=(1,),
            )
            entries[key] = {**entries[key], BYTES: vector}
        return {**state_dict, "state": entries}

    def check_alike(self, state_dict: dict[str, Any], groups: Groups) -> None:
        """Raise ``ValueError`` unless all processes have state of the same parameters, sizes and steps. Collective."""
        names, entries = labels(state_dict, groups), state_dict["state"]
        mine = {
            names[key]: (entries[key]["step"], tuple(getattr(entries[key].get(BYTES), "shape", ())))
            for key, *_ in self.saved(state_dict, groups)
        }
        unlike = sorted({name for each in from_all(mine, self.group) for name, _ in each.items() ^ mine.items()})
        if unlike:
            raise ValueError(
                f"the processes have different states of {few(unlike)}: give load_state_dict the same checkpoint in all of them"
            )

    def collected(self, state_dict: dict[str, Any], groups: Groups) -> dict[str, Any]:
        """A checked ``state_dict`` with the whole bytes of the parameters that this process owns, of others the step alone.

        Collective.
        """
        from torch.distributed.tensor import DTensor

        entries = dict(state_dict["state"])
        found = self.saved(state_dict, groups)
        cut = [item for item in found if isinstance(entries[item[0]].get(BYTES), DTensor)]
        exchange = self._bytes([param for _, param, _ in cut], [entries[key][BYTES].numel() for key, *_ in cut])
        received = exchange.to_owners([entries[key][BYTES].to_local().contiguous() for key, *_ in cut]) if cut else []
        mine = [key for key, param, _ in cut if param not in self.elsewhere]
        for index, key in enumerate(mine):
            entries[key] = {**entries[key], BYTES: torch.cat(received[index :: len(mine)])}
        for key, param, _ in found:
            if param in self.elsewhere:
                entries[key] = {name: value for name, value in entries[key].items() if name != BYTES}
        return {**state_dict, "state": entries}

    def saved(self, state_dict: dict[str, Any], groups: Groups) -> list[tuple[Any, Any, dict[str, Any]]]:
        """Key, parameter and saved group of every sharded parameter that has a state."""
        entries = state_dict["state"]
        return [
            (key, param, group)
            for key, param, group in pairs(state_dict, groups)
            if key in entries and param in self.wholes and not only_foreign(entries[key], param, group)
        ]

    def adopt(self, fresh: State) -> State:
        """Named entries as the optimizer keeps them: a sharded parameter's fields under ``"bytes"``, with the owner."""
        return {
            param: {"step": entry["step"], BYTES: {**({} if param in self.elsewhere else entry), OWNER: owner}}
            if (owner := self.owners.get(param)) is not None
            else entry
            for param, entry in fresh.items()
        }

    def claim(self, state: State) -> None:
        """Enter the owner of every state that there is."""
        for param, owner in self.owners.items():
            if "step" in state.get(param, ()):
                state[param][BYTES][OWNER] = owner


def _row_bytes(param: Tensor) -> int:
    """Bytes for each index of the first dimension."""
    return 0 if param.numel() == 0 else param.numel() // param.shape[0] * param.element_size()


def _cut(vector: Tensor, world: int) -> list[Tensor]:
    return [vector[first:last] for first, last in chunks(vector.numel(), world)]
