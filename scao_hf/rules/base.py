"""What a rule is: a table of the fields of its state, and a step that changes parameters and state; what the rules share.

The shared equations are functions on stacks, below the class: G is ``[N, r, l]``, a factor ``[N, d, d]``.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from scao_hf import ops, quantization
from scao_hf.blocks import Member, as_real
from scao_hf.options import default_rank

Pair = tuple[Tensor, Tensor]

#: Gradients are scaled to at most this magnitude per matrix, so that their squares stay finite in float32.
LARGEST_GRADIENT = 1e15
#: A gradient may be this many times as large as the level of those before it, which fades by the second factor a step.
LARGEST_JUMP, LEVEL_DECAY = 10.0, 0.95


class Legal(NamedTuple):
    """What the entries of a field of the state can be, bounds included; ``load_state_dict`` refuses everything else.

    Attributes:
        whole: whole numbers alone.
        diagonal: the bounds are for the diagonals of square matrices.
    """

    low: float = -sys.float_info.max
    high: float = sys.float_info.max
    whole: bool = False
    diagonal: bool = False

    def __str__(self) -> str:
        words = f"between {self.low:g} and {self.high:g}" if self.high < FINITE.high else "finite"
        if words == "finite" and self.low > FINITE.low:
            words += f" and at least {self.low:g}"
        return "whole numbers " * self.whole + words + " on the diagonal" * self.diagonal

    def offence(self, field: Tensor) -> float | None:
        """An entry of ``field`` that cannot be; None where all are sound."""
        if self.diagonal:
            bounds = self._replace(diagonal=False)
            return FINITE.offence(field) or bounds.offence(field.diagonal(dim1=-2, dim2=-1))
        lowest, highest = (float(end) for end in field.aminmax())
        if not (self.low <= lowest and highest <= self.high):  # NaN is neither
            return highest if self.low <= lowest else lowest
        broken = field[field != field.round()].tolist() if self.whole else ()
        return float(broken[0]) if broken else None


FINITE, NOT_NEGATIVE = Legal(), Legal(0)
#: A positive semidefinite matrix.
FACTOR = Legal(0, diagonal=True)
#: A share of one and unit vectors, both with room for rounding.
SHARE, VECTORS = Legal(0, 1.001), Legal(-10, 10)


class Field(NamedTuple):
    """A field of a rule's state: one tensor for each matrix, stacked.

    Attributes:
        sides: of one matrix's tensor: its own sides ``r`` and ``l``, the directions that are kept of them, ``kr`` and
            ``k``, or numbers; nothing for a scalar.
        kind: in the memory report: moments, curvature or bases.
        legal: what its entries can be.
        levels: the power of its levels under ``moment_dtype="int8"`` (Q1): 2 for means of gradients, 4 for means of
            squares, 0 for what is never encoded.
        phase: the phase in which it exists, 0 for both.
        fill: what it holds at first.
        bfloat16: kept in that dtype by parameters that are stepped in float32.
        int8: the field as it is called under ``use_int8_ema``, where it is kept as codes and scales.
    """

    sides: str
    kind: str = "moments"
    legal: Legal = FINITE
    levels: int = 0
    phase: int = 0
    fill: float = 0.0
    bfloat16: bool = False
    int8: str = ""


#: What every parameter's state has besides its rule's fields: finite gradients so far, no more than ``step``; how large they
#: were (U3); of an expert, which of them were not zero (X3).
COUNTERS = {"taken": Legal(0, whole=True), "level": Legal(0, LARGEST_GRADIENT), "activity": Legal(0)}

_UNKNOWN = torch.empty(0)


@dataclass
class Bucket:
    """Blocks of one shape, group, device and age, stacked to ``[N, r, l]`` and stepped by one sequence of operations.

    They are of ordinary parameters, or of such as pack E experts each. The number of operations of a step depends on the
    number of distinct shapes, not of layers.

    Attributes:
        group: the parameter group whose options hold.
        shape: ``(r, l)`` of every block; ``(1, numel)`` for parameters without two sides.
        step: how many steps these blocks have taken, skipped ones included.
        dtype: arithmetic and moment dtype: float64 for float64 parameters, float32 for all others.
        rule: what steps them.
        members: what is stacked, in order.
        owners: the parameter in whose state each member's is: the member's own, or the sharded one that it is the whole of.
        fields: the stacked fields of the state, on the meta device.
        pointers: where each field of each member has been put in memory.
        entries: where each member's state is entered. This and the next one are filled during a step alone.
        state: the stacked state, one tensor of leading size N, the number of matrices, per field.
        offsets: how many entries of the group's matrices come before each of the N (``offsets_of``), rising.
        cycle: how many entries the group's matrices have.
    """

    group: dict[str, Any]
    shape: tuple[int, int]
    step: int
    dtype: torch.dtype
    rule: Rule
    members: list[Member] = dataclasses.field(default_factory=list)
    _: dataclasses.KW_ONLY
    owners: list[Tensor] = dataclasses.field(default_factory=list)
    fields: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    pointers: list[int] = dataclasses.field(default_factory=list)
    entries: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    state: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    offsets: list[int] = dataclasses.field(default_factory=list)
    cycle: int = 1

    @property
    def matrix(self) -> bool:
        """Whether the members are matrices; the others take plain AdamW steps."""
        return self.members[0].block is not None

    @property
    def size(self) -> int:
        """N, the number of matrices (or vectors): E for each member that packs E experts."""
        return len(self.members) * self.members[0].size

    @property
    def packed(self) -> bool:
        """Whether each member packs the factors of several experts."""
        return self.members[0].size > 1

    def split(self, stack: Tensor) -> Sequence[Tensor]:
        """A field of the state, ``[N, ...]``, as views by member: ``[...]`` each, or ``[E, ...]`` of E experts."""
        return stack.chunk(len(self.members)) if self.packed else stack.unbind(0)

    def largest(self) -> Tensor | None:
        """The largest magnitude of each expert's gradient, ``[N]``, zero where it had no token; None for ordinary members."""
        if not self.packed:
            return None
        tops = [
            torch.linalg.vector_norm(block.part(param.grad), ord=math.inf, dim=(1, 2))
            for param, _, block in self.members
            if param.grad is not None and block is not None
        ]
        return torch.cat(tops)

    def gradients(self) -> Tensor:
        """A stacked copy ``[N, r, l]`` of the gradients in the bucket's arithmetic dtype."""
        grads = []
        for param, _, block in self.members:
            if param.grad is not None:
                grads.append(block.of(param.grad) if block else as_real(param.grad).reshape(1, -1))
        return torch.stack(grads).to(self.dtype).reshape(-1, *self.shape)

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and gradients as they are stored, without a copy (vectors' gradients: contiguous)."""
        params, grads = [], []
        for param, _, block in self.members:
            if param.grad is None:
                continue
            if block is None:
                params.append(param)
                grads.append(param.grad.contiguous())
            elif block.packing:
                params.extend(block.part(param).unbind(0))
                grads.extend(block.part(param.grad).unbind(0))
            else:
                params.append(block.part(param))
                grads.append(block.part(param.grad))
        return params, grads

    @property
    def phase1_steps(self) -> int:
        """The last step of phase 1."""
        return self.rule.phase1_steps(self.group)

    def due(self, step: int) -> slice:
        """(S1) The members whose turn it is to be refreshed at ``step``.

        Each has a slot, ``precond_freq * offset // cycle``, and is refreshed at the steps with ``(step - phase1_steps) %
        precond_freq == slot``: every step refreshes about as many entries, in one run of each stack. None in phase 1, and by
        rules that refresh all matrices in the same step.
        """
        start = self.phase1_steps
        if step <= start or not self.rule.staggered:
            return slice(0, 0)
        period = self.group["precond_freq"]
        slot = (step - start) % period
        first, last = (-(-part * self.cycle // period) for part in (slot, slot + 1))
        return slice(bisect_left(self.offsets, first), bisect_left(self.offsets, last))


@dataclass(eq=False)
class Step:
    """One step of a stack of N matrices: the state that it changes and what its equations need.

    Attributes:
        bucket: the parameters and their gradients.
        state: the stacked fields, and ``COUNTERS``.
        number: how many steps the matrices have taken, this one included.
        due: the matrices whose bases are to be refreshed, none in phase 1 (``Bucket.due``).
        finite: 1 or 0, ``[N, 1, 1]``: whether this step's gradient was finite. Known once the gradient has been read.
    """

    bucket: Bucket
    state: dict[str, Tensor]
    number: int
    due: slice
    finite: Tensor = _UNKNOWN

    @property
    def group(self) -> dict[str, Any]:
        """The parameter group with every option."""
        return self.bucket.group

    def gradients(self) -> Tensor:
        """(U3) The gradients as a stack ``[N, r, l]`` of its own; counts the step."""
        grads, self.finite = sanitize(self.bucket.gradients(), self.state["level"])
        self.bucket.step += 1
        self.state["taken"] += self.finite[:, 0, 0]
        return grads

    def uncount(self) -> None:
        """Leave the step, wherever it was ended, to be taken once more."""
        self.bucket.step = self.number - 1
        self.state["taken"].clamp_(max=self.bucket.step)

    def write(self, direction: Tensor) -> None:
        """Decoupled decay and the step, ``w <- w - lr (direction + decay w)``; a skipped matrix stays as it is.

        The weights are rounded once: to the nearest number, or under ``stochastic_rounding`` (Q2) to one of two.

        Args:
            direction: ``[N, r, l]`` in the arithmetic dtype, changed in place.
        """
        bucket, decay, lr = self.bucket, self.group["weight_decay"], self.group["lr"]
        rate = self.finite * (lr.detach().to(direction) if isinstance(lr, Tensor) else float(lr))
        targets = [block.of(param.detach()) if block else as_real(param.detach()) for param, _, block in bucket.members]
        if self.group["stochastic_rounding"] and targets[0].dtype == torch.bfloat16:
            weights = torch.stack(
                [target if bucket.packed else target.reshape(direction.shape[1:]) for target in targets]
            )
            weights = weights.to(direction.dtype).view_as(direction)
            # Seeds of its own: those of the state are not negative.
            fresh = quantization.to_bfloat16(weights - rate * (direction + decay * weights), ~bucket.step)
            for target, piece in zip(targets, bucket.split(fresh), strict=True):
                target.copy_(piece.view(target.shape))
            return
        pieces = [piece.view(target.shape) for piece, target in zip(bucket.split(direction), targets, strict=True)]
        scaled = [(direction, rate)]
        tall = [index for index, member in enumerate(bucket.members) if member.block and member.block.transposed]
        if tall and not bucket.packed:
            # On a GPU foreach is a few kernels only where all its tensors lie in memory as their counterparts do.
            rates = rate.unbind(0)
            scaled.append((torch.stack([pieces[index].mT for index in tall]), torch.stack([rates[i] for i in tall])))
            for index, piece in zip(tall, scaled[1][0].unbind(0), strict=True):
                pieces[index] = piece.mT
        if decay:
            torch._foreach_add_(pieces, targets, alpha=decay)
        for stack, factor in scaled:
            stack.mul_(factor)
        torch._foreach_sub_(targets, pieces)

    def is_native(self, kernel: str, *bases: str) -> bool:
        """Whether a native kernel can take this step, with those ``bases`` in the state."""
        # A learning rate on a device would have to be waited for.
        lr = self.group["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            return False
        if self.group["stochastic_rounding"] and self.bucket.members[0].param.dtype == torch.bfloat16:
            return False
        # The kernels' v += (1 - b2) (g^2 - v) loses all digits of a small g^2 where b2 is next to zero; lerp does not.
        if self.group["betas"][1] < 0.5 or not all(name in self.state for name in bases):
            return False
        params = [member.param for member in self.bucket.members]
        return ops.steps(kernel, params, self.state["exp_avg"], *(self.state[name] for name in bases))

    def run_native(
        self,
        kernel: Callable[..., None],
        fields: list[Tensor],
        *options: bool,
        refreshes: bool,
        more: Iterable[float] = (),
    ) -> None:
        """The whole step by a native kernel: (U3), decay and parameters included.

        Args:
            kernel: one of ``ops``.
            fields: those of the state that it takes, in its order.
            options: what it takes besides the numbers.
            refreshes: whether a refresh follows, which asks which gradients were finite.
            more: numbers besides those of the group.
        """
        taken = self.state["taken"]
        before = taken.clone() if refreshes else taken
        group = self.group
        numbers = [float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"], group["rho"], *more]
        params, grads = self.bucket.parts()
        self.bucket.step += 1  # Ctrl-C in the kernel is raised once it has taken the step
        kernel(params, grads, fields, numbers, *options)
        torch.autograd.graph.increment_version(params)
        if refreshes:
            self.finite = (taken - before)[:, None, None]

    @property
    def count(self) -> Tensor:
        """Finite gradients seen by each matrix, ``[N, 1, 1]``."""
        return self.state["taken"][:, None, None]

    @cached_property
    def _schedule(self) -> tuple[Pair, Pair, Tensor]:
        return schedule(self.group["betas"], self.group["rho"], self.finite, self.count)

    @property
    def weights(self) -> Pair:
        """``(1 - beta) finite`` for the two moments, ``[N, 1, 1]``: what this gradient counts in each."""
        return self._schedule[0]

    @property
    def bias(self) -> Pair:
        """``1 - beta^count`` for the two moments, ``[N, 1, 1]``, never zero (U5)."""
        return self._schedule[1]

    @property
    def curvature_weight(self) -> Tensor:
        """``(1 - rho) finite``, ``[N, 1, 1]``: what this gradient counts in (E1)."""
        return self._schedule[2]

    def part(self, rows: slice) -> Step:
        """The same step of some of the matrices."""
        state = {name: field[rows] for name, field in self.state.items()}
        part = replace(self, state=state, finite=self.finite[rows])
        (first, second), (bias1, bias2), curvature = self._schedule
        part._schedule = (first[rows], second[rows]), (bias1[rows], bias2[rows]), curvature[rows]
        return part

    def update(self, fresh: dict[str, Tensor]) -> None:
        """Write ``fresh`` fields into the state in place, but not for matrices whose gradient was not finite."""
        kept = self.finite > 0
        for name, value in fresh.items():
            field = self.state[name]
            torch.where(kept.view(-1, *[1] * (field.ndim - 1)), value, field, out=field)


class Rule(ABC):
    """An update rule on stacks of matrices ``[N, r, l]``."""

    #: The option ``rule`` that it is.
    name: ClassVar[str]
    #: The state. In this order native kernels take it, after the counters.
    fields: ClassVar[Mapping[str, Field]]
    #: How many sides have a dense factor, so that they are cut to max_precond_dim: none, the small one or both.
    cut_sides = 0
    #: Whether the refreshes of the matrices are spread over the steps (S1).
    staggered = False

    @abstractmethod
    def step(self, step: Step) -> None:
        """Update the state by one gradient and the parameters by the step that follows from it."""

    def phase1_steps(self, group: dict[str, Any]) -> int:
        """(U1) The last step of phase 1: the warm-up is over, and ``min_precond_updates`` refreshes were possible."""
        start: int = max(group["warmup_steps"], group["min_precond_updates"] * group["precond_freq"])
        return start

    @abstractmethod
    def figures(self, bucket: Bucket) -> dict[str, Tensor]:
        """``rank``, ``captured_mass``, ``curvature_norm`` and ``damped`` (1 or 0) of each matrix, ``[N]`` each."""

    def create(
        self,
        size: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        group: dict[str, Any],
        step: int = 0,
    ) -> dict[str, Tensor]:
        """State of ``size`` matrices that have taken ``step`` steps, leading dimension ``size``; works on the meta device."""
        r, l = shape
        rank = group.get("k_max") or default_rank(r)
        sides = {"r": r, "l": l, "k": min(rank, l), "kr": min(rank, r)}
        phase = 1 if step < self.phase1_steps(group) else 2
        state: dict[str, Tensor] = {}
        for name, field in self.fields.items():
            if field.phase not in (0, phase):
                continue
            shape_of_one = [sides.get(side) or int(side) for side in field.sides.split()]
            if field.int8 and group["use_int8_ema"]:
                codes, scales = quantization.zeros(size, torch.Size(shape_of_one).numel(), device)
                state |= {f"{field.int8}_codes": codes, f"{field.int8}_scales": scales}
            else:
                kept = torch.bfloat16 if field.bfloat16 and dtype == torch.float32 else dtype
                state[name] = torch.full((size, *shape_of_one), field.fill, dtype=kept, device=device)
        return state

    def field(self, name: str) -> Field:
        """The field that is kept under ``name``, be it as the codes or scales of one."""
        if name in self.fields:
            return self.fields[name]
        stem, _, part = name.rpartition("_")
        field = self.fields.get(stem) or next(field for field in self.fields.values() if field.int8 == stem)
        if part == "scales":
            return field._replace(legal=NOT_NEGATIVE)
        signed = field.legal.low < 0 or field.legal.diagonal
        return field._replace(legal=Legal(-quantization.LEVELS if signed else 0, quantization.LEVELS))


def step_adamw(step: Step, refreshes: bool = False) -> None:
    """What every rule with a phase 1 does in it: (U4) and (U6), and (E1) where the state has a ``factor``.

    Args:
        step: changed in place.
        refreshes: whether the first refresh follows.
    """
    state, group = step.state, step.group
    if step.is_native("adamw_step_"):
        fields = [state[name] for name in ("taken", "level", "exp_avg", "exp_avg_sq", "factor") if name in state]
        step.run_native(ops.adamw_step_, fields, refreshes=refreshes)
        return
    grads = step.gradients()
    if "factor" in state:
        accumulate(state["factor"], grads @ grads.mT, step.curvature_weight)
    adam_moments(state["exp_avg"], state["exp_avg_sq"], grads, step.weights)
    step.write(adam_direction(state["exp_avg"], state["exp_avg_sq"], step.bias, group["eps"]))


def blend_weight(step: int, start: int, blend_steps: int) -> float:
    """(U2) Weight of the curvature step at ``step`` (from 1): 0 in phase 1, then a linear ramp to 1."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / (blend_steps + 1)) if blend_steps else 1.0


def sanitize(grads: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """(U3) Zero the matrices that hold a NaN or Inf, and bound the magnitude of the others: ``max|G| <= 10 level``.

    The level is the largest magnitude of the earlier gradients, fading: ``level <- max(0.95 level, max|G|)`` with the
    bounded G. One gradient that is far too large cannot ruin moments and curvature then, and a lasting change of scale
    is followed within a few steps. Before the first gradient that is not zero, ``LARGEST_GRADIENT`` is the bound alone.

    Args:
        grads: G, ``[N, r, l]``, changed in place.
        level: ``[N]``, zero before the first step, changed in place; as it was for a matrix that is skipped.

    Returns:
        G, and ``[N, 1, 1]`` with 1 for a finite matrix and 0 for a skipped one.
    """
    flat, on_cpu = grads.flatten(1), grads.device.type == "cpu"
    # A norm is one kernel on a GPU, and ten times slower on a CPU.
    largest = torch.maximum(flat.amax(1), -flat.amin(1)) if on_cpu else torch.linalg.vector_norm(flat, math.inf, 1)
    finite = torch.lt(largest, math.inf, out=torch.empty_like(largest))
    jump, faded = torch._foreach_mul([level, level], [LARGEST_JUMP, LEVEL_DECAY])
    limit = torch.threshold_(jump, 0.0, LARGEST_GRADIENT).clamp_max_(LARGEST_GRADIENT)
    bounded = torch.minimum(largest, limit)
    fresh = torch.maximum(bounded, faded)
    torch.where(torch.logical_and(finite, largest), fresh, level, out=level)
    # On a GPU the question would have to be waited for, on a CPU it is cheaper than two passes over the gradient.
    if not on_cpu or not torch.equal(bounded, largest):
        # The quotient of a matrix that holds a NaN or Inf, or zeros alone, makes zeros and NaN of its entries.
        grads.mul_((bounded / largest)[:, None, None]).nan_to_num_(0.0, 0.0, 0.0)
    return grads, finite[:, None, None]


def accumulate(factor: Tensor, outer: Tensor, weight: Tensor) -> Tensor:
    """(E1) ``L <- rho L + (1 - rho) G G^T`` in place.

    Args:
        factor: L, ``[N, d, d]``.
        outer: G G^T, ``[N, d, d]``.
        weight: 1 - rho, or 0 where a matrix's gradient was not finite, ``[N, 1, 1]``.
    """
    return factor.lerp_(outer, weight)


def debias(factor: Tensor, rho: float, count: Tensor) -> Tensor:
    """(E2) Divide an EMA by ``1 - rho^t``, t the number of terms that it holds, ``[N, 1, 1]``."""
    return factor / (1 - torch.pow(rho, count)).clamp_min(1e-30)


def adaptive_rank(values: Tensor, total: Tensor, epsilon_sparse: float, k_min: int, k_max: int) -> Tensor:
    """(E4) The smallest k in ``[k_min, k_max]`` whose eigenvalues hold at least ``1 - epsilon_sparse`` of the mass.

    Args:
        values: ``[N, d]``, falling.
        total: ``[N]``, the trace (larger than the sum of ``values`` where these are truncated already).

    Returns:
        ``[N]``, int64, at most d.
    """
    # The tolerance keeps a rounding error in the running sum from costing one more direction.
    threshold = (1 - epsilon_sparse) * total * (1 - 1e-6)
    side = values.shape[-1]
    # A product, because torch.use_deterministic_algorithms refuses cumsum on CUDA.
    running = values @ torch.ones(side, side, dtype=values.dtype, device=values.device).triu_()
    rank = (running < threshold[:, None]).sum(-1) + 1
    return rank.clamp(min(k_min, side), min(k_max, side))


def schedule(betas: tuple[float, float], rho: float, finite: Tensor, count: Tensor) -> tuple[Pair, Pair, Tensor]:
    """What this gradient weighs in the two moments, 0 for a skipped matrix; (U5); what it weighs in the curvature.

    (U5) is ``1 - beta^t`` for each matrix's t, exact to rounding without float64, which MPS does not have.

    Args:
        finite, count: of each matrix, ``[N, 1, 1]``, as what is returned.
    """
    # A matrix that has seen no finite gradient has moments of zero: any bias correction does.
    terms, logs = count.clamp_min(1), [math.log(beta) if beta else -math.inf for beta in betas]
    factors = [1 - betas[0], 1 - betas[1], 1 - rho, *logs]
    first, second, curvature, *bias = torch._foreach_mul([finite, finite, finite, terms, terms], factors)
    torch._foreach_expm1_(bias)
    torch._foreach_neg_(bias)
    return (first, second), (bias[0], bias[1]), curvature


def adam_moments(mean: Tensor, square: Tensor, grads: Tensor, weights: tuple[Tensor, Tensor]) -> None:
    """(U4) ``m <- b1 m + (1 - b1) G`` and ``v <- b2 v + (1 - b2) G^2``, both in place.

    ``weights`` holds 1 - b1 and 1 - b2, or zeros for a skipped matrix, which stays as it is.
    """
    mean.lerp_(grads, weights[0])
    square.lerp_(grads.square(), weights[1])


def adam_direction(mean: Tensor, square: Tensor, bias: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """(U6) ``m_hat / (sqrt(v_hat) + eps)``, torch.optim.AdamW's step without the learning rate, in fresh memory."""
    return torch.div(
        mean, denominator := square.sqrt().mul_(bias[0] / bias[1].sqrt()).add_(bias[0] * eps), out=denominator
    )


def clip_norm(direction: Tensor, tau: float | None) -> Tensor:
    """(U8) Scale each matrix of ``direction`` to a Frobenius norm of at most ``tau``."""
    if tau is None:
        return direction
    norm = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)
    scale: Tensor = tau / norm.clamp_min(tau)
    return direction * scale


def mix(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """(U9) ``(1 - weight) first + weight second``."""
    if weight == 1.0:
        return second
    return torch.lerp(first, second, weight)


def count_activity(activity: Tensor, largest: Tensor, beta2: float) -> None:
    """(X3) ``n <- n + a`` and ``w <- b2 w + (1 - b2) a`` for an expert, a being 1 in a step with tokens and 0 without.

    An expert's curvature averages the n gradients that are not zero, its second moments all of them: what the average
    is in place of AdamW's second moment is w times as large. With tokens in every step n is t and w is ``1 - b2^t``.

    Args:
        activity: n and w, ``[N, 2]``, changed in place; as they were where the gradient is not finite.
        largest: largest magnitude of each gradient, ``[N]``.
        beta2: b2.
    """
    held, weight = activity[:, 0], activity[:, 1]
    active, finite = (part.to(activity.dtype) for part in (largest > 0, largest.isfinite()))
    held += active * finite
    weight.lerp_(active, (1 - beta2) * finite)


def averaged(state: dict[str, Tensor], count: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor]:
    """How many gradients a matrix's curvature averages, and what they weigh in its second moments, ``[N, 1, 1]`` each.

    Args:
        state: with ``activity`` where the two differ from those that follow (X3).
        count: finite gradients seen by each matrix, ``[N, 1, 1]``.
        bias2: bias correction of the second moments.
    """
    if "activity" not in state:
        return count, bias2
    held, weight = state["activity"][..., None, None].unbind(1)
    return held, weight


@contextmanager
def idle_experts_kept(bucket: Bucket) -> Iterator[None]:
    """Leave the curvature of experts without a token as it is: an average over the steps in which they had some.

    Their moments decay as AdamW's do; ``activity`` knows by how much these are smaller than the average (X3).
    """
    largest = bucket.largest()
    if largest is None:
        yield
        return
    idle = largest == 0
    if "activity" in bucket.state:
        count_activity(bucket.state["activity"], largest, bucket.group["betas"][1])
    names = [name for name in bucket.state if name not in COUNTERS and bucket.rule.field(name).kind == "curvature"]
    before = {name: bucket.state[name].clone() for name in names}
    try:
        yield
    finally:
        for name, field in before.items():
            kept = idle.view(-1, *[1] * (field.ndim - 1))
            bucket.state[name].copy_(torch.where(kept, field, bucket.state[name]))


@contextmanager
def all_or_nothing(state: dict[str, Tensor]) -> Iterator[None]:
    """Put the state back where a refresh raises: half of one is a momentum in other bases than the state says."""
    # By dtype: foreach is one kernel only where all tensors of a list have the same.
    alike = [[field for field in state.values() if field.dtype == kind] for kind in {it.dtype for it in state.values()}]
    before = [[torch.empty_like(field) for field in fields] for fields in alike]
    for copies, fields in zip(before, alike, strict=True):
        torch._foreach_copy_(copies, fields)
    try:
        yield
    except BaseException:
        for copies, fields in zip(before, alike, strict=True):
            torch._foreach_copy_(fields, copies)
        raise
