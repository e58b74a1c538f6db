"""Scales and ranks at which an algorithm's arithmetic ends, and decompositions that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter

from faults.core import LR, STEPS, Inapplicable, Subject, Task, clean_loss, copies, fault, finite, require, same
from scao_hf import ops


def scaled_gradients(subject: Subject, scale: float, least: float = 0.05, steps: int = 30) -> None:
    """Constant gradients of one scale: finite, downhill, at a speed of ``least`` to 4 learning rates a step."""
    params = [Parameter(torch.ones(6, 10)), Parameter(torch.ones(10, 6)), Parameter(torch.ones(7))]
    optimizer = subject.build(params, LR)
    before = copies(params)
    for _ in range(steps):
        for param in params:
            param.grad = scale * torch.linspace(0.5, 1, param.numel()).view(param.shape)
        optimizer.step()
    require(finite(params), "weights are NaN or Inf")
    for param, old in zip(params, before, strict=True):
        moved = float((old - param).mean()) / (LR * steps)
        require(least <= moved < 4, f"moves {moved:.2g} lr a step")


@fault("numerics", "gradients of 1e-20")
def tiny_gradients(subject: Subject) -> None:
    # Far below everyone's eps: not to move is right, to move uphill or by NaN is not.
    scaled_gradients(subject, 1e-20, least=0.0)


@fault("numerics", "gradients of 1e15")
def huge_gradients(subject: Subject) -> None:
    scaled_gradients(subject, 1e15)


@fault("numerics", "gradients of 1e25")
def enormous_gradients(subject: Subject) -> None:
    scaled_gradients(subject, 1e25)


@fault("numerics", "gradients of rank one: no step above twice lr in the mean")
def rank_one(subject: Subject) -> None:
    draw = torch.Generator().manual_seed(0)
    param = Parameter(torch.zeros(8, 24))
    optimizer = subject.build([param], LR)
    column = torch.randn(8, 1, generator=draw)
    for step in range(60):
        before = param.detach().clone()
        param.grad = column @ torch.randn(1, 24, generator=draw)
        optimizer.step()
        require(finite([param]), "weights are NaN or Inf")
        size = float((param.detach() - before).square().mean().sqrt()) / LR
        require(size <= 2, f"a step of {size:.2g} lr at step {step + 1}")


def largest_move(subject: Subject, gradient: Callable[[int], Tensor], limit: float, steps: int = 40) -> None:
    """No entry may move by more than ``limit`` learning rates in a step."""
    param = Parameter(torch.zeros_like(gradient(0)))
    optimizer = subject.build([param], LR)
    for step in range(steps):
        before = param.detach().clone()
        param.grad = gradient(step)
        optimizer.step()
        require(finite([param]), "weights are NaN or Inf")
        move = float((param.detach() - before).abs().max()) / LR
        require(move <= limit, f"an entry moves {move:.2g} lr at step {step + 1}")


@fault("numerics", "gradients of ones: no entry moves more than 1.5 lr")
def all_ones(subject: Subject) -> None:
    largest_move(subject, lambda step: torch.ones(48, 32), 1.5)


@fault("numerics", "a constant diagonal gradient: no entry moves more than 2 lr")
def diagonal(subject: Subject) -> None:
    largest_move(subject, lambda step: torch.eye(16, 24), 2)


@fault("numerics", "gradients of rank two: no entry moves more than 4 lr")
def rank_two(subject: Subject) -> None:
    draw = torch.Generator().manual_seed(0)
    columns, rows = torch.randn(8, 2, generator=draw), torch.randn(40, 2, 24, generator=draw)
    largest_move(subject, lambda step: columns @ rows[step], 4)


@fault("numerics", "a step with zero gradients does not enlarge the next one")
def idle_step(subject: Subject) -> None:
    draw = torch.Generator().manual_seed(0)
    mean = torch.randn(8, 24, generator=draw)
    runs = [Parameter(torch.zeros(8, 24)) for _ in range(2)]
    optimizers = [subject.build([param], LR) for param in runs]
    for step in range(45):
        grad = mean + torch.randn(8, 24, generator=draw)
        moves = []
        for param, optimizer in zip(runs, optimizers, strict=True):
            before = param.detach().clone()
            param.grad = torch.zeros_like(grad) if param is runs[1] and step == 40 else grad.clone()
            optimizer.step()
            moves.append(float((param.detach() - before).square().mean().sqrt()))
        if step > 40:
            require(moves[1] <= 1.1 * moves[0], f"{moves[1] / moves[0]:.2f} times as large")


@fault("numerics", "gradients in one step of five: no step above twice lr in the mean")
def seldom(subject: Subject) -> None:
    draw = torch.Generator().manual_seed(0)
    param = Parameter(torch.zeros(8, 24))
    optimizer = subject.build([param], LR)
    for step in range(80):
        before = param.detach().clone()
        param.grad = torch.randn(8, 24, generator=draw) * (step % 5 == 0)
        optimizer.step()
        require(finite([param]), "weights are NaN or Inf")
        size = float((param.detach() - before).square().mean().sqrt()) / LR
        require(size <= 2, f"a step of {size:.2g} lr at step {step + 1}")


@fault("numerics", "gradients of zero: nothing moves")
def zero_gradients(subject: Subject) -> None:
    params = [Parameter(torch.ones(6, 10)), Parameter(torch.ones(7))]
    before = copies(params)
    optimizer = subject.build(params, LR)
    for _ in range(30):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    require(same(params, before), "weights moved or became NaN")


@fault("numerics", "rows of the gradient twelve orders of magnitude apart")
def uneven_rows(subject: Subject) -> None:
    draw = torch.Generator().manual_seed(0)
    param = Parameter(torch.zeros(6, 20))
    optimizer = subject.build([param], LR)
    scales = torch.logspace(-6, 6, 6)[:, None]
    for _ in range(60):
        before = param.detach().clone()
        param.grad = scales * torch.randn(6, 20, generator=draw)
        optimizer.step()
        require(finite([param]), "weights are NaN or Inf")
        size = float((param.detach() - before).square().mean().sqrt()) / LR
        require(size <= 4, f"a step of {size:.2g} lr")


DECOMPOSITIONS = ("eigh", "eigvalsh", "svd", "qr", "cholesky", "cholesky_ex", "inv", "solve", "lstsq", "eig")


@contextmanager
def failing(error: Exception) -> Iterator[list[int]]:
    """Every decomposition raises, SCAO's native ones left out; yields a list with an entry for each call."""
    calls: list[int] = []

    def fails(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise error

    with (
        mock.patch.multiple(torch.linalg, **dict.fromkeys(DECOMPOSITIONS, fails)),
        mock.patch.object(torch, "svd", fails),
        mock.patch.object(ops, "NATIVE", frozenset()),
    ):
        yield calls


def failed_refresh(subject: Subject, error: Exception, first: int, last: int, within: float) -> None:
    """Decompositions fail from step ``first`` to ``last``; training continues."""
    clean = clean_loss(subject)
    hurt = Task(subject)
    hurt.train(0, first)
    with failing(error) as calls:
        hurt.train(first, last)
    if not calls:
        raise Inapplicable("it decomposes nothing")
    loss = hurt.train(last, STEPS)
    require(finite(hurt.params), "weights are NaN or Inf")
    require(loss <= within * clean, f"loss {loss:.3g} instead of {clean:.3g}")


def no_convergence() -> Exception:
    """What torch raises when eigh does not converge."""
    return torch.linalg.LinAlgError("the algorithm failed to converge")


@fault("numerics", "eigendecompositions fail for 15 steps")
def eigh_fails(subject: Subject) -> None:
    failed_refresh(subject, no_convergence(), 40, 55, 1.5)


@fault("numerics", "eigendecompositions always fail")
def eigh_never_works(subject: Subject) -> None:
    failed_refresh(subject, no_convergence(), 0, STEPS, 2.0)


@fault("numerics", "eigendecompositions fail from step 40 to the end")
def eigh_stops(subject: Subject) -> None:
    failed_refresh(subject, no_convergence(), 40, STEPS, 1.1)


@fault("numerics", "out of memory in every decomposition for 15 steps")
def out_of_memory(subject: Subject) -> None:
    failed_refresh(subject, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 40, 55, 1.5)
