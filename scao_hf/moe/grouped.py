"""Products of rows with the weights of the experts that they were routed to, with LoRA next to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Weights(Protocol):
    """Frozen weights of E experts, wherever and however they are stored."""

    @property
    def width(self) -> int:
        """How many outputs an expert has."""
        ...

    def reader(self, dtype: torch.dtype) -> Callable[[int], Tensor]:
        """What gives an expert's weight, ``[in, out]`` as its rows are multiplied by it."""
        ...

    def stack(self, dtype: torch.dtype) -> Tensor:
        """All of them, ``[E, in, out]``."""
        ...


class Stacked(NamedTuple):
    """Weights as one tensor: ``[E, out, in]``, or ``[E, in, out]`` where ``transposed``."""

    tensor: Tensor
    transposed: bool

    @property
    def width(self) -> int:
        """As in ``Weights``."""
        return self.tensor.shape[2 if self.transposed else 1]

    def reader(self, dtype: torch.dtype) -> Callable[[int], Tensor]:
        """As in ``Weights``: a view where the dtype is right, else a copy of this expert alone."""
        tensor = self.tensor if self.transposed else self.tensor.mT
        return lambda expert: tensor[expert].to(dtype)

    def stack(self, dtype: torch.dtype) -> Tensor:
        """A view where the dtype is right."""
        weight = self.tensor.to(dtype)
        return weight if self.transposed else weight.mT


class Factors(NamedTuple):
    """One adapter's LoRA factors for all experts: A ``[E, r, in]``, B ``[E, r, out]``, and what their product is scaled by."""

    a: Tensor
    b: Tensor
    scaling: float


class Routing(NamedTuple):
    """Rows in the order of their experts.

    Attributes:
        order: where in the flat list of (token, choice) pairs each row comes from, ``[S]``.
        sizes: how many rows each expert has, E numbers on the host.
        ends: where each expert's rows end, E numbers on the device, int32, as grouped products take them.
    """

    order: Tensor
    sizes: list[int]
    ends: Tensor


def route(choices: Tensor, experts: int) -> Routing:
    """Sort (token, choice) pairs by expert; choices outside ``range(experts)`` are left out.

    Args:
        choices: expert numbers, ``[tokens, k]``.
        experts: E.
    """
    flat = choices.reshape(-1)
    counts = torch.bincount(flat.clamp(0, experts), minlength=experts + 1)[:experts]
    sizes = counts.tolist()
    return Routing(flat.argsort(stable=True)[: sum(sizes)], sizes, counts.cumsum(0, dtype=torch.int32))


