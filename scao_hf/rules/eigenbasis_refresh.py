"""A refresh of SCAO's rule: new bases for both sides of a stack of matrices; momentum and second moments move along.

First what estimates a second moment in a basis, then the refresh and its parts. State and shapes are those of
``scao_hf/rules/eigenbasis.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from scao_hf.linalg import adaptive_rank, eigh
from scao_hf.rules.base import Step, adam_direction, averaged, debias

#: (U14) What is added to estimated second moments, as a share of the energy of all rows, or of the mean of all columns.
DAMPING = 1e-3
#: Bound on (U13), either way.
MOST_GAIN = 2.0


def plain_row(step: Step) -> Tensor:
    """(U12) Mean over l of AdamW's second moment, worked out from L's diagonal, ``[N, r, 1]``."""
    diagonal = step.state["factor"].diagonal(dim1=1, dim2=2)[..., None]
    held, weight = averaged(step.state, step.count, step.bias[1])
    return debias(diagonal, step.group["rho"], held) * (weight / step.state["exp_avg"].shape[-1])


def damping_of(plain_row: Tensor) -> Tensor:
    """(U14) What is added to every row's second moment: ``1e-3 sum_i v_i``, v_i as in (U12).

    A coordinate with less than that is rounding of the larger ones, from 16-bit gradients, kept bases or int8 moments:
    divided by its own root it would be stepped as far as they are. Columns have 1e-3 of their mean added (U10).

    Args:
        plain_row: v, ``[N, r, 1]``.

    Returns:
        ``[N, 1, 1]``.
    """
    return DAMPING * plain_row.sum(1, keepdim=True)


def bounded_direction(mean: Tensor, square: Tensor, damping: Tensor, bias: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """(U6) with an estimated second moment: damped (U14), and within 1: no mean of squares is below the squared mean."""
    return adam_direction(mean, square + damping, bias, eps).clamp_(-1, 1)


def rank_one_direction(
    mean: Tensor, row: Tensor, col: Tensor, damping: Tensor, bias: tuple[Tensor, Tensor], eps: float
) -> Tensor:
    """(U10) (U6) with a second moment of rank one, ``(row_i + damping) (col_j / mean(col) + 1e-3)``, within 1.

    The moment is never formed: its root is the product of two roots. No mean of squares is below the squared mean, but
    one of rank one may come out so, of a diagonal matrix by a factor of its side.

    Args:
        mean: ``[N, r, l]``.
        row: mean of the squares over the columns, ``[N, r, 1]``.
        col: mean of the squares over the rows, ``[N, 1, l]``.
        damping: (U14).
        bias: bias corrections.
        eps: Adam's.

    Returns:
        Fresh memory.
    """
    rows = (row + damping).sqrt_().mul_(bias[0] / bias[1].sqrt())
    cols = (col / col.mean(2, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)).add_(DAMPING).sqrt_()
    denominator = torch.addcmul(bias[0] * eps, rows, cols)
    return torch.div(mean, denominator, out=denominator).clamp_(-1, 1)


@contextmanager
def all_or_nothing(state: dict[str, Tensor]) -> Iterator[None]:
    """Put the state back where a refresh raises: half of one is a momentum in other bases than the state says."""
    # By dtype: foreach is one kernel only where all tensors of a list have the same.
    alike = [[field for field in state.values() if field.dtype == kind] for kind in {it.dtype for it in state.values()}]
    before = [[torch.empty_like(field) for field in fields] for fields in alike]
    for copies, fields in zip(before, alike, strict=True):
        torch._foreach_copy_(copies, fields)
    try:
        yield
    except BaseException:
        for copies, fields in zip(before, alike, strict=True):
            torch._foreach_copy_(fields, copies)
        raise


def refresh(step: Step, long_basis: Tensor, decay: float, square: Tensor | None = None) -> None:
    """New bases, momentum and second moments in them, and (U13), the size of the steps until the next refresh. In place.

    Args:
        step: of the matrices to be refreshed, all of them.
        long_basis: U^T, ``[N, k, l]``, changed in place.
        decay: what the old long basis is worth.
        square: AdamW's second moment, for the first refresh.
    """
    moments = step.state["exp_avg"]
    products = gram(moments, long_basis)
    coefficients = (refresh_bases if moments.device.type == "cpu" else refresh_bases_on_host)(step, products, decay)
    if square is not None:
        first_squares(step, square)
    step.update({"gain": graft_scale(*rotate(step, long_basis, coefficients))})


def graft_scale(adamw: Tensor, own: Tensor) -> Tensor:
    """(U13) The norm of AdamW's step over the rule's own, both with the same momentum, within a factor of ``MOST_GAIN``.

    Grafting: the rule gives the direction, AdamW the size. The new bases are fitted to the momentum, so that a step of it
    is a few leading directions and smaller than AdamW's. The gradients that follow have more outside of these, and steps
    that are too large without the bound.

    Args:
        adamw, own: squared norms, ``[N]``.
    """
    scale = (adamw / own.clamp_min(torch.finfo(own.dtype).tiny)).sqrt()
    return torch.where(own > 0, scale, 1.0).clamp(1 / MOST_GAIN, MOST_GAIN)


def refresh_bases(step: Step, products: Tensor, decay: float) -> Tensor:
    """All of a refresh but for rows of length l: (E6), an eigendecomposition for the small side, and what moves along.

    A decomposition that fails leaves that basis as it is. A matrix whose gradient is not finite keeps everything.

    Args:
        step, decay: as in ``refresh``.
        products: of the rows of ``Z = [U^T; M]``, as ``gram`` returns them.

    Returns:
        What ``rotate`` makes of Z, ``[N, r + k + r, k + r]``.
    """
    state, group = step.state, step.group
    r, k = state["inside_avg"].shape[1:]
    old_basis, l = state["vectors"], state["col"].shape[-1]
    decomposition = eigh(state["factor"], torch.zeros_like(state["gain"]))
    factor_values, basis = (state["factor_values"], old_basis) if decomposition is None else decomposition
    # What makes the whole momentum, in the parameter's own coordinates, of Z: Q [N, I].
    lift = torch.cat([old_basis @ state["inside_avg"], old_basis], -1)
    found = sketch(products, state["long_values"], lift / step.bias[0], decay)
    if found is None:
        same = torch.eye(k, k + r, dtype=lift.dtype, device=lift.device).expand(len(lift), k, k + r)
        found = same, state["long_values"], torch.zeros_like(state["long_tail"])
    long_basis, values, lost = found
    tail = decay * state["long_tail"] + lost
    rank = adaptive_rank(values, values.sum(-1) + tail, group["epsilon_sparse"], group["k_min"], group["k_max"])
    mask = (torch.arange(k, device=rank.device) < rank[:, None]) & (values > 0)
    mask = mask[:, None, :].to(values.dtype)
    # The share of each new direction that lay in the old ones; the rest was residual.
    across = long_basis @ products
    overlap = (across[:, :, :k] * mask.mT * state["mask"]).square()
    unseen = (mask.mT - overlap.sum(-1, keepdim=True)).clamp(0, 1).mT
    row = transport(state["row"], basis, old_basis)
    moved = transport(state["inside_sq"], basis, old_basis)
    energy = moved.sum(-1, keepdim=True) + l * row
    share, _ = shares(values, tail, mask)
    rotated = basis.mT @ lift
    inside = (rotated @ across.mT) * mask
    step.update(
        {
            "vectors": basis,
            "factor_values": factor_values,
            "long_values": values,
            "long_tail": tail,
            "mask": mask,
            "row": row,
            "inside_sq": moved @ overlap.mT + energy * share * unseen,
            "inside_avg": inside,
        }
    )
    return torch.cat([rotated - inside @ long_basis, long_basis, lift], 1)


#: What ``refresh_bases`` reads of the state; it changes all but the last two.
READ = (
    "vectors", "factor_values", "long_values", "long_tail", "mask", "row", "inside_sq", "inside_avg", "factor", "gain",
)  # fmt: skip


def refresh_bases_on_host(step: Step, products: Tensor, decay: float) -> Tensor:
    """``refresh_bases`` for matrices on another device: one copy there, which has to be waited for, and one back.

    Batched decompositions on a GPU are slower above side 32 than the copies, wait for the device once or more each, and
    fail in other ways on every backend. Nothing of the state is changed before all of it has worked.
    """
    fields = {name: step.state[name] for name in READ}
    numbers = {"products": products, "finite": step.finite, "taken": step.state["taken"]}
    host = _moved({**fields, **numbers}, torch.device("cpu"))
    there = replace(step, state={**host, "col": step.state["col"]}, finite=host["finite"])
    coefficients = refresh_bases(there, host["products"], decay)
    changed = {name: host[name] for name in READ[:-2]}
    found = _moved({**changed, "coefficients": coefficients}, products.device, waiting=products.device.type == "mps")
    torch._foreach_copy_([step.state[name] for name in changed], [found[name] for name in changed])
    return found["coefficients"]


def gram(moments: Tensor, long_basis: Tensor) -> Tensor:
    """Inner products of the rows of ``Z = [U^T; M]``, ``[N, k + r, k + r]``: all that a refresh has to know of the long side.

    Args:
        moments: M, ``[N, r, l]``.
        long_basis: U^T, ``[N, k, l]``.
    """
    rows = torch.cat([long_basis.to(moments.dtype), moments], 1)
    return rows @ rows.mT


def sketch(gram: Tensor, values: Tensor, lift: Tensor, decay: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """(E6) Top-k eigenbasis of ``decay * U S U^T + X^T X``, as coefficients of the rows of Z: no l x l matrix, no pass over l.

    Args:
        gram: of Z = [U^T; M], ``[N, k + r, k + r]``; U's columns are orthonormal or zero.
        values: S, ``[N, k]``.
        lift: what makes X of Z, ``X = lift Z``, ``[N, r, k + r]``.
        decay: what the old basis is worth.

    Returns:
        A with ``A Z`` the new U^T, ``[N, k, k + r]`` (a row without mass is zero), values ``[N, k]`` falling, and the mass
        that was discarded ``[N]``; None if the decomposition failed.
    """
    width = values.shape[-1]
    rows = torch.cat([torch.nn.functional.pad((decay * values).sqrt().diag_embed(), (0, lift.shape[1])), lift], 1)
    decomposition = eigh(rows @ gram @ rows.mT, torch.zeros_like(values[:, 0]))
    if decomposition is None:
        return None
    spectrum, mixing = decomposition
    kept = spectrum[:, :width]
    # A direction below float32's resolution of the Gram is rounding, not curvature.
    solid = kept > 1e-6 * kept[:, :1]
    scale = torch.where(solid, kept.clamp_min(torch.finfo(kept.dtype).tiny).rsqrt(), 0.0)
    return (mixing[:, :, :width] * scale[:, None, :]).mT @ rows, kept * solid, spectrum[:, width:].sum(-1)


def transport(square: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """(E7) Second moments after a change of basis, ``(Q_new^T Q_old)^2 v``: exact where the old coordinates are uncorrelated.

    Args:
        square: v, ``[N, r, c]``, in coordinates of the old basis.
        new, old: ``[N, r, r]``, eigenvectors in columns.
    """
    return (new.mT @ old).square() @ square


#: Least share of the energy that is taken to lie outside a sketch of the momentum. The sketch has been fitted to the
#: momentum: its directions hold 95 % and more of that, but 55 to 75 % of a fresh gradient's energy in 4-bit fine-tunes.
LEAST_OUTSIDE = 0.3


def shares(values: Tensor, tail: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(E8) What part of a gradient's energy to expect along each kept direction, and outside all of them.

    Args:
        values: the sketch's eigenvalues, ``[N, k]``.
        tail: the mass that it has discarded, ``[N]``.
        mask: 1 for a kept direction, ``[N, 1, k]``.

    Returns:
        ``[N, 1, k]`` and ``[N, 1, 1]``, together one.
    """
    total = (values.sum(-1) + tail).clamp_min(torch.finfo(values.dtype).tiny)
    share = mask * (values / total[:, None])[:, None, :]
    held = share.sum(-1, keepdim=True)
    outside = (1 - held).clamp_min(LEAST_OUTSIDE)
    return share * ((1 - outside) / held.clamp_min(torch.finfo(held.dtype).tiny)), outside


