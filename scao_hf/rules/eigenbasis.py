"""SCAO's rule: Adam in a truncated Kronecker eigenbasis.

The small side has the whole eigenbasis Q of its curvature L, the long side the k leading directions U of a sketch. In
Q's coordinates the gradient's part inside U and the residual outside it each have momentum and second moment of their
own; the residual's second moment is of rank one. State in phase 2: the residual's momentum (as large as the
parameter), U in bfloat16 (or int8) and terms of size r x r, r x k and l.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from scao_hf import ops, quantization
from scao_hf.buckets import Bucket
from scao_hf.rules.adamw import step_adamw
from scao_hf.rules.base import (
    COUNTERS,
    FACTOR,
    NOT_NEGATIVE,
    SHARE,
    VECTORS,
    Field,
    Legal,
    Rule,
    Step,
    accumulate,
    blend_weight,
    clip_norm,
    curvature_start,
    mix,
)
from scao_hf.rules.eigenbasis_refresh import (
    MOST_GAIN,
    all_or_nothing,
    bounded_direction,
    damping_of,
    plain_row,
    rank_one_direction,
    refresh,
)

#: A step works on as many matrices at a time as have this many entries: its intermediates stay in a CPU's caches, and
#: take little of a GPU's memory, which wants few and large operations.
PORTION, PORTION_ELSEWHERE = 2**20, 2**23


class Eigenbasis(Rule):
    """Phase 1 holds AdamW's state and L; the last step of phase 1 trades ``exp_avg_sq`` for the bases."""

    cut_sides = 1
    staggered = True
    name = "eigenbasis"
    fields: ClassVar[Mapping[str, Field]] = {
        "exp_avg": Field("r l", levels=2),  # momentum; in phase 2 the residual's
        "exp_avg_sq": Field("r l", legal=NOT_NEGATIVE, levels=4, phase=1),
        "factor": Field("r r", "curvature", FACTOR),  # L
        "inside_avg": Field("r k", levels=2, phase=2),  # moments of the part inside U
        "inside_sq": Field("r k", legal=NOT_NEGATIVE, levels=4, phase=2),
        "row": Field("r 1", legal=NOT_NEGATIVE, phase=2),  # second moment of the residual (U10)
        "col": Field("1 l", legal=NOT_NEGATIVE, levels=4, phase=2),
        "vectors": Field("r r", "bases", VECTORS, phase=2),  # Q
        "mask": Field("1 k", "bases", Legal(0, 1, whole=True), phase=2),  # 1 for a direction of U that is kept (E4)
        "gain": Field("", legal=Legal(1 / MOST_GAIN, MOST_GAIN), phase=2, fill=1),  # (U13)
        "agreement": Field("", legal=SHARE, phase=2, fill=1),  # (U16)
        "factor_values": Field("r", "bases", NOT_NEGATIVE, phase=2),  # eigenvalues of L
        "long_values": Field("k", "bases", NOT_NEGATIVE, phase=2),  # of the sketch (E6), and the mass it has discarded
        "long_tail": Field("", "bases", NOT_NEGATIVE, phase=2),
        "long_vectors": Field("k l", "bases", VECTORS, phase=2, bfloat16=True, int8="long"),  # U^T
    }
    #: What the kernels of phase 2 take, in their order (csrc/state.h).
    native_fields = (
        "taken", "level", "exp_avg", "factor", "inside_avg", "inside_sq", "row", "col", "vectors", "mask", "gain", "agreement",
        "long_vectors",
    )  # fmt: skip

    def step(self, step: Step) -> None:
        """Phase 1: (E1) and AdamW. Phase 2: (E1), (U11), the ramp (U9), and then the refreshes that are due."""
        start = self.phase1_steps(step.group)
        if step.number <= start:
            step_adamw(step, refreshes=step.number == start)
            if step.number == start:
                try:
                    self._enter(step)
                except BaseException:
                    step.uncount()  # the last step of phase 1 is still to come
                    raise
            return
        state, group, refreshes = step.state, step.group, step.due.start < step.due.stop
        blend = blend_weight(step.number, start, group["blend_steps"])
        ramp = () if blend == 1.0 else (blend,)
        native = group["tau"] is None and (not ramp or state["exp_avg"].device.type in ops.RAMPS)
        if native and step.is_native("eigenbasis_step_", "long_vectors"):
            fields = [state[name] for name in (*self.native_fields, "activity") if name in state]
            step.run_native(ops.eigenbasis_step_, fields, group["cautious"], refreshes=refreshes, more=ramp)
        else:
            grads = step.gradients()
            accumulate(state["factor"], grads @ grads.mT, step.curvature_weight)
            # A CPU works on a few matrices at a time, which stay in its caches; a GPU on all.
            for rows in _portions(grads) if grads.device.type == "cpu" else (slice(None),):
                grads[rows] = self._direction(step.part(rows), grads[rows], blend)
            step.write(grads)
        if refreshes:
            self._refresh(step)

    def _direction(self, step: Step, grads: Tensor, blend: float) -> Tensor:
        """(U11) at the size (U13), cautious (U16), bounded by (U8); in the ramp also AdamW's step, from moments of rank one."""
        state, eps = step.state, step.group["eps"]
        long_basis = _long_basis(state, grads.dtype).to(grads.dtype)
        row = plain_row(step)
        damping = damping_of(row)
        direction = eigenbasis_direction(step, grads, long_basis, damping).mul_(state["gain"][:, None, None])
        if step.group["cautious"]:
            direction = cautious(direction, grads, state["agreement"])
        direction = clip_norm(direction, step.group["tau"])
        if blend == 1.0:
            return direction
        momentum = state["vectors"] @ torch.baddbmm(state["exp_avg"], state["inside_avg"], long_basis)
        col = state["col"] + state["inside_sq"].mean(1, keepdim=True) @ long_basis.square()
        return mix(rank_one_direction(momentum, row, col, damping, step.bias, eps), direction, blend)

    def _enter(self, step: Step) -> None:
        """End of phase 1: first bases, second moments from the Kronecker product of the two sides' energies."""
        momentum = step.state["exp_avg"]
        size, r, l = momentum.shape
        fresh = self.create(size, (r, l), momentum.dtype, momentum.device, step.group, step.number)
        fresh = {**fresh, **{name: step.state[name] for name in (*COUNTERS, "factor") if name in step.state}}
        fresh["exp_avg"] = momentum.clone()
        fresh["vectors"] += torch.eye(r, dtype=momentum.dtype, device=momentum.device)
        whole = replace(step, state=fresh)
        for rows in _portions(momentum):
            self._refresh_portion(whole.part(rows), step.state["exp_avg_sq"][rows])
        # No basis of the state has been changed so far: what raises leaves the optimizer in phase 1.
        momentum.copy_(fresh.pop("exp_avg"))
        del step.state["exp_avg_sq"]
        step.state |= fresh

    def _refresh(self, step: Step) -> None:
        """New bases for the matrices that are due, and the size of the steps that are taken in them."""
        for rows in _portions(step.state["exp_avg"], step.due):
            part = step.part(rows)
            with all_or_nothing(part.state):
                self._refresh_portion(part)

    def _refresh_portion(self, step: Step, square: Tensor | None = None) -> None:
        """Refresh all matrices of a step; ``square``: AdamW's second moment, for the first refresh."""
        long_basis = _long_basis(step.state, step.state["exp_avg"].dtype)
        refresh(step, long_basis, self._decay(step), square)
        if "long_vectors" not in step.state:
            codes, scales = quantization.encode(long_basis, seed=step.number)
            step.update({"long_codes": codes, "long_scales": scales})

    def _decay(self, step: Step) -> float:
        """What the old long basis is worth. The first refresh (S1) comes after fewer steps than the others."""
        decay: float = step.group["rho"] ** min(step.group["precond_freq"], step.number - self.phase1_steps(step.group))
        return decay

    def figures(self, bucket: Bucket) -> dict[str, Tensor]:
        """Rank and captured mass of the long side; the curvature norm is that of the small side's factor.

        Nothing is added to the factor here; ``damped`` are the matrices whose steps' size (U13) is held at its bound.
        """
        state = bucket.state
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

    def phase1_steps(self, group: dict[str, Any]) -> int:
        """(U1) The warm-up, or what it takes until ``min_precond_updates`` refreshes were possible."""
        return curvature_start(group["warmup_steps"], group["min_precond_updates"], group["precond_freq"])


