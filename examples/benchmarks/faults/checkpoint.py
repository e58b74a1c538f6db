"""Saving, resuming, and checkpoints that must not be loaded."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from faults.core import Inapplicable, Lost, Subject, Task, copies, equal_states, fault, require


def saved(optimizer: Optimizer) -> bytes:
    """A state dict as a file's bytes."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return buffer.getvalue()


def loaded(data: bytes) -> Any:
    """A state dict from a file's bytes, without running anything that is in it."""
    return torch.load(io.BytesIO(data), weights_only=True)


@fault("checkpoint", "loads with weights_only=True")
def weights_only(subject: Subject) -> None:
    task = Task(subject)
    task.train(0, 30)
    try:
        loaded(saved(task.optimizer))
    except pickle.UnpicklingError as error:
        raise Lost("UnpicklingError") from error


def resumed(subject: Subject, dtype: torch.dtype | None, pause: int) -> None:
    """Save, load into a fresh optimizer, go on: equal to the uninterrupted run to the bit."""
    whole = Task(subject, dtype)
    whole.train(0, 60)
    first = Task(subject, dtype)
    first.train(0, pause)
    data = saved(first.optimizer)
    second = Task(subject, dtype, params=[Parameter(param) for param in copies(first.params)])
    # Whether weights_only can read the file is another row.
    second.optimizer.load_state_dict(torch.load(io.BytesIO(data), weights_only=False))
    second.train(pause, 60)
    gap = max(float((a - b).detach().float().abs().max()) for a, b in zip(whole.params, second.params, strict=True))
    require(gap == 0, f"weights differ by {gap:.2g}")


@fault("checkpoint", "resume at step 3, to the bit")
def resume_early(subject: Subject) -> None:
    resumed(subject, None, 3)


@fault("checkpoint", "resume at step 41, to the bit")
def resume_late(subject: Subject) -> None:
    resumed(subject, None, 41)


@fault("checkpoint", "resume with bfloat16 parameters, to the bit")
def resume_bfloat16(subject: Subject) -> None:
    resumed(subject, torch.bfloat16, 41)


def turned_away(subject: Subject, change: Callable[[dict[str, Any]], Any]) -> None:
    """A state dict that does not fit must be an error at load time, and leave the live optimizer as it was."""
    task = Task(subject)
    task.train(0, 30)
    before = copy.deepcopy(task.optimizer.state_dict())
    wrong = copy.deepcopy(before)
    changed = change(wrong)
    try:
        task.optimizer.load_state_dict(wrong if changed is None else changed)
    except (ValueError, RuntimeError, KeyError, TypeError):
        require(equal_states(before, task.optimizer.state_dict()), "refused, but the live state changed")
        task.train(30, 32)
        return
    raise Lost("it is accepted")


def tensors(state: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where the floating-point tensors of the first parameter's state are, as holder and key."""
    entry = next(iter(state["state"].values()))
    found = [(entry, key) for key, value in entry.items() if isinstance(value, Tensor) and value.numel() > 1]
    if not found:
        raise Inapplicable("its state dict holds no tensors")
    return found


@fault("checkpoint", "a state of other shapes is refused")
def wrong_shape(subject: Subject) -> None:
    def change(state: dict[str, Any]) -> None:
        for holder, key in tensors(state):
            holder[key] = torch.zeros(3, 7)

    turned_away(subject, change)


@fault("checkpoint", "a state with missing keys is refused")
def missing_key(subject: Subject) -> None:
    def change(state: dict[str, Any]) -> None:
        holder, key = tensors(state)[0]
        del holder[key]

    turned_away(subject, change)


@fault("checkpoint", "a state with NaN inside is refused")
def nan_inside(subject: Subject) -> None:
    def change(state: dict[str, Any]) -> None:
        for holder, key in tensors(state):
            if holder[key].is_floating_point():
                holder[key].view(-1)[0] = math.nan

    turned_away(subject, change)


@fault("checkpoint", "another optimizer's state is refused")
def foreign_state(subject: Subject) -> None:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        task = Task(Subject("sgd", lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9)))
        task.train(0, 3)
        return task.optimizer.state_dict()

    turned_away(subject, change)


@fault("checkpoint", "one flipped bit in the file is refused")
def flipped_bit(subject: Subject) -> None:
    def change(state: dict[str, Any]) -> None:
        holder, key = tensors(state)[0]
        holder[key] = holder[key].contiguous()
        holder[key].view(-1).view(torch.uint8)[1] ^= 4

    turned_away(subject, change)


@fault("checkpoint", "a file cut short is refused")
def cut_short(subject: Subject) -> None:
    task = Task(subject)
    task.train(0, 30)
    data = saved(task.optimizer)
    before = copy.deepcopy(task.optimizer.state_dict())
    try:
        task.optimizer.load_state_dict(torch.load(io.BytesIO(data[: len(data) * 2 // 3]), weights_only=False))
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        require(equal_states(before, task.optimizer.state_dict()), "refused, but the live state changed")
        return
    raise Lost("it is accepted")


@fault("checkpoint", "loading copies: the file's tensors stay as they are")
def aliased(subject: Subject) -> None:
    task = Task(subject)
    task.train(0, 30)
    state = copy.deepcopy(task.optimizer.state_dict())
    kept = copy.deepcopy(state)
    task.optimizer.load_state_dict(state)
    task.train(30, 40)
    require(equal_states(state, kept), "training writes into the loaded dict")
