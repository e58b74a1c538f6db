"""Blockwise int8 codec and bfloat16 with stochastic rounding, for state that is an exponential moving average.

Rounding to nearest stalls such an average: at rho = 0.999 a step changes an entry by less than half a code and is
rounded away. Stochastic rounding is right on average. One scale for a block of 128 entries keeps small entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 128
LEVELS = 127


def encoded_shapes(batch: int, numel: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the codes (int8) and of the scales (float32) for ``batch`` tensors of ``numel`` entries each."""
    blocks = -(-numel // BLOCK)
    return (batch, blocks * BLOCK), (batch, blocks)


def _mix(x: Any) -> Any:
    """Bijective mixing of 32 bits in int64, in place, or of a Python number (lowbias32 by Chris Wellons, public domain)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> shift
        x *= factor
        x &= 0xFFFFFFFF
    x ^= x >> 16
    return x


def uniform_noise(blocks: int, seed: int, device: torch.device) -> Tensor:
    """Noise in [0, 1) for every entry of every block, float32 ``[blocks, 128]``.

    A hash of seed, block and entry: the same on every device and in the native kernels (csrc/int8.h), whatever the
    order of evaluation, and without a random generator's state.
    """
    blocks_keys = _mix(torch.arange(blocks, device=device) ^ _mix(seed & 0xFFFFFFFF))
    lanes = torch.arange(BLOCK, device=device) * 0x9E3779B9
    noise: Tensor = (_mix((blocks_keys[:, None] + lanes) & 0xFFFFFFFF) >> 8).to(torch.float32) * 2.0**-24
    return noise


def encode(values: Tensor, seed: int, power: int = 1) -> tuple[Tensor, Tensor]:
    """(Q1) Round each block of 128 entries to the levels ``scale * 127 * sign(c) |c / 127|^power``, right on average.

    With power 1 the levels are evenly spaced and ``code = floor(x / scale + u)``, u uniform in [0, 1). Higher powers are
    for entries of very different sizes: neighbouring levels are ``power / |c|`` apart, relative to their size, and an
    entry goes to one of its two neighbours with the probability that makes its mean right.

    Args:
        values: ``[N, ...]``, any float dtype, finite; not negative where ``power`` is 4.
        seed: seed of u; the same seed gives the same codes, and torch's global generator is not touched.
        power: 1 (curvature), 2 (momenta) or 4 (second moments: an entry above zero never becomes zero, as steps are
            divided by it).

    Returns:
        Codes, int8 ``[N, blocks * 128]`` (the tail of the last block is zero), and scales, float32 ``[N, blocks]``.
        The error of an entry is below one scale, max|block| / 127, with power 1 and below the distance of its two
        levels otherwise, and zero on average (tests/test_quantization.py).
    """
    flat = values.reshape(values.shape[0], -1).to(torch.float32)
    (_, padded), (_, blocks) = encoded_shapes(*flat.shape)
    if flat.shape[1] < padded:
        flat = torch.nn.functional.pad(flat, (0, padded - flat.shape[1]))
    flat = flat.reshape(-1, blocks, BLOCK)
    scales = flat.abs().amax(-1) / LEVELS
    noise = uniform_noise(scales.numel(), seed, flat.device).view_as(flat)
    # The reciprocal of a denormal scale overflows: such a block holds nothing that a float32 square root would see.
    inverse = (1 / scales).masked_fill_(scales <= torch.finfo(torch.float32).tiny, 0.0)[..., None]
    codes = (flat * inverse + noise).floor_() if power == 1 else _between(flat * inverse / LEVELS, noise, power)
    return codes.clamp_(-LEVELS, LEVELS).to(torch.int8).view(-1, padded), scales


def _between(values: Tensor, noise: Tensor, power: int) -> Tensor:
    """Codes, as floats, of values in [-1, 1] on the levels ``sign(c) |c / 127|^power``, the lower or the upper one."""
    size = values.abs()
    codes = (size.sqrt() if power == 2 else size.sqrt().sqrt()).mul_(LEVELS).floor_()
    lower, upper = (codes / LEVELS).pow_(power), ((codes + 1) / LEVELS).pow_(power)
    codes += noise * (upper - lower) < size - lower
    if power == 4:
        codes = torch.maximum(codes, (size > 0).to(codes))
    return codes.copysign_(values)


def decode(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype, power: int = 1) -> Tensor:
    """Inverse of ``encode``: ``[N, *shape]`` in ``dtype``."""
    numel = 1
    for side in shape:
        numel *= side
    values = codes.view(*scales.shape, BLOCK).to(dtype)
    if power > 1:
        size = values.abs().div_(LEVELS).pow_(power).mul_(LEVELS)
        values = size.copysign_(values)
    values = values * scales[..., None].to(dtype)
    return values.view(codes.shape[0], -1)[:, :numel].reshape(-1, *shape)


def zeros(batch: int, numel: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``batch`` tensors of ``numel`` zeros each."""
    codes, scales = encoded_shapes(batch, numel)
    return torch.zeros(codes, dtype=torch.int8, device=device), torch.zeros(scales, device=device, dtype=torch.float32)


def ema_(codes: Tensor, scales: Tensor, values: Tensor, weights: Tensor, seed: int) -> None:
    """Decode, ``x <- x + w (value - x)``, (Q1), in place; a matrix of weight zero keeps its codes.

    Args:
        codes, scales: of x, with power 1.
        values: ``[N, ...]``.
        weights: w, ``[N]``.
        seed: as for ``encode``.
    """
    flat = values.reshape(values.shape[0], -1)
    average = decode(codes, scales, tuple(flat.shape[1:]), flat.dtype).lerp_(flat, weights[:, None])
    fresh_codes, fresh_scales = encode(average, seed)
    keep = weights[:, None] == 0
    codes.copy_(torch.where(keep, codes, fresh_codes))
    scales.copy_(torch.where(keep, scales, fresh_scales))


def to_bfloat16(values: Tensor, seed: int) -> Tensor:
    """(Q2) Round to one of the two neighbouring bfloat16 numbers, right on average; a bfloat16 number stays as it is.

    Args:
        values: float, finite.
        seed: as for ``encode``.
    """
    bits = values.to(torch.float32).contiguous().view(torch.int32).flatten()
    noise = uniform_noise(-(-bits.numel() // BLOCK), seed, values.device).flatten()[: bits.numel()]
    # Adding 16 random bits below the ones that are kept carries into these with the right probability.
    rounded = (bits + (noise * 2**16).to(torch.int32)) & ~0xFFFF
    return rounded.view(torch.float32).view(values.shape).to(torch.bfloat16)
