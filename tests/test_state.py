"""Saving and loading: bit-exact resume in every phase, exact dtypes, refusals that change nothing."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import pickle
import random
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from scao_hf import SCAO, create_scao_optimizer, options

SHAPES = [(4, 24), (24, 4), (6, 6), (10, 12), (5,), (3, 4, 2)]
QUICK: dict[str, Any] = {"warmup_steps": 4, "blend_steps": 3, "precond_freq": 2, "min_precond_updates": 1, "k_max": 4}


def make(dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[list[torch.nn.Parameter], SCAO]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    return params, SCAO(params, **{"lr": 0.01, "max_precond_dim": 8, **QUICK, **kwargs})


def train(params: list[torch.nn.Parameter], optimizer: SCAO, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("use_int8_ema", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", options.MATRIX_RULES)
def test_resume_is_bit_exact_in_every_phase(rule: str, dtype: torch.dtype, use_int8_ema: bool) -> None:
    settings = {"rule": rule, "use_int8_ema": use_int8_ema}
    params, optimizer = make(dtype, **settings)
    train(params, optimizer, range(14))
    for pause in (0, 1, 4, 6, 11):  # nothing yet, phase 1, its last step, the ramp, phase 2
        first, before = make(dtype, **settings)
        train(first, before, range(pause))
        second, after = make(dtype, **settings)
        with torch.no_grad():
            for a, b in zip(second, first, strict=True):
                a.copy_(b)
        after.load_state_dict(through_file(before.state_dict()))
        train(second, after, range(pause, 14))
        for a, b in zip(second, params, strict=True):
            assert torch.equal(a, b), f"paused after {pause}"


@pytest.mark.parametrize("rule", options.MATRIX_RULES)
def test_dtypes_survive_and_nothing_is_aliased(rule: str) -> None:
    params, optimizer = make(torch.bfloat16, rule=rule, use_int8_ema=True)
    train(params, optimizer, range(6))
    saved = through_file(optimizer.state_dict())
    other_params, other = make(torch.bfloat16, rule=rule, use_int8_ema=True)
    other.load_state_dict(saved)
    seen = set()
    for index, param in enumerate(other_params):
        for name, value in saved["state"][index].items():
            if isinstance(value, torch.Tensor):
                loaded = other.state[param][name]
                assert loaded.dtype == value.dtype and torch.equal(loaded, value)
                assert loaded.data_ptr() != value.data_ptr()
                seen.add(value.dtype)
    assert torch.float32 in seen and (torch.int8 in seen) == (rule != "orthogonal")  # which keeps no curvature
    assert torch.bfloat16 not in seen


def test_fp32_state_loads_under_bf16_parameters_unrounded() -> None:
    params, optimizer = make()
    train(params, optimizer, range(6))
    half, other = make(torch.bfloat16)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[half[0]]["exp_avg"], optimizer.state[params[0]]["exp_avg"])


def size(saved: Any) -> int:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.tell()


@pytest.mark.parametrize("steps", [2, 9])
def test_a_part_of_the_state_is_saved_at_its_own_size(steps: int) -> None:
    params = [torch.nn.Parameter(torch.ones(8, 200)) for _ in range(40)]
    optimizer = SCAO(params, **QUICK)
    train(params, optimizer, range(steps))
    state = optimizer.state_dict()["state"]
    own = [sum(value.nbytes for value in entry.values() if isinstance(value, torch.Tensor)) for entry in state.values()]
    assert size(state[0]) < own[0] + 10_000 < size(state) < sum(own) + len(own) * 10_000
    assert size(copy.deepcopy(state[0])) < own[0] + 10_000
    weights = sum(param.nbytes for param in params)
    assert len(pickle.dumps(optimizer)) < sum(own) + weights + len(own) * 20_000
    # Nothing is copied: a state dict is as large as AdamW's, next to nothing.
    live = optimizer.state[params[3]]["exp_avg"]
    assert state[3]["exp_avg"].data_ptr() == live.data_ptr() and torch.equal(state[3]["exp_avg"], live)


def test_a_state_dict_that_was_not_copied_is_refused_with_what_to_do() -> None:
    params, optimizer = make()
    train(params, optimizer, range(5))
    live, copied = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
    train(params, optimizer, range(5, 7))
    with pytest.raises(ValueError, match=r"changed since state_dict\(\) was called.*keep copy\.deepcopy"):
        optimizer.load_state_dict(live)
    optimizer.load_state_dict(copied)


def test_state_holds_tensors_and_numbers_only_and_every_name_once() -> None:
    params, optimizer = make()
    train(params, optimizer, range(6))
    for entry in optimizer.state_dict()["state"].values():
        assert all(isinstance(value, (torch.Tensor, int)) for value in entry.values())
    report = optimizer.memory_report()
    held = sum(
        value.numel() * value.element_size()
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )
    assert report["total"] == held
    # Phase 1 holds two moments as large as the parameters, and L.
    assert report["peak"] >= max(held, 8 * report["parameters"])


@pytest.mark.parametrize("rank", [3, 4, 8, 11, 16])
def test_lora_of_any_rank_above_two_takes_about_as_much_as_adamw(rank: int) -> None:
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((rank, 640), (960, rank))]
    settings = {**QUICK, "k_max": None}
    optimizer = SCAO(params, **settings)
    train(params, optimizer, range(6))
    report = optimizer.memory_report()
    assert report["peak"] < 8.25 * report["parameters"]
    assert [optimizer.state[param]["long_vectors"].shape[0] for param in params] == [min(rank + rank // 2, 16)] * 2
    wider = SCAO(params, **{**settings, "k_max": 24})  # what is passed holds, above the rank too
    train(params, wider, range(6))
    assert [wider.state[param]["long_vectors"].shape[0] for param in params] == [24] * 2


def test_a_state_with_more_directions_than_the_default_resumes_with_them() -> None:
    params, optimizer = make(k_max=16)
    train(params, optimizer, range(6))
    other, resumed = make(k_max=None)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    with torch.no_grad():
        for ours, theirs in zip(other, params, strict=True):
            ours.copy_(theirs)
    for pair in ((params, optimizer), (other, resumed)):
        train(*pair, range(6, 12))
    assert resumed.state[other[0]]["long_vectors"].shape == (16, 24)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(other, params, strict=True))


@pytest.mark.parametrize("moment_dtype", ["float32", "int8"])
def test_parameters_that_stop_or_pause_do_not_keep_their_stacks(moment_dtype: str) -> None:
    count = 12
    params = [torch.nn.Parameter(torch.ones(4, 24)) for _ in range(count)]
    optimizer = SCAO(params, moment_dtype=moment_dtype, **QUICK)
    chance = random.Random(0)
    freezing = [range(first, count) for first in range(count)]
    dropping = [[index for index in range(count) if chance.random() < 0.7] for _ in range(20)]
    for present in [*freezing, *dropping]:
        for index, param in enumerate(params):
            param.grad = torch.full_like(param, index + 1.0) if index in present else None
        optimizer.step()
        tensors = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
        assert sum(storages.values()) == sum(value.numel() * value.element_size() for value in tensors)


def test_a_meta_model_reports_the_same_bytes() -> None:
    meta = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    _, optimizer = make()
    assert SCAO(meta, max_precond_dim=8, **QUICK).memory_report() == optimizer.memory_report()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_of_the_optimizer_go_on(clone: Callable[[SCAO], SCAO]) -> None:
    params, optimizer = make()
    train(params, optimizer, range(6))
    twin = clone(optimizer)
    twins = [param for group in twin.param_groups for param in group["params"]]
    train(twins, twin, range(6, 9))
    train(params, optimizer, range(6, 9))
    for a, b in zip(params, twins, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
        lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()) or optimizer,  # as Accelerate does
    ],
    ids=["copied", "pickled", "loaded"],
)
def test_groups_can_be_added_to_what_was_copied_or_loaded(clone: Callable[[SCAO], SCAO]) -> None:
    def group(*shape: int) -> dict[str, Any]:
        return {"params": [torch.nn.Parameter(torch.ones(shape))]}

    optimizer = clone(SCAO([group(5)], precond_freq=3))
    optimizer.add_param_group(group(4, 6))  # matrices, where the first group has none
    optimizer.add_param_group({**group(4, 6), "rule": "published"})
    assert optimizer.param_groups[2]["precond_freq"] == 3  # as passed, not the other rule's default
    train([param for group in optimizer.param_groups for param in group["params"]], optimizer, range(3))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()) or optimizer]
)
def test_flattened_matrices_are_refused_after_a_copy_or_a_load_too(clone: Callable[[SCAO], SCAO]) -> None:
    params, optimizer = make()
    optimizer = clone(optimizer)
    flat = [torch.nn.Parameter(param.detach().flatten()) for param in params]
    optimizer.param_groups[0]["params"] = flat  # as DeepSpeed ZeRO-1 and 2 do
    with pytest.raises(ValueError, match="replaced by flat vectors"):
        train(flat, optimizer, range(1))
    for param in params:
        param.data = param.detach().flatten()
    optimizer.param_groups[0]["params"] = params  # the same ones, flattened in place
    with pytest.raises(ValueError, match="replaced by flat vectors"):
        train(params, optimizer, range(1))


def test_refreshes_are_still_shared_out_after_a_load() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        _, optimizer = make()
        optimizer.share_refresh()
        optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does too, when it prepares an optimizer
        assert optimizer._sharing is not None
    finally:
        dist.destroy_process_group()


def test_the_state_resumes_through_zero_redundancy_optimizer() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def wrapped(params: list[torch.nn.Parameter]) -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(params, optimizer_class=SCAO, lr=0.01, **QUICK)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        params = make()[0]
        optimizer: Any = wrapped(params)
        train(params, optimizer, range(9))
        optimizer.consolidate_state_dict()
        saved, others = through_file(optimizer.state_dict()), copy.deepcopy(params)
        resumed: Any = wrapped(others)
        resumed.load_state_dict(saved)  # which enters a copy of the file in the state
        train(params, optimizer, range(9, 14))
        train(others, resumed, range(9, 14))
    finally:
        dist.destroy_process_group()
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)


def spoil(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def spoiled(state: dict[str, Any]) -> dict[str, Any]:
        change(state)
        return state

    return spoiled


def adamw_state(_: dict[str, Any]) -> dict[str, Any]:
    params, _ = make()
    adamw = torch.optim.AdamW(params)
    for param in params:
        param.grad = torch.ones_like(param)
    adamw.step()
    return adamw.state_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (adamw_state, "another optimizer"),
        (lambda _: {"weights": 1}, "not an optimizer state"),
        (spoil(lambda s: s["param_groups"][0].update(scao_version=99)), "layout version 99"),
        (spoil(lambda s: s["param_groups"][0].update(rule="published")), "rule='published'"),
        (spoil(lambda s: s["param_groups"][0].update(lr=-1.0)), "lr=-1.0"),
        (spoil(lambda s: s["param_groups"][0].update(precond_freq=0)), "precond_freq=0"),
        (spoil(lambda s: s["param_groups"][0]["params"].pop()), "groups of sizes"),
        (spoil(lambda s: s["state"].update({77: s["state"][0]})), "unknown parameters"),
        (spoil(lambda s: s["state"][0].pop("exp_avg")), "lacks ['exp_avg']"),
        (spoil(lambda s: s["state"][0].update(other=1)), "does not fit its checksum"),
        (spoil(lambda s: s["state"][0].update(step=-1)), "step is -1"),
        (spoil(lambda s: s["state"][0].update(exp_avg=torch.zeros(2, 2))), "exp_avg is (2, 2)"),
        (spoil(lambda s: s["state"][0].update(exp_avg="x")), "exp_avg is str"),
        (spoil(lambda s: s["state"][0].update(exp_avg=torch.zeros(4, 24, dtype=torch.int8))), "torch.int8"),
        (spoil(lambda s: s["state"][0]["exp_avg"].fill_(float("nan"))), "does not fit its checksum"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change: Any, words: str) -> None:
    params, optimizer = make()
    train(params, optimizer, range(6))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError) as error:
        optimizer.load_state_dict(change(copy.deepcopy(before)))
    assert words in str(error.value)
    ways_out = (
        "take an earlier",
        "start from",
        "start SCAO from",
        "resume with",
        "build the optimizer",
        "Pass what",
        "delete",
    )
    assert any(way in str(error.value) for way in ways_out), "what is to be done?"
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(after["state"][key][name]), torch.as_tensor(value))
    train(params, optimizer, range(6, 8))


#: Options, steps, a field of the first matrix, an entry that it cannot have, and what the message says of it.
IMPOSSIBLE: list[tuple[dict[str, Any], int, str, float, str]] = [
    *(({}, 2, name, -1.0, "and at least 0") for name in ("exp_avg_sq", "factor")),
    *(({}, 9, name, -1e-9, "and at least 0") for name in ("row", "col", "inside_sq", "factor_values", "long_values")),
    *(({}, 9, "taken", value, "whole numbers between 0 and 9") for value in (-1.0, 10.0, 0.5)),
    *(({}, 9, "mask", value, "whole numbers between 0 and 1") for value in (-1.0, 2.0, 0.5)),
    *(({}, 9, "gain", value, "between 0.5 and 2") for value in (-1.0, 0.0, 2.1)),
    *(({}, 9, "agreement", value, "between 0 and 1.001") for value in (-0.1, 1.1)),
    ({}, 9, "level", -1.0, "between 0 and 1e+15"),
    ({}, 9, "vectors", 1024.0, "between -10 and 10"),
    ({}, 9, "long_vectors", -1024.0, "between -10 and 10"),
    ({}, 9, "exp_avg", float("inf"), "be finite:"),
    ({}, 9, "inside_avg", float("nan"), "be finite:"),
    ({"moment_dtype": "int8"}, 2, "exp_avg_sq_codes", -1, "between 0 and 127"),
    ({"moment_dtype": "int8"}, 9, "exp_avg_scales", -1.0, "and at least 0"),
    ({"moment_dtype": "bfloat16"}, 2, "exp_avg_sq", -1.0, "and at least 0"),
    ({"use_int8_ema": True}, 9, "long_codes", -128, "between -127 and 127"),
    ({"use_int8_ema": True}, 9, "long_scales", -1.0, "and at least 0"),
    ({"rule": "published"}, 9, "right_factor", -1.0, "on the diagonal"),
    ({"rule": "published"}, 9, "left_values", -1.0, "and at least 0"),
    ({"rule": "published"}, 9, "left_tail", 0.0, "and at least 1.17549e-38"),
    ({"rule": "published"}, 9, "right_mass", 2.0, "between 0 and 1.001"),
]


@pytest.mark.parametrize(("settings", "steps", "name", "value", "words"), IMPOSSIBLE)
def test_an_impossible_entry_is_refused_by_name_and_value(
    settings: dict[str, Any], steps: int, name: str, value: float, words: str
) -> None:
    params = [torch.nn.Parameter(torch.ones(8, 24)) for _ in range(2)]
    optimizer = SCAO(zip("ab", params, strict=True), **{**QUICK, "max_precond_dim": 24, **settings})
    train(params, optimizer, range(steps))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    entry = saved["state"][1]
    entry[name].view(-1)[0] = value
    del entry["checksum"]
    with pytest.raises(ValueError) as error:
        optimizer.load_state_dict(saved)
    assert str(error.value).startswith(
        f"parameter 'b' of shape (8, 24): saved {name} holds {value:g}; its entries must be "
    )
    assert words in str(error.value)


def test_a_number_that_is_too_large_for_the_fields_type_is_refused() -> None:
    params, optimizer = make()
    train(params, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    entry = saved["state"][0]
    del entry["checksum"]
    entry["exp_avg"] = torch.full((4, 24), 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match="exp_avg holds inf"):
        optimizer.load_state_dict(saved)


def renewed(optimizer: SCAO, params: list[torch.nn.Parameter]) -> None:
    optimizer.state = defaultdict(dict)


def cleared(optimizer: SCAO, params: list[torch.nn.Parameter]) -> None:
    optimizer.state.clear()


def taken_away(optimizer: SCAO, params: list[torch.nn.Parameter]) -> None:
    for param in params:
        del optimizer.state[param]


def emptied(optimizer: SCAO, params: list[torch.nn.Parameter]) -> None:
    for param in params:
        optimizer.state[param].clear()


@pytest.mark.parametrize("reset", [renewed, cleared, taken_away, emptied])
def test_a_state_that_was_taken_away_begins_anew(reset: Callable[[SCAO, list[torch.nn.Parameter]], None]) -> None:
    params, optimizer = make()
    train(params, optimizer, range(9))
    reset(optimizer, params)
    others, fresh = make()
    with torch.no_grad():
        for a, b in zip(others, params, strict=True):
            a.copy_(b)
    train(params, optimizer, range(9, 18))
    train(others, fresh, range(9, 18))
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)
    saved, expected = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert {key: entry["checksum"] for key, entry in saved.items()} == {k: e["checksum"] for k, e in expected.items()}


def test_a_part_of_the_state_may_begin_anew() -> None:
    params, optimizer = make()
    train(params, optimizer, range(9))
    optimizer.state[params[0]].clear()
    del optimizer.state[params[1]]
    train(params, optimizer, range(9, 12))
    assert [optimizer.state[param]["step"] for param in params] == [3, 3, 12, 12, 12, 12]


def test_hooks_after_a_load_see_the_state() -> None:
    params, optimizer = make()
    train(params, optimizer, range(6))
    seen = []
    optimizer.register_load_state_dict_post_hook(
        lambda loaded: seen.append({p: e["step"] for p, e in loaded.state.items()})
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [dict.fromkeys(params, 6)]


def named(order: str, weights: dict[str, torch.Tensor], cut: int = 0, **options: Any) -> tuple[SCAO, dict[str, Any]]:
    """Parameters of one shape in that order, those after the first ``cut`` without decay, and their optimizer."""
    params = {name: torch.nn.Parameter(weights[name].clone()) for name in order}
    pairs = list(params.items())
    groups = [{"params": pairs[:cut]}, {"params": pairs[cut:], "weight_decay": 0.0}] if cut else [{"params": pairs}]
    return SCAO(groups, lr=0.01, **QUICK, **options), params


def stepped(optimizer: SCAO, params: dict[str, torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, param in params.items():
            generator = torch.Generator().manual_seed(100 * step + ord(name))
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(("order", "cut"), [("dcba", 0), ("badc", 2), ("cdba", 2)], ids=["one", "within", "groups"])
def test_a_state_goes_to_the_parameters_of_its_names(order: str, cut: int) -> None:
    weights = {name: torch.full((6, 30), float(index)) for index, name in enumerate("abcd")}
    optimizer, params = named("abcd", weights, cut)
    stepped(optimizer, params, range(9))
    saved = through_file(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["param_names"] = [f"module._orig_mod.{name}" for name in group["param_names"]]
    other, others = named(order, {name: param.detach() for name, param in params.items()}, cut)
    other.load_state_dict(saved)
    for name, param in params.items():
        entry, loaded = optimizer.state[param], other.state[others[name]]
        assert entry.keys() == loaded.keys() and entry["step"] == 9
        assert all(torch.equal(torch.as_tensor(entry[field]), torch.as_tensor(loaded[field])) for field in entry), name
    stepped(other, others, range(9, 10))
    assert [name for group in other.param_groups for name in group["param_names"]] == list(order)
    decays = {param: group["weight_decay"] for group in other.param_groups for param in group["params"]}
    assert [decays[others[name]] for name in "abcd"] == [0.01, 0.01, *[0.0 if cut else 0.01] * 2]


def test_a_submodule_that_is_called_module_is_no_wrapper() -> None:
    params = {name: torch.nn.Parameter(torch.ones(6, 30)) for name in ("weight", "module.weight")}
    optimizer = SCAO(params.items(), **QUICK)
    for factor, param in enumerate(params.values()):
        param.grad = torch.full_like(param, 1.0 + factor)
    optimizer.step()
    other = SCAO(reversed(params.items()), **QUICK)
    other.load_state_dict(optimizer.state_dict())
    for param in params.values():
        assert torch.equal(other.state[param]["exp_avg"], optimizer.state[param]["exp_avg"])


@pytest.mark.parametrize(
    ("order", "cut", "words"),
    [
        ("abce", 0, "only the saved state has ['d'] (frozen or removed since); only the optimizer has ['e'] (new)"),
        ("abc", 0, "sizes [4], the optimizer has [3]; only the saved state has ['d'] (frozen or removed since): build"),
        ("abcdefghij", 0, "only the optimizer has ['e', 'f', 'g', 'h', 'i'] and 1 more (new): build"),
        ("abcd", 2, "sizes [4], the optimizer has [2, 2]; 'c' is in group 0 there and in group 1 here"),
    ],
)
def test_a_state_of_other_names_is_refused_with_these(order: str, cut: int, words: str) -> None:
    weights = {name: torch.ones(6, 30) for name in "abcdefghij"}
    optimizer, params = named("abcd", weights)
    stepped(optimizer, params, range(3))
    other, others = named(order, weights, cut)
    with pytest.raises(ValueError) as error:
        other.load_state_dict(optimizer.state_dict())
    assert words in str(error.value) and not other.state
    if len(others) == 4 and not cut:
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            del group["param_names"]
        other.load_state_dict(state)  # by position, as the message says


@pytest.mark.parametrize("cut", [0, 1], ids=["one group", "two groups"])
def test_a_partial_resume_loads_what_is_common(cut: int) -> None:
    """``a`` is frozen, ``c`` has another shape, ``e`` is new: ``b`` and ``d`` have their state, the others none."""
    weights = {name: torch.full((6, 30), float(index)) for index, name in enumerate("abcd")}
    optimizer, params = named("abcd", weights)
    stepped(optimizer, params, range(9))
    saved = through_file(optimizer.state_dict())
    shapes = {name: param.detach() for name, param in params.items()} | {"c": torch.ones(8, 30), "e": torch.ones(6, 30)}
    refusing, _ = named("ebcd", shapes, cut)
    with pytest.raises(
        ValueError, match=r"\['a'\] \(frozen or removed since\); only the optimizer has \['e'\] \(new\)"
    ):
        refusing.load_state_dict(saved)
    other, others = named("ebcd", shapes, cut, partial_resume=True)
    with pytest.warns(RuntimeWarning) as caught:
        copy.deepcopy(other).load_state_dict(saved)
        other.load_state_dict(saved)
    assert str(caught[1].message) == (
        "partial_resume: the state of 2 parameters is loaded; new or never stepped, and without state: ['e']; of another "
        "shape or other options, and without state: ['c']; only in the saved state, frozen or removed since: ['a']"
    )
    assert {name for name, param in others.items() if "step" in other.state.get(param, ())} == {"b", "d"}
    for name in "bd":
        entry, loaded = optimizer.state[params[name]], other.state[others[name]]
        assert all(torch.equal(torch.as_tensor(entry[field]), torch.as_tensor(loaded[field])) for field in entry), name
    stepped(other, others, range(9, 12))
    assert [other.state[others[name]]["step"] for name in "bcde"] == [12, 3, 12, 3]
    resumed, _ = named("ebcd", shapes, cut, partial_resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(through_file(other.state_dict()))


def test_a_partial_resume_takes_twice_as_long_for_twice_the_parameters() -> None:
    def calls(count: int) -> int:
        params = [(f"p{index}", torch.nn.Parameter(torch.ones(2))) for index in range(count)]
        state, found = SCAO(params, partial_resume=True).state_dict(), 0

        def counting(frame: Any, event: str, argument: Any) -> None:
            nonlocal found
            found += event == "call"

        other = SCAO(params, partial_resume=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sys.setprofile(counting)
            try:
                other.load_state_dict(state)
            finally:
                sys.setprofile(None)
        return found

    assert calls(400) < 2.5 * calls(200)


class Weights(torch.nn.Module):
    """A module whose parameters have those names, as torch.distributed.checkpoint wants to know them."""

    def __init__(self, params: dict[str, torch.nn.Parameter]) -> None:
        super().__init__()
        for name, param in params.items():
            self.register_parameter(name, param)


@pytest.mark.parametrize(
    ("order", "partial", "loaded"),
    [("dcba", False, "abcd"), ("bd", False, "bd"), ("debc", True, "bcd"), ("cb", True, "bc")],
)
def test_names_that_are_keys_say_whose_state_it_is(order: str, partial: bool, loaded: str) -> None:
    """torch.distributed.checkpoint has names for keys; the list of names in its groups may be that of the saved run."""
    weights = {name: torch.full((6, 30), float(index)) for index, name in enumerate("abcde")}
    optimizer, params = named("abcd", weights)
    stepped(optimizer, params, range(9))
    saved = get_optimizer_state_dict(Weights(params), optimizer)
    for through in ("load_state_dict", "set_optimizer_state_dict"):
        other, others = named(order, weights, partial_resume=partial)
        state = copy.deepcopy(saved)
        if through == "load_state_dict" and len(order) != 4 and not partial:
            continue  # refused, as nobody has left the others out
        with pytest.warns(RuntimeWarning, match="partial_resume") if "e" in order else contextlib.nullcontext():
            if through == "load_state_dict":
                other.load_state_dict(state)
            else:
                form = StateDictOptions(strict=False)
                set_optimizer_state_dict(Weights(others), other, state, options=form)
        assert other.param_groups[0]["param_names"] == list(order)
        assert {name for name, param in others.items() if "step" in other.state.get(param, ())} == set(loaded)
        for name in loaded:
            entry, found = optimizer.state[params[name]], other.state[others[name]]
            assert all(torch.equal(torch.as_tensor(entry[key]), torch.as_tensor(found[key])) for key in entry), name


def test_a_partial_resume_refuses_what_it_cannot_tell_apart() -> None:
    weights = {name: torch.ones(6, 30) for name in "abcd"}
    optimizer, params = named("ab", weights)
    stepped(optimizer, params, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    other, _ = named("cd", weights, partial_resume=True)
    with pytest.raises(
        ValueError, match=r"no parameter of the saved state .* it has \['a', 'b'\], the optimizer \['c', 'd'\]"
    ):
        other.load_state_dict(state)
    damaged, _ = named("bc", weights, partial_resume=True)
    next(iter(reversed(state["state"].values())))["exp_avg" if "exp_avg" in state["state"][1] else "M"][0, 0] += 1
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="does not fit its checksum"):
        damaged.load_state_dict(state)
    for group in state["param_groups"]:
        del group["param_names"]
    with pytest.raises(ValueError, match="goes by the names of the parameters"):
        damaged.load_state_dict(state)
    with pytest.raises(ValueError, match="written by another optimizer"):
        damaged.load_state_dict(torch.optim.AdamW(params.items()).state_dict())
    assert not damaged.state


NESTS = pytest.mark.skipif(
    "nested" not in inspect.getsource(torch.distributed.checkpoint.state_dict._unflatten_optim_state_dict),
    reason="before torch 2.9 or so, flattened state dicts have no nested keys",
)


def copied(state: Any, _: Any) -> Any:
    return copy.deepcopy(state)


def read_into(state: Any, target: Any) -> Any:
    """Through files, as torch.distributed.checkpoint reads them: into the keys and shapes of ``target``."""
    with tempfile.TemporaryDirectory() as folder:
        dcp.save({"optimizer": state}, checkpoint_id=folder)
        found = {"optimizer": target}
        dcp.load(found, checkpoint_id=folder)
    return found["optimizer"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("pause", [2, 5, 9], ids=["phase 1", "ramp", "phase 2"])
@pytest.mark.parametrize(
    ("through", "options"),
    [
        (copied, {}),
        (copied, {"full_state_dict": True, "cpu_offload": True}),
        (read_into, {}),
        pytest.param(copied, {"flatten_optimizer_state_dict": True}, marks=NESTS),
        pytest.param(read_into, {"flatten_optimizer_state_dict": True}, marks=NESTS),
    ],
    ids=["copied", "full", "read", "flattened", "read flattened"],
)
def test_distributed_checkpoints_of_one_process_go_into_a_new_optimizer(
    through: Callable[[Any, Any], Any], options: dict[str, Any], pause: int
) -> None:
    form = StateDictOptions(**options)

    def build() -> tuple[torch.nn.Module, SCAO]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.Linear(8, 20))
        return model, create_scao_optimizer(model, lr=0.01, rule="eigenbasis", max_precond_dim=6, **QUICK)

    def run(model: torch.nn.Module, optimizer: SCAO, steps: range) -> None:
        train(list(model.parameters()), optimizer, steps)
        optimizer.zero_grad()

    (model, optimizer), (fresh, after) = build(), build()
    run(model, optimizer, range(pause))
    fresh.load_state_dict(model.state_dict())
    saved = get_optimizer_state_dict(model, optimizer, options=form)
    run(model, optimizer, range(pause, 12))
    target = get_optimizer_state_dict(fresh, after, options=form)
    set_optimizer_state_dict(fresh, after, through(saved, target), options=form)
    run(fresh, after, range(pause, 12))
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "exp_avg.0" in optimizer.state_dict()["state"][0]  # everybody else gets the fields by name


def test_options_come_from_the_checkpoint() -> None:
    params, optimizer = make(use_int8_ema=True, moment_dtype="int8")  # of all kinds that change the shape of the state
    others, other = make(k_max=2, precond_freq=5, max_precond_dim=6)
    train(params, optimizer, range(9))
    with torch.no_grad():
        for a, b in zip(others, params, strict=True):
            a.copy_(b)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert {**other.param_groups[0], "params": []} == {**optimizer.param_groups[0], "params": []}
    train(params, optimizer, range(9, 14))
    train(others, other, range(9, 14))
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_options_come_from_a_distributed_checkpoint() -> None:
    module = torch.nn.Linear(30, 6)
    given: dict[str, Any] = {"stochastic_rounding": True, "from_scratch": True, "precond_freq": 5}
    saving, loading = SCAO(module.named_parameters(), **given), SCAO(module.named_parameters())
    saved = get_optimizer_state_dict(module, saving)
    set_optimizer_state_dict(module, loading, read_into(saved, get_optimizer_state_dict(module, loading)))
    assert {**loading.param_groups[0], "params": []} == {**saving.param_groups[0], "params": []}


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_a_schedule_in_numpy_can_be_saved(kind: str) -> None:
    np = pytest.importorskip("numpy")
    params, optimizer = make()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: getattr(np, kind)(np.cos(0.1 * step)))
    train(params, optimizer, range(2))
    schedule.step()
    saved = through_file(optimizer.state_dict())
    assert saved["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * np.cos(0.1), 1e-6)
    train(params, optimizer, range(2, 3))


def test_an_empty_state_loads() -> None:
    _, optimizer = make()
    optimizer.load_state_dict(optimizer.state_dict())
