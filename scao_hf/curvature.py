"""Curvature: how the Kronecker factors are gathered, damped, decomposed and truncated.

Every function works on stacks of N matrices and keeps no state. Shapes: G is ``[N, r, l]``, a factor ``[N, d, d]``,
a truncated basis ``[N, d, k]`` whose columns beyond a matrix's own rank are zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Basis(NamedTuple):
    """A truncated eigenbasis of a stack of factors.

    Attributes:
        vectors: ``[N, d, k]``, orthonormal columns, zero columns beyond the rank.
        values: ``[N, k]``, eigenvalues in falling order, zero beyond the rank.
        tail: ``[N]``, mean eigenvalue of what is left out (the kept minimum where nothing is).
        mass: ``[N]``, share of the trace that the kept columns hold.
    """

    vectors: Tensor
    values: Tensor
    tail: Tensor
    mass: Tensor


def accumulate(factor: Tensor, outer: Tensor, weight: Tensor) -> Tensor:
    """(E1) ``L <- rho L + (1 - rho) G G^T`` in place.

    Args:
        factor: L, ``[N, d, d]``.
        outer: G G^T, ``[N, d, d]``.
        weight: 1 - rho, or 0 where a matrix's gradient was not finite, ``[N, 1, 1]``.
    """
    return factor.lerp_(outer, weight)


def debias(factor: Tensor, rho: float, count: Tensor) -> Tensor:
    """(E2) Divide an EMA by ``1 - rho^t``, t the number of terms that it holds, ``[N, 1, 1]``."""
    return factor / (1 - torch.pow(rho, count)).clamp_min(1e-30)


#: (E3) The damping's share of the mean eigenvalue.
TIKHONOV = 1e-4


def damping(factor: Tensor, eps: float) -> Tensor:
    """(E3) Adaptive Tikhonov: ``max(eps, 1e-4 tr(L) / d)`` of each factor, ``[N]``."""
    return (TIKHONOV * factor.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp_min(eps)


def damped_above(values: Tensor, tail: Tensor, side: int, eps: float) -> Tensor:
    """Whether the damping (E3) that a truncated basis (E5) was made with was above its floor, ``[N]``, 1 or 0.

    Args:
        values: eigenvalues of ``L + damping I``, ``[N, k]``, zero beyond the rank; all zero where there is no basis yet.
        tail: the mean of those left out, ``[N]``.
        side: d.
        eps: the floor.
    """
    mean = (values.sum(-1) + tail * (side - (values > 0).sum(-1))) / side
    return ((values[:, 0] > 0) & (mean > eps * (1 + 1 / TIKHONOV))).to(values.dtype)


#: What decomposes a stack ``[N, d, d]``, as ``torch.linalg.eigh`` does; it raises LinAlgError where it cannot.
Solver = Callable[[Tensor], tuple[Tensor, Tensor]]


def eigh(factor: Tensor, damping: Tensor, solver: Solver | None = None) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues of ``L + damping I`` in falling order, at least ``damping``, and eigenvectors; None if it fails.

    It is done on the CPU whatever the device: the solvers of other devices differ in speed and in how they fail. Each
    matrix is scaled to a trace of d first, so that float32 neither over- nor underflows. A stack on which the
    decomposition fails, or for which memory does not suffice, is tried once more in float64 with a thousandth of the
    mean eigenvalue on the diagonal. A factor that int8 rounding has made slightly indefinite comes out
    with the damping in place of its negative eigenvalues.

    Args:
        factor: L, symmetric, ``[N, d, d]``.
        damping: ``[N]``, not negative.
        solver: None for ``torch.linalg.eigh``, which the second attempt takes in any case.
    """
    side, device = factor.shape[-1], factor.device
    factor, damping = factor.cpu(), damping.cpu()
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(factor.dtype).tiny)[:, None, None]
    scaled = factor / mean
    for last in (False, True):
        try:
            if last:
                identity = torch.eye(side, dtype=torch.float64, device="cpu")
                found = torch.linalg.eigh(scaled.double() + 1e-3 * identity)
            else:
                found = (solver or torch.linalg.eigh)(scaled)
            values, vectors = (part.flip(-1).to(factor) for part in found)
        except (torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:  # type: ignore[attr-defined]
            # Python shows a warning once for each place and text: not at every refresh.
            warnings.warn(
                f"a decomposition of curvature factors of side {side} failed ({type(error).__name__}): "
                + ("the matrices keep their last basis" if last else "tried again in float64"),
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        return (values.clamp_min(0) * mean[:, 0] + damping[:, None]).to(device), vectors.to(device)
    return None


def adaptive_rank(values: Tensor, total: Tensor, epsilon_sparse: float, k_min: int, k_max: int) -> Tensor:
    """(E4) The smallest k in ``[k_min, k_max]`` whose eigenvalues hold at least ``1 - epsilon_sparse`` of the mass.

    Args:
        values: ``[N, d]``, falling.
        total: ``[N]``, the trace (larger than the sum of ``values`` where these are truncated already).

    Returns:
        ``[N]``, int64, at most d.
    """
    # The tolerance keeps a rounding error in the running sum from costing one more direction.
    threshold = (1 - epsilon_sparse) * total * (1 - 1e-6)
    side = values.shape[-1]
    # A product, because torch.use_deterministic_algorithms refuses cumsum on CUDA.
    running = values @ torch.ones(side, side, dtype=values.dtype, device=values.device).triu_()
    rank = (running < threshold[:, None]).sum(-1) + 1
    return rank.clamp(min(k_min, side), min(k_max, side))


def truncate(values: Tensor, vectors: Tensor, rank: Tensor, width: int) -> Basis:
    """(E5) Keep the first ``rank`` columns of each eigenbasis in a stack of width ``width``; the tail keeps its trace.

    The tail's eigenvalue is its mean: (trace - kept mass) / (d - rank), so the truncated factor has the full trace.
    """
    side = values.shape[-1]
    keep = torch.arange(width, device=values.device) < rank[:, None]
    kept = values[:, :width] * keep
    total, held = values.sum(-1), kept.sum(-1)
    left = side - rank
    smallest = values.gather(1, (rank - 1)[:, None])[:, 0]
    tail = torch.where(left > 0, (total - held).clamp_min(0) / left.clamp_min(1), smallest)
    mass = torch.where(total > 0, held / total.clamp_min(torch.finfo(total.dtype).tiny), 1.0)
    return Basis(vectors[:, :, :width] * keep[:, None, :], kept, tail, mass)


def gram(moments: Tensor, long_basis: Tensor) -> Tensor:
    """Inner products of the rows of ``Z = [U^T; M]``, ``[N, k + r, k + r]``: all that a refresh has to know of the long side.

    Args:
        moments: M, ``[N, r, l]``.
        long_basis: U^T, ``[N, k, l]``.
    """
    rows = torch.cat([long_basis.to(moments.dtype), moments], 1)
    return rows @ rows.mT


def sketch(
    gram: Tensor, values: Tensor, lift: Tensor, decay: float, solver: Solver | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(E6) Top-k eigenbasis of ``decay * U S U^T + X^T X``, as coefficients of the rows of Z: no l x l matrix, no pass over l.

    Args:
        gram: of Z = [U^T; M], ``[N, k + r, k + r]``; U's columns are orthonormal or zero.
        values: S, ``[N, k]``.
        lift: what makes X of Z, ``X = lift Z``, ``[N, r, k + r]``.
        decay: what the old basis is worth.
        solver: as in ``eigh``.

    Returns:
        A with ``A Z`` the new U^T, ``[N, k, k + r]`` (a row without mass is zero), values ``[N, k]`` falling, and the mass
        that was discarded ``[N]``; None if the decomposition failed.
    """
    width = values.shape[-1]
    rows = torch.cat([torch.nn.functional.pad((decay * values).sqrt().diag_embed(), (0, lift.shape[1])), lift], 1)
    decomposition = eigh(rows @ gram @ rows.mT, torch.zeros_like(values[:, 0]), solver)
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
