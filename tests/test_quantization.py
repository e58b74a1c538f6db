"""The int8 codec: stated error bound, unbiased rounding, no stall, reproducible without the global generator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scao_hf import quantization


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    numel=st.integers(1, 700),
    log_scale=st.floats(-18, 18),
    seed=st.integers(0, 2**31),
)
def test_error_is_below_one_scale(batch: int, numel: int, log_scale: float, seed: int) -> None:
    values = torch.randn(batch, numel, generator=torch.Generator().manual_seed(seed)) * 10.0**log_scale
    codes, scales = quantization.encode(values, seed)
    assert (codes.shape, scales.shape) == quantization.encoded_shapes(batch, numel)
    back = quantization.decode(codes, scales, (numel,), torch.float32)
    bound = scales.repeat_interleave(quantization.BLOCK, 1)[:, :numel]
    assert ((back - values).abs() <= bound * 1.0001).all()


def test_rounding_is_unbiased() -> None:
    values = torch.linspace(-1, 1, 128)[None].double()
    mean = torch.zeros_like(values)
    draws = 4000
    for seed in range(draws):
        codes, scales = quantization.encode(values, seed)
        mean += quantization.decode(codes, scales, (128,), torch.float64) / draws
    # The error of one draw is uniform on one scale of 1 / 127 at most: five standard deviations of the mean.
    assert (mean - values).abs().max() < 5 * (1 / 127) * 0.5 / draws**0.5


def test_moving_average_follows_a_change_of_regime() -> None:
    rho, target = 0.999, torch.rand(1, 256, generator=torch.Generator().manual_seed(0)) + 0.5
    average, codes, scales = torch.zeros(1, 256), *quantization.encode(torch.zeros(1, 256), 0)
    for step in range(1500):
        average = rho * average + (1 - rho) * target
        decoded = quantization.decode(codes, scales, (256,), torch.float32)
        codes, scales = quantization.encode(rho * decoded + (1 - rho) * target, step)
    decoded = quantization.decode(codes, scales, (256,), torch.float32)
    assert (decoded - average).norm() / average.norm() < 0.05


def test_same_seed_same_codes_and_the_global_generator_is_left_alone() -> None:
    values = torch.randn(2, 300)
    before = torch.get_rng_state()
    first, second, other = (quantization.encode(values, seed)[0] for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_noise_is_the_hash_of_seed_block_and_entry_that_the_kernels_have() -> None:
    def mix32(x: int) -> int:  # csrc/state.h
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    seeds, lanes = [0, 7, 2**32 - 1], range(quantization.BLOCK)
    keys = [mix32(block ^ mix32(seed)) for seed in seeds for block in range(3)]
    expected = [[(mix32(key + lane * 0x9E3779B9 & 0xFFFFFFFF) >> 8) / 2**24 for lane in lanes] for key in keys]
    found = quantization.uniform_noise([3] * len(seeds), seeds, torch.device("cpu"))
    assert torch.equal(found, torch.tensor(expected))


@pytest.mark.parametrize("power", [1, 2, 4])
def test_fields_that_are_encoded_together_have_the_codes_that_each_has_alone(power: int) -> None:
    fields = [torch.rand(3, 4, 50), torch.rand(3, 128, dtype=torch.float64), torch.zeros(3, 1), torch.rand(3, 700)]
    together = quantization.encode_all(fields, range(5, 9), power)
    for field, seed, (codes, scales) in zip(fields, range(5, 9), together, strict=True):
        alone = quantization.encode(field, seed, power)
        assert torch.equal(codes, alone[0]) and torch.equal(scales, alone[1])
        assert (codes.shape, scales.shape) == quantization.encoded_shapes(3, field[0].numel())


@pytest.mark.parametrize("value", [0.0, 1e-44, 3e38])
def test_extreme_blocks_stay_finite(value: float) -> None:
    codes, scales = quantization.encode(torch.full((1, 130), value), 0)
    back = quantization.decode(codes, scales, (130,), torch.float32)
    assert torch.isfinite(back).all()
    assert (back - value).abs().max() <= max(value / 100, 1e-37)
