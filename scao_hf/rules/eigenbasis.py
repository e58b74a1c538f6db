"""SCAO's rule: Adam in a truncated Kronecker eigenbasis.

The small side has the whole eigenbasis Q of its curvature L, the long side the k leading directions U of a sketch. In
Q's coordinates the gradient's part inside U and the residual outside it each have momentum and second moment of their
own; the residual's second moment is of rank one. State in phase 2: the residual's momentum (as large as the
parameter), U in bfloat16 (or int8) and terms of size r x r, r x k and l.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from scao_hf import curvature, ops, quantization, refresh
from scao_hf.rules.rule import CODES, FACTOR, FINITE, NOT_NEGATIVE, SHARE, VECTORS, Legal, Tick, update_finite
from scao_hf.update import (
    adam_direction,
    adam_moments,
    blend_weight,
    cautious,
    clip_norm,
    curvature_start,
    damping_of,
    eigenbasis_direction,
    mix,
    rank_one_direction,
)

PHASE_ONE = ("exp_avg", "exp_avg_sq", "factor")
#: What ``ops.eigenbasis_step_`` takes, in its order.
FUSED = (
    "exp_avg",
    "factor",
    "inside_avg",
    "inside_sq",
    "row",
    "col",
    "taken",
    "level",
    "vectors",
    "mask",
    "gain",
    "long_vectors",
    "agreement",
)
#: What the fields of ``Eigenbasis.create`` can hold.
LEGAL: Mapping[str, Legal] = {
    "exp_avg": FINITE,
    "exp_avg_sq": NOT_NEGATIVE,
    "factor": FACTOR,
    "row": NOT_NEGATIVE,
    "col": NOT_NEGATIVE,
    "gain": Legal(1 / refresh.MOST_GAIN, refresh.MOST_GAIN),
    "agreement": SHARE,
    "inside_avg": FINITE,
    "inside_sq": NOT_NEGATIVE,
    "mask": Legal(0, 1, whole=True),
    "vectors": VECTORS,
    "factor_values": NOT_NEGATIVE,
    "long_values": NOT_NEGATIVE,
    "long_tail": NOT_NEGATIVE,
    "long_vectors": VECTORS,
    "long_codes": CODES,
    "long_scales": NOT_NEGATIVE,
}

#: A refresh works on as many matrices at a time as have this many entries: its intermediates stay in a CPU's caches, and
#: take little of a GPU's memory, which wants few and large operations.
PORTION, PORTION_ELSEWHERE = 2**20, 2**23


def _portions(stack: Tensor, rows: slice | None = None) -> Iterator[slice]:
    """Cut a stack ``[N, r, l]``, or those ``rows`` of it, into runs of matrices of about ``PORTION`` entries."""
    portion = PORTION if stack.device.type == "cpu" else PORTION_ELSEWHERE
    count = max(1, portion // stack[0].numel())
    first, last = (rows.start, rows.stop) if rows else (0, len(stack))
    for start in range(first, last, count):
        yield slice(start, min(start + count, last))


class Eigenbasis:
    """Phase 1 holds AdamW's state and L; the last step of phase 1 trades ``exp_avg_sq`` for the bases."""

    cut_sides = 1
    takes_turns = True
    legal = LEGAL

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
            sides |= {"row": (r, 1), "col": (1, l), "gain": (), "agreement": ()}
            sides |= {"inside_avg": (r, k), "inside_sq": (r, k), "mask": (1, k)}
            sides |= {"vectors": (r, r), "factor_values": (r,), "long_values": (k,), "long_tail": ()}
            if group["use_int8_ema"]:
                codes, scales = quantization.encoded_shapes(size, l * k)
                sides |= {"long_codes": codes[1:], "long_scales": scales[1:]}
                dtypes = {"long_codes": torch.int8, "long_scales": torch.float32}
            else:
                sides["long_vectors"] = (k, l)
                dtypes["long_vectors"] = torch.bfloat16 if dtype == torch.float32 else dtype
        return {
            name: torch.zeros(size, *side, dtype=dtypes.get(name, dtype), device=device) for name, side in sides.items()
        }

    def step(self, state: dict[str, Tensor], grads: Tensor, tick: Tick) -> Tensor:
        """Phase 1: (E1) and AdamW. Phase 2: (E1), (U11), the ramp (U9), and then the refreshes that are due."""
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
        # A CPU works on a few matrices at a time, which stay in its caches; a GPU on all.
        cuts = _portions(grads) if grads.device.type == "cpu" else (slice(None),)
        for rows in cuts:
            part, now = {name: field[rows] for name, field in state.items()}, tick.part(rows)
            grads[rows] = self._direction(part, grads[rows], now, blend)
        if tick.due.start < tick.due.stop:
            self._refresh(state, tick.finite[:, 0, 0], tick.step, group, tick.due)
        return grads

    def fused(
        self,
        state: dict[str, Tensor],
        params: list[Tensor],
        grads: list[Tensor],
        step: int,
        group: dict[str, Any],
        due: slice,
    ) -> bool:
        """Phase 1, and phase 2 once the ramp is over, unless an option asks for what the kernel does not do."""
        start = self.start(group)
        since = step - start
        if since <= 0:
            able = ops.has("adamw_step_", state["exp_avg"])
        else:
            able = blend_weight(step, start, group["blend_steps"]) == 1.0 and group["tau"] is None
            able = able and "long_vectors" in state
            able = able and ops.has("eigenbasis_step_", state["exp_avg"], state["long_vectors"])
        if not able:
            return False
        refresh = since == 0 or due.start < due.stop
        before = state["taken"].clone() if refresh else state["taken"]
        if since <= 0:
            fields = (state[name] for name in (*PHASE_ONE, "taken", "level"))
            ops.adamw_step_(params, grads, *fields, *ops.numbers(group))
        else:
            fields = (state[name] for name in FUSED)
            ops.eigenbasis_step_(params, grads, *fields, group["cautious"], *ops.numbers(group), state.get("activity"))
        if refresh:
            finite = state["taken"] - before
            if since:
                self._refresh(state, finite, step, group, due)
            else:
                self._enter(state, Tick.of(step, state["taken"][:, None, None], finite[:, None, None], group, due))
        return True

    def _direction(self, state: dict[str, Tensor], grads: Tensor, tick: Tick, blend: float) -> Tensor:
        """(U11) at the size (U13), cautious (U16), bounded by (U8); in the ramp also AdamW's step, from moments of rank one."""
        eps = tick.group["eps"]
        long_basis = self._long_basis(state, grads.dtype).to(grads.dtype)
        row = refresh.plain_row(state, tick.count, tick.bias[1], tick.group["rho"])
        damping = damping_of(row)
        direction = eigenbasis_direction(state, grads, long_basis, damping, tick.weights, tick.bias, eps)
        direction = direction.mul_(state["gain"][:, None, None])
        if tick.group["cautious"]:
            direction = cautious(direction, grads, state["agreement"])
        direction = clip_norm(direction, tick.group["tau"])
        if blend == 1.0:
            return direction
        momentum = state["vectors"] @ torch.baddbmm(state["exp_avg"], state["inside_avg"], long_basis)
        col = state["col"] + state["inside_sq"].mean(1, keepdim=True) @ long_basis.square()
        return mix(rank_one_direction(momentum, row, col, damping, tick.bias, eps), direction, blend)

    @staticmethod
    def _long_basis(state: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """U^T, ``[N, k, l]``, in bfloat16 where it is stored so."""
        if "long_vectors" in state:
            return state["long_vectors"]
        shape = (state["mask"].shape[-1], state["col"].shape[-1])
        return quantization.decode(state["long_codes"], state["long_scales"], shape, dtype).contiguous()

    def _enter(self, state: dict[str, Tensor], tick: Tick) -> None:
        """End of phase 1: first bases, second moments from the Kronecker product of the two sides' energies."""
        momentum = state["exp_avg"]
        size, r, l = momentum.shape
        fresh = self.create(size, (r, l), momentum.dtype, momentum.device, tick.group, tick.step)
        fresh = {**state, **{name: field for name, field in fresh.items() if name not in PHASE_ONE}}
        square = fresh.pop("exp_avg_sq")
        fresh["exp_avg"] = momentum.clone()
        fresh["vectors"] += torch.eye(r, dtype=momentum.dtype, device=momentum.device)
        fresh["gain"] += 1
        fresh["agreement"] += 1
        for rows in _portions(momentum):
            part = {name: field[rows] for name, field in fresh.items()}
            self._turn(part, tick.part(rows), square[rows])
        # Nothing of the state has been changed so far: what raises leaves the optimizer in phase 1.
        momentum.copy_(fresh.pop("exp_avg"))
        del state["exp_avg_sq"]
        state |= fresh

    def _refresh(self, state: dict[str, Tensor], finite: Tensor, step: int, group: dict[str, Any], due: slice) -> None:
        """New bases for the matrices that are due, and the size of the steps that are taken in them.

        Args:
            state: of the whole stack.
            finite: 0 for a matrix that stays as it is, ``[N]``.
            step, group, due: as in ``Tick``.
        """
        moments = state["exp_avg"]
        if "long_vectors" in state and ops.refreshes(moments, state["long_vectors"]):
            fields = (state[name] for name in refresh.FIELDS)
            settings = self._settings(step, group)
            # As a list, which costs no operation.
            failed = ops.eigenbasis_refresh_(
                *fields, finite, due.start, due.stop, *settings, state.get("activity")
            ).tolist()
            portions = [slice(row, row + 1) for row, bad in enumerate(failed, due.start) if bad]
        else:
            portions = list(_portions(moments, due))
        for rows in portions:
            part = {name: field[rows] for name, field in state.items()}
            columns = part["taken"][:, None, None], finite[rows, None, None]
            self._turn(part, Tick.of(step, *columns, group, due))

    def _turn(self, state: dict[str, Tensor], tick: Tick, square: Tensor | None = None) -> None:
        """Refresh all matrices of a state; ``square``: AdamW's second moment, for the first refresh."""
        moments = state["exp_avg"]
        long_basis = self._long_basis(state, moments.dtype)
        settings = self._settings(tick.step, tick.group)
        whole = {**state, "long_vectors": long_basis}
        refresh.renew(whole, tick.count, tick.finite, tick.bias, settings, ops.tools(moments, long_basis), square)
        if "long_vectors" not in state:
            codes, scales = quantization.encode(long_basis, seed=tick.step)
            update_finite(state, {"long_codes": codes, "long_scales": scales}, tick)

    def _settings(self, step: int, group: dict[str, Any]) -> refresh.Settings:
        # Matrices take turns (S1), so that the first refresh comes after fewer steps than the others.
        decay = group["rho"] ** min(group["precond_freq"], step - self.start(group))
        first, second = group["betas"]
        limits = group["epsilon_sparse"], group["k_min"], group["k_max"]
        return refresh.Settings(first, second, group["eps"], group["rho"], decay, *limits)

    def summary(self, state: dict[str, Tensor], group: dict[str, Any]) -> dict[str, Tensor]:
        """Rank and captured mass of the long side; the curvature norm is that of the small side's factor.

        Nothing is added to the factor here; ``damped`` are the matrices whose steps' size (U13) is held at its bound.
        """
        norm = torch.linalg.vector_norm(state["factor"], dim=(1, 2))
        if "mask" not in state:
            none = torch.zeros_like(norm)
            return {"rank": none, "captured_mass": none, "curvature_norm": norm, "damped": none}
        held = (state["long_values"] * state["mask"][:, 0]).sum(-1)
        total = state["long_values"].sum(-1) + state["long_tail"]
        mass = held / total.clamp_min(torch.finfo(total.dtype).tiny)
        gain = state["gain"]
        damped = ((gain <= 1 / refresh.MOST_GAIN) | (gain >= refresh.MOST_GAIN)).to(norm.dtype)
        return {"rank": state["mask"].sum((1, 2)), "captured_mass": mass, "curvature_norm": norm, "damped": damped}

    def start(self, group: dict[str, Any]) -> int:
        """(U1)."""
        return curvature_start(group["warmup_steps"], group["min_precond_updates"], group["precond_freq"])

    def kind(self, name: str) -> str:
        """Kind of a field."""
        if name == "factor":
            return "curvature"
        return "bases" if name in ("vectors", "factor_values", "mask") or name.startswith("long_") else "moments"