@functools.cache
def _has_grouped_kernel(kind: str, dtype: torch.dtype) -> bool:
    """Whether this release of PyTorch has a grouped product for that dtype on CPUs; newer GPUs have it for bfloat16."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    if kind == "cuda":
        return dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 0)
    rows = torch.ones(8, 8, dtype=dtype)
    try:
        torch.nn.functional.grouped_mm(rows, rows[None], offs=torch.tensor([8], dtype=torch.int32))
    except RuntimeError:
        return False
    return True


def has_grouped_product(rows: Tensor, weights: Weights, factors: Sequence[Tensor]) -> bool:
    """Whether to take PyTorch's grouped product, one call for all experts, instead of products expert by expert.

    On a CPU it is not taken where the weights have to be decoded or converted first: it needs all of them at a time.

    Args:
        rows, weights, factors: as for ``GroupedLoRA``; the kernels want rows of a multiple of 16 bytes.
    """
    kind, dtype = rows.device.type, rows.dtype
    ready = isinstance(weights, Stacked) and weights.tensor.dtype == dtype
    return (
        (kind == "cuda" or (kind == "cpu" and ready))
        and all(side * dtype.itemsize % 16 == 0 for tensor in (rows, *factors) for side in tensor.shape[1:])
        and weights.width * dtype.itemsize % 16 == 0
        and _has_grouped_kernel(kind, dtype)
    )


class GroupedLoRA(torch.autograd.Function):
    """(X2) ``y = x W_e + s (x A_e^T) B_e`` for the rows x of each expert e, with W_e frozen.

    No product ``B A`` is formed and nothing of W is kept for the backward pass, which reads it again: besides x and y
    there are ``S r`` numbers for each adapter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Weights,
        routing: Routing,
        scalings: Sequence[float],
        grouped: bool,
        *factors: Tensor,
    ) -> Tensor:
        """Rows ``[S, in]`` to ``[S, out]``.

        Args:
            ctx: autograd's.
            rows: x, sorted by expert.
            weights: W.
            routing: which rows are whose.
            scalings: s of each adapter.
            grouped: whether to take PyTorch's grouped product (``has_grouped_product``).
            *factors: A and B of each adapter in turn, in the dtype of the rows.
        """
        adapters = _adapters(factors, scalings)
        out, inner = (_forward_grouped if grouped else _forward_by_expert)(rows, weights, routing, adapters)
        ctx.save_for_backward(rows, *inner, *factors)
        ctx.weights, ctx.routing, ctx.scalings, ctx.grouped = weights, routing, scalings, grouped
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Gradients of the rows and of every factor; those of experts without rows are zero."""
        rows, *saved = ctx.saved_tensors
        count = len(ctx.scalings)
        adapters = _adapters(saved[count:], ctx.scalings)
        backward = _backward_grouped if ctx.grouped else _backward_by_expert
        wanted = ctx.needs_input_grad[0]
        dx, found = backward(grads[0].contiguous(), rows, saved[:count], ctx.weights, ctx.routing, adapters, wanted)
        return dx, None, None, None, None, *found


def _adapters(factors: Sequence[Tensor], scalings: Sequence[float]) -> list[Factors]:
    return [Factors(a, b, s) for a, b, s in zip(factors[::2], factors[1::2], scalings, strict=True)]


def _forward_by_expert(
    rows: Tensor, weights: Weights, routing: Routing, adapters: list[Factors]
) -> tuple[Tensor, list[Tensor]]:
    """y, and ``x A_e^T`` of each adapter."""
    out = rows.new_empty(len(rows), weights.width)
    inner = [rows.new_empty(len(rows), a.shape[1]) for a, _, _ in adapters]
    matrix, sizes = weights.reader(rows.dtype), routing.sizes
    pieces = [
        (low.split(sizes), a.mT.unbind(0), b.unbind(0), s) for low, (a, b, s) in zip(inner, adapters, strict=True)
    ]
    for expert, (x, y) in enumerate(zip(rows.split(sizes), out.split(sizes), strict=True)):
        if not len(x):
            continue
        torch.mm(x, matrix(expert), out=y)
        for low, down, up, scaling in pieces:
            y.addmm_(torch.mm(x, down[expert], out=low[expert]), up[expert], alpha=scaling)
    return out, inner


def _backward_by_expert(
    dy: Tensor,
    rows: Tensor,
    inner: Sequence[Tensor],
    weights: Weights,
    routing: Routing,
    adapters: list[Factors],
    wanted: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx, None unless ``wanted``, and the gradients of all A and B in turn."""
    dx = torch.empty_like(rows) if wanted else None
    found = [torch.zeros_like(factor) for a, b, _ in adapters for factor in (a, b)]
    matrix, sizes = weights.reader(dy.dtype), routing.sizes
    pieces = [
        (low.mT.split(sizes, 1), a.unbind(0), b.mT.unbind(0), da.unbind(0), db.unbind(0), s)
        for low, (a, b, s), da, db in zip(inner, adapters, found[::2], found[1::2], strict=True)
    ]
    back_to = dx.split(sizes) if dx is not None else ()
    for expert, (x, g) in enumerate(zip(rows.split(sizes), dy.split(sizes), strict=True)):
        if not len(x):
            continue
        if back_to:
            torch.mm(g, matrix(expert).mT, out=back_to[expert])
        for low, a, b, da, db, scaling in pieces:
            back = torch.mm(g, b[expert])
            if back_to:
                back_to[expert].addmm_(back, a[expert], alpha=scaling)
            torch.mm(back.mT, x, out=da[expert])
            torch.mm(low[expert], g, out=db[expert])
    for index, factor in enumerate(found):
        factor.mul_(adapters[index // 2].scaling)
    return dx, found


def _forward_grouped(
    rows: Tensor, weights: Weights, routing: Routing, adapters: list[Factors]
) -> tuple[Tensor, list[Tensor]]:
    """As ``_forward_by_expert``, all experts in one product."""
    product, inner = torch.nn.functional.grouped_mm, []
    out = product(rows, weights.stack(rows.dtype), offs=routing.ends)
    for a, b, scaling in adapters:
        inner.append(product(rows, a.mT, offs=routing.ends))
        out.add_(product(inner[-1], b, offs=routing.ends), alpha=scaling)
    return out, inner


def _backward_grouped(
    dy: Tensor,
    rows: Tensor,
    inner: Sequence[Tensor],
    weights: Weights,
    routing: Routing,
    adapters: list[Factors],
    wanted: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """As ``_backward_by_expert``, all experts in one product."""
    product, ends = torch.nn.functional.grouped_mm, routing.ends
    dx = product(dy, weights.stack(dy.dtype).mT, offs=ends) if wanted else None
    found = []
    for low, (a, b, scaling) in zip(inner, adapters, strict=True):
        back = product(dy, b.mT, offs=ends).mul_(scaling)
        if dx is not None:
            dx.add_(product(back, a, offs=ends))
        found += [product(back.mT, rows, offs=ends), product(low.mT, dy, offs=ends).mul_(scaling)]
    return dx, found