def rotate(step: Step, long_basis: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """(U15) Move U and the residual's momentum to new bases in place; the squared norms of two steps in them.

    Of ``coefficients Z`` with ``Z = [U^T; M]``, ``[N, k + r, l]``, the first r rows are the new M, the next k the new U^T,
    the last r the whole momentum in the parameter's own coordinates. A matrix whose gradient is not finite stays as it is.

    Args:
        step: ``refresh_bases`` has changed its state.
        long_basis: U^T, ``[N, k, l]``.
        coefficients: ``[N, r + k + r, k + r]``.

    Returns:
        ``[N]`` each: of AdamW's step with the whole momentum, and of the rule's own.
    """
    state, moments, eps = step.state, step.state["exp_avg"], step.group["eps"]
    r, k = moments.shape[1], long_basis.shape[1]
    fresh = coefficients @ torch.cat([long_basis.to(moments.dtype), moments], 1)
    outside, basis, momentum = fresh.split([r, k, r], 1)
    moments.copy_(torch.where(step.finite > 0, outside, moments))
    long_basis.copy_(torch.where(step.finite > 0, basis.to(long_basis.dtype), long_basis))
    # AdamW's second moment over the columns: the residual's, and the kept part's along each direction of U.
    col = state["col"] + state["inside_sq"].mean(1, keepdim=True) @ long_basis.to(moments.dtype).square()
    row = plain_row(step)
    damping = damping_of(row)
    adamw = rank_one_direction(momentum, row, col, damping, step.bias, eps)
    own = rank_one_direction(outside, state["row"], state["col"], damping, step.bias, eps)
    inside = bounded_direction(state["inside_avg"], state["inside_sq"], damping, step.bias, eps)
    squares = [torch.linalg.vector_norm(part.flatten(1), dim=1).square() for part in (adamw, own)]
    return squares[0], squares[1] + inside.square().sum((1, 2))


def first_squares(step: Step, square: Tensor) -> None:
    """The second moments at the end of phase 1, from AdamW's."""
    state, l = step.state, square.shape[-1]
    held, weight = averaged(state, step.count, step.bias[1])
    row = debias(state["factor_values"][..., None], step.group["rho"], held) * weight / l
    row = torch.where(row.sum(1, keepdim=True) > 0, row, square.mean(2, keepdim=True))
    share, rest = shares(state["long_values"], state["long_tail"], state["mask"])
    state["inside_sq"].copy_(row * l * share)
    state["row"].copy_(row * rest)
    state["col"].copy_(square.mean(1, keepdim=True) * rest)


def _moved(tensors: dict[str, Tensor], device: torch.device, waiting: bool = True) -> dict[str, Tensor]:
    """Tensors of one dtype on another device, by one copy, which the host waits for or not."""
    whole = torch.cat([tensor.reshape(-1) for tensor in tensors.values()]).to(device, non_blocking=not waiting)
    parts = whole.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}
