"""Products of bfloat16 matrices on processors that have none, where torch takes ten to a hundred times as long for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
#: Each product and the one that returns a new matrix: itself, unless it writes into its first argument.
PRODUCTS = {packet: packet for packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)}
PRODUCTS |= {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}


class InFloat32(TorchDispatchMode):
    """Computes products of bfloat16 matrices in float32 and rounds them once, as processors do that have such products."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """``func``, or the same in float32."""
        packet, numbers = func.overloadpacket, dict(kwargs or {})
        product: Any = PRODUCTS.get(packet)
        if product is None or args[-1].dtype != torch.bfloat16:
            return func(*args, **numbers)
        target: Tensor | None = numbers.pop("out", None) if product is packet else args[0]
        found: Tensor = product(*(arg.float() for arg in args), **numbers).bfloat16()
        return found if target is None else target.copy_(found)


def in_float32() -> AbstractContextManager[Any]:
    """``InFloat32`` where torch has no fast products in bfloat16 on the CPU, and no GPU is there to take them."""
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return nullcontext()
    return InFloat32()
