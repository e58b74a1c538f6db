"""Blockwise int8 codec and bfloat16 with stochastic rounding, for state that is an exponential moving average.

Rounding to nearest stalls such an average: at rho = 0.999 a step changes an entry by less than half a code and is
rounded away. Stochastic rounding is right on average. One scale for a block of 128 entries keeps small entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 128
LEVELS = 127


def encoded_shapes(batch: int, numel: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the codes (int8) and of the scales (float32) for ``batch`` tensors of ``numel`` entries each."""
    blocks = -(-numel // BLOCK)
    return (batch, blocks * BLOCK), (batch, blocks)


def _mix(x: Tensor) -> Tensor:
    """Bijective mixing of 32 bits, int32, in place (lowbias32 by Chris Wellons, public domain)."""
    # x ^= x >> 16, whose sign bit int32 would spread, is the upper half xor-ed into the lower one.
    halves = x.view(torch.int16)
    lower, upper = halves[..., ::2], halves[..., 1::2]
    lower ^= upper
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    lower ^= upper
    return x


def _random_bits(counts: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor:
    """32 random bits for every entry of every block of some tensors, int32 ``[blocks, 128]``.

    A hash of seed, block and entry: the same on every device and in the native kernels (csrc/state.h), whatever the
    order of evaluation, and without a random generator's state.

    Args:
        counts: how many blocks each tensor has.
        seeds: of each.
        device: where.
    """
    # A 0-dim tensor of the CPU is a number to an operation on a GPU.
    numbers = _mix(torch.tensor(seeds, device="cpu").to(torch.int32))
    blocks = [torch.arange(count, dtype=torch.int32, device=device) for count in counts]
    keys = _mix(torch.cat([block ^ number for block, number in zip(blocks, numbers, strict=True)]))
    entries = torch.arange(BLOCK, dtype=torch.int32, device=device)
    return _mix(torch.add(keys[:, None], entries, alpha=0x9E3779B9 - 2**32))


def uniform_noise(counts: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor:
    """Noise in [0, 1), float32 ``[blocks, 128]``, multiples of 2^-24; arguments as for ``_random_bits``."""
    bits = _random_bits(counts, seeds, device)
    return (bits >> 8).bitwise_and_(0xFFFFFF) * torch.tensor(2.0**-24, dtype=torch.float32, device="cpu")


def encode(values: Tensor, seed: int, power: int = 1) -> tuple[Tensor, Tensor]:
    """``encode_all`` of one tensor."""
    return encode_all([values], [seed], power)[0]


def encode_all(fields: Sequence[Tensor], seeds: Sequence[int], power: int = 1) -> list[tuple[Tensor, Tensor]]:
    """(Q1) Round each block of 128 entries to the levels ``scale * 127 * sign(c) |c / 127|^power``, right on average.

    With power 1 the levels are evenly spaced and ``code = floor(x / scale + u)``, u uniform in [0, 1). Higher powers are
    for entries of very different sizes: neighbouring levels are ``power / |c|`` apart, relative to their size, and an
    entry goes to one of its two neighbours with the probability that makes its mean right.

    Args:
        fields: ``[N, ...]`` each, any float dtype, finite; not negative where ``power`` is 4. Their blocks are worked on
            together, each of them to the same bits as alone.
        seeds: of each field's u; the same seed gives the same codes, and torch's global generator is not touched.
        power: 1 (curvature), 2 (momenta) or 4 (second moments: an entry above zero never becomes zero, as steps are
            divided by it).

    Returns:
        For each field codes, int8 ``[N, blocks * 128]`` (the tail of the last block is zero), and scales, float32
        ``[N, blocks]``; in memory that all fields share. The error of an entry is below one scale, max|block| / 127, with
        power 1 and below the distance of its two levels otherwise, and zero on average (tests/test_quantization.py).
    """
    stacks = [_blocks(field) for field in fields]
    counts = [len(stack) for stack in stacks]
    flat = torch.cat(stacks) if len(stacks) > 1 else stacks[0]
    scales = flat.abs().amax(-1) / LEVELS
    noise = uniform_noise(counts, seeds, flat.device)
    # The reciprocal of a denormal scale overflows: such a block holds nothing that a float32 square root would see.
    inverse = scales.reciprocal().masked_fill_(scales <= torch.finfo(torch.float32).tiny, 0.0)[:, None]
    values = flat * inverse
    codes = values.add_(noise).floor_() if power == 1 else _between(values.div_(LEVELS), noise, power)
    codes = codes.clamp_(-LEVELS, LEVELS).to(torch.int8)
    parts = zip(fields, codes.split(counts), scales.split(counts), strict=True)
    return [(code.view(len(field), -1), scale.view(len(field), -1)) for field, code, scale in parts]


def _blocks(values: Tensor) -> Tensor:
    """``[N, ...]`` in float32 as ``[N * blocks, 128]``, each of the N padded with zeros to whole blocks."""
    flat = values.reshape(values.shape[0], -1).to(torch.float32)
    missing = -flat.shape[1] % BLOCK
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)


def _between(values: Tensor, noise: Tensor, power: int) -> Tensor:
    """Codes, as floats, of values in [-1, 1] on the levels ``sign(c) |c / 127|^power``, the lower or the upper one.

    ``noise`` is scratch.
    """
    size = values.abs()
    codes = (size.sqrt() if power == 2 else size.sqrt().sqrt_()).mul_(LEVELS).floor_()
    lower = (codes / LEVELS).pow_(power)
    distance = (codes + 1).div_(LEVELS).pow_(power).sub_(lower)
    codes += noise.mul_(distance) < size.sub_(lower)
    if power == 4:
        codes = torch.maximum(codes, (values != 0).to(codes))
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
    noise = _random_bits([-(-bits.numel() // BLOCK)], [seed], values.device).flatten()[: bits.numel()]
    # Adding 16 random bits below the ones that are kept carries into these with the right probability.
    rounded = (noise >> 16).bitwise_and_(0xFFFF).add_(bits).bitwise_and_(~0xFFFF)
    return rounded.view(torch.float32).view(values.shape).to(torch.bfloat16)
