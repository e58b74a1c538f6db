"""SCAO's rule: Adam in a truncated Kronecker eigenbasis.

The small side has the whole eigenbasis Q of its curvature L, the long side the k leading directions U of a sketch. In
Q's coordinates the gradient's part inside U and the residual outside it each have momentum and second moment of their
own; the residual's second moment is of rank one. State in phase 2: the residual's momentum (as large as the
parameter), U in bfloat16 (or int8) and terms of size r x r, r x k and l.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scao_hf import curvature, quantization
from scao_hf.rules.rule import Tick, update_finite
from scao_hf.update import (
    adam_direction,
    adam_moments,
    blend_weight,
    clip_norm,
    curvature_start,
    mix,
    rank_one,
)

PHASE_ONE = ("exp_avg", "exp_avg_sq", "factor")


class Eigenbasis:
    """Phase 1 holds AdamW's state and L; the last step of phase 1 trades ``exp_avg_sq`` for the bases."""

    split_long_side = False

    def create(
        self,
        size: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        group: dict[str, Any],
        step: int = 0,
    ) -> dict[str, Tensor]:
        """The fields of a state of that age, all zero."""
        r, l = shape
        k = min(group["k_max"], l)
        sides: dict[str, tuple[int, ...]] = {"exp_avg": (r, l), "factor": (r, r)}
        dtypes: dict[str, torch.dtype] = {}
        if step < self.start(group):
            sides["exp_avg_sq"] = (r, l)
        else:
            sides |= {"adam_row": (r, 1), "adam_col": (1, l), "row": (r, 1), "col": (1, l)}
            sides |= {"inside_avg": (r, k), "inside_sq": (r, k), "mask": (1, k)}
            sides |= {"vectors": (r, r), "factor_values": (r,), "long_values": (k,), "long_tail": ()}
            if group["use_int8_ema"]:
                codes, scales = quantization.encoded_shapes(size, l * k)
                sides |= {"long_codes": codes[1:], "long_scales": scales[1:]}
                dtypes = {"long_codes": torch.int8, "long_scales": torch.float32}
            else:
                sides["long_vectors"] = (l, k)
                dtypes["long_vectors"] = torch.bfloat16 if dtype == torch.float32 else dtype
        return {
            name: torch.zeros(size, *side, dtype=dtypes.get(name, dtype), device=device) for name, side in sides.items()
        }

    def step(self, state: dict[str, Tensor], grads: Tensor, tick: Tick) -> Tensor:
        """Phase 1: (E1) and AdamW. Phase 2: (E1), (U11), the ramp (U9), and at the end of the step a refresh when due."""
        group = tick.group
        start = self.start(group)
        curvature.accumulate(state["factor"], grads @ grads.mT, (1 - group["rho"]) * tick.finite)
        if tick.step <= start:
            adam_moments(state["exp_avg"], state["exp_avg_sq"], grads, tick.weights)
            direction = adam_direction(state["exp_avg"], state["exp_avg_sq"], tick.bias, group["eps"])
            if tick.step == start:
                self._enter(state, tick)
            return direction
        blend = blend_weight(tick.step, start, group["blend_steps"])
        direction, plain = self._directions(state, grads, tick, blend)
        if (tick.step - start) % group["precond_freq"] == 0:
            self._refresh(state, tick)
        return direction if plain is None else mix(plain, direction, blend)

    def _directions(
        self, state: dict[str, Tensor], grads: Tensor, tick: Tick, blend: float
    ) -> tuple[Tensor, Tensor | None]:
        """(U11) The step in the eigenbasis; during the ramp also AdamW's, from second moments of rank one.

        With ``Gq = Q^T G``, ``P = Gq U`` and ``R = Gq - P U^T``, moments of P and of R, the step is
        ``Q (P_hat / (sqrt(vP_hat) + eps) U^T + R_hat / (sqrt(vR_hat) + eps))``.
        """
        eps, (first, second) = tick.group["eps"], tick.weights
        basis, long_basis = state["vectors"], self._long_basis(state, grads.dtype)
        rotated = basis.mT @ grads
        inside = (rotated @ long_basis).mul_(state["mask"])
        outside = rotated.baddbmm_(inside, long_basis.mT, alpha=-1)
        state["inside_avg"].lerp_(inside, first)
        state["inside_sq"].lerp_(inside.square(), second)
        state["exp_avg"].lerp_(outside, first)
        energy = outside.square_()
        state["row"].lerp_(energy.mean(2, keepdim=True), second)
        state["col"].lerp_(energy.mean(1, keepdim=True), second)
        direction = adam_direction(state["exp_avg"], rank_one(state["row"], state["col"]), tick.bias, eps)
        kept = adam_direction(state["inside_avg"], state["inside_sq"], tick.bias, eps)
        direction = basis @ direction.baddbmm_(kept, long_basis.mT)
        direction = clip_norm(direction, tick.group["tau"])
        if blend == 1.0:
            return direction, None
        energy = grads.square()
        state["adam_row"].lerp_(energy.mean(2, keepdim=True), second)
        state["adam_col"].lerp_(energy.mean(1, keepdim=True), second)
        momentum = self._momentum(state, long_basis)
        return direction, adam_direction(momentum, rank_one(state["adam_row"], state["adam_col"]), tick.bias, eps)

    @staticmethod
    def _momentum(state: dict[str, Tensor], long_basis: Tensor) -> Tensor:
        """The whole momentum in the parameter's own coordinates."""
        return state["vectors"] @ torch.baddbmm(state["exp_avg"], state["inside_avg"], long_basis.mT)

    @staticmethod
    def _long_basis(state: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        if "long_vectors" in state:
            return state["long_vectors"].to(dtype)
        shape = (state["col"].shape[-1], state["mask"].shape[-1])
        return quantization.decode(state["long_codes"], state["long_scales"], shape, dtype)

    def _enter(self, state: dict[str, Tensor], tick: Tick) -> None:
        """End of phase 1: first bases, second moments from the Kronecker product of the two sides' energies."""
        group = tick.group
        momentum, square = state["exp_avg"], state.pop("exp_avg_sq")
        size, r, l = momentum.shape
        fresh = self.create(size, (r, l), momentum.dtype, momentum.device, group, tick.step)
        state |= {name: field for name, field in fresh.items() if name not in PHASE_ONE}
        state["vectors"] += torch.eye(r, dtype=momentum.dtype, device=momentum.device)
        state["adam_row"].copy_(square.mean(2, keepdim=True))
        state["adam_col"].copy_(square.mean(1, keepdim=True))
        self._refresh(state, tick)
        # The Kronecker product of the two sides' spectra is the best guess at the energies in the new coordinates.
        row = curvature.debias(state["factor_values"][..., None], group["rho"], tick.count)
        row = row * tick.bias[1] / l
        row = torch.where(row.sum(1, keepdim=True) > 0, row, state["adam_row"])
        values = state["long_values"][:, None, :]
        share = state["mask"] * values / (values.sum(-1, keepdim=True) + state["long_tail"][:, None, None]).clamp_min(
            torch.finfo(values.dtype).tiny
        )
        left = (1 - share.sum(-1, keepdim=True)).clamp_min(0.05)
        state["inside_sq"].copy_(row * l * share)
        state["row"].copy_(row * left)
        state["col"].copy_(state["adam_col"] * left)

    def _refresh(self, state: dict[str, Tensor], tick: Tick) -> None:
        """(E6) for the long side, an eigendecomposition for the small one; momentum and second moments move along.

        A decomposition that fails leaves that basis as it is. A matrix whose gradient is not finite keeps everything.
        """
        group, dtype = tick.group, state["exp_avg"].dtype
        old_basis, old_long, old_mask = state["vectors"], self._long_basis(state, dtype), state["mask"]
        momentum = self._momentum(state, old_long)
        size, k = state["long_values"].shape
        decomposition = curvature.eigh(state["factor"], torch.zeros_like(tick.count[:, 0, 0]))
        factor_values, basis = (state["factor_values"], old_basis) if decomposition is None else decomposition
        decay = group["rho"] ** group["precond_freq"]
        found = curvature.sketch(old_long, state["long_values"], momentum / tick.bias[0], decay)
        if found is None:
            long_basis, values, lost = old_long, state["long_values"], torch.zeros_like(state["long_tail"])
        else:
            long_basis, values, lost = found
        tail = decay * state["long_tail"] + lost
        rank = curvature.adaptive_rank(
            values, values.sum(-1) + tail, group["epsilon_sparse"], group["k_min"], group["k_max"]
        )
        mask = (torch.arange(k, device=rank.device) < rank[:, None]).to(dtype)[:, None, :]
        mask = mask * (values > 0)[:, None, :]
        # The share of each new direction that lay in the old ones; the rest was residual.
        overlap = ((long_basis * mask).mT @ (old_long * old_mask)).square()
        unseen = (mask.mT - overlap.sum(-1, keepdim=True)).clamp(0, 1).mT
        row = curvature.transport(state["row"], basis, old_basis)
        inside_sq = curvature.transport(state["inside_sq"], basis, old_basis) @ overlap.mT + row * unseen
        rotated = basis.mT @ momentum
        inside = (rotated @ long_basis) * mask
        fresh = {
            "vectors": basis,
            "factor_values": factor_values,
            "long_values": values,
            "long_tail": tail,
            "mask": mask,
            "row": row,
            "inside_sq": inside_sq,
            "inside_avg": inside,
            "exp_avg": torch.baddbmm(rotated, inside, long_basis.mT, alpha=-1),
        }
        if "long_vectors" in state:
            fresh["long_vectors"] = long_basis.to(state["long_vectors"].dtype)
        else:
            fresh["long_codes"], fresh["long_scales"] = quantization.encode(long_basis, seed=tick.step)
        update_finite(state, fresh, tick)

    def summary(self, state: dict[str, Tensor], group: dict[str, Any]) -> dict[str, Tensor]:
        """Rank and captured mass of the long side; the curvature norm is that of the small side's factor."""
        norm = torch.linalg.vector_norm(state["factor"], dim=(1, 2))
        if "mask" not in state:
            return {"rank": torch.zeros_like(norm), "captured_mass": torch.zeros_like(norm), "curvature_norm": norm}
        held = (state["long_values"] * state["mask"][:, 0]).sum(-1)
        total = state["long_values"].sum(-1) + state["long_tail"]
        mass = held / total.clamp_min(torch.finfo(total.dtype).tiny)
        return {"rank": state["mask"].sum((1, 2)), "captured_mass": mass, "curvature_norm": norm}

    def start(self, group: dict[str, Any]) -> int:
        """(U1)."""
        return curvature_start(group["warmup_steps"], group["min_precond_updates"], group["precond_freq"])

    def kind(self, name: str) -> str:
        """Kind of a field."""
        if name == "factor":
            return "curvature"
        return "bases" if name in ("vectors", "factor_values", "mask") or name.startswith("long_") else "moments"
