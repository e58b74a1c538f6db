"""What the rules share: schedule, bounds on gradients, Adam's moments, curvature factors, as functions on stacks.

Shapes: G is ``[N, r, l]``, a factor ``[N, d, d]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Gradients are scaled to at most this magnitude per matrix, so that their squares stay finite in float32.
LARGEST_GRADIENT = 1e15
#: A gradient may be this many times as large as the level of those before it, which fades by the second factor a step.
LARGEST_JUMP, LEVEL_DECAY = 10.0, 0.95


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
    flat, on_cpu = grads.flatten(1), grads.device.type == "cpu"
    # A norm is one kernel on a GPU, and ten times slower on a CPU.
    largest = torch.maximum(flat.amax(1), -flat.amin(1)) if on_cpu else torch.linalg.vector_norm(flat, math.inf, 1)
    finite = largest < math.inf
    limit = (LARGEST_JUMP * level).clamp_max_(LARGEST_GRADIENT).masked_fill_(level == 0, LARGEST_GRADIENT)
    bounded = torch.minimum(largest, limit)
    fresh = torch.maximum(bounded, LEVEL_DECAY * level)
    torch.where(torch.logical_and(finite, largest), fresh, level, out=level)
    # On a GPU the question would have to be waited for, on a CPU it is cheaper than two passes over the gradient.
    if not on_cpu or not torch.equal(bounded, largest):
        # The quotient of a matrix that holds a NaN or Inf, or zeros alone, makes zeros and NaN of its entries.
        grads.mul_((bounded / largest)[:, None, None]).nan_to_num_(0.0, 0.0, 0.0)
    return grads, finite[:, None, None].to(grads.dtype)


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


def bias_corrections(betas: tuple[float, float], count: Tensor) -> tuple[Tensor, Tensor]:
    """(U5) ``1 - beta^t`` for each matrix's t, ``[N, 1, 1]``, exact to rounding without float64, which MPS does not have."""
    first, second = torch._foreach_mul([count, count], [math.log(beta) if beta else -math.inf for beta in betas])
    torch._foreach_expm1_([first, second])
    torch._foreach_neg_([first, second])
    return first, second


def moment_schedule(
    betas: tuple[float, float], finite: Tensor, count: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What this gradient weighs in the two moments, 0 for a skipped matrix, and their bias corrections (U5)."""
    # A matrix that has seen no finite gradient has moments of zero: any bias correction does.
    terms = count.clamp_min(1)
    first, second = torch._foreach_mul([finite, finite], [1 - beta for beta in betas])
    return (first, second), bias_corrections(betas, terms)


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
