"""A refresh: new bases for both sides of a stack of matrices; momentum and second moments move along.

State and shapes are those of ``scao_hf/rules/eigenbasis.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scao_hf import curvature
from scao_hf.update import averaged, bounded_direction, damping_of, turn

#: Bound on (U13), either way.
MOST_GAIN = 2.0
#: What a refresh reads and changes, in the order in which ``ops.eigenbasis_refresh_`` takes it.
FIELDS = (
    "exp_avg",
    "long_vectors",
    "factor",
    "inside_avg",
    "inside_sq",
    "row",
    "col",
    "vectors",
    "mask",
    "gain",
    "factor_values",
    "long_values",
    "long_tail",
    "taken",
)


class Settings(NamedTuple):
    """The options that a refresh depends on; ``decay`` is what the old long basis is worth."""

    beta1: float
    beta2: float
    eps: float
    rho: float
    decay: float
    epsilon_sparse: float
    k_min: int
    k_max: int


class Tools(NamedTuple):
    """What does the larger parts of a refresh: PyTorch, or native kernels."""

    gram: Callable[[Tensor, Tensor], Tensor] = curvature.gram
    turn: Callable[..., Tensor] = turn
    solver: curvature.Solver | None = None


TORCH = Tools()


def write_finite(state: dict[str, Tensor], fresh: dict[str, Tensor], finite: Tensor) -> None:
    """Write ``fresh`` fields into ``state`` in place, but not for matrices with ``finite``, ``[N, 1, 1]``, zero."""
    for name, value in fresh.items():
        field = state[name]
        field.copy_(torch.where(finite.view(-1, *[1] * (field.ndim - 1)) > 0, value, field))


def plain_row(state: dict[str, Tensor], count: Tensor, bias2: Tensor, rho: float) -> Tensor:
    """(U12) Mean over l of AdamW's second moment, worked out from L's diagonal, ``[N, r, 1]``."""
    diagonal = state["factor"].diagonal(dim1=1, dim2=2)[..., None]
    held, weight = averaged(state, count, bias2)
    return curvature.debias(diagonal, rho, held) * (weight / state["exp_avg"].shape[-1])


def renew(
    state: dict[str, Tensor],
    count: Tensor,
    finite: Tensor,
    bias: tuple[Tensor, Tensor],
    settings: Settings,
    tools: Tools = TORCH,
    square: Tensor | None = None,
) -> None:
    """New bases, momentum and second moments in them, and (U13), the size of the steps until the next refresh. In place.

    (U13) is the ratio of AdamW's norm to the steps' own, measured in the new bases, which are fitted to the momentum:
    it is above one where the step is a few leading directions. The bound keeps the steps that follow, with more of
    fresh gradients in them, within twice the size.

    Args:
        state: ``FIELDS``, of the matrices to be refreshed, and of experts ``activity``.
        count: finite gradients seen by each, ``[N, 1, 1]``.
        finite: 0 for a matrix that stays as it is, ``[N, 1, 1]``.
        bias: bias corrections of the two moments, ``[N, 1, 1]``.
        settings: options.
        tools: what does the larger parts.
        square: AdamW's second moment, for the first refresh.
    """
    moments, long_basis = state["exp_avg"], state["long_vectors"]
    work = small if moments.device.type == "cpu" else small_on_host
    coefficients = work(state, tools.gram(moments, long_basis), finite, bias[0], settings, tools.solver)
    if square is not None:
        first_squares(state, square, count, bias[1], settings.rho)
    plain, square_mean = plain_row(state, count, bias[1], settings.rho), state["inside_sq"].mean(1, keepdim=True)
    fields = moments, long_basis, state["row"], state["col"]
    norms = tools.turn(*fields, coefficients, plain, square_mean, bias, finite, settings.eps)
    inside = bounded_direction(state["inside_avg"], state["inside_sq"], damping_of(plain), bias, settings.eps)
    own = norms[:, 1] + inside.square().sum((1, 2))
    gain = (norms[:, 0] / own.clamp_min(torch.finfo(own.dtype).tiny)).sqrt()
    write_finite(state, {"gain": torch.where(own > 0, gain, 1.0).clamp(1 / MOST_GAIN, MOST_GAIN)}, finite)


#: What ``small`` reads besides the Gram matrix; it changes all but the last two.
SMALL = (
    "vectors", "factor_values", "long_values", "long_tail", "mask", "row", "inside_sq", "inside_avg", "factor", "gain",
)  # fmt: skip


def small_on_host(
    state: dict[str, Tensor],
    gram: Tensor,
    finite: Tensor,
    bias1: Tensor,
    settings: Settings,
    solver: curvature.Solver | None = None,
) -> Tensor:
    """``small`` for matrices on another device: one copy there and one back, the only ones that have to be waited for.

    Batched decompositions on a GPU are slower above side 32 than the copies, wait for the device once or more each, and
    fail in other ways on every backend. Nothing of the state is changed before all of it has worked.
    """
    device = gram.device
    fields = {name: state[name] for name in SMALL} | {"gram": gram, "finite": finite, "bias1": bias1}
    host = {**_moved(fields, torch.device("cpu")), "col": state["col"]}
    coefficients = small(host, host["gram"], host["finite"], host["bias1"], settings, solver)
    changed = {name: host[name] for name in SMALL[:-2]}
    found = _moved({**changed, "coefficients": coefficients}, device)
    torch._foreach_copy_([state[name] for name in changed], [found[name] for name in changed])
    return found["coefficients"]


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of one dtype on another device, by one copy."""
    whole = torch.cat([tensor.reshape(-1) for tensor in tensors.values()]).to(device)
    parts = whole.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


