"""SCAO's rule: Adam in a truncated Kronecker eigenbasis.

The small side has the whole eigenbasis Q of its curvature L, the long side the k leading directions U of a sketch. In
Q's coordinates the gradient's part inside U and the residual outside it each have momentum and second moment of their
own; the residual's second moment is of rank one. State in phase 2: the residual's momentum (as large as the
parameter), U in bfloat16 (or int8) and terms of size r x r, r x k and l.

In this order: the state and what happens in a step, the step of phase 2, what estimates a second moment in a basis, and a
refresh with its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from scao_hf import ops, quantization
from scao_hf.ops import eigh
from scao_hf.rules.base import (
    COUNTERS,
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
    adaptive_rank,
    all_or_nothing,
    averaged,
    blend_weight,
    clip_norm,
    debias,
    mix,
    step_adamw,
)

#: A refresh works on as many matrices at a time as have this many entries, to bound the memory of its intermediates.
PORTION = 2**23

#: (U14) What is added to estimated second moments, as a share of the energy of all rows, or of the mean of all columns.
DAMPING = 1e-3
#: Bound on (U13), either way.
MOST_GAIN = 2.0


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
            try:
                step_adamw(step, refreshes=step.number == start)
                if step.number == start:
                    self._enter(step)
            except BaseException:
                if step.number == start:
                    step.uncount()  # the last step of phase 1 is still to come
                raise
            return
        state, group, refreshes = step.state, step.group, step.due.start < step.due.stop
        blend = blend_weight(step.number, start, group["blend_steps"])
        ramp = () if blend == 1.0 else (blend,)
        if group["tau"] is None and step.is_native("eigenbasis_step_", "long_vectors"):
            fields = [state[name] for name in (*self.native_fields, "activity") if name in state]
            step.run_native(ops.eigenbasis_step_, fields, group["cautious"], refreshes=refreshes, more=ramp)
        else:
            grads = step.gradients()
            accumulate(state["factor"], grads @ grads.mT, step.curvature_weight)
            step.write(self._direction(step, grads, blend))
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
            refresh(whole.part(rows), step.state["exp_avg_sq"][rows])
        # No basis of the state has been changed so far: what raises leaves the optimizer in phase 1.
        momentum.copy_(fresh.pop("exp_avg"))
        del step.state["exp_avg_sq"]
        step.state |= fresh

    def _refresh(self, step: Step) -> None:
        """New bases for the matrices that are due, and the size of the steps that are taken in them."""
        for rows in _portions(step.state["exp_avg"], step.due):
            part = step.part(rows)
            with all_or_nothing(part.state):
                refresh(part)

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


def _portions(stack: Tensor, rows: slice | None = None) -> Iterator[slice]:
    """Cut a stack ``[N, r, l]``, or those ``rows`` of it, into runs of matrices of about ``PORTION`` entries."""
    count = max(1, PORTION // stack[0].numel())
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
    counted = torch.linalg.vector_norm(products, 0, (1, 2))  # count_nonzero takes several times as long on a CPU
    agrees = products.gt_(0)
    direction.mul_(agrees).div_(agreement.clamp_min(0.5)[:, None, None])
    share = agrees.sum((1, 2)) / counted.clamp_min(1)
    agreement.copy_(torch.where(counted > 0, share, agreement))
    return direction


def plain_row(step: Step) -> Tensor:
    """(U12) Mean over l of AdamW's second moment, worked out from L's diagonal, ``[N, r, 1]``."""
    diagonal = step.state["factor"].diagonal(dim1=1, dim2=2)[..., None]
    held, weight = averaged(step.state, step.count, step.bias[1])
    return debias(diagonal, step.group["rho"], held) * (weight / step.state["exp_avg"].shape[-1])


def damping_of(plain_row: Tensor) -> Tensor:
    """(U14) What is added to every row's second moment: ``1e-3 sum_i v_i``, v_i as in (U12).

    A coordinate with less than that is rounding of the larger ones, from 16-bit gradients, kept bases or int8 moments:
    divided by its own root it would be stepped as far as they are. Columns have 1e-3 of their mean added (U10).

    Args:
        plain_row: v, ``[N, r, 1]``.

    Returns:
        ``[N, 1, 1]``.
    """
    return DAMPING * plain_row.sum(1, keepdim=True)


def bounded_direction(mean: Tensor, square: Tensor, damping: Tensor, bias: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """(U6) with an estimated second moment: damped (U14), and within 1: no mean of squares is below the squared mean."""
    return adam_direction(mean, square + damping, bias, eps).clamp_(-1, 1)


def rank_one_direction(
    mean: Tensor, row: Tensor, col: Tensor, damping: Tensor, bias: tuple[Tensor, Tensor], eps: float
) -> Tensor:
    """(U10) (U6) with a second moment of rank one, ``(row_i + damping) (col_j / mean(col) + 1e-3)``, within 1.

    The moment is never formed: its root is the product of two roots. No mean of squares is below the squared mean, but
    one of rank one may come out so, of a diagonal matrix by a factor of its side.

    Args:
        mean: ``[N, r, l]``.
        row: mean of the squares over the columns, ``[N, r, 1]``.
        col: mean of the squares over the rows, ``[N, 1, l]``.
        damping: (U14).
        bias: bias corrections.
        eps: Adam's.

    Returns:
        Fresh memory.
    """
    rows = (row + damping).sqrt_().mul_(bias[0] / bias[1].sqrt())
    cols = (col / col.mean(2, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)).add_(DAMPING).sqrt_()
    denominator = torch.addcmul(bias[0] * eps, rows, cols)
    return torch.div(mean, denominator, out=denominator).clamp_(-1, 1)


def refresh(step: Step, square: Tensor | None = None) -> None:
    """New bases, momentum and second moments in them, and (U13), the size of the steps until the next refresh. In place.

    Args:
        step: of the matrices to be refreshed, all of them.
        square: AdamW's second moment, for the first refresh.
    """
    moments, group = step.state["exp_avg"], step.group
    long_basis = _long_basis(step.state, moments.dtype)
    # The first refresh in phase 2 (S1) comes after fewer steps than the others.
    decay = group["rho"] ** min(group["precond_freq"], step.number - step.bucket.phase1_steps)
    products = gram(moments, long_basis)
    coefficients = (refresh_bases if moments.device.type == "cpu" else refresh_bases_on_host)(step, products, decay)
    if square is not None:
        first_squares(step, square)
    step.update({"gain": graft_scale(*rotate(step, long_basis, coefficients))})
    if "long_vectors" not in step.state:
        codes, scales = quantization.encode(long_basis, seed=step.number)
        step.update({"long_codes": codes, "long_scales": scales})


def graft_scale(adamw: Tensor, own: Tensor) -> Tensor:
    """(U13) The norm of AdamW's step over the rule's own, both with the same momentum, within a factor of ``MOST_GAIN``.

    Grafting: the rule gives the direction, AdamW the size. The new bases are fitted to the momentum, so that a step of it
    is a few leading directions and smaller than AdamW's. The gradients that follow have more outside of these, and steps
    that are too large without the bound.

    Args:
        adamw, own: squared norms, ``[N]``.
    """
    scale = (adamw / own.clamp_min(torch.finfo(own.dtype).tiny)).sqrt()
    return torch.where(own > 0, scale, 1.0).clamp(1 / MOST_GAIN, MOST_GAIN)


def refresh_bases(step: Step, products: Tensor, decay: float) -> Tensor:
    """All of a refresh but for rows of length l: (E6), an eigendecomposition for the small side, and what moves along.

    A decomposition that fails leaves that basis as it is. A matrix whose gradient is not finite keeps everything.

    Args:
        step: as in ``refresh``.
        products: of the rows of ``Z = [U^T; M]``, as ``gram`` returns them.
        decay: what the old long basis is worth.

    Returns:
        What ``rotate`` makes of Z, ``[N, r + k + r, k + r]``.
    """
    state, group = step.state, step.group
    r, k = state["inside_avg"].shape[1:]
    old_basis, l = state["vectors"], state["col"].shape[-1]
    decomposition = eigh(state["factor"], torch.zeros_like(state["gain"]))
    factor_values, basis = (state["factor_values"], old_basis) if decomposition is None else decomposition
    # What makes the whole momentum, in the parameter's own coordinates, of Z: Q [N, I].
    lift = torch.cat([old_basis @ state["inside_avg"], old_basis], -1)
    found = sketch(products, state["long_values"], lift / step.bias[0], decay)
    if found is None:
        same = torch.eye(k, k + r, dtype=lift.dtype, device=lift.device).expand(len(lift), k, k + r)
        found = same, state["long_values"], torch.zeros_like(state["long_tail"])
    long_basis, values, lost = found
    tail = decay * state["long_tail"] + lost
    rank = adaptive_rank(values, values.sum(-1) + tail, group["epsilon_sparse"], group["k_min"], k)
    mask = (torch.arange(k, device=rank.device) < rank[:, None]) & (values > 0)
    mask = mask[:, None, :].to(values.dtype)
    # The share of each new direction that lay in the old ones; the rest was residual.
    across = long_basis @ products
    overlap = (across[:, :, :k] * mask.mT * state["mask"]).square()
    unseen = (mask.mT - overlap.sum(-1, keepdim=True)).clamp(0, 1).mT
    row = transport(state["row"], basis, old_basis)
    moved = transport(state["inside_sq"], basis, old_basis)
    energy = moved.sum(-1, keepdim=True) + l * row
    share, _ = shares(values, tail, mask)
    rotated = basis.mT @ lift
    inside = (rotated @ across.mT) * mask
    step.update(
        {
            "vectors": basis,
            "factor_values": factor_values,
            "long_values": values,
            "long_tail": tail,
            "mask": mask,
            "row": row,
            "inside_sq": moved @ overlap.mT + energy * share * unseen,
            "inside_avg": inside,
        }
    )
    return torch.cat([rotated - inside @ long_basis, long_basis, lift], 1)


#: What ``refresh_bases`` reads of the state; it changes all but the last two.
READ = (
    "vectors", "factor_values", "long_values", "long_tail", "mask", "row", "inside_sq", "inside_avg", "factor", "gain",
)  # fmt: skip


def refresh_bases_on_host(step: Step, products: Tensor, decay: float) -> Tensor:
    """``refresh_bases`` for matrices on another device: one copy there, which has to be waited for, and one back.

    Batched decompositions on a GPU are slower above side 32 than the copies, wait for the device once or more each, and
    fail in other ways on every backend. Nothing of the state is changed before all of it has worked.
    """
    fields = {name: step.state[name] for name in READ}
    numbers = {"products": products, "finite": step.finite, "taken": step.state["taken"]}
    host = _moved({**fields, **numbers}, torch.device("cpu"))
    there = replace(step, state={**host, "col": step.state["col"]}, finite=host["finite"])
    coefficients = refresh_bases(there, host["products"], decay)
    changed = {name: host[name] for name in READ[:-2]}
    found = _moved({**changed, "coefficients": coefficients}, products.device, waiting=products.device.type == "mps")
    torch._foreach_copy_([step.state[name] for name in changed], [found[name] for name in changed])
    return found["coefficients"]


def gram(moments: Tensor, long_basis: Tensor) -> Tensor:
    """Inner products of the rows of ``Z = [U^T; M]``, ``[N, k + r, k + r]``: all that a refresh has to know of the long side.

    Args:
        moments: M, ``[N, r, l]``.
        long_basis: U^T, ``[N, k, l]``.
    """
    rows = torch.cat([long_basis.to(moments.dtype), moments], 1)
    return rows @ rows.mT


def sketch(gram: Tensor, values: Tensor, lift: Tensor, decay: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """(E6) Top-k eigenbasis of ``decay * U S U^T + X^T X``, as coefficients of the rows of Z: no l x l matrix, no pass over l.

    Args:
        gram: of Z = [U^T; M], ``[N, k + r, k + r]``; U's columns are orthonormal or zero.
        values: S, ``[N, k]``.
        lift: what makes X of Z, ``X = lift Z``, ``[N, r, k + r]``.
        decay: what the old basis is worth.

    Returns:
        A with ``A Z`` the new U^T, ``[N, k, k + r]`` (a row without mass is zero), values ``[N, k]`` falling, and the mass
        that was discarded ``[N]``; None if the decomposition failed.
    """
    width = values.shape[-1]
    rows = torch.cat([torch.nn.functional.pad((decay * values).sqrt().diag_embed(), (0, lift.shape[1])), lift], 1)
    decomposition = eigh(rows @ gram @ rows.mT, torch.zeros_like(values[:, 0]))
    if decomposition is None:
        return None
    spectrum, mixing = decomposition
    kept = spectrum[:, :width]
    # A direction below float32's resolution of the Gram is rounding, not curvature.
    solid = kept > 1e-6 * kept[:, :1]
    scale = torch.where(solid, kept.clamp_min(torch.finfo(kept.dtype).tiny).rsqrt(), 0.0)
    return (mixing[:, :, :width] * scale[:, None, :]).mT @ rows, kept * solid, spectrum[:, width:].sum(-1)


def transport(square: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """(E7) Second moments after a change of basis, ``(Q_new^T Q_old)^2 v``: exact where the old coordinates are uncorrelated.

    Args:
        square: v, ``[N, r, c]``, in coordinates of the old basis.
        new, old: ``[N, r, r]``, eigenvectors in columns.
    """
    return (new.mT @ old).square() @ square


#: Least share of the energy that is taken to lie outside a sketch of the momentum. The sketch has been fitted to the
#: momentum: its directions hold 95 % and more of that, but 55 to 75 % of a fresh gradient's energy in 4-bit fine-tunes.
LEAST_OUTSIDE = 0.3


def shares(values: Tensor, tail: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(E8) What part of a gradient's energy to expect along each kept direction, and outside all of them.

    Args:
        values: the sketch's eigenvalues, ``[N, k]``.
        tail: the mass that it has discarded, ``[N]``.
        mask: 1 for a kept direction, ``[N, 1, k]``.

    Returns:
        ``[N, 1, k]`` and ``[N, 1, 1]``, together one.
    """
    total = (values.sum(-1) + tail).clamp_min(torch.finfo(values.dtype).tiny)
    share = mask * (values / total[:, None])[:, None, :]
    held = share.sum(-1, keepdim=True)
    outside = (1 - held).clamp_min(LEAST_OUTSIDE)
    return share * ((1 - outside) / held.clamp_min(torch.finfo(held.dtype).tiny)), outside


