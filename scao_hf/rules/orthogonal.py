"""SCAO's rule for matrices with two large sides: the polar factor of the momentum, its columns equalised.

The polar factor gives every direction of the momentum the same size, which is what whitening by both sides' curvature
aims at, without a factor or a decomposition, and so without phases. It makes the norms of the rows one; (O3) makes those
of the columns alike. (O1) and (O2) are those of Muon (K. Jordan et al., 2024), (O3) is NorMuon's normalisation (Z. Li et
al., 2025), here always along the long side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from scao_hf.rules.base import NOT_NEGATIVE, Bucket, Field, Rule, Step, clip_norm

#: Coefficients of the Newton-Schulz iteration ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``: steep at zero rather than
#: exact at one, so that five iterations take singular values from 1e-2 up to between 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
#: Size of each direction of a step, in learning rates, over that of the largest step that AdamW can take (O4).
STEP_SIZE = 1 / 16
#: Entries that are orthogonalised at a time, to bound the memory of the intermediates.
PORTION = 2**22


def polar(matrix: Tensor) -> Tensor:
    """(O2) The polar factor ``(X X^T)^-1/2 X`` of a stack, in fresh memory; a matrix of zeros stays zero.

    Args:
        matrix: X, ``[N, r, l]`` with r <= l. Its products are in bfloat16 on devices that multiply it natively: that
            changes a step by less than the iteration's own error.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrix / _norm(matrix).clamp_min(torch.finfo(matrix.dtype).tiny)).to(_product_dtype(matrix))
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    found: Tensor = x.to(matrix.dtype)
    return found


def _product_dtype(matrix: Tensor) -> torch.dtype:
    if matrix.dtype != torch.float32:
        return matrix.dtype
    if matrix.is_cuda:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = matrix.device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


class Orthogonal(Rule):
    """The momentum M, as large as the parameter, and the columns' second moment c."""

    name = "orthogonal"
    fields: ClassVar[Mapping[str, Field]] = {
        "exp_avg": Field("r l", levels=2),
        "col": Field("1 l", legal=NOT_NEGATIVE, levels=4),
    }

    def step(self, step: Step) -> None:
        """(O1) to (O4) on a few matrices at a time, bounded by (U8)."""
        grads = step.gradients()
        count = max(1, PORTION // grads[0].numel())
        for first in range(0, len(grads), count):
            rows = slice(first, first + count)
            grads[rows] = _direction(step.part(rows), grads[rows])
        step.write(clip_norm(grads, step.group["tau"]))

    def phase1_steps(self, group: dict[str, Any]) -> int:
        """None: there is no curvature to wait for."""
        return 0

    def figures(self, bucket: Bucket) -> dict[str, Tensor]:
        """All r directions have the same weight, whatever the curvature, which is not estimated."""
        none = torch.zeros_like(bucket.state["taken"])
        return {"rank": none + bucket.shape[0], "captured_mass": none + 1, "curvature_norm": none, "damped": none}


def _direction(step: Step, grads: Tensor) -> Tensor:
    """(O1) ``M <- b1 M + (1 - b1) G``; the step is that of ``X = b1 M + (1 - b1) G``, the momentum a step ahead.

    (O3) is ``c <- b2 c + (1 - b2) mean_i X_ij^2`` of the polar factor X, and ``D = X / sqrt(c_hat)`` with its bias corrected:
    columns that are large in step after step count as much as the others.

    (O4) is ``D <- D sqrt(r l) |X|_F / (16 |D|_F)``: the size of a step follows from how many directions the momentum has, not
    from the gradient. The norm of AdamW's step, with entries of one learning rate, is sqrt(r l) at most, that of each direction
    here a sixteenth of it: AdamW's best learning rate, which is smaller for larger matrices, then is a good one.
    """
    momentum, col = step.state["exp_avg"], step.state["col"]
    momentum.lerp_(grads, step.weights[0])
    x = polar(torch.lerp(momentum, grads, 1 - step.group["betas"][0]))
    size = _norm(x) * (STEP_SIZE * math.sqrt(x.shape[1] * x.shape[2]))
    col.lerp_(x.square().mean(1, keepdim=True), step.weights[1])
    direction = x.div_((col / step.bias[1]).sqrt_().add_(step.group["eps"]))
    return direction.div_(_norm(direction).clamp_min(torch.finfo(x.dtype).tiny)).mul_(size)


def _norm(stack: Tensor) -> Tensor:
    """Frobenius norms, ``[N, 1, 1]``."""
    norm: Tensor = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True)
    return norm
