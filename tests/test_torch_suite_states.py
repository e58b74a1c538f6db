"""PyTorch's contract for state dicts of optimizers: the part of test_torch_suite.py that saves and loads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

pytest.importorskip("expecttest", reason="torch's OptimizerInfo needs expecttest (pip install expecttest)")

from torch.testing._internal.common_optimizers import (
    OptimizerInput,
)
from torch_suite import EARLY, EVERY, build, follow, linear, same_state, trained, values

from scao_hf import SCAO


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@EVERY
@pytest.mark.parametrize("contiguous", [True, False])
def test_state_dicts_are_deterministic(given: OptimizerInput, contiguous: bool) -> None:
    params, optimizer, loss = trained(given, 8, contiguous)
    twins = [Parameter(value) for value in values(params)]
    other = build(twins, given)
    saved = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(optimizer.state_dict())
    follow(params, optimizer, twins, other, loss)
    assert same_state(optimizer.state_dict(), other.state_dict())
    assert saved["param_groups"] == other.state_dict()["param_groups"]
    # The same parameters twice have the same numbers.
    other.param_groups.extend(other.param_groups)
    assert optimizer.state_dict()["param_groups"][-1] == other.state_dict()["param_groups"][-1]


@EVERY
def test_older_state_dicts_without_newer_options_load(given: OptimizerInput) -> None:
    _, optimizer, loss = trained(given, 8)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for name in ("tau", "on_nonfinite"):
            del group[name]
    optimizer.load_state_dict(saved)
    optimizer.step(loss)


@EVERY
@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)])
def test_states_load_between_named_and_unnamed_parameters(given: OptimizerInput, named: tuple[bool, bool]) -> None:
    def params_of(weights: list[Parameter], with_names: bool) -> Any:
        return list(zip(("weight", "bias"), weights, strict=True)) if with_names else weights

    params, loss = linear()
    optimizer = build(params_of(params, named[0]), given)
    for _ in range(8):
        optimizer.step(loss)
    twins = [Parameter(value) for value in values(params)]
    other = build(params_of(twins, named[1]), given)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    follow(params, optimizer, twins, other, loss)
    # Once there are names, in the live groups or in the loaded ones, a saved state has them.
    assert not named[0] or other.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@EVERY
def test_saved_and_loaded_with_weights_only(given: OptimizerInput, tmp_path: Any) -> None:
    params, optimizer, loss = trained(given, 8)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    twins = [Parameter(value) for value in values(params)]
    other = build(twins, given)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    follow(params, optimizer, twins, other, loss)


@EVERY
def test_states_move_to_another_dtype_and_stay_exact(given: OptimizerInput) -> None:
    params, optimizer, _ = trained(given, 8)
    halves = [Parameter(value.bfloat16()) for value in values(params)]
    other = build(halves, given)
    other.load_state_dict(optimizer.state_dict())
    for param, half in zip(params, halves, strict=True):
        for name, value in optimizer.state[param].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[half][name])), name
    for half in halves:
        half.grad = torch.ones_like(half)
    other.step()


@EVERY
def test_a_deep_copy_has_every_public_attribute(given: OptimizerInput) -> None:
    _, optimizer, _ = trained(given, 8)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert public == {name for name in vars(copy.deepcopy(optimizer)) if not name.startswith("_")}


@EVERY
def test_an_optimizer_without_steps_has_no_state(given: OptimizerInput) -> None:
    optimizer = build(linear()[0], given)
    assert not optimizer.state_dict()["state"] and len(optimizer.state_dict()["param_groups"]) == 1
    _, optimizer, _ = trained(given, 1)
    assert all(entry for entry in optimizer.state.values()) and len(optimizer.state) == 2


def test_state_dict_hooks_run_and_can_change_the_dict() -> None:
    params, loss = linear()
    optimizer = SCAO(params, lr=0.1, **EARLY)
    optimizer.step(loss)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("save"))
    handle = optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    first = optimizer.register_state_dict_post_hook(lambda _, state: seen.append("first"), prepend=True)
    assert optimizer.state_dict()["note"] == 1 and seen == ["save", "first"]
    handle.remove()
    first.remove()
    saved = copy.deepcopy(optimizer.state_dict())

    def raise_lr(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 0.5} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(raise_lr)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(saved)
    assert seen[-1] == "loaded" and optimizer.param_groups[0]["lr"] == 0.5 and saved["param_groups"][0]["lr"] == 0.1
