"""What other optimizers hold for each parameter, to compare SCAO's state with."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor

#: By name in TrainingArguments: tensors as large as the parameter, and their bits; None is the parameter's own precision.
STATES: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), (2, None)),
    "paged_adamw_32bit": (2, 32),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), (2, 8)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), (1, 32)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), (1, 8)),
    "sgd": (0, None),
}
#: bitsandbytes: parameters with fewer elements keep 32 bits, others have a float32 scale for each block.
LEAST_8BIT, BLOCK = 4096, 256


def state_bytes(name: str, params: Iterable[Tensor], embeddings: Collection[Tensor]) -> int:
    """Bytes of an optimizer's state, without step counters and what all parameters share.

    Args:
        name: one of ``STATES``.
        params: what is trained.
        embeddings: of these, the ones for which the Trainer asks bitsandbytes for 32 bits.
    """
    count, bits = STATES[name]
    kept = {id(embedding) for embedding in embeddings}
    total = 0
    for param in params:
        numel = param.numel()
        if bits is None:
            total += count * numel * param.element_size()
        elif bits == 8 and numel >= LEAST_8BIT and id(param) not in kept:
            total += count * (numel + 4 * -(-numel // BLOCK))
        else:
            total += count * numel * 4
    return total