def rotate(step: Step, long_basis: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """(U15) Move U and the residual's momentum to new bases in place; the squared norms of two steps in them.

    Of ``coefficients Z`` with ``Z = [U^T; M]``, ``[N, k + r, l]``, the first r rows are the new M, the next k the new U^T,
    the last r the whole momentum in the parameter's own coordinates. A matrix whose gradient is not finite stays as it is.

    Args:
        step: ``refresh_bases`` has changed its state.
        long_basis: U^T, ``[N, k, l]``.
        coefficients: ``[N, r + k + r, k + r]``.

    Returns:
        ``[N]`` each: of AdamW's step with the whole momentum, and of the rule's own.
    """
    state, moments, eps = step.state, step.state["exp_avg"], step.group["eps"]
    r, k = moments.shape[1], long_basis.shape[1]
    fresh = coefficients @ torch.cat([long_basis.to(moments.dtype), moments], 1)
    outside, basis, momentum = fresh.split([r, k, r], 1)
    moments.copy_(torch.where(step.finite > 0, outside, moments))
    long_basis.copy_(torch.where(step.finite > 0, basis.to(long_basis.dtype), long_basis))
    # AdamW's second moment over the columns: the residual's, and the kept part's along each direction of U.
    col = state["col"] + state["inside_sq"].mean(1, keepdim=True) @ long_basis.to(moments.dtype).square()
    row = plain_row(step)
    damping = damping_of(row)
    adamw = rank_one_direction(momentum, row, col, damping, step.bias, eps)
    own = rank_one_direction(outside, state["row"], state["col"], damping, step.bias, eps)
    inside = bounded_direction(state["inside_avg"], state["inside_sq"], damping, step.bias, eps)
    squares = [torch.linalg.vector_norm(part.flatten(1), dim=1).square() for part in (adamw, own)]
    return squares[0], squares[1] + inside.square().sum((1, 2))


def first_squares(step: Step, square: Tensor) -> None:
    """The second moments at the end of phase 1, from AdamW's."""
    state, l = step.state, square.shape[-1]
    held, weight = averaged(state, step.count, step.bias[1])
    row = debias(state["factor_values"][..., None], step.group["rho"], held) * weight / l
    row = torch.where(row.sum(1, keepdim=True) > 0, row, square.mean(2, keepdim=True))
    share, rest = shares(state["long_values"], state["long_tail"], state["mask"])
    state["inside_sq"].copy_(row * l * share)
    state["row"].copy_(row * rest)
    state["col"].copy_(square.mean(1, keepdim=True) * rest)


def _moved(tensors: dict[str, Tensor], device: torch.device, waiting: bool = True) -> dict[str, Tensor]:
    """Tensors of one dtype on another device, by one copy, which the host waits for or not."""
    whole = torch.cat([tensor.reshape(-1) for tensor in tensors.values()]).to(device, non_blocking=not waiting)
    parts = whole.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}