def small(
    state: dict[str, Tensor],
    gram: Tensor,
    finite: Tensor,
    bias1: Tensor,
    settings: Settings,
    solver: curvature.Solver | None = None,
) -> Tensor:
    """All of a refresh but the long side: (E6), an eigendecomposition for the small side, everything that moves along.

    A decomposition that fails leaves that basis as it is. A matrix whose gradient is not finite keeps everything.

    Args:
        state: as in ``renew``; changed in place.
        gram: of the rows of ``Z = [U^T; M]``.
        finite, bias1, settings, solver: as in ``renew``.

    Returns:
        What ``turn`` makes of Z, ``[N, r + k + r, k + r]``.
    """
    r, k = state["inside_avg"].shape[1:]
    old_basis, l = state["vectors"], state["col"].shape[-1]
    decomposition = curvature.eigh(state["factor"], torch.zeros_like(state["gain"]), solver)
    factor_values, basis = (state["factor_values"], old_basis) if decomposition is None else decomposition
    # What makes the whole momentum, in the parameter's own coordinates, of Z: Q [N, I].
    lift = torch.cat([old_basis @ state["inside_avg"], old_basis], -1)
    found = curvature.sketch(gram, state["long_values"], lift / bias1, settings.decay, solver)
    if found is None:
        same = torch.eye(k, k + r, dtype=lift.dtype, device=lift.device).expand(len(lift), k, k + r)
        found = same, state["long_values"], torch.zeros_like(state["long_tail"])
    long_basis, values, lost = found
    tail = settings.decay * state["long_tail"] + lost
    rank = curvature.adaptive_rank(
        values, values.sum(-1) + tail, settings.epsilon_sparse, settings.k_min, settings.k_max
    )
    mask = (torch.arange(k, device=rank.device) < rank[:, None]) & (values > 0)
    mask = mask[:, None, :].to(values.dtype)
    # The share of each new direction that lay in the old ones; the rest was residual.
    across = long_basis @ gram
    overlap = (across[:, :, :k] * mask.mT * state["mask"]).square()
    unseen = (mask.mT - overlap.sum(-1, keepdim=True)).clamp(0, 1).mT
    row = curvature.transport(state["row"], basis, old_basis)
    moved = curvature.transport(state["inside_sq"], basis, old_basis)
    energy = moved.sum(-1, keepdim=True) + l * row
    share, _ = curvature.shares(values, tail, mask)
    turned = basis.mT @ lift
    inside = (turned @ across.mT) * mask
    fresh = {
        "vectors": basis,
        "factor_values": factor_values,
        "long_values": values,
        "long_tail": tail,
        "mask": mask,
        "row": row,
        "inside_sq": moved @ overlap.mT + energy * share * unseen,
        "inside_avg": inside,
    }
    write_finite(state, fresh, finite)
    return torch.cat([turned - inside @ long_basis, long_basis, lift], 1)


def first_squares(state: dict[str, Tensor], square: Tensor, count: Tensor, bias2: Tensor, rho: float) -> None:
    """The second moments at the end of phase 1, from AdamW's."""
    l = square.shape[-1]
    held, weight = averaged(state, count, bias2)
    row = curvature.debias(state["factor_values"][..., None], rho, held) * weight / l
    row = torch.where(row.sum(1, keepdim=True) > 0, row, square.mean(2, keepdim=True))
    share, rest = curvature.shares(state["long_values"], state["long_tail"], state["mask"])
    state["inside_sq"].copy_(row * l * share)
    state["row"].copy_(row * rest)
    state["col"].copy_(square.mean(1, keepdim=True) * rest)
