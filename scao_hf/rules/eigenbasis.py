"""SCAO's rule: Adam in a truncated Kronecker eigenbasis.

The small side has the whole eigenbasis Q of its curvature L, the long side the k leading directions U of a sketch. In
Q's coordinates the gradient's part inside U and the residual outside it each have momentum and second moment of their
own; the residual's second moment is of rank one. State in phase 2: the residual's momentum (as large as the
parameter), U in bfloat16 (or int8) and terms of size r x r, r x k and l.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scao_hf import curvature, ops, quantization
from scao_hf.rules.rule import Tick, update_finite
from scao_hf.update import (
    adam_direction,
    adam_moments,
    blend_weight,
    cautious,
    clip_norm,
    curvature_start,
    eigenbasis_direction,
    least_square,
    mix,
    rank_one_direction,
    turn,
)

#: Bound on (U13), either way.
MOST_GAIN = 2.0
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

#: A refresh works on as many matrices at a time as have this many entries: its many intermediates then stay small.
PORTION = 2**20


def _portions(shape: torch.Size) -> Iterator[slice]:
    """Cut a stack ``[N, r, l]`` into runs of matrices of about ``PORTION`` entries."""
    count = max(1, PORTION // (shape[1] * shape[2]))
    for first in range(0, shape[0], count):
        yield slice(first, first + count)


class Eigenbasis:
    """Phase 1 holds AdamW's state and L; the last step of phase 1 trades ``exp_avg_sq`` for the bases."""

    split_long_side = False
    takes_turns = True

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
        cuts = _portions(grads.shape) if grads.device.type == "cpu" else (slice(None),)
        for rows in cuts:
            part, now = {name: field[rows] for name, field in state.items()}, tick.part(rows)
            grads[rows] = self._direction(part, grads[rows], now, blend)
        if tick.due.start < tick.due.stop:
            self._refresh(state, tick)
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
            ops.eigenbasis_step_(params, grads, *fields, group["cautious"], *ops.numbers(group))
        if refresh:
            tick = Tick.of(step, state["taken"][:, None, None], (state["taken"] - before)[:, None, None], group, due)
            (self._refresh if since else self._enter)(state, tick)
        return True

    def _direction(self, state: dict[str, Tensor], grads: Tensor, tick: Tick, blend: float) -> Tensor:
        """(U11) at the size (U13), cautious (U16), bounded by (U8); in the ramp also AdamW's step, from moments of rank one."""
        eps = tick.group["eps"]
        long_basis = self._long_basis(state, grads.dtype).to(grads.dtype)
        direction = eigenbasis_direction(state, grads, long_basis, tick.weights, tick.bias, eps)
        direction = direction.mul_(state["gain"][:, None, None])
        if tick.group["cautious"]:
            direction = cautious(direction, grads, state["agreement"], tick.finite)
        direction = clip_norm(direction, tick.group["tau"])
        if blend == 1.0:
            return direction
        momentum = state["vectors"] @ torch.baddbmm(state["exp_avg"], state["inside_avg"], long_basis)
        # The momentum comes out of the eigenbasis with the rounding errors of the largest row in all: (U14) for each.
        least = momentum.square().mean(2, keepdim=True).mul_(least_square(tick.group["betas"]))
        row = torch.maximum(self._plain_row(state, tick), least)
        col = state["col"] + state["inside_sq"].mean(1, keepdim=True) @ long_basis.square()
        return mix(rank_one_direction(momentum, row, col, tick.bias, eps), direction, blend)

    @staticmethod
    def _plain_row(state: dict[str, Tensor], tick: Tick) -> Tensor:
        """(U12) Mean over l of AdamW's second moment, worked out from L's diagonal, ``[N, r, 1]``."""
        diagonal = state["factor"].diagonal(dim1=1, dim2=2)[..., None]
        return curvature.debias(diagonal, tick.group["rho"], tick.count) * (tick.bias[1] / state["exp_avg"].shape[-1])

    @staticmethod
    def _lift(state: dict[str, Tensor]) -> Tensor:
        """What makes the whole momentum, in the parameter's own coordinates, of ``Z = [U^T; M]``: ``Q [N, I]``."""
        return torch.cat([state["vectors"] @ state["inside_avg"], state["vectors"]], -1)

    @staticmethod
    def _long_basis(state: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """U^T, ``[N, k, l]``, in bfloat16 where it is stored so."""
        if "long_vectors" in state:
            return state["long_vectors"]
        shape = (state["mask"].shape[-1], state["col"].shape[-1])
        return quantization.decode(state["long_codes"], state["long_scales"], shape, dtype).contiguous()

    def _enter(self, state: dict[str, Tensor], tick: Tick) -> None:
        """End of phase 1: first bases, second moments from the Kronecker product of the two sides' energies."""
        square, momentum = state.pop("exp_avg_sq"), state["exp_avg"]
        size, r, l = momentum.shape
        fresh = self.create(size, (r, l), momentum.dtype, momentum.device, tick.group, tick.step)
        state |= {name: field for name, field in fresh.items() if name not in PHASE_ONE}
        state["vectors"] += torch.eye(r, dtype=momentum.dtype, device=momentum.device)
        state["gain"] += 1
        state["agreement"] += 1
        for rows in _portions(momentum.shape):
            part = {name: field[rows] for name, field in state.items()}
            self._turn(part, tick.part(rows), square[rows])

    def _refresh(self, state: dict[str, Tensor], tick: Tick) -> None:
        """New bases for the matrices that are due, and the size of the steps that are taken in them."""
        due = {name: field[tick.due] for name, field in state.items()}
        moment = tick.part(tick.due)
        for rows in _portions(due["exp_avg"].shape):
            self._turn({name: field[rows] for name, field in due.items()}, moment.part(rows))

    def _turn(self, state: dict[str, Tensor], tick: Tick, square: Tensor | None = None) -> None:
        """New bases, momentum and second moments in them, and (U13), the size of the steps until the next refresh.

        (U13) is the ratio of AdamW's norm to the steps' own, measured in the new bases, which are fitted to the momentum:
        it is above one where the step is a few leading directions. The bound keeps the steps that follow, with more of
        fresh gradients in them, within twice the size.

        Args:
            state: of the matrices to be refreshed.
            tick: the same matrices' moment.
            square: AdamW's second moment, for the first refresh.
        """
        eps, bias, moments = tick.group["eps"], tick.bias, state["exp_avg"]
        long_basis = self._long_basis(state, moments.dtype)
        native = ops.has("eigenbasis_turn_", moments, long_basis)
        gram = (ops.eigenbasis_gram if native else curvature.gram)(moments, long_basis)
        coefficients = self._small(state, gram, tick)
        if square is not None:
            self._first_squares(state, square, tick)
        least = least_square(tick.group["betas"])
        held = torch.maximum(state["inside_sq"], state["inside_avg"].square().mul_(least))
        update_finite(state, {"inside_sq": held}, tick)
        arguments = coefficients, self._plain_row(state, tick), state["inside_sq"].mean(1, keepdim=True)
        fields = moments, long_basis, state["row"], state["col"]
        if native:
            flat = (*(part.flatten() for part in bias), tick.finite.flatten())
            norms = ops.eigenbasis_turn_(*fields, *arguments, *flat, least, eps)
        else:
            norms = turn(*fields, *arguments, bias, tick.finite, least, eps)
        fresh = {}
        if "long_vectors" not in state:
            fresh["long_codes"], fresh["long_scales"] = quantization.encode(long_basis, seed=tick.step)
        inside = adam_direction(state["inside_avg"], state["inside_sq"], bias, eps)
        own = norms[:, 1] + inside.square().sum((1, 2))
        gain = (norms[:, 0] / own.clamp_min(torch.finfo(own.dtype).tiny)).sqrt()
        fresh["gain"] = torch.where(own > 0, gain, 1.0).clamp(1 / MOST_GAIN, MOST_GAIN)
        update_finite(state, fresh, tick)

    def _small(self, state: dict[str, Tensor], gram: Tensor, tick: Tick) -> Tensor:
        """All of a refresh but the long side: (E6), an eigendecomposition for the small side, everything that moves along.

        A decomposition that fails leaves that basis as it is. A matrix whose gradient is not finite keeps everything.

        Args:
            gram: of the rows of ``Z = [U^T; M]``.

        Returns:
            What ``turn`` makes of Z, ``[N, r + k + r, k + r]``.
        """
        group, (r, k) = tick.group, state["inside_avg"].shape[1:]
        old_basis, l = state["vectors"], state["col"].shape[-1]
        decomposition = curvature.eigh(state["factor"], torch.zeros_like(state["gain"]), ops.eigh)
        factor_values, basis = (state["factor_values"], old_basis) if decomposition is None else decomposition
        # Matrices take turns (S1), so that the first refresh comes after fewer steps than the others.
        decay = group["rho"] ** min(group["precond_freq"], tick.step - self.start(group))
        lift = self._lift(state)
        found = curvature.sketch(gram, state["long_values"], lift / tick.bias[0], decay, ops.eigh)
        if found is None:
            same = torch.eye(k, k + r, dtype=lift.dtype, device=lift.device).expand(len(lift), k, k + r)
            found = same, state["long_values"], torch.zeros_like(state["long_tail"])
        long_basis, values, lost = found
        tail = decay * state["long_tail"] + lost
        rank = curvature.adaptive_rank(
            values, values.sum(-1) + tail, group["epsilon_sparse"], group["k_min"], group["k_max"]
        )
        mask = (torch.arange(k, device=rank.device) < rank[:, None]) & (values > 0)
        mask = mask[:, None, :].to(values.dtype)
        # The share of each new direction that lay in the old ones; the rest was residual.
        across = long_basis @ gram
        overlap = (across[:, :, :k] * mask.mT * state["mask"]).square()
        unseen = (mask.mT - overlap.sum(-1, keepdim=True)).clamp(0, 1).mT
        row = curvature.transport(state["row"], basis, old_basis)
        moved = curvature.transport(state["inside_sq"], basis, old_basis)
        energy = moved.sum(-1, keepdim=True) + l * row
        share, _ = curvature.shares(values, tail, mask)
        turned = basis.mT @ lift
        inside = (turned @ across.mT) * mask
        fresh = {
            "vectors": basis,
            "factor_values": factor_values,
            "long_values": values,
            "long_tail": tail,
            "mask": mask,
            "row": row,
            "inside_sq": moved @ overlap.mT + energy * share * unseen,
            "inside_avg": inside,
        }
        update_finite(state, fresh, tick)
        return torch.cat([turned - inside @ long_basis, long_basis, lift], 1)

    @staticmethod
    def _first_squares(state: dict[str, Tensor], square: Tensor, tick: Tick) -> None:
        """The second moments at the end of phase 1, from AdamW's."""
        l = square.shape[-1]
        row = curvature.debias(state["factor_values"][..., None], tick.group["rho"], tick.count) * tick.bias[1] / l
        row = torch.where(row.sum(1, keepdim=True) > 0, row, square.mean(2, keepdim=True))
        share, rest = curvature.shares(state["long_values"], state["long_tail"], state["mask"])
        state["inside_sq"].copy_(row * l * share)
        state["row"].copy_(row * rest)
        state["col"].copy_(square.mean(1, keepdim=True) * rest)

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
        damped = ((gain <= 1 / MOST_GAIN) | (gain >= MOST_GAIN)).to(norm.dtype)
        return {"rank": state["mask"].sum((1, 2)), "captured_mass": mass, "curvature_norm": norm, "damped": damped}

    def start(self, group: dict[str, Any]) -> int:
        """(U1)."""
        return curvature_start(group["warmup_steps"], group["min_precond_updates"], group["precond_freq"])

    def kind(self, name: str) -> str:
        """Kind of a field."""
        if name == "factor":
            return "curvature"
        return "bases" if name in ("vectors", "factor_values", "mask") or name.startswith("long_") else "moments"
