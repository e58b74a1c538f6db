"""What SECURITY.md says about checkpoints: nothing runs on load, damaged and foreign ones end in an error."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from strange_values import STRANGE

from scao_hf import SCAO, options

EARLY: dict[str, Any] = {"warmup_steps": 3, "blend_steps": 2, "precond_freq": 2, "min_precond_updates": 1}


def trained(steps: int = 7, **chosen: Any) -> tuple[list[torch.nn.Parameter], SCAO]:
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((4, 30), (20, 6), (9,))]
    optimizer = SCAO(params, lr=0.01, **{**EARLY, **chosen})
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=draw)
        optimizer.step()
    return params, optimizer


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def test_a_checkpoint_cannot_run_code() -> None:
    _, optimizer = trained()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = Malicious()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("rule", options.MATRIX_RULES)
@pytest.mark.parametrize("moment_dtype", options.OPTIONS["moment_dtype"].choices)
def test_states_need_no_allow_listing(rule: str, moment_dtype: str) -> None:
    _, optimizer = trained(rule=rule, use_int8_ema=True, moment_dtype=moment_dtype)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))


def snapshot(optimizer: SCAO) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return bool(first == second)


def test_every_one_of_300_flipped_bits_is_noticed() -> None:
    params, optimizer = trained(use_int8_ema=True)
    before, weights = snapshot(optimizer), [param.detach().clone() for param in params]
    chance = random.Random(0)
    for _ in range(300):
        wrong = copy.deepcopy(before)
        entry = wrong["state"][chance.randrange(3)]
        name = chance.choice([name for name, value in entry.items() if isinstance(value, torch.Tensor)])
        entry[name] = entry[name].contiguous()
        data = entry[name].view(-1).view(torch.uint8)
        data[chance.randrange(data.numel())] ^= 1 << chance.randrange(8)
        with pytest.raises(ValueError, match="checksum"):
            optimizer.load_state_dict(wrong)
    assert equal(before, optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(params, weights, strict=True))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nested structure."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def mutated(state: dict[str, Any], chance: random.Random) -> None:
    """Change, drop or add something, somewhere."""
    path = chance.choice(places(state))
    holder: Any = state
    for key in path[:-1]:
        holder = holder[key]
    kind = chance.randrange(4)
    if kind == 0:
        del holder[path[-1]]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(["step", "exp_avg", "strange", 7])] = copy.deepcopy(chance.choice(STRANGE))
    elif kind == 2 and isinstance(holder[path[-1]], torch.Tensor):
        holder[path[-1]] = chance.choice([torch.zeros(3), holder[path[-1]].half().flatten(), holder[path[-1]][None]])
    else:
        holder[path[-1]] = copy.deepcopy(chance.choice(STRANGE))


def test_a_thousand_mutated_states_end_in_clear_errors() -> None:
    params, optimizer = trained()
    before, weights = snapshot(optimizer), [param.detach().clone() for param in params]
    chance = random.Random(1)
    refused = 0
    for _ in range(1000):
        wrong = copy.deepcopy(before)
        mutated(wrong, chance)
        try:
            optimizer.load_state_dict(wrong)
        except ValueError:
            refused += 1
            assert equal(before, optimizer.state_dict()), "refused, but the live state has changed"
            continue
        # What is accepted (another learning rate, an option's other legal value) must be steppable and finite.
        for param, weight in zip(params, weights, strict=True):
            param.data.copy_(weight)  # not those that a far too large rate has left behind
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert all(bool(torch.isfinite(param).all()) for param in params)
        optimizer.load_state_dict(copy.deepcopy(before))
    assert refused >= 700


@pytest.mark.parametrize("length", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_an_error(length: float, tmp_path: Path) -> None:
    _, optimizer = trained()
    path = tmp_path / "optimizer.pt"
    torch.save(optimizer.state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * length)])
    with pytest.raises((RuntimeError, EOFError, OSError, pickle.UnpicklingError)):  # as torch has it, by the length
        torch.load(path, weights_only=True)
