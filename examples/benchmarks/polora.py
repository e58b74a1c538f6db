"""PoLoRA, written from its definition as a baseline: whiten, take the polar factor, unwhiten, scale by the norms.

For one LoRA pair A (r x n), B (m x r) with gradients G_A, G_B (https://github.com/nikhilgsh/polora):

    M     <- beta1 M + (1 - beta1) G,  M^ = beta1 M + (1 - beta1) G              momentum with look-ahead       (P1)
    q     =  (Q / max Q + delta)^{-1/2},  p likewise                             diagonal long-side metric      (P2)
    C_B   =  B^T diag(p^{-2}) B,  C_A = A diag(q^{-2}) A^T                       r x r metric of the partner    (P3)
    D_A   =  C_B^{-1/2} polar(C_B^{-1/2} M^_A diag(q)) diag(q)                   whiten, polar, unwhiten        (P4)
    D_B   =  diag(p) polar(diag(p) M^_B C_A^{-1/2}) C_A^{-1/2}
    A     <- A - rho D_A / |D_A|_2,  B likewise,  rho = lr / (|A|_2 + |B|_2)     spectral step                  (P5)
    Q     <- curvature_beta Q + (1 - curvature_beta) diag(G_A^T C_B^{-1} G_A) / r                               (P6)
    P     <- curvature_beta P + (1 - curvature_beta) diag(G_B C_A^{-1} G_B^T) / r

Where the published code iterates (Newton-Schulz for inverse roots, PolarExpress for the polar factor, power iteration
for the norms), this baseline takes the exact result through r x r eigendecompositions. There is no weight decay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def lora_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Every trainable (lora_A, lora_B) pair of a PEFT model."""
    parameters = {name: param for name, param in model.named_parameters() if param.requires_grad}
    return [
        (param, parameters[name.replace("lora_A", "lora_B")]) for name, param in parameters.items() if "lora_A" in name
    ]


def inverse_root(gram: Tensor, delta: float, floor: float) -> Tensor:
    """(C + lambda I)^{-1/2} of symmetric C (..., r, r), lambda = max(delta * largest eigenvalue, floor)."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    damping = (delta * values[..., -1:]).clamp_min(floor)
    return (vectors * (values + damping).rsqrt().unsqueeze(-2)) @ vectors.mT


def polar(matrix: Tensor) -> Tensor:
    """The polar factor U V^T of a wide X (..., r, n) with X = U S V^T, null directions left at zero."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    # The Gram squares the spectrum: directions under 1e-3.5 of the largest are rounding noise in float32.
    keep = values > values[..., -1:] * 1e-7
    scale = torch.where(keep, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0)
    return (vectors * scale.unsqueeze(-2)) @ (vectors.mT @ matrix)


def spectral_norm(matrix: Tensor) -> Tensor:
    """The largest singular value of a wide X (..., r, n), kept as (..., 1, 1)."""
    return torch.linalg.eigvalsh(matrix @ matrix.mT)[..., -1:, None].clamp_min(0).sqrt()


class PoLoRA(Optimizer):
    """PoLoRA over LoRA pairs; every factor needs a gradient at every step.

    Args:
        pairs: (A, B) parameters, A of shape (r, n), B of shape (m, r).
        lr: the spectral step; 10 to 100 times AdamW's learning rate.
        beta1: momentum decay.
        curvature_beta: decay of the diagonal metrics Q and P.
        delta: relative damping of (P2) and (P3).
        epsilon: absolute floor of the damping, and the value that Q and P start from.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[Tensor, Tensor]],
        lr: float = 2e-2,
        beta1: float = 0.9,
        curvature_beta: float = 0.99,
        delta: float = 1e-4,
        epsilon: float = 1e-12,
    ) -> None:
        self.pairs = list(pairs)
        if not self.pairs:
            raise ValueError("PoLoRA needs at least one (A, B) pair: the model has no LoRA factors")
        defaults = {"lr": lr, "beta1": beta1, "curvature_beta": curvature_beta, "delta": delta, "epsilon": epsilon}
        super().__init__([factor for pair in self.pairs for factor in pair], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every pair; pairs of one shape are stacked."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stacks: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for pair in self.pairs:
            stacks[(*pair[0].shape, *pair[1].shape)].append(pair)
        for pairs in stacks.values():
            self._step_stack([a for a, _ in pairs], [b for _, b in pairs])
        return loss

    def _step_stack(self, a_factors: list[Tensor], b_factors: list[Tensor]) -> None:
        group = self.param_groups[0]
        delta, floor = group["delta"], group["epsilon"]
        rank = a_factors[0].shape[0]

        # B enters transposed: then both factors are r x long, and one set of equations serves the two.
        def read(factors: list[Tensor], transposed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            for factor in factors:
                if not self.state[factor]:
                    long = factor.shape[0 if transposed else 1]
                    self.state[factor]["momentum"] = torch.zeros_like(factor)
                    self.state[factor]["metric"] = factor.new_full((long,), floor)
            value = torch.stack([factor.detach() for factor in factors])
            grad = torch.stack([factor.grad for factor in factors])  # type: ignore[misc]
            momentum = torch.stack([self.state[factor]["momentum"] for factor in factors])
            metric = torch.stack([self.state[factor]["metric"] for factor in factors])
            return (value.mT, grad.mT, momentum.mT, metric) if transposed else (value, grad, momentum, metric)

        factors = (a_factors, b_factors)
        sides = [read(a_factors, False), read(b_factors, True)]
        long_roots = [(metric / metric.amax(-1, keepdim=True) + delta).rsqrt().unsqueeze(-2) for *_, metric in sides]
        partner_roots = [
            inverse_root((value / root.square()) @ value.mT, delta, floor)
            for (value, *_), root in zip(sides, long_roots, strict=True)
        ][::-1]
        rho = group["lr"] / sum(spectral_norm(value) for value, *_ in sides)
        for index, (value, grad, momentum, metric) in enumerate(sides):
            long_root, root = long_roots[index], partner_roots[index]
            momentum = group["beta1"] * momentum + (1 - group["beta1"]) * grad
            ahead = group["beta1"] * momentum + (1 - group["beta1"]) * grad
            direction = root @ polar(root @ ahead * long_root) * long_root
            value = value - rho * direction / spectral_norm(direction).clamp_min(floor)
            curvature = (grad * (root @ (root @ grad))).sum(-2) / rank
            metric = metric.lerp(curvature, 1 - group["curvature_beta"])
            for at, factor in enumerate(factors[index]):
                factor.copy_(value[at].mT if index else value[at])
                self.state[factor]["momentum"].copy_(momentum[at].mT if index else momentum[at])
                self.state[factor]["metric"].copy_(metric[at])
