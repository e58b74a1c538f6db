"""Gradients that are not numbers, or far too large."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from faults.core import Params, Subject, fault, goes_on


def poison(value: float, entry: bool = True) -> Callable[[Params], None]:
    """Put a value into one entry of the first gradient, or into all of every gradient."""

    def spoil(params: Params) -> None:
        for param in params[:1] if entry else params:
            if entry:
                param.grad.view(-1)[3] = value
            else:
                param.grad.fill_(value)

    return spoil


@fault("bad gradients", "one NaN entry in the second step")
def nan_early(subject: Subject) -> None:
    goes_on(subject, {1: poison(math.nan)})


@fault("bad gradients", "one NaN entry in step 40")
def nan_late(subject: Subject) -> None:
    goes_on(subject, {40: poison(math.nan)})


@fault("bad gradients", "one Inf entry in step 40")
def inf_entry(subject: Subject) -> None:
    goes_on(subject, {40: poison(math.inf)})


@fault("bad gradients", "all gradients NaN (one NaN entry after clipping)")
def nan_everywhere(subject: Subject) -> None:
    goes_on(subject, {40: poison(math.nan, entry=False)})


@fault("bad gradients", "NaN in five steps in a row")
def nan_in_a_row(subject: Subject) -> None:
    goes_on(subject, dict.fromkeys(range(40, 45), poison(math.nan, entry=False)))


@fault("bad gradients", "gradients times 1e6 in step 40")
def spike(subject: Subject) -> None:
    def spoil(params: Params) -> None:
        for param in params:
            param.grad.mul_(1e6 if param.dtype != torch.float16 else 1e3)

    goes_on(subject, {40: spoil})
