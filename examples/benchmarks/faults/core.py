"""What a fault is, the small task that it is tried on, and comparisons to the bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

Params = list[Any]
LR = 0.02
STEPS = 80


class Lost(Exception):
    """The optimizer did not survive; the message says how."""


class Inapplicable(Exception):
    """The fault cannot happen to this optimizer; the message says why."""


@dataclass(frozen=True)
class Subject:
    """An optimizer under test.

    Attributes:
        name: what the table calls it.
        build: parameters (or groups) and a learning rate to an optimizer without weight decay.
        dtype: of the parameters, where a case does not choose one itself.
    """

    name: str
    build: Callable[..., Optimizer]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Fault:
    """One row of the table: its kind, what happens, what survives it, and the function that tries."""

    kind: str
    title: str
    try_on: Callable[[Subject], None]


FAULTS: dict[str, Fault] = {}


def fault(kind: str, title: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Enter a case in ``FAULTS`` under the name of its function."""

    def enter(case: Callable[[Subject], None]) -> Callable[[Subject], None]:
        FAULTS[case.__name__] = Fault(kind, title, case)
        return case

    return enter


def require(condition: bool, reason: str) -> None:
    """Raise ``Lost`` unless ``condition`` holds."""
    if not condition:
        raise Lost(reason)


def finite(params: Params) -> bool:
    """Whether every parameter is finite."""
    return all(bool(torch.isfinite(torch.view_as_real(p) if p.is_complex() else p).all()) for p in params)


@dataclass
class Task:
    """A low-rank regression ``B A x + c`` with B = 0 at the start, as in LoRA, in batches of 16."""

    subject: Subject
    dtype: torch.dtype | None = None
    lr: Any = LR
    params: Params = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        dtype = self.dtype or self.subject.dtype
        self.x = torch.randn(256, 16, generator=draw)
        self.y = self.x @ torch.randn(16, 4, generator=draw) @ torch.randn(4, 12, generator=draw) / 4
        self.y += 0.3 * torch.randn(256, 12, generator=draw)
        shapes = torch.randn(4, 16, generator=draw) / 4, torch.zeros(12, 4), torch.zeros(12)
        if not self.params:
            self.params = [Parameter(start.to(dtype)) for start in shapes]
        self.optimizer = self.subject.build(self.params, self.lr)

    def loss(self, rows: slice = slice(None)) -> Tensor:
        """Mean squared error, in float32 whatever the parameters are."""
        a, b, c = (param.float() for param in self.params)
        return (self.x[rows] @ a.T @ b.T + c - self.y[rows]).square().mean()

    def backward(self, step: int, size: int = 16) -> Tensor:
        """Gradients of one batch."""
        for param in self.params:
            param.grad = None
        first = step * 16 % 256
        loss = self.loss(slice(first, first + size))
        loss.backward()
        return loss

    def train(
        self, first: int = 0, last: int = STEPS, spoil: dict[int, Callable[[Params], None]] | None = None
    ) -> float:
        """Steps ``first`` to ``last``; ``spoil`` changes the gradients of single steps. The loss afterwards."""
        for step in range(first, last):
            self.backward(step)
            if spoil and step in spoil:
                spoil[step](self.params)
            self.optimizer.step()
        return float(self.loss())


@functools.cache
def clean_loss(subject: Subject) -> float:
    """The loss at the end of a run without any damage."""
    return Task(subject).train()


def copies(params: Params) -> Params:
    """Detached copies."""
    return [param.detach().clone() for param in params]


def distance(first: Params, second: Params) -> float:
    """The largest difference of two lists of parameters."""
    return max(float((a - b).detach().float().abs().max()) for a, b in zip(first, second, strict=True))


def same(first: Params, second: Params) -> bool:
    """Whether two lists of parameters are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def goes_on(subject: Subject, spoil: dict[int, Callable[[Params], None]], within: float = 1.5) -> None:
    """Train with the damage; the final loss must be within a factor of the clean run's."""
    clean = clean_loss(subject)
    hurt = Task(subject)
    loss = hurt.train(spoil=spoil)
    require(finite(hurt.params), "weights are NaN or Inf")
    require(math.isfinite(loss) and loss <= within * clean, f"loss {loss:.3g} instead of {clean:.3g}")


def equal_states(first: Any, second: Any) -> bool:
    """Whether two state dicts are equal to the bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal_states(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal_states, first, second))
    if hasattr(first, "__dict__") and type(first) is type(second):
        return equal_states(vars(first), vars(second))
    return bool(first == second)
