"""The step: schedule, Adam moments, preconditioning, blending and decoupled decay, as functions on stacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Gradients are scaled to at most this magnitude per matrix, so that their squares stay finite in float32.
LARGEST_GRADIENT = 1e15


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32: TF32, which training frameworks switch on, is too coarse for Gram matrices."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def curvature_start(warmup_steps: int, min_precond_updates: int, precond_freq: int) -> int:
    """(U1) The last step of phase 1: both the warm-up and the required refreshes (one every precond_freq) are over."""
    return max(warmup_steps, min_precond_updates * precond_freq)


def blend_weight(step: int, start: int, blend_steps: int) -> float:
    """(U2) Weight of the curvature step at ``step`` (from 1): 0 in phase 1, then a linear ramp to 1."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / (blend_steps + 1)) if blend_steps else 1.0


def sanitize(grads: Tensor) -> tuple[Tensor, Tensor]:
    """(U3) Zero the matrices that hold a NaN or Inf, and bound the others' magnitude by ``LARGEST_GRADIENT``.

    Args:
        grads: G, ``[N, r, l]``, changed in place.

    Returns:
        G, and ``[N, 1, 1]`` with 1 for a finite matrix and 0 for a skipped one.
    """
    largest = torch.linalg.vector_norm(grads, float("inf"), dim=(1, 2), keepdim=True)
    finite = torch.isfinite(largest)
    scale = torch.where(finite, LARGEST_GRADIENT / largest.clamp_min(LARGEST_GRADIENT), 0.0)
    grads = torch.where(finite, grads, 0.0).mul_(scale)
    return grads, finite.to(grads.dtype)


def adam_moments(mean: Tensor, square: Tensor, grads: Tensor, betas: tuple[float, float], finite: Tensor) -> None:
    """(U4) ``m <- b1 m + (1 - b1) G`` and ``v <- b2 v + (1 - b2) G^2``, both in place; skipped matrices stay as they are."""
    mean.lerp_(grads, (1 - betas[0]) * finite)
    square.lerp_(grads.square(), (1 - betas[1]) * finite)


def bias(beta: float, count: Tensor) -> Tensor:
    """(U5) ``1 - beta^t`` for the t of each matrix, ``[N, 1, 1]``; 1 where no finite gradient has come yet."""
    power = torch.pow(torch.tensor(beta, dtype=torch.float64, device=count.device), count.double())
    return torch.where(count > 0, 1 - power, 1.0).to(count.dtype)


def adam_direction(mean: Tensor, square: Tensor, betas: tuple[float, float], eps: float, count: Tensor) -> Tensor:
    """(U6) ``m_hat / (sqrt(v_hat) + eps)``, torch.optim.AdamW's step without the learning rate."""
    denominator = square.sqrt().div_(bias(betas[1], count).sqrt()).add_(eps)
    return (mean / bias(betas[0], count)).div_(denominator)


def kronecker_precondition(
    grads: Tensor, left: tuple[Tensor, Tensor, Tensor], right: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """(U7) ``L^-1/4 G R^-1/4`` with truncated factors: kept directions by their own eigenvalue, the rest by the tail's mean.

    With ``P = t^-1/4 I + U (S^-1/4 - t^-1/4) U^T`` on each side no matrix larger than G is formed, and nothing of G is
    dropped or left at another scale.

    Args:
        grads: G, ``[N, m, n]``.
        left: basis vectors ``[N, m, k]``, eigenvalues ``[N, k]`` and tail eigenvalue ``[N]`` of L, all damped above zero.
        right: the same of R.
    """
    for side, (vectors, values, tail) in ((-2, left), (-1, right)):
        outside = tail.pow(-0.25)[:, None, None]
        kept = torch.where(values > 0, values, 1.0).pow(-0.25)[:, None, :]
        scaled = vectors * (kept - outside)
        if side == -2:
            grads = grads * outside + scaled @ (vectors.mT @ grads)
        else:
            grads = grads * outside + (grads @ vectors) @ scaled.mT
    return grads


def clip_norm(direction: Tensor, tau: float | None) -> Tensor:
    """(U8) Scale each matrix of ``direction`` to a Frobenius norm of at most ``tau``."""
    if tau is None:
        return direction
    norm = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)
    return direction * (tau / norm.clamp_min(tau))


def mix(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """(U9) ``(1 - weight) first + weight second``."""
    if weight == 1.0:
        return second
    return torch.lerp(first, second, weight)


def rank_one(row: Tensor, col: Tensor) -> Tensor:
    """(U10) Second moment of rank one: ``row_i col_j / mean(col)``, ``[N, r, l]``.

    Args:
        row: mean of the squares over the columns, ``[N, r, 1]``.
        col: mean of the squares over the rows, ``[N, 1, l]``.
    """
    return row @ (col / col.mean(2, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny))

