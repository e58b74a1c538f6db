"""The step: schedule, Adam moments, preconditioning, blending and decoupled decay, as functions on stacks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Gradients are scaled to at most this magnitude per matrix, so that their squares stay finite in float32.
LARGEST_GRADIENT = 1e15
#: A gradient may be this many times as large as the level of those before it, which fades by the second factor a step.
LARGEST_JUMP, LEVEL_DECAY = 10.0, 0.95
#: (U14) What is added to estimated second moments, as a share of the energy of all rows, or of the mean of all columns.
DAMPING = 1e-3


def curvature_start(warmup_steps: int, min_precond_updates: int, precond_freq: int) -> int:
    """(U1) The last step of phase 1: both the warm-up and the required refreshes (one every precond_freq) are over."""
    return max(warmup_steps, min_precond_updates * precond_freq)


def blend_weight(step: int, start: int, blend_steps: int) -> float:
    """(U2) Weight of the curvature step at ``step`` (from 1): 0 in phase 1, then a linear ramp to 1."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / (blend_steps + 1)) if blend_steps else 1.0


def sanitize(grads: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """(U3) Zero the matrices that hold a NaN or Inf, and bound the magnitude of the others: ``max|G| <= 10 level``.

    The level is the largest magnitude of the earlier gradients, fading: ``level <- max(0.95 level, max|G|)`` with the
    bounded G. One gradient that is far too large cannot ruin moments and curvature then, and a lasting change of scale
    is followed within a few steps. Before the first gradient that is not zero, ``LARGEST_GRADIENT`` is the bound alone.

    Args:
        grads: G, ``[N, r, l]``, changed in place.
        level: ``[N]``, zero before the first step, changed in place; as it was for a matrix that is skipped.

    Returns:
        G, and ``[N, 1, 1]`` with 1 for a finite matrix and 0 for a skipped one.
    """
    flat = grads.flatten(1)
    largest = torch.maximum(flat.amax(1), -flat.amin(1))
    finite = torch.isfinite(largest)
    limit = torch.where(level > 0, LARGEST_JUMP * level, LARGEST_GRADIENT).clamp_max(LARGEST_GRADIENT)
    scale = torch.where(finite, limit / torch.maximum(largest, limit), 0.0)
    fresh = torch.maximum(torch.minimum(largest, limit), LEVEL_DECAY * level)
    level.copy_(torch.where(finite & (largest > 0), fresh, level))
    # On a GPU the question would have to be waited for, on a CPU it is cheaper than two passes over the gradient.
    if grads.device.type != "cpu" or not bool((scale == 1).all()):
        grads.mul_(scale[:, None, None]).nan_to_num_(0.0, 0.0, 0.0)
    return grads, finite[:, None, None].to(grads.dtype)


def bias_correction(beta: float, count: Tensor) -> Tensor:
    """(U5) ``1 - beta^t`` for each matrix's t, ``[N, 1, 1]``, exact to rounding without float64, which MPS does not have."""
    return torch.expm1(count * math.log(beta)).neg_() if beta else torch.ones_like(count)


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


def count_activity(activity: Tensor, largest: Tensor, beta2: float) -> None:
    """(X3) ``n <- n + a`` and ``w <- b2 w + (1 - b2) a`` for an expert, a being 1 in a step with tokens and 0 without.

    An expert's curvature averages the n gradients that are not zero, its second moments all of them: what the average
    is in place of AdamW's second moment is w times as large. With tokens in every step n is t and w is ``1 - b2^t``.

    Args:
        activity: n and w, ``[N, 2]``, changed in place; as they were where the gradient is not finite.
        largest: largest magnitude of each gradient, ``[N]``.
        beta2: b2.
    """
    held, weight = activity[:, 0], activity[:, 1]
    active, finite = (part.to(activity.dtype) for part in (largest > 0, largest.isfinite()))
    held += active * finite
    weight.lerp_(active, (1 - beta2) * finite)


def averaged(state: dict[str, Tensor], count: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor]:
    """How many gradients a matrix's curvature averages, and what they weigh in its second moments, ``[N, 1, 1]`` each.

    Args:
        state: with ``activity`` where the two differ from those that follow (X3).
        count: finite gradients seen by each matrix, ``[N, 1, 1]``.
        bias2: bias correction of the second moments.
    """
    if "activity" not in state:
        return count, bias2
    held, weight = state["activity"][..., None, None].unbind(1)
    return held, weight


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


def eigenbasis_direction(
    state: dict[str, Tensor],
    grads: Tensor,
    long_basis: Tensor,
    damping: Tensor,
    weights: tuple[Tensor, Tensor],
    bias: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """(U11) Update the moments in the eigenbasis and return the step, in the parameter's coordinates.

    With ``Gq = Q^T G``, ``P = Gq U`` and ``R = Gq - P U^T``, moments of P and of R, the step is
    ``Q (P_hat / (sqrt(vP_hat) + eps) U^T + R_hat / (sqrt(vR_hat) + eps))``, both quotients damped (U14) and within 1.

    Args:
        state: the moments ``exp_avg`` of R, ``row`` and ``col``, ``inside_avg`` and ``inside_sq`` of P, all changed in
            place; Q in ``vectors`` and the ``mask`` of U's columns.
        grads: G, ``[N, r, l]``.
        long_basis: U^T, ``[N, k, l]``.
        damping: (U14).
        weights: ``1 - beta`` of the two moments, zero for a skipped matrix.
        bias: their bias corrections.
    """
    basis, (first, second) = state["vectors"], weights
    rotated = basis.mT @ grads
    inside = (rotated @ long_basis.mT).mul_(state["mask"])
    outside = rotated.baddbmm_(inside, long_basis, alpha=-1)
    state["inside_avg"].lerp_(inside, first)
    state["inside_sq"].lerp_(inside.square(), second)
    state["exp_avg"].lerp_(outside, first)
    energy = outside.square_()
    state["row"].lerp_(energy.mean(2, keepdim=True), second)
    state["col"].lerp_(energy.mean(1, keepdim=True), second)
    direction = rank_one_direction(state["exp_avg"], state["row"], state["col"], damping, bias, eps)
    kept = bounded_direction(state["inside_avg"], state["inside_sq"], damping, bias, eps)
    return basis @ direction.baddbmm_(kept, long_basis)


def cautious(direction: Tensor, grads: Tensor, agreement: Tensor) -> Tensor:
    """(U16) Only the entries of a step that this gradient agrees with, larger by the share that agreed a step ago.

    ``D (D G > 0) / max(a, 1/2)``: the share of the step before stands for this step's own, which is known too late to be
    used without another pass over the matrix. Entries without a gradient do not count, and a step without any leaves a as
    it is. After C. Liang et al., Cautious Optimizers, 2024.

    Args:
        direction: D, ``[N, r, l]``, changed in place.
        grads: G, in the same coordinates; scratch.
        agreement: a, ``[N]``, replaced by this step's share.
    """
    products = grads.mul_(direction)
    counted = torch.count_nonzero(products, (1, 2))
    agrees = products.gt_(0)
    direction.mul_(agrees).div_(agreement.clamp_min(0.5)[:, None, None])
    share = torch.count_nonzero(agrees, (1, 2)) / counted.clamp_min(1)
    agreement.copy_(torch.where(counted > 0, share, agreement))
    return direction


def turn(
    moments: Tensor,
    long_basis: Tensor,
    row: Tensor,
    col: Tensor,
    coefficients: Tensor,
    plain_row: Tensor,
    inside_sq: Tensor,
    bias: tuple[Tensor, Tensor],
    finite: Tensor,
    eps: float,
) -> Tensor:
    """(U15) Move U and the residual's momentum to new bases in place; the squared norms of two steps in them.

    Of ``coefficients Z`` with ``Z = [U^T; M]``, ``[N, k + r, l]``, the first r rows are the new M, the next k the new U^T,
    the last r the whole momentum in the parameter's own coordinates.

    Args:
        moments: M, ``[N, r, l]``.
        long_basis: U^T, ``[N, k, l]``.
        row, col: second moment of the residual in the new basis, as in (U10).
        coefficients: ``[N, r + k + r, k + r]``.
        plain_row: what AdamW's second moment has in place of ``row``, ``[N, r, 1]``.
        inside_sq: second moment of the kept part, mean over the rows, ``[N, 1, k]``: AdamW's moment has
            ``col + inside_sq (U^T)^2`` in place of ``col``.
        bias: bias corrections.
        finite: 0 for a matrix that stays as it is, ``[N, 1, 1]``.
        eps: Adam's.

    Returns:
        ``[N, 2]``: of AdamW's step with the whole momentum, and of the residual's.
    """
    r, k = moments.shape[1], long_basis.shape[1]
    fresh = coefficients @ torch.cat([long_basis.to(moments.dtype), moments], 1)
    outside, basis, momentum = fresh.split([r, k, r], 1)
    moments.copy_(torch.where(finite > 0, outside, moments))
    long_basis.copy_(torch.where(finite > 0, basis.to(long_basis.dtype), long_basis))
    plain_col, damping = col + inside_sq @ long_basis.to(moments.dtype).square(), damping_of(plain_row)
    plain = rank_one_direction(momentum, plain_row, plain_col, damping, bias, eps)
    steps = plain, rank_one_direction(outside, row, col, damping, bias, eps)
    return torch.stack([torch.linalg.vector_norm(step.flatten(1), dim=1).square() for step in steps], -1)
