"""Which parts of which parameters are matrices, and which of them are stepped together.

A parameter with two sides becomes one or more blocks, oriented with the small side first. Blocks of one shape,
group, device and age form a bucket: their gradients are stacked to ``[N, r, l]`` and stepped by one sequence of
tensor operations, so the number of operations depends on the number of distinct shapes and not of layers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["A", "B"]


class Packing(NamedTuple):
    """How a parameter holds the factors of so many experts: expert by expert ("A") or rank by rank ("B")."""

    side: Side
    experts: int


def unpack(tensor: Tensor, packing: Packing) -> Tensor:
    """(X1) A packed factor as a stack of the experts' own, a view of the same memory.

    Args:
        tensor: A, ``[E r, in]``, or B, ``[out, E r]``, or anything of the same shape, such as its gradient.
        packing: which of the two, and E.

    Returns:
        ``[E, r, in]`` for A, whose row ``e r + i`` is row i of expert e; ``[E, out, r]`` for B, whose column
        ``i E + e`` is column i of expert e.

    Raises:
        ValueError: the packed side is not a multiple of E.
    """
    check_packing(tensor, packing)
    side, count = packing
    by_expert: Tensor = tensor.unflatten(0, (count, -1)) if side == "A" else tensor.unflatten(1, (-1, count))
    return by_expert if side == "A" else by_expert.permute(2, 0, 1)


def check_packing(tensor: Tensor, packing: Packing) -> None:
    """Raise ``ValueError`` unless the packed side of ``tensor``, which may be sharded, is a multiple of E."""
    side, count = packing
    packed = tensor.shape[0 if side == "A" else 1]
    if packed % count:
        raise ValueError(
            f"a {side} of shape {tuple(tensor.shape)} cannot hold {count} experts: {packed} % {count} != 0"
        )


@dataclass(frozen=True)
class Block:
    """A contiguous part of a 2-D parameter. ``whole`` spares the slicing, ``transposed`` puts the small side first.

    Of a parameter that packs the factors of several experts it is the same part of each, a stack.
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    transposed: bool
    whole: bool
    packing: Packing | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(r, l)`` with ``r <= l`` where the rule orients its blocks."""
        shape = (self.rows[1] - self.rows[0], self.cols[1] - self.cols[0])
        return shape[::-1] if self.transposed else shape

    @property
    def size(self) -> int:
        """How many matrices it is."""
        return self.packing.experts if self.packing else 1

    def of(self, tensor: Tensor) -> Tensor:
        """The block as a view of ``tensor`` (the parameter or its gradient), ``[r, l]``, or ``[E, r, l]`` of E experts."""
        tensor = self.part(tensor)
        return tensor.mT if self.transposed else tensor

    def part(self, tensor: Tensor) -> Tensor:
        """The block as it is stored, ``[r, l]`` or ``[l, r]``, or E of them."""
        if self.packing:
            tensor = unpack(tensor, self.packing)
        return tensor if self.whole else tensor[..., self.rows[0] : self.rows[1], self.cols[0] : self.cols[1]]


def is_matrix(param: Tensor) -> bool:
    """Whether curvature makes sense for ``param``: two sides of at least two, real numbers."""
    return param.ndim == 2 and min(param.shape) >= 2 and not param.is_complex()


def split_evenly(length: int, largest: int) -> list[tuple[int, int]]:
    """Cut ``range(length)`` into the fewest contiguous parts of at most ``largest``, as equal as possible."""
    parts = -(-length // largest)
    bounds = [length * index // parts for index in range(parts + 1)]
    return list(pairwise(bounds))


def blocks_of(shape: Sequence[int], max_dim: int, cut_sides: int, packing: Packing | None = None) -> list[Block]:
    """Cut a 2-D shape into blocks, small side first.

    Args:
        shape: the parameter's two sides.
        max_dim: the largest side that a dense factor may have.
        cut_sides: how many sides have a dense factor (``Rule.cut_sides``) and are cut to ``max_dim``.
        packing: how the parameter holds the factors of several experts; ``shape`` is then that of one.
    """
    rows, cols = shape
    transposed = rows > cols
    row_limit = max_dim if cut_sides > transposed else rows
    col_limit = max_dim if cut_sides > (not transposed) else cols
    row_parts, col_parts = split_evenly(rows, row_limit), split_evenly(cols, col_limit)
    whole = len(row_parts) == len(col_parts) == 1
    return [Block(row, col, transposed, whole, packing) for row in row_parts for col in col_parts]


class Member(NamedTuple):
    """One entry of a bucket: a parameter, the suffix of its fields in that parameter's state, its block (None: no matrix)."""

    param: Tensor
    suffix: str
    block: Block | None

    @property
    def size(self) -> int:
        """How many rows of the bucket it fills."""
        return self.block.size if self.block else 1


class Layout(NamedTuple):
    """What a tensor's memory means."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """Of ``tensor``, without keeping it alive."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype)


