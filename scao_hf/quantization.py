"""Blockwise int8 codec with stochastic rounding, for curvature that is an exponential moving average.

Rounding to nearest stalls such an average: at rho = 0.999 a step changes an entry by less than half a code and is
rounded away. Stochastic rounding is right on average. One scale for a block of 128 entries keeps small entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
LEVELS = 127


def encoded_shapes(batch: int, numel: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the codes (int8) and of the scales (float32) for ``batch`` tensors of ``numel`` entries each."""
    blocks = -(-numel // BLOCK)
    return (batch, blocks * BLOCK), (batch, blocks)


def _mix(x: Tensor) -> Tensor:
    """Bijective mixing of 32 bits held in int64 (lowbias32 by Chris Wellons, public domain)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return x ^ (x >> 16)


def uniform_noise(blocks: int, seed: int, device: torch.device) -> Tensor:
    """Noise in [0, 1) for every entry of every block, float32 ``[blocks, 128]``.

    A hash of seed, block and entry: the same on every device and in the native kernels (csrc/int8.h), whatever the
    order of evaluation, and without a random generator's state.
    """
    key = _mix(torch.tensor(seed & 0xFFFFFFFF, device=device))
    blocks_keys = _mix(torch.arange(blocks, device=device) ^ key)
    lanes = torch.arange(BLOCK, device=device) * 0x9E3779B9
    return (_mix((blocks_keys[:, None] + lanes) & 0xFFFFFFFF) >> 8).to(torch.float32) * 2.0**-24


def encode(values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(Q1) Round each block of 128 entries to ``scale * code``, code = floor(x / scale + u), u uniform in [0, 1).

    Args:
        values: ``[N, ...]``, any float dtype, finite.
        seed: seed of u; the same seed gives the same codes, and torch's global generator is not touched.

    Returns:
        Codes, int8 ``[N, blocks * 128]`` (the tail of the last block is zero), and scales, float32 ``[N, blocks]``.
        The error of an entry is below one scale, max|block| / 127, and zero on average
        (tests/test_quantization.py).
    """
    flat = values.reshape(values.shape[0], -1).to(torch.float32)
    (_, padded), (_, blocks) = encoded_shapes(*flat.shape)
    flat = torch.nn.functional.pad(flat, (0, padded - flat.shape[1])).view(-1, blocks, BLOCK)
    scales = flat.abs().amax(-1) / LEVELS
    noise = uniform_noise(scales.numel(), seed, flat.device).view_as(flat)
    # The reciprocal of a denormal scale overflows: such a block holds nothing that a float32 square root would see.
    inverse = torch.where(scales > torch.finfo(torch.float32).tiny, 1 / scales, 0.0)
    codes = (flat * inverse[..., None] + noise).floor_().clamp_(-LEVELS, LEVELS)
    return codes.to(torch.int8).view(-1, padded), scales


def decode(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Inverse of ``encode``: ``[N, *shape]`` in ``dtype``."""
    numel = 1
    for side in shape:
        numel *= side
    values = codes.view(*scales.shape, BLOCK).to(dtype) * scales[..., None].to(dtype)
    return values.view(codes.shape[0], -1)[:, :numel].reshape(-1, *shape)
