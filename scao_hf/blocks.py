"""Which parts of a parameter are matrices: blocks, oriented with the small side first, and packed experts as stacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

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
