"""The two rules as one reads them: float64, one matrix, plain loops, dense factors. Tests hold the fast path to this.

Nothing here is imported by the optimizer. A trajectory is the list of weights after each gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _eigh_falling(factor: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(factor)
    return values.flip(0), vectors.flip(1)


def _rank(values: Tensor, total: float, epsilon_sparse: float, k_min: int, k_max: int | None) -> int:
    """(E4): the smallest k whose eigenvalues hold the mass, within its bounds."""
    held = 0.0
    rank = len(values)
    for index, value in enumerate(values.tolist()):
        held += value
        if held >= (1 - epsilon_sparse) * total * (1 - 1e-6):
            rank = index + 1
            break
    return max(min(k_min, len(values)), min(rank, k_max or len(values), len(values)))


def _ramp(step: int, start: int, blend_steps: int) -> float:
    """(U2)."""
    return 0.0 if step <= start else min(1.0, (step - start) / (blend_steps + 1))


def published(weight: Tensor, grads: Sequence[Tensor], o: dict[str, Any]) -> list[Tensor]:
    """The published rule on one matrix that needs no blocks.

    Args:
        weight: ``[m, n]``.
        grads: one ``[m, n]`` gradient a step.
        o: every option by name, with lr, betas, eps and weight_decay.
    """
    w, (m, n) = weight.double().clone(), weight.shape
    b1, b2 = o["betas"]
    mean, square = torch.zeros(m, n).double(), torch.zeros(m, n).double()
    factors = [o["eps"] * torch.eye(side).double() for side in (m, n)]
    roots = [torch.eye(side).double() for side in (m, n)]
    start = max(o["warmup_steps"], o["min_precond_updates"] * o["precond_freq"])
    trajectory = []
    for step, grad in enumerate(grads, start=1):
        g = grad.double()
        for index, outer in enumerate((g @ g.T, g.T @ g)):
            factors[index] = o["rho"] * factors[index] + (1 - o["rho"]) * outer
            if step % o["precond_freq"] == 0:
                side = outer.shape[0]
                unbiased = factors[index] / (1 - o["rho"] ** step)
                damping = max(o["eps"], 1e-4 * float(unbiased.trace()) / side)
                values, vectors = _eigh_falling(unbiased + damping * torch.eye(side).double())
                rank = _rank(values, float(values.sum()), o["epsilon_sparse"], o["k_min"], o["k_max"])
                rest = values[rank:].mean() if rank < side else values[rank - 1]
                spectrum = torch.cat([values[:rank], rest.expand(side - rank)])
                roots[index] = vectors @ torch.diag(spectrum**-0.25) @ vectors.T
        blend = _ramp(step, start, o["blend_steps"])
        if blend:
            natural = roots[0] @ g @ roots[1]
            if o["tau"] is not None:
                natural = natural * min(1.0, o["tau"] / float(natural.norm()))
            g = blend * natural + (1 - blend) * g
        mean = b1 * mean + (1 - b1) * g
        square = b2 * square + (1 - b2) * g**2
        direction = (mean / (1 - b1**step)) / ((square / (1 - b2**step)).sqrt() + o["eps"])
        w = w - o["lr"] * o["weight_decay"] * w - o["lr"] * direction
        trajectory.append(w.clone())
    return trajectory


def eigenbasis(weight: Tensor, grads: Sequence[Tensor], o: dict[str, Any], slot: int = 0) -> list[Tensor]:
    """SCAO's rule on one matrix ``[r, l]`` with r <= l, momentum kept whole and in the weight's own coordinates.

    Args:
        weight: ``[r, l]``.
        grads: one ``[r, l]`` gradient a step.
        o: every option by name, with lr, betas, eps and weight_decay.
        slot: (S1) when in each interval of ``precond_freq`` steps the matrix is refreshed; 0 for a matrix alone.
    """
    w, (r, l) = weight.double().clone(), weight.shape
    b1, b2 = o["betas"]
    k = min(o["k_max"] or min(16, r + r // 2), l)
    momentum, square = torch.zeros(r, l).double(), torch.zeros(r, l).double()
    factor = torch.zeros(r, r).double()
    q = torch.eye(r).double()
    start = max(o["warmup_steps"], o["min_precond_updates"] * o["precond_freq"])
    u, spectrum, tail = torch.zeros(l, k).double(), torch.zeros(k).double(), 0.0
    used = u
    row = col = inside_sq = torch.zeros(1).double()
    gain = agreement = 1.0

    def plain_row(step: int) -> Tensor:
        """(U12)."""
        row: Tensor = factor.diagonal() / (1 - o["rho"] ** step) / l * (1 - b2**step)
        return row

    def quotient(step: int, mean: Tensor, square: Tensor) -> Tensor:
        """(U6) within 1."""
        direction: Tensor = (mean / (1 - b1**step)) / ((square / (1 - b2**step)).sqrt() + o["eps"])
        return direction.clamp(-1, 1)

    def rank_one(row: Tensor, col: Tensor, damping: float) -> Tensor:
        """The second moment in (U10)."""
        return torch.outer(row + damping, col / col.mean().clamp_min(torch.finfo(torch.float64).tiny) + 1e-3)

    def steps(step: int) -> tuple[Tensor, Tensor, Tensor]:
        """AdamW's step from moments of rank one, the kept part's and the residual's."""
        damping = 1e-3 * float(plain_row(step).sum())  # (U14)
        inside = q.T @ momentum @ used
        outside = q.T @ momentum - inside @ used.T
        plain_col = col + inside_sq.mean(0) @ (u**2).T
        plain = quotient(step, momentum, rank_one(plain_row(step), plain_col, damping))
        return plain, quotient(step, inside, inside_sq + damping), quotient(step, outside, rank_one(row, col, damping))

    def graft(step: int) -> float:
        """(U13)."""
        plain, inside, outside = steps(step)
        own = float(inside.norm() ** 2 + outside.norm() ** 2)
        return min(max(float(plain.norm()) / own**0.5, 0.5), 2.0) if own > 0 else 1.0

    trajectory = []
    for step, grad in enumerate(grads, start=1):
        g = grad.double()
        factor = o["rho"] * factor + (1 - o["rho"]) * g @ g.T
        momentum = b1 * momentum + (1 - b1) * g
        if step <= start:
            square = b2 * square + (1 - b2) * g**2
            direction = (momentum / (1 - b1**step)) / ((square / (1 - b2**step)).sqrt() + o["eps"])
            if step == start:
                values, q = _eigh_falling(factor)
                u, spectrum, tail = _sketch(u, spectrum, momentum / (1 - b1**step), decay=1.0)
                kept = _mask(spectrum, tail, o)
                used = u * kept
                share, rest = _shares(spectrum, tail, kept)
                energy = values.clamp_min(0) / (1 - o["rho"] ** step) * (1 - b2**step) / l
                inside_sq, row, col = torch.outer(energy * l, share), energy * rest, square.mean(0) * rest
                gain = graft(step)
        else:
            p = q.T @ g @ used
            residual = q.T @ g - p @ used.T
            inside_sq = b2 * inside_sq + (1 - b2) * p**2
            row = b2 * row + (1 - b2) * (residual**2).mean(1)
            col = b2 * col + (1 - b2) * (residual**2).mean(0)
            plain, inside, outside = steps(step)
            direction = gain * q @ (outside + inside @ used.T)
            if o["cautious"]:  # (U16)
                agrees, counted = direction * g > 0, int((direction * g != 0).sum())
                direction = direction * agrees / max(agreement, 0.5)
                agreement = int(agrees.sum()) / counted if counted else agreement
            if o["tau"] is not None:
                direction = direction * min(1.0, o["tau"] / float(direction.norm()))
            blend = _ramp(step, start, o["blend_steps"])
            if blend < 1:
                direction = blend * direction + (1 - blend) * plain
        if step > start and (step - start) % o["precond_freq"] == slot:
            # The new bases hold from the next step on.
            values, q_new = _eigh_falling(factor)
            decay = o["rho"] ** min(o["precond_freq"], step - start)
            u_new, spectrum, lost = _sketch(u, spectrum, momentum / (1 - b1**step), decay)
            tail = decay * tail + lost
            kept = _mask(spectrum, tail, o)
            used_new = u_new * kept
            overlap = (used_new.T @ used) ** 2
            unseen = kept - overlap.sum(1)
            row = ((q_new.T @ q) ** 2) @ row
            moved = ((q_new.T @ q) ** 2) @ inside_sq
            energy = moved.sum(1) + l * row
            share, _ = _shares(spectrum, tail, kept)
            inside_sq = moved @ overlap.T + torch.outer(energy, share * unseen.clamp(0, 1))
            q, u, used = q_new, u_new, used_new
            gain = graft(step)
        w = w - o["lr"] * o["weight_decay"] * w - o["lr"] * direction
        trajectory.append(w.clone())
    return trajectory


