"""Expert weights in 4 bit: NF4 through bitsandbytes, one expert at a time in full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Bytes of a 4-bit stack against those of the same stack in bfloat16: four bits and a float32 for each block of 64.
MOST_BYTES = 0.29


class NF4(NamedTuple):
    """A 4-bit stack as bitsandbytes keeps it: packed codes, and what they are decoded by.

    ``transposed`` as in ``Stacked``.
    """

    codes: Tensor
    state: Any
    transposed: bool

    @property
    def width(self) -> int:
        """As in ``Weights``."""
        width: int = self.state.shape[2 if self.transposed else 1]
        return width

    def reader(self, dtype: torch.dtype) -> Callable[[int], Tensor]:
        """As in ``Weights``; each matrix is decoded when it is read."""
        count, *sides = self.state.shape
        scales, codes = self._scales().view(count, -1), self.codes.view(count, -1)

        def read(expert: int) -> Tensor:
            weight = self._decode(codes[expert], scales[expert], dtype).view(sides)
            return weight if self.transposed else weight.mT

        return read

    def stack(self, dtype: torch.dtype) -> Tensor:
        """As in ``Weights``, decoded whole."""
        weight = self.decoded(dtype)
        return weight if self.transposed else weight.mT

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weights as they were given to be quantised, ``[E, ...]``."""
        return self._decode(self.codes.view(-1), self._scales(), dtype).view(self.state.shape)

    def _decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """``[blocks, block]``. In other shapes bitsandbytes' CPU kernel mistakes the scales of rows shorter than a block."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        block: int = self.state.blocksize
        shape = torch.Size((scales.numel(), block))
        kind = {"code": self.state.code, "blocksize": block, "quant_type": self.state.quant_type}
        decoded: Tensor = dequantize_4bit(codes.unsqueeze(1), QuantState(scales, shape=shape, dtype=dtype, **kind))
        return decoded

    def _scales(self) -> Tensor:
        """One scale for each block; they may be quantised themselves."""
        from bitsandbytes.functional import dequantize_blockwise

        scales: Tensor = self.state.absmax
        if self.state.nested:
            scales = dequantize_blockwise(scales, self.state.state2) + self.state.offset
        return scales


def quantized(experts: nn.Module, name: str) -> NF4 | None:
    """A parameter of an expert module as 4-bit weights, None where it is not quantised by bitsandbytes."""
    chain = getattr(experts, "parametrizations", {})
    if name not in chain:
        return None
    states = [part.quant_state for part in chain[name] if hasattr(part, "quant_state")]
    if len(states) != 1:
        return None
    return NF4(chain[name].original, states[0], bool(getattr(experts, "is_transposed", False)))


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Transformers' exchangeable expert modules, known by what its decorator leaves on them."""
    for name, module in model.named_modules():
        fields = vars(module)
        if "has_gate" in fields and "is_transposed" in fields and hasattr(module, "num_experts"):
            yield name, module


class Quantization(NamedTuple):
    """What ``quantize_experts`` has done: the names of the weights, their bytes in bfloat16 and now."""

    names: list[str]
    bfloat16_bytes: int
    bytes: int


def quantize_experts(model: nn.Module) -> Quantization:
    """Quantise all stacked expert weights of a model to NF4, in place.

    ``load_in_4bit`` quantises linear layers and passes over these, which are most of a mixture of experts. Call it
    after ``get_peft_model``, which does not find the weights otherwise, and then ``fuse_moe_lora``: PEFT's own forward
    does not train such experts.

    Args:
        model: with transformers' expert modules, in full precision, on any device that bitsandbytes quantises on.

    Raises:
        ValueError: there are no such weights, or the matrices of an expert are not a multiple of the block of 64.
        RuntimeError: the weights do not take at most ``MOST_BYTES`` of their size in bfloat16.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    found = [
        (f"{name}.{field}", module, field)
        for name, module in expert_modules(model)
        for field, weight in list(module.named_parameters(recurse=False))
        if weight.ndim == 3 and weight.is_floating_point()
    ]
    if not found:
        raise ValueError("the model has no stacked expert weights in full precision: nothing to quantise")
    for name, module, field in found:
        sides = getattr(module, field).shape[1:]
        if sides.numel() % 64:
            raise ValueError(f"{name}: an expert's matrix is {tuple(sides)}, no multiple of the 64 weights of a block")
    before = after = 0
    for _, module, field in found:
        before += 2 * getattr(module, field).numel()
        replace_parameter_4bit(module, field, quant_type="nf4", blocksize=64)
        now = quantized(module, field)
        after += now.codes.nbytes + now.state.absmax.nbytes if now else 8 * before
    if after > MOST_BYTES * before:
        raise RuntimeError(f"the experts take {after} bytes in 4 bit, more than {MOST_BYTES} of {before} in bfloat16")
    return Quantization([name for name, _, _ in found], before, after)


def dequantize_experts(model: nn.Module) -> list[str]:
    """Undo ``quantize_experts``, but for the rounding, so that adapters can be merged; the names of the weights."""
    from torch.nn.utils import parametrize

    names = []
    for name, module in model.named_modules():
        for field in list(getattr(module, "parametrizations", {})):
            if four_bit := quantized(module, field):
                weight = four_bit.decoded(four_bit.state.dtype)
                parametrize.remove_parametrizations(module, field, leave_parametrized=False)
                setattr(module, field, nn.Parameter(weight, requires_grad=False))
                names.append(f"{name}.{field}")
    return names
