"""Moments in fewer bits: encoded between two steps, decoded for the step. A rule says which (``Field.levels``).

``moment_dtype`` says how. A bucket whose moments are encoded is small (``stacks``), so that little is decoded at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from scao_hf import quantization
from scao_hf.rules.base import COUNTERS, Bucket

#: At most so many fields of a rule are encoded (``Field.levels``): each has noise of its own in every step.
MOST = 5


def _is_encoded(bucket: Bucket, name: str, like: Tensor) -> bool:
    """Whether a field, ``[N, ...]`` as the rule has it, is kept encoded; int8 only where its padded blocks take fewer bytes."""
    kind = bucket.group["moment_dtype"]
    if kind == "float32" or name in COUNTERS or not bucket.rule.field(name).levels:
        return False
    if kind == "bfloat16":
        return True
    (_, codes), (_, scales) = quantization.encoded_shapes(1, like[0].numel())
    return codes + 4 * scales < like[0].numel() * like.element_size()


def encoded_zeros(bucket: Bucket, fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fields of a new state, all zero in those that are kept encoded, as they are kept."""
    kept: dict[str, Tensor] = {}
    for name, field in fields.items():
        if not _is_encoded(bucket, name, field):
            kept[name] = field
        elif bucket.group["moment_dtype"] == "bfloat16":
            kept[name] = torch.zeros_like(field, dtype=torch.bfloat16)
        else:
            codes, scales = quantization.zeros(len(field), field[0].numel(), field.device)
            kept |= {f"{name}_codes": codes, f"{name}_scales": scales}
    return kept


@contextmanager
def decoded(bucket: Bucket) -> Iterator[dict[str, Tensor]]:
    """A bucket's state as its rule knows it, for one step; what the step leaves behind is kept encoded again.

    A matrix that the step has skipped keeps its codes to the bit.
    """
    if bucket.group["moment_dtype"] == "float32":
        yield bucket.state
        return
    before = bucket.state["taken"].clone()
    state = _decoded(bucket)
    try:
        yield state
    finally:  # a step whose refresh has been ended is one without it
        _encode(bucket, state, bucket.state["taken"] != before)


def convert(bucket: Bucket) -> None:
    """Keep the moments of a bucket as its group's ``moment_dtype`` says, where they were kept in another way."""
    fields, bucket.state = _decoded(bucket), {}
    _encode(bucket, fields, torch.ones_like(fields["taken"], dtype=torch.bool))


def _decoded(bucket: Bucket) -> dict[str, Tensor]:
    """The whole state in the rule's dtypes; what is not encoded is the bucket's own tensor."""
    likes = bucket.rule.create(1, bucket.shape, bucket.dtype, torch.device("meta"), bucket.group, bucket.step)
    state = {name: bucket.state[name] for name in COUNTERS if name in bucket.state}
    for name, like in likes.items():
        if name in bucket.state:
            state[name] = bucket.state[name].to(like.dtype)
        else:
            codes, scales = (bucket.state[f"{name}_{part}"] for part in ("codes", "scales"))
            values = quantization.decode(
                codes, scales, tuple(like.shape[1:]), like.dtype, bucket.rule.field(name).levels
            )
            state[name] = values.contiguous()  # without the padding of the last block
    return state


def _encode(bucket: Bucket, state: dict[str, Tensor], changed: Tensor) -> None:
    """Put the fields of ``state`` into the bucket, in place where they were there before."""
    names = [name for name, field in bucket.rule.fields.items() if field.levels]
    seeds = {name: bucket.step * MOST + place for place, name in enumerate(names)}
    encoded = [name for name in names if name in state and _is_encoded(bucket, name, state[name])]
    kept = {name: field for name, field in state.items() if name not in encoded}
    for levels in {bucket.rule.field(name).levels for name in encoded}:
        alike = [name for name in encoded if bucket.rule.field(name).levels == levels]
        fields, own = [state[name] for name in alike], [seeds[name] for name in alike]
        fresh: dict[str, Tensor] = {}
        if bucket.group["moment_dtype"] == "bfloat16":
            fresh |= zip(alike, map(quantization.to_bfloat16, fields, own), strict=True)
        else:
            for name, (codes, scales) in zip(alike, quantization.encode_all(fields, own, levels), strict=True):
                fresh |= {f"{name}_codes": codes, f"{name}_scales": scales}
        for key, value in fresh.items():
            old = bucket.state.get(key)
            if old is None:
                kept[key] = value.clone()  # fields encoded together share their memory
            else:
                kept[key] = torch.where(changed.view(-1, *[1] * (old.ndim - 1)), value, old, out=old)
    bucket.state = kept
