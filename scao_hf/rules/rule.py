"""What a rule is: the interface between the optimizer's lifecycle and an update's equations."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from scao_hf.quantization import LEVELS
from scao_hf.refresh import write_finite
from scao_hf.update import LARGEST_GRADIENT, moment_schedule


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
#: Codes of int8, of numbers with a sign.
CODES = Legal(-LEVELS, LEVELS)
#: What every parameter's state has beside its rule's fields; no more than ``step`` gradients are taken.
COUNTERS = {"taken": Legal(0, whole=True), "level": Legal(0, LARGEST_GRADIENT), "activity": Legal(0)}


@dataclass(frozen=True)
class Tick:
    """Where a bucket stands in time, and what follows from that for every matrix. Tensors are ``[N, 1, 1]``.

    Attributes:
        step: steps taken so far, this one included.
        count: finite gradients seen by each matrix so far.
        finite: 1 or 0: whether this step's gradient was finite.
        group: the parameter group with every option.
        due: the matrices whose turn it is to be refreshed, none in phase 1 (``Bucket.due``).
        weights: ``(1 - beta) finite`` for the two moments: what this gradient counts in each.
        bias: ``1 - beta^count`` for the two moments, never zero (U5).
    """

    step: int
    count: Tensor
    finite: Tensor
    group: dict[str, Any]
    due: slice
    weights: tuple[Tensor, Tensor]
    bias: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, step: int, count: Tensor, finite: Tensor, group: dict[str, Any], due: slice) -> Tick:
        """Work out weights and bias corrections once for all uses in a step."""
        return cls(step, count, finite, group, due, *moment_schedule(group["betas"], finite, count))

    def part(self, rows: slice) -> Tick:
        """The same moment for some of the matrices."""
        weights, bias = self.weights, self.bias
        return Tick(
            self.step,
            self.count[rows],
            self.finite[rows],
            self.group,
            self.due,
            (weights[0][rows], weights[1][rows]),
            (bias[0][rows], bias[1][rows]),
        )


def update_finite(state: dict[str, Tensor], fresh: dict[str, Tensor], tick: Tick) -> None:
    """Write ``fresh`` fields into ``state`` in place, but not for matrices whose gradient was not finite in this step."""
    write_finite(state, fresh, tick.finite)


class Rule(Protocol):
    """One update rule on stacks of matrices ``[N, r, l]``."""

    #: How many sides have a dense factor, so that they are cut to max_precond_dim: none, the small one or both.
    cut_sides: int
    #: Whether matrices are refreshed in the steps in which they are due (S1), each on its own.
    takes_turns: bool
    #: For every field that ``create`` makes.
    legal: Mapping[str, Legal]

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
        ...

    def step(self, state: dict[str, Tensor], grads: Tensor, tick: Tick) -> Tensor:
        """Update ``state`` by one gradient ``[N, r, l]`` and return the step to be subtracted, in its memory or fresh one."""
        ...

    def fused(
        self,
        state: dict[str, Tensor],
        params: list[Tensor],
        grads: list[Tensor],
        step: int,
        group: dict[str, Any],
        due: slice,
    ) -> bool:
        """Take the whole step natively, skipping, decay and parameters included; False, nothing changed, if ``step`` must.

        Args:
            state: as for ``step``; ``taken`` is counted up here.
            params, grads: as stored, ``[r, l]`` or ``[l, r]`` each.
            step: steps taken, this one included.
            due: as in ``Tick``.
        """
        ...

    def summary(self, state: dict[str, Tensor], group: dict[str, Any]) -> dict[str, Tensor]:
        """``rank``, ``captured_mass``, ``curvature_norm`` and ``damped`` (1 or 0; a mean) of each matrix, ``[N]`` each."""
        ...

    def start(self, group: dict[str, Any]) -> int:
        """The last step of phase 1."""
        ...

    def kind(self, name: str) -> str:
        """What a field of the state is, for the memory report: moments, curvature, bases or counters."""
        ...