def _portions(stack: Tensor, rows: slice | None = None) -> Iterator[slice]:
    """Cut a stack ``[N, r, l]``, or those ``rows`` of it, into runs of matrices of about ``PORTION`` entries."""
    portion = PORTION if stack.device.type == "cpu" else PORTION_ELSEWHERE
    count = max(1, portion // stack[0].numel())
    first, last = (rows.start, rows.stop) if rows else (0, len(stack))
    for start in range(first, last, count):
        yield slice(start, min(start + count, last))


def _long_basis(state: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """U^T, ``[N, k, l]``, in bfloat16 where it is stored so."""
    if "long_vectors" in state:
        return state["long_vectors"]
    shape = (state["mask"].shape[-1], state["col"].shape[-1])
    return quantization.decode(state["long_codes"], state["long_scales"], shape, dtype).contiguous()


def eigenbasis_direction(step: Step, grads: Tensor, long_basis: Tensor, damping: Tensor) -> Tensor:
    """(U11) Update the moments in the eigenbasis and return the step, in the parameter's coordinates.

    With ``Gq = Q^T G``, ``P = Gq U`` and ``R = Gq - P U^T``, moments of P and of R, the step is
    ``Q (P_hat / (sqrt(vP_hat) + eps) U^T + R_hat / (sqrt(vR_hat) + eps))``, both quotients damped (U14) and within 1.

    Args:
        step: its state has the moments ``exp_avg`` of R, ``row`` and ``col``, ``inside_avg`` and ``inside_sq`` of P, all
            changed in place; Q in ``vectors`` and the ``mask`` of U's columns.
        grads: G, ``[N, r, l]``.
        long_basis: U^T, ``[N, k, l]``.
        damping: (U14).
    """
    state, bias, eps, (first, second) = step.state, step.bias, step.group["eps"], step.weights
    basis = state["vectors"]
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
