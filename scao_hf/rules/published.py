"""The published rule: precondition the gradient by L^-1/4 and R^-1/4, then AdamW. Kept as the reference to beat.

As published, all matrices are refreshed in the same step: (S1) does not apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scao_hf import curvature, ops, quantization
from scao_hf.rules.rule import CODES, FACTOR, FINITE, NOT_NEGATIVE, SHARE, VECTORS, Legal, Tick, update_finite
from scao_hf.update import (
    adam_direction,
    adam_moments,
    averaged,
    blend_weight,
    clip_norm,
    curvature_start,
    kronecker_precondition,
    mix,
)

SIDES = ("left", "right")
#: Of the fields of a side. The tail's eigenvalue is damped, so that a root of it is finite.
OF_A_SIDE = {
    "factor": FACTOR,
    "codes": CODES,
    "scales": NOT_NEGATIVE,
    "vectors": VECTORS,
    "values": NOT_NEGATIVE,
    "tail": Legal(torch.finfo(torch.float32).tiny),
    "mass": SHARE,
}


class Published:
    """State: ``exp_avg``, ``exp_avg_sq``; per side the factor (dense, or int8 codes and scales) and its truncated basis."""

    cut_sides = 2
    takes_turns = False
    legal: Mapping[str, Legal] = {"exp_avg": FINITE, "exp_avg_sq": NOT_NEGATIVE} | {
        f"{side}_{part}": legal for side in SIDES for part, legal in OF_A_SIDE.items()
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
        """Moments at zero, factors at ``eps I``, no basis yet."""

        def zeros(*sides: int, like: torch.dtype = dtype) -> Tensor:
            return torch.zeros(size, *sides, dtype=like, device=device)

        state = {"exp_avg": zeros(*shape), "exp_avg_sq": zeros(*shape)}
        for side, dim in zip(SIDES, shape, strict=True):
            width = min(group["k_max"], dim)
            if group["use_int8_ema"]:
                codes, scales = quantization.encoded_shapes(size, dim * dim)
                state[f"{side}_codes"] = torch.zeros(codes, dtype=torch.int8, device=device)
                state[f"{side}_scales"] = torch.zeros(scales, dtype=torch.float32, device=device)
            else:
                state[f"{side}_factor"] = zeros(dim, dim)
            if device.type != "meta":
                start = group["eps"] * torch.eye(dim, dtype=dtype, device=device).expand(size, dim, dim)
                _store(state, side, start, seed=0)
            state[f"{side}_vectors"] = zeros(dim, width)
            state[f"{side}_values"] = zeros(width)
            # A tail eigenvalue of one and no basis is the identity: what holds until a decomposition has worked.
            state[f"{side}_tail"] = zeros() + 1
            state[f"{side}_mass"] = zeros()
        return state

    def step(self, state: dict[str, Tensor], grads: Tensor, tick: Tick) -> Tensor:
        """(E1) on both sides, a refresh when due, then (U7), (U8), (U9) and AdamW's (U4), (U6) on the result."""
        group = tick.group
        weight = (1 - group["rho"]) * tick.finite
        refresh = tick.step % group["precond_freq"] == 0
        for index, side in enumerate(SIDES):
            outer = grads @ grads.mT if side == "left" else grads.mT @ grads
            if f"{side}_factor" in state:
                curvature.accumulate(state[f"{side}_factor"], outer, weight)
            else:
                codes, scales = state[f"{side}_codes"], state[f"{side}_scales"]
                ops.int8_ema_(codes, scales, outer.float(), weight.float().flatten(), 2 * tick.step + index)
            if refresh:
                _refresh(state, side, _load(state, side, grads.shape[1 + index], grads.dtype), tick)
        blend = blend_weight(tick.step, self.start(group), group["blend_steps"])
        if blend:
            bases = [tuple(state[f"{side}_{part}"] for part in ("vectors", "values", "tail")) for side in SIDES]
            natural = kronecker_precondition(grads, *bases)  # type: ignore[arg-type]
            grads = mix(grads, clip_norm(natural, group["tau"]), blend)
        adam_moments(state["exp_avg"], state["exp_avg_sq"], grads, tick.weights)
        return adam_direction(state["exp_avg"], state["exp_avg_sq"], tick.bias, group["eps"])

    def fused(
        self,
        state: dict[str, Tensor],
        params: list[Tensor],
        grads: list[Tensor],
        step: int,
        group: dict[str, Any],
        due: slice,
    ) -> bool:
        """Never: the reference rule is left to PyTorch."""
        return False

    def summary(self, state: dict[str, Tensor], group: dict[str, Any]) -> dict[str, Tensor]:
        """Means over the two sides; the curvature norm is that of the kept eigenvalues, damped those above (E3)'s floor."""
        rank = sum((state[f"{side}_values"] > 0).sum(-1).double() for side in SIDES)
        mass = sum(state[f"{side}_mass"].double() for side in SIDES)
        norm = sum(state[f"{side}_values"].double().norm(dim=-1) for side in SIDES)
        damped = sum(
            curvature.damped_above(
                state[f"{side}_values"], state[f"{side}_tail"], state[f"{side}_vectors"].shape[1], group["eps"]
            ).double()
            for side in SIDES
        )
        return {"rank": rank / 2, "captured_mass": mass / 2, "curvature_norm": norm / 2, "damped": damped / 2}

    def start(self, group: dict[str, Any]) -> int:
        """(U1)."""
        return curvature_start(group["warmup_steps"], group["min_precond_updates"], group["precond_freq"])

    def kind(self, name: str) -> str:
        """Kind of a field."""
        if name.startswith("exp_avg"):
            return "moments"
        return "curvature" if name.endswith(("factor", "codes", "scales")) else "bases"


def _load(state: dict[str, Tensor], side: str, dim: int, dtype: torch.dtype) -> Tensor:
    if f"{side}_factor" in state:
        return state[f"{side}_factor"]
    return quantization.decode(state[f"{side}_codes"], state[f"{side}_scales"], (dim, dim), dtype)


def _store(state: dict[str, Tensor], side: str, factor: Tensor, seed: int) -> None:
    if f"{side}_factor" in state:
        state[f"{side}_factor"].copy_(factor)
        return
    codes, scales = quantization.encode(factor, seed)
    state[f"{side}_codes"].copy_(codes)
    state[f"{side}_scales"].copy_(scales)


def _refresh(state: dict[str, Tensor], side: str, factor: Tensor, tick: Tick) -> None:
    """(E2), (E3), decomposition, (E4), (E5); a decomposition that fails leaves the last good basis in place."""
    group = tick.group
    held, _ = averaged(state, tick.count, tick.bias[1])
    factor = curvature.debias(factor, group["rho"], held)
    decomposition = curvature.eigh(factor, curvature.damping(factor, group["eps"]), ops.eigh)
    if decomposition is None:
        return
    values, vectors = decomposition
    rank = curvature.adaptive_rank(values, values.sum(-1), group["epsilon_sparse"], group["k_min"], group["k_max"])
    basis = curvature.truncate(values, vectors, rank, width=state[f"{side}_values"].shape[-1])
    update_finite(state, {f"{side}_{part}": fresh for part, fresh in basis._asdict().items()}, tick)
