"""How tensors that are cut over processes come together: where the cuts are, and one exchange for many tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scao_hf.blocks import is_matrix

T = TypeVar("T")

INSTEAD = "Train with DDP, or with FSDP2 (fully_shard; fsdp_version: 2), which keeps the shapes"
ZERO = "Give DeepSpeed a scao_hf.zero.ZeroSCAO instead"


def is_sharded(param: Tensor) -> bool:
    """Whether ``param`` is a DTensor, which FSDP2 makes of parameters."""
    return type(param).__name__ == "DTensor"  # without an import that most users do not need


def check_placement(param: Tensor) -> None:
    """Raise ``ValueError`` for a parameter of which no process could step a whole matrix.

    ZeRO-3 (without ``ZeroSCAO``) and FSDP1 leave flattened parts. A DTensor must be cut along its first dimension over one
    dimension of the mesh, as ``fully_shard`` does, and be the same along the others (HSDP).
    """
    if hasattr(param, "ds_id"):
        raise ValueError(f"DeepSpeed ZeRO-3 cuts matrices into parts, and SCAO steps whole matrices. {ZERO}")
    if getattr(param, "_fsdp_flattened", False) or type(param).__name__ == "FlatParameter":
        raise ValueError(f"FSDP1 flattens matrices into parts, and SCAO steps whole matrices. {INSTEAD}")
    if is_sharded(param):
        shard_dim(param)
        if not param.to_local().is_contiguous():  # type: ignore[attr-defined]
            raise ValueError(
                f"the local part of a parameter of shape {tuple(param.shape)} is not contiguous: make it so"
            )


def check_flattened(params: Sequence[Tensor], had_matrices: bool) -> None:
    """Raise ``ValueError`` where something has replaced a group's matrices, as ZeRO-1 and 2 do.

    Stepped as vectors they would silently get AdamW's steps.
    """
    if had_matrices and params and not any(is_matrix(param) for param in params):
        raise ValueError(
            "the matrices of a parameter group were replaced by flat vectors, as DeepSpeed ZeRO does, and SCAO steps whole "
            f"matrices. {ZERO}"
        )


def shard_dim(param: Any) -> int:
    """The dimension of the mesh over which a DTensor's first dimension is cut.

    Raises:
        ValueError: it is cut otherwise.
    """
    from torch.distributed.tensor import Replicate, Shard

    cut = [dim for dim, placement in enumerate(param.placements) if type(placement) is not Replicate]
    if len(cut) != 1 or type(param.placements[cut[0]]) is not Shard or param.placements[cut[0]].dim != 0:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has the placements {tuple(param.placements)}: SCAO steps parameters "
            "that are cut along their first dimension over one dimension of the mesh, as fully_shard does. Leave out "
            "tensor parallelism and shard_placement_fn"
        )
    return cut[0]


@contextmanager
def agreed(groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Raise what the block raises in all processes: one that has raised alone would leave the others waiting for it.

    Without sharded parameters every process is on its own. Collective otherwise: one number where nothing is raised.

    Raises:
        ValueError, RuntimeError: the error of another process, with its number.
    """
    params = (param for group in groups for param in group["params"])
    sharded: Any = next(filter(is_sharded, params), None) if dist.is_available() and dist.is_initialized() else None
    mesh = None if sharded is None else sharded.device_mesh
    everywhere = [] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]
    with agreed_among(everywhere, torch.device("cpu") if sharded is None else sharded.to_local().device):
        yield


@contextmanager
def agreed_among(process_groups: Sequence[dist.ProcessGroup | None], device: torch.device) -> Iterator[None]:
    """``agreed``, for all processes that are in one of these groups with this one, or with one that is.

    Args:
        process_groups: None is the group of all processes.
        device: where they exchange tensors.
    """
    problem = None
    try:
        yield
    except Exception as error:  # whatever it is, it is raised below
        problem = error
    told = None if problem is None else (isinstance(problem, ValueError), str(problem))
    told = _told(told, process_groups, device)
    if problem is not None:
        raise problem
    if told is not None:
        raise (ValueError if told[0] else RuntimeError)(told[1])


def _told(
    told: tuple[bool, str] | None, process_groups: Sequence[dist.ProcessGroup | None], device: torch.device
) -> tuple[bool, str] | None:
    """What the first process that has something to tell tells, in all processes of the groups."""
    if told is not None and process_groups:
        told = told[0], f"process {dist.get_rank()}: {told[1]}"
    for group in process_groups:
        count = torch.tensor(int(told is not None), device=device)
        dist.all_reduce(count, group=group)
        if int(count):
            told = next(filter(None, from_all(told, group)))
    return told


def from_all(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every process's value, in the order of the processes. Collective."""
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def local_gradient(param: Any) -> Tensor:
    """This process's part of a sharded parameter's gradient, cut as the parameter is. Collective where it is not."""
    grad = param.grad
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    local: Tensor = grad.to_local()
    return local


def chunks(length: int, world: int) -> list[tuple[int, int]]:
    """First and last index (exclusive) of each process's part of ``length``, as ``torch.chunk`` and FSDP2 cut it."""
    size = -(-length // world)
    return [(min(rank * size, length), min((rank + 1) * size, length)) for rank in range(world)]


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's numbers as ``uint8[n]``, row by row; a view where its memory allows it."""
    return tensor.contiguous().view(-1).view(torch.uint8)


class Exchange:
    """Vectors of bytes, each cut over all processes and owned by one: collects them with the owners and returns them.

    Args:
        owners: for each vector, the process that owns it.
        sizes: for each vector, how many bytes of it each process has.
        group: the processes.
    """

    def __init__(self, owners: Sequence[int], sizes: Sequence[Sequence[int]], group: dist.ProcessGroup | None) -> None:
        self.group = group
        rank, ranks = dist.get_rank(group), range(dist.get_world_size(group))
        # On the side of the parts: owner by owner. On the owners' side: process by process.
        self.order = sorted(range(len(owners)), key=lambda index: owners[index])
        mine = [index for index, owner in enumerate(owners) if owner == rank]
        self.parts = [sizes[index][rank] for index in self.order]
        self.part_totals = [
            sum(sizes[index][rank] for index, owner in enumerate(owners) if owner == target) for target in ranks
        ]
        self.owned = [sizes[index][source] for source in ranks for index in mine]
        self.owned_totals = [sum(sizes[index][source] for index in mine) for source in ranks]

    def to_owners(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """This process's part of every vector, in order -> each process's parts of the owned ones, process by process."""
        send = torch.cat([parts[index] for index in self.order])
        received = send.new_empty(sum(self.owned_totals))
        dist.all_to_all_single(received, send, self.owned_totals, self.part_totals, group=self.group)
        return list(received.split(self.owned))

    def to_parts(self, owned: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """The inverse of ``to_owners``; ``device`` is where the exchange takes place."""
        send = torch.cat(list(owned)) if owned else torch.empty(0, dtype=torch.uint8, device=device)
        received = send.new_empty(sum(self.part_totals))
        dist.all_to_all_single(received, send, self.part_totals, self.owned_totals, group=self.group)
        pieces = received.split(self.parts)
        result: list[Tensor] = [received] * len(pieces)
        for index, piece in zip(self.order, pieces, strict=True):
            result[index] = piece
        return result
