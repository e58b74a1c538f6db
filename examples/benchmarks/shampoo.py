"""Shampoo, written from its definition as a baseline, with the decomposition that is reported to fail.

For a weight W (m x n) with gradient G (Gupta, Koren, Singer: Shampoo, 2018):

    L <- L + G G^T,  R <- R + G^T G                      both start at epsilon I                                (H1)
    W <- W - lr L^{-1/4} G R^{-1/4}                                                                            (H2)

Vectors have one factor and the power -1/2. Roots are taken in every step, by ``torch.linalg.svd``, as the common PyTorch
ports take them, or by ``torch.linalg.eigh``. Nothing guards a decomposition: what it raises is the finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

DECOMPOSITIONS = ("svd", "eigh")


def inverse_root(factor: Tensor, order: int, decomposition: str) -> Tensor:
    """``L^{-1/order}`` of a symmetric positive definite L (d, d), through its singular or eigenvalues."""
    if decomposition == "svd":
        left, values, right = torch.linalg.svd(factor)
        return (left * values.pow(-1 / order)) @ right
    values, vectors = torch.linalg.eigh(factor)
    return (vectors * values.pow(-1 / order)) @ vectors.mT


class Shampoo(Optimizer):
    """Shampoo without grafting, momentum or weight decay.

    Args:
        params: parameters or groups.
        lr: step size; it has no relation to AdamW's.
        epsilon: what the factors start from.
        decomposition: ``svd`` or ``eigh``.

    Raises:
        ValueError: another decomposition.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.1, epsilon: float = 1e-4, decomposition: str = "svd"
    ) -> None:
        if decomposition not in DECOMPOSITIONS:
            raise ValueError(f"decomposition={decomposition!r} must be one of {', '.join(DECOMPOSITIONS)}")
        super().__init__(params, {"lr": lr, "epsilon": epsilon, "decomposition": decomposition})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """(H1) and (H2) on every parameter with a gradient; more than two dimensions are folded into two."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, param.grad, group)
        return loss

    def _step(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        matrix = gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient.reshape(-1, 1)
        sides = (matrix @ matrix.mT, matrix.mT @ matrix)[: 2 if gradient.ndim > 1 else 1]
        order = 2 * len(sides)
        for side, outer in enumerate(sides):
            if f"factor_{side}" not in state:
                state[f"factor_{side}"] = group["epsilon"] * torch.eye(len(outer), dtype=outer.dtype).to(outer.device)
            state[f"factor_{side}"] += outer
            root = inverse_root(state[f"factor_{side}"], order, group["decomposition"])
            matrix = matrix @ root if side else root @ matrix
        param.sub_(matrix.view_as(param), alpha=group["lr"])
