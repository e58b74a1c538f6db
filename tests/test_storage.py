"""Moments below float32: codec bounds, resume to the bit in every phase, skipped matrices, bytes, and what it does to a run."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scao_hf import SCAO, options, quantization, stacks
from scao_hf.blocks import Packing

KINDS = ("bfloat16", "int8")
#: Sides at which int8 pays for an ``exp_avg``, for a ``col`` and for the small ``inside`` moments, blocks, and a vector.
SHAPES = [(8, 300), (200, 4), (16, 90), (300,), (40, 30)]
QUICK: dict[str, Any] = {"warmup_steps": 4, "blend_steps": 3, "precond_freq": 2, "min_precond_updates": 1, "k_max": 10}


def make(**kwargs: Any) -> tuple[list[torch.nn.Parameter], SCAO]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return params, SCAO(params, lr=0.01, max_precond_dim=24, **{**QUICK, **kwargs})


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def train(params: list[torch.nn.Parameter], optimizer: SCAO, steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


@settings(max_examples=60, deadline=None)
@given(power=st.sampled_from((2, 4)), decades=st.floats(0, 14), log_scale=st.floats(-6, 6), seed=st.integers(0, 2**31))
def test_an_entry_goes_to_a_neighbouring_level(power: int, decades: float, log_scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 300, generator=generator) * 10 ** (
        log_scale - decades * torch.rand(2, 300, generator=generator)
    )
    values = values.abs() if power == 4 else values
    codes, scales = quantization.encode(values, seed, power)
    back = quantization.decode(codes, scales, (300,), torch.float64, power)
    top = 127 * scales.double().repeat_interleave(quantization.BLOCK, 1)[:, :300]
    place = 127 * (values.double().abs() / top) ** (1 / power)
    levels = [top * (place.floor() + offset).div(127) ** power for offset in (-1e-4, 1 + 1e-4)]
    lower = torch.where(place < 1, 0.0, levels[0])
    assert (back.abs() >= lower * (1 - 1e-4)).all() and (back.abs() <= levels[1] * (1 + 1e-4)).all()
    assert (back * values >= 0).all()
    if power == 4:
        assert (back > 0).equal(values > 0)


@pytest.mark.parametrize("power", [2, 4])
def test_rounding_between_levels_is_unbiased(power: int) -> None:
    values = torch.logspace(-3, 0, 128).double()[None]
    draws = 3000
    mean = torch.zeros_like(values)
    for seed in range(draws):
        codes, scales = quantization.encode(values, seed, power)
        mean += quantization.decode(codes, scales, (128,), torch.float64, power) / draws
    code = 127 * values ** (1 / power)
    distance = ((code.floor() + 1) / 127) ** power - (code.floor() / 127) ** power
    # Half the distance of two levels is the largest deviation of one draw; five of the mean's.
    assert ((mean - values).abs() < 5 * distance / 2 / draws**0.5 + 1e-7).all()


def test_bfloat16_rounding_is_unbiased_and_leaves_bfloat16_alone() -> None:
    values = torch.linspace(1, 2, 333)
    mean = torch.stack([quantization.to_bfloat16(values, seed).double() for seed in range(2000)]).mean(0)
    assert (mean - values).abs().max() < 5 * 2**-7 / 2 / 2000**0.5
    exact = torch.cat([values.bfloat16(), torch.tensor([0.0, -3.5, 1e-30, 3e38]).bfloat16()])
    assert torch.equal(quantization.to_bfloat16(exact, 7), exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", options.MATRIX_RULES)
def test_resume_is_bit_exact_in_every_phase(rule: str, kind: str) -> None:
    kwargs = {"rule": rule, "moment_dtype": kind, "use_int8_ema": True}
    params, optimizer = make(**kwargs)
    saved = {}
    for step in range(14):
        if step in (1, 4, 6, 11):  # phase 1, its last step, the ramp, phase 2
            saved[step] = copy.deepcopy((optimizer.state_dict(), [param.detach() for param in params]))
        train(params, optimizer, range(step, step + 1))
    for pause, (state, values) in saved.items():
        resumed, after = make(**kwargs)
        with torch.no_grad():
            for param, value in zip(resumed, values, strict=True):
                param.copy_(value)
        after.load_state_dict(state)
        train(resumed, after, range(pause, 14))
        for a, b in zip(resumed, params, strict=True):
            assert torch.equal(a, b), f"paused after {pause}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_encoded(kind: str) -> None:
    params, optimizer = make(moment_dtype=kind)
    train(params, optimizer, range(2))
    dtype = {"bfloat16": torch.bfloat16, "int8": torch.int8}[kind]
    for param in params:
        large = [
            field for field in optimizer.state[param].values() if isinstance(field, Tensor) and field.numel() >= 300
        ]
        assert large and all(field.dtype == dtype for field in large)
    train(params, optimizer, range(2, 12))
    entry = optimizer.state[params[0]]
    name = "exp_avg" if kind == "bfloat16" else "exp_avg_codes"
    assert entry[name].dtype == dtype and not any(key.startswith("exp_avg_sq") for key in entry)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [2, 4, 6, 10])
def test_a_skipped_matrix_stays_to_the_bit(kind: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under the noise at which a code that is decoded and encoded again may become its lower neighbour."""
    params, optimizer = make(moment_dtype=kind)
    train(params, optimizer, range(step - 1))
    give_gradients(params, step)
    assert params[0].grad is not None
    params[0].grad[3, 7] = math.nan
    before = {name: field.clone() for name, field in optimizer.state[params[0]].items() if isinstance(field, Tensor)}
    value = params[0].detach().clone()
    monkeypatch.setattr(
        quantization, "uniform_noise", lambda counts, seeds, device: torch.ones(sum(counts), 128) - 2**-24
    )
    optimizer.step()
    assert torch.equal(params[0], value)
    after = optimizer.state[params[0]]
    shared = before.keys() & after.keys()
    assert len(shared) >= 3
    for name in shared:
        assert torch.equal(after[name], before[name]), name
    assert not torch.equal(params[1], value)