@dataclass
class Bucket:
    """Blocks of one shape that are stepped together: of ordinary parameters, or of such as pack E experts each.

    Attributes:
        group: the parameter group whose options hold.
        shape: ``(r, l)`` of every block; ``(1, numel)`` for parameters without two sides.
        step: how many steps these blocks have taken, skipped ones included.
        dtype: arithmetic and moment dtype: float64 for float64 parameters, float32 for all others.
        members: what is stacked, in order.
        owners: the parameter in whose state each member's is: the member's own, or the sharded one that it is the whole of.
        fields: the fields of the state and how each is stacked.
        pointers: where each field of each member has been put in memory.
        entries: where each member's state is entered. This and the next one are filled during a step alone.
        state: the stacked state, one tensor of leading size N, the number of matrices, per field.
        offsets: how many entries of the group's matrices come before each of the N (``offsets_of``), rising.
        cycle: how many entries the group's matrices have.
    """

    group: dict[str, Any]
    shape: tuple[int, int]
    step: int
    dtype: torch.dtype
    members: list[Member] = field(default_factory=list)
    owners: list[Tensor] = field(default_factory=list)
    fields: dict[str, Layout] = field(default_factory=dict)
    pointers: list[int] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)
    cycle: int = 1

    @property
    def matrix(self) -> bool:
        """Whether the members are matrices; the others take plain AdamW steps."""
        return self.members[0].block is not None

    @property
    def size(self) -> int:
        """N, the number of matrices (or vectors): E for each member that packs E experts."""
        return len(self.members) * self.members[0].size

    @property
    def packed(self) -> bool:
        """Whether each member packs the factors of several experts."""
        return self.members[0].size > 1

    def split(self, stack: Tensor) -> Sequence[Tensor]:
        """A field of the state, ``[N, ...]``, as views by member: ``[...]`` each, or ``[E, ...]`` of E experts."""
        return stack.chunk(len(self.members)) if self.packed else stack.unbind(0)

    def largest(self) -> Tensor | None:
        """The largest magnitude of each expert's gradient, ``[N]``, zero where it had no token; None for ordinary members."""
        if not self.packed:
            return None
        tops = [
            torch.linalg.vector_norm(block.part(param.grad), ord=math.inf, dim=(1, 2))
            for param, _, block in self.members
            if param.grad is not None and block is not None
        ]
        return torch.cat(tops)

    def gradients(self) -> Tensor:
        """A stacked copy ``[N, r, l]`` of the gradients in the bucket's arithmetic dtype."""
        grads = []
        for param, _, block in self.members:
            if param.grad is not None:
                grads.append(block.of(param.grad) if block else as_real(param.grad).reshape(1, -1))
        return torch.stack(grads).to(self.dtype).reshape(-1, *self.shape)

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and gradients as they are stored, without a copy (vectors' gradients: contiguous)."""
        params, grads = [], []
        for param, _, block in self.members:
            if param.grad is None:
                continue
            if block is None:
                params.append(param)
                grads.append(param.grad.contiguous())
            elif block.packing:
                params.extend(block.part(param).unbind(0))
                grads.extend(block.part(param.grad).unbind(0))
            else:
                params.append(block.part(param))
                grads.append(block.part(param.grad))
        return params, grads

    def due(self, step: int, start: int) -> slice:
        """(S1) The members whose turn it is to be refreshed at ``step``, phase 1 having ended at ``start``.

        Each has a slot, ``precond_freq * offset // cycle``, and is refreshed at the steps with ``(step - start) %
        precond_freq == slot``: every step refreshes about as many entries, in one run of each stack.
        """
        if step <= start:
            return slice(0, 0)
        period = self.group["precond_freq"]
        slot = (step - start) % period
        first, last = (-(-part * self.cycle // period) for part in (slot, slot + 1))
        return slice(bisect_left(self.offsets, first), bisect_left(self.offsets, last))


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers count as two reals, as in torch's AdamW."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def members_of(
    param: Tensor, max_dim: int, cut_sides: Callable[[torch.Size], int], packing: Packing | None = None
) -> list[tuple[tuple[int, int], Member]]:
    """The blocks of a parameter with their shapes: one ``(1, numel)`` entry where it is not a matrix, none where it is empty.

    Args:
        param: the parameter.
        max_dim: as for ``blocks_of``.
        cut_sides: the same for a matrix of some shape.
        packing: as for ``blocks_of``.
    """
    if param.numel() == 0:
        return []
    matrix = param
    if packing:  # of its shape alone: a sharded parameter cannot be cut into experts
        matrix = unpack(torch.empty(param.shape, dtype=param.dtype, device="meta"), packing)[0]
    if not is_matrix(matrix):
        return [((1, as_real(param).numel()), Member(param, "", None))]
    blocks = blocks_of(matrix.shape, max_dim, cut_sides(matrix.shape), packing)
    suffixes = [""] if len(blocks) == 1 else [f".{index}" for index in range(len(blocks))]
    return [(block.shape, Member(param, suffix, block)) for block, suffix in zip(blocks, suffixes, strict=True)]


def offsets_of(members: Iterable[tuple[tuple[int, int], Member]]) -> tuple[dict[tuple[int, str], int], int]:
    """Where in a cycle each matrix of a group is refreshed (S1): shape by shape, each in the order of the parameters.

    Args:
        members: the blocks of all parameters of the group, whether or not they have a gradient now.

    Returns:
        How many entries come before a block, by the parameter's id and the block's suffix; how many there are in all.
    """
    shapes: dict[tuple[int, int], list[Member]] = {}
    for shape, member in members:
        if member.block is not None:
            shapes.setdefault(shape, []).append(member)
    offsets, before = {}, 0
    for (r, l), alike in shapes.items():
        for member in alike:
            offsets[id(member.param), member.suffix] = before
            before += r * l * member.size
    return offsets, before


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """float64 parameters are stepped in float64, all others in float32."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32