def _sketch(u: Tensor, spectrum: Tensor, rows: Tensor, decay: float) -> tuple[Tensor, Tensor, float]:
    """(E6) by the dense l x l matrix that the fast path never forms."""
    k = spectrum.shape[0]
    dense = decay * u @ torch.diag(spectrum) @ u.T + rows.T @ rows
    values, vectors = _eigh_falling(dense)
    solid = values[:k] > 1e-6 * values[0]
    return vectors[:, :k] * solid, values[:k] * solid, float(values[k:].clamp_min(0).sum())


def _mask(spectrum: Tensor, tail: float, o: dict[str, Any]) -> Tensor:
    total = float(spectrum.sum()) + tail
    rank = _rank(spectrum, total, o["epsilon_sparse"], o["k_min"], o["k_max"])
    return ((torch.arange(len(spectrum)) < rank) & (spectrum > 0)).double()


def _shares(spectrum: Tensor, tail: float, kept: Tensor) -> tuple[Tensor, float]:
    """(E8)."""
    share = kept * spectrum / (float(spectrum.sum()) + tail)
    rest = max(0.3, 1 - float(share.sum()))
    return share * (1 - rest) / float(share.sum()), rest


def orthogonal(weight: Tensor, grads: Sequence[Tensor], o: dict[str, Any]) -> list[Tensor]:
    """The rule of matrices with two large sides on one matrix ``[r, l]`` with r <= l.

    Args:
        weight: ``[r, l]``.
        grads: one ``[r, l]`` gradient a step.
        o: every option by name, with lr, betas, eps and weight_decay.
    """
    w, (r, l) = weight.double().clone(), weight.shape
    b1, b2 = o["betas"]
    momentum, col = torch.zeros(r, l).double(), torch.zeros(l).double()
    trajectory = []
    for step, grad in enumerate(grads, start=1):
        g = grad.double()
        momentum = b1 * momentum + (1 - b1) * g
        x = b1 * momentum + (1 - b1) * g
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        col = b2 * col + (1 - b2) * (x**2).mean(0)
        direction = x / ((col / (1 - b2**step)).sqrt() + o["eps"])
        direction = direction * (r * l) ** 0.5 / 16 * x.norm() / direction.norm()
        if o["tau"] is not None:
            direction = direction * min(1.0, o["tau"] / float(direction.norm()))
        w = w - o["lr"] * o["weight_decay"] * w - o["lr"] * direction
        trajectory.append(w.clone())
    return trajectory
