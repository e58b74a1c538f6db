"""The published rule: precondition the gradient by L^-1/4 and R^-1/4, then AdamW. Kept as the reference to beat.

As published, all matrices are refreshed in the same step: (S1) does not apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from scao_hf import ops, quantization
from scao_hf.ops import eigh
from scao_hf.rules.base import (
    FACTOR,
    NOT_NEGATIVE,
    SHARE,
    VECTORS,
    Bucket,
    Field,
    Legal,
    Rule,
    Step,
    accumulate,
    adam_direction,
    adam_moments,
    adaptive_rank,
    all_or_nothing,
    averaged,
    blend_weight,
    clip_norm,
    debias,
    mix,
)

SIDES = ("left", "right")


def _side(name: str, side: str, kept: str) -> dict[str, Field]:
    """The factor of a side and its truncated basis."""
    fields = {
        "factor": Field(f"{side} {side}", "curvature", FACTOR, int8=name),
        "vectors": Field(f"{side} {kept}", "bases", VECTORS),
        "values": Field(kept, "bases", NOT_NEGATIVE),
        # Damped, so that a root of it is finite. One and no basis is the identity: what holds until a decomposition has worked.
        "tail": Field("", "bases", Legal(torch.finfo(torch.float32).tiny), fill=1),
        "mass": Field("", "bases", SHARE),
    }
    return {f"{name}_{part}": field for part, field in fields.items()}


class Published(Rule):
    """AdamW's moments, of the preconditioned gradient; per side the factor (dense, or int8 codes and scales) and its basis."""

    cut_sides = 2
    name = "published"
    fields: ClassVar[Mapping[str, Field]] = {
        "exp_avg": Field("r l", levels=2),
        "exp_avg_sq": Field("r l", legal=NOT_NEGATIVE, levels=4),
        **_side("left", "r", "kr"),
        **_side("right", "l", "k"),
    }

    def create(
        self,
        size: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        group: dict[str, Any],
        step: int = 0,
    ) -> dict[str, Tensor]:
        """Moments at zero, factors at ``eps I``."""
        state = super().create(size, shape, dtype, device, group, step)
        for side, dim in zip(SIDES, shape, strict=True) if device.type != "meta" else ():
            start = group["eps"] * torch.eye(dim, dtype=dtype, device=device).expand(size, dim, dim)
            if f"{side}_factor" in state:
                state[f"{side}_factor"].copy_(start)
            else:
                state[f"{side}_codes"], state[f"{side}_scales"] = quantization.encode(start, seed=0)
        return state

    def step(self, step: Step) -> None:
        """(E1) on both sides, a refresh when due, and the step; what ends the refresh leaves a whole step without it."""
        state, group, grads = step.state, step.group, step.gradients()
        weight = step.curvature_weight
        for index, side in enumerate(SIDES):
            outer = grads @ grads.mT if side == "left" else grads.mT @ grads
            if f"{side}_factor" in state:
                accumulate(state[f"{side}_factor"], outer, weight)
            else:
                codes, scales = state[f"{side}_codes"], state[f"{side}_scales"]
                average_codes(codes, scales, outer.float(), weight.float().flatten(), 2 * step.number + index)
        try:
            if step.number % group["precond_freq"] == 0:
                self._refresh(step)
        finally:
            self._move(step, grads)

    def _refresh(self, step: Step) -> None:
        """Both sides' bases, or neither's."""
        with all_or_nothing({name: step.state[name] for name in _BASES}):
            for side, dim in zip(SIDES, step.bucket.shape, strict=True):
                _refresh_side(step, side, _factor(step.state, side, dim, step.bucket.dtype))

    def _move(self, step: Step, grads: Tensor) -> None:
        """(U7), (U8), (U9) and AdamW's (U4), (U6) on the result."""
        state, group = step.state, step.group
        blend = blend_weight(step.number, self.phase1_steps(group), group["blend_steps"])
        if blend:
            bases = [tuple(state[f"{side}_{part}"] for part in ("vectors", "values", "tail")) for side in SIDES]
            natural = kronecker_precondition(grads, *bases)  # type: ignore[arg-type]
            grads = mix(grads, clip_norm(natural, group["tau"]), blend)
        adam_moments(state["exp_avg"], state["exp_avg_sq"], grads, step.weights)
        step.write(adam_direction(state["exp_avg"], state["exp_avg_sq"], step.bias, group["eps"]))

    def figures(self, bucket: Bucket) -> dict[str, Tensor]:
        """Means over the two sides; the curvature norm is that of the kept eigenvalues, damped those above (E3)'s floor."""
        sides: list[dict[str, Tensor]] = []
        for side in SIDES:
            values, tail, mass = (bucket.state[f"{side}_{part}"] for part in ("values", "tail", "mass"))
            damped = damped_above(values, tail, bucket.state[f"{side}_vectors"].shape[1], bucket.group["eps"])
            sides.append(
                {
                    "rank": (values > 0).sum(-1),
                    "captured_mass": mass,
                    "curvature_norm": torch.linalg.vector_norm(values, dim=-1),
                    "damped": damped,
                }
            )
        return {name: (sides[0][name].float() + sides[1][name].float()) / 2 for name in sides[0]}


def average_codes(codes: Tensor, scales: Tensor, values: Tensor, weights: Tensor, seed: int) -> None:
    """``quantization.ema_``, by the native kernel where there is one."""
    kernel = ops.int8_ema_ if ops.has("int8_ema_", values.device) else quantization.ema_
    kernel(codes, scales, values, weights, seed)


def _factor(state: dict[str, Tensor], side: str, dim: int, dtype: torch.dtype) -> Tensor:
    if f"{side}_factor" in state:
        return state[f"{side}_factor"]
    return quantization.decode(state[f"{side}_codes"], state[f"{side}_scales"], (dim, dim), dtype)


def _refresh_side(step: Step, side: str, factor: Tensor) -> None:
    """(E2), (E3), decomposition, (E4), (E5); a decomposition that fails leaves the last good basis in place."""
    group = step.group
    held, _ = averaged(step.state, step.count, step.bias[1])
    factor = debias(factor, group["rho"], held)
    decomposition = eigh(factor, damping(factor, group["eps"]))
    if decomposition is None:
        return
    values, vectors = decomposition
    width = step.state[f"{side}_values"].shape[-1]
    rank = adaptive_rank(values, values.sum(-1), group["epsilon_sparse"], group["k_min"], width)
    basis = truncate(values, vectors, rank, width)
    step.update({f"{side}_{part}": fresh for part, fresh in basis._asdict().items()})


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


_BASES = tuple(f"{side}_{part}" for side in SIDES for part in Basis._fields)
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
