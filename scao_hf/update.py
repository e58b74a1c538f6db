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
    largest = grads.abs().flatten(1).amax(1)[:, None, None]
    finite = torch.isfinite(largest)
    scale = torch.where(finite, LARGEST_GRADIENT / largest.clamp_min(LARGEST_GRADIENT), 0.0)
    return grads.mul_(scale).nan_to_num_(0.0, 0.0, 0.0), finite.to(grads.dtype)


def bias_correction(beta: float, count: Tensor) -> Tensor:
    """(U5) ``1 - beta^t`` for each matrix's t, ``[N, 1, 1]``, worked out in float64."""
    correction: Tensor = 1 - torch.pow(beta, count.double())
    return correction.to(count.dtype)


def moment_schedule(
    betas: tuple[float, float], finite: Tensor, count: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What this gradient weighs in the two moments, 0 for a skipped matrix, and their bias corrections (U5)."""
    # A matrix that has seen no finite gradient has moments of zero: any bias correction does.
    terms = count.clamp_min(1)
    weights = finite * (1 - betas[0]), finite * (1 - betas[1])
    return weights, (bias_correction(betas[0], terms), bias_correction(betas[1], terms))


def adam_moments(mean: Tensor, square: Tensor, grads: Tensor, weights: tuple[Tensor, Tensor]) -> None:
    """(U4) ``m <- b1 m + (1 - b1) G`` and ``v <- b2 v + (1 - b2) G^2``, both in place.

    ``weights`` holds 1 - b1 and 1 - b2, or zeros for a skipped matrix, which stays as it is.
    """
    mean.lerp_(grads, weights[0])
    square.lerp_(grads.square(), weights[1])


def adam_direction(mean: Tensor, square: Tensor, bias: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """(U6) ``m_hat / (sqrt(v_hat) + eps)``, torch.optim.AdamW's step without the learning rate, in fresh memory."""
    return torch.div(
        mean, denominator := square.sqrt().mul_(bias[0] / bias[1].sqrt()).add_(bias[0] * eps), out=denominator
    )


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
        kept_part = scaled @ (vectors.mT @ grads) if side == -2 else (grads @ vectors) @ scaled.mT
        grads = grads * outside + kept_part
    return grads


def clip_norm(direction: Tensor, tau: float | None) -> Tensor:
    """(U8) Scale each matrix of ``direction`` to a Frobenius norm of at most ``tau``."""
    if tau is None:
        return direction
    norm = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)
    scale: Tensor = tau / norm.clamp_min(tau)
    return direction * scale


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


def eigenbasis_direction(
    state: dict[str, Tensor],
    grads: Tensor,
    long_basis: Tensor,
    weights: tuple[Tensor, Tensor],
    bias: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """(U11) Update the moments in the eigenbasis and return the step, in the parameter's coordinates.

    With ``Gq = Q^T G``, ``P = Gq U`` and ``R = Gq - P U^T``, moments of P and of R, the step is
    ``Q (P_hat / (sqrt(vP_hat) + eps) U^T + R_hat / (sqrt(vR_hat) + eps))``.

    Args:
        state: the moments ``exp_avg`` of R, ``row`` and ``col``, ``inside_avg`` and ``inside_sq`` of P, all changed in
            place; Q in ``vectors`` and the ``mask`` of U's columns.
        grads: G, ``[N, r, l]``.
        long_basis: U, ``[N, l, k]``.
        weights: ``1 - beta`` of the two moments, zero for a skipped matrix.
        bias: their bias corrections.
    """
    basis, (first, second) = state["vectors"], weights
    rotated = basis.mT @ grads
    inside = (rotated @ long_basis).mul_(state["mask"])
    outside = rotated.baddbmm_(inside, long_basis.mT, alpha=-1)
    state["inside_avg"].lerp_(inside, first)
    state["inside_sq"].lerp_(inside.square(), second)
    state["exp_avg"].lerp_(outside, first)
    energy = outside.square_()
    state["row"].lerp_(energy.mean(2, keepdim=True), second)
    state["col"].lerp_(energy.mean(1, keepdim=True), second)
    direction = adam_direction(state["exp_avg"], rank_one(state["row"], state["col"]), bias, eps)
    kept = adam_direction(state["inside_avg"], state["inside_sq"], bias, eps)
    return basis @ direction.baddbmm_(kept, long_basis.mT)