@pytest.mark.parametrize("kind", ("float32", *KINDS))
@pytest.mark.parametrize("use_int8_ema", [False, True])
@pytest.mark.parametrize("rule", options.RULES)
def test_the_report_counts_the_bytes_that_are_there(rule: str, use_int8_ema: bool, kind: str) -> None:
    """In both phases, of what trains: a frozen layer has no state, before the first step and after it."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    packed = {
        torch.nn.Parameter(torch.ones(6, 90)): Packing("A", 3),
        torch.nn.Parameter(torch.ones(90, 6)): Packing("B", 3),
    }
    frozen = torch.nn.Parameter(torch.ones(100, 200), requires_grad=False)
    settings: dict[str, Any] = {**QUICK, "rule": rule, "moment_dtype": kind, "use_int8_ema": use_int8_ema}
    optimizer = SCAO([frozen, *params, *packed], max_precond_dim=24, experts=packed, **settings)
    report = optimizer.memory_report()
    held = []
    for steps in (range(2), range(2, 12)):
        train([*params, *packed], optimizer, steps)
        fields = [field for entry in optimizer.state.values() for field in entry.values() if isinstance(field, Tensor)]
        storages = {field.untyped_storage().data_ptr(): field.untyped_storage().nbytes() for field in fields}
        held.append(sum(storages.values()))
    assert report["total"] == held[1] and report["peak"] == max(held)
    assert sum(report[name] for name in report.keys() - {"total", "peak", "parameters"}) == held[1]
    assert report["parameters"] == sum(param.numel() for param in (*params, *packed))
    assert optimizer.memory_report() == report
    params[0].requires_grad_(False)  # what has state holds it
    assert optimizer.memory_report() == report


def test_every_step_has_noise_of_its_own() -> None:
    """Under one gradient the second moment stays the same after bias correction; its codes do not err alike."""
    params, optimizer = make(moment_dtype="int8", warmup_steps=100, betas=(0.0, 0.0))
    give_gradients(params, 0)
    codes = []
    for _ in range(2):
        optimizer.step()
        codes.append({name: optimizer.state[params[0]][name].clone() for name in ("exp_avg_codes", "exp_avg_sq_codes")})
    for name in codes[0]:
        assert not torch.equal(codes[0][name], codes[1][name])
        assert (codes[0][name].int() - codes[1][name].int()).abs().max() <= 1
    first, second = codes[0].values()
    assert not torch.equal(first.abs(), second)  # |G| and G^2 have the same levels, but not the same noise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [4, 1000])
def test_a_run_ends_where_float32_ends(kind: str, warmup: int) -> None:
    """A LoRA regression whose inputs differ in size by a factor of 100, in phase 2 and in AdamW's phase alone."""

    def final_loss(moment_dtype: str) -> float:
        generator = torch.Generator().manual_seed(0)
        sizes = torch.logspace(1, -1, 160)[:, None]
        target = torch.randn(64, 160, generator=generator)
        a = torch.nn.Parameter(torch.randn(8, 160, generator=generator) / 160**0.5)
        b = torch.nn.Parameter(torch.zeros(64, 8))
        optimizer = SCAO([a, b], lr=0.02, weight_decay=0.0, warmup_steps=warmup, moment_dtype=moment_dtype)
        losses = []
        for _ in range(60):
            inputs = torch.randn(160, 32, generator=generator) * sizes
            optimizer.zero_grad()
            loss = (b @ (a @ inputs) - target @ inputs).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses[-10:])

    assert final_loss(kind) == pytest.approx(final_loss("float32"), rel=5e-3)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_buckets_on_a_cpu_are_small(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the steps are those of one large bucket."""
    params = [torch.nn.Parameter(torch.randn(4, 100)) for _ in range(7)]
    reference = [torch.nn.Parameter(param.detach().clone()) for param in params]
    sizes = []
    for each, entries in ((params, 1000), (reference, 10000)):
        monkeypatch.setattr(stacks, "CPU_ENTRIES", entries)
        optimizer = SCAO(each, moment_dtype=kind)
        give_gradients(each, 0)
        optimizer.step()
        assert optimizer._stacks is not None
        sizes.append([len(bucket.members) for bucket in optimizer._stacks.buckets])
    assert sizes == [[3, 2, 2], [7]]
    for a, b in zip(params, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="moment_dtype='int4' is not valid: it must be one of 'float32', 'bfloat16'"):
        SCAO([torch.nn.Parameter(torch.zeros(2, 2))], moment_dtype="int4")
