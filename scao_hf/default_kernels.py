"""The operations that a native kernel may do: schemas, fakes that validate, default kernels.

Each operation steps one bucket in place. The default kernels are made of the equations in ``curvature``, ``update``,
``refresh`` and ``quantization`` and run on every device; ``scao_hf/ops.py`` puts native ones in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scao_hf import curvature, quantization, refresh, update
from scao_hf.precision import full_precision
from scao_hf.update import (
    adam_direction,
    adam_moments,
    eigenbasis_direction,
    moment_schedule,
    sanitize,
    turn,
)

#: What parameters and gradients may be for a native kernel.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_NUMBERS = "float lr, float beta1, float beta2, float eps, float weight_decay, float rho"
_LIBRARY = torch.library.Library("scao", "DEF")
_LIBRARY.define(
    "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? factor, "
    f"Tensor(e!) taken, Tensor(f!) level, {_NUMBERS}) -> ()"
)
_LIBRARY.define(
    "eigenbasis_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) exp_avg, Tensor(c!) factor, "
    "Tensor(d!) inside_avg, Tensor(e!) inside_sq, Tensor(f!) row, Tensor(g!) col, Tensor(h!) taken, "
    "Tensor(i!) level, Tensor vectors, "
    f"Tensor mask, Tensor gain, Tensor long_vectors, Tensor(j!) agreement, bool cautious, {_NUMBERS}, "
    "Tensor? activity=None) -> ()"
)
_LIBRARY.define(
    "eigenbasis_refresh_(Tensor(a!) exp_avg, Tensor(b!) long_vectors, Tensor factor, Tensor(c!) inside_avg, "
    "Tensor(d!) inside_sq, Tensor(e!) row, Tensor(f!) col, Tensor(g!) vectors, Tensor(h!) mask, Tensor(i!) gain, "
    "Tensor(j!) factor_values, Tensor(k!) long_values, Tensor(l!) long_tail, Tensor taken, Tensor finite, int first, "
    "int last, float beta1, float beta2, float eps, float rho, float decay, float epsilon_sparse, "
    "int k_min, int k_max, Tensor? activity=None) -> Tensor"
)
_LIBRARY.define("eigenbasis_gram(Tensor exp_avg, Tensor long_vectors) -> Tensor")
_LIBRARY.define(
    "eigenbasis_turn_(Tensor(a!) exp_avg, Tensor(b!) long_vectors, Tensor row, Tensor col, Tensor coefficients, "
    "Tensor plain_row, Tensor inside_sq, Tensor bias1, Tensor bias2, Tensor finite, float eps) -> Tensor"
)
_LIBRARY.define("symmetric_eigh(Tensor matrices) -> (Tensor, Tensor)")
_LIBRARY.define("int8_ema_(Tensor(a!) codes, Tensor(b!) scales, Tensor values, Tensor weights, int seed) -> ()")


def _check(tensor: Tensor, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype] = (torch.float32,)) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be {tuple(shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}: it must be one of {', '.join(map(str, dtypes))}")


def _check_members(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Tensor) -> None:
    size, r, l = exp_avg.shape
    if not len(params) == len(grads) == size:
        raise ValueError(f"there are {len(params)} params and {len(grads)} grads: exp_avg has {size} matrices")
    for name, tensors in (("params", params), ("grads", grads)):
        for tensor in tensors:
            fits = tensor.numel() == l if r == 1 else tuple(tensor.shape) in ((r, l), (l, r))
            if not fits or tensor.dtype not in DTYPES:
                raise ValueError(
                    f"an entry of {name} has shape {tuple(tensor.shape)} and is {tensor.dtype}: it must be ({r}, {l}) or "
                    f"({l}, {r}) in one of {', '.join(map(str, DTYPES))}"
                )


def _oriented(tensor: Tensor, r: int, l: int) -> Tensor:
    if r == 1:
        return tensor.view(1, l)
    return tensor if tuple(tensor.shape) == (r, l) else tensor.mT


def _gradients(grads: Sequence[Tensor], exp_avg: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    _, r, l = exp_avg.shape
    return sanitize(torch.stack([_oriented(grad, r, l).to(exp_avg.dtype) for grad in grads]), level)


def _write(params: Sequence[Tensor], direction: Tensor, finite: Tensor, lr: float, weight_decay: float) -> None:
    """Decoupled decay, then the step."""
    _, r, l = direction.shape
    for param, delta, taken in zip(params, direction, finite, strict=True):
        target = _oriented(param, r, l)
        target.copy_(target.to(delta.dtype) * (1 - taken * (lr * weight_decay)) - delta * (taken * lr))


def _adamw_fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factor: Tensor | None,
    taken: Tensor,
    level: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rho: float,
) -> None:
    size, r, l = exp_avg.shape
    _check_members(params, grads, exp_avg)
    _check(exp_avg, "exp_avg", (size, r, l))
    _check(exp_avg_sq, "exp_avg_sq", (size, r, l))
    _check(taken, "taken", (size,))
    _check(level, "level", (size,))
    if factor is not None:
        _check(factor, "factor", (size, r, r))


def _adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factor: Tensor | None,
    taken: Tensor,
    level: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rho: float,
) -> None:
    """(U3), (E1) where there is a factor, (U4), (U6), decay and step."""
    _adamw_fake(params, grads, exp_avg, exp_avg_sq, factor, taken, level, lr, beta1, beta2, eps, weight_decay, rho)
    stacked, finite = _gradients(grads, exp_avg, level)
    taken += finite[:, 0, 0]
    if factor is not None:
        with full_precision():
            curvature.accumulate(factor, stacked @ stacked.mT, (1 - rho) * finite)
    weights, bias = moment_schedule((beta1, beta2), finite, taken[:, None, None])
    adam_moments(exp_avg, exp_avg_sq, stacked, weights)
    direction = adam_direction(exp_avg, exp_avg_sq, bias, eps)
    _write(params, direction, finite, lr, weight_decay)


def _eigenbasis_fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Tensor,
    factor: Tensor,
    inside_avg: Tensor,
    inside_sq: Tensor,
    row: Tensor,
    col: Tensor,
    taken: Tensor,
    level: Tensor,
    vectors: Tensor,
    mask: Tensor,
    gain: Tensor,
    long_vectors: Tensor,
    agreement: Tensor,
    cautious: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rho: float,
    activity: Tensor | None = None,
) -> None:
    size, r, l = exp_avg.shape
    k = inside_avg.shape[-1]
    _check_members(params, grads, exp_avg)
    _check(long_vectors, "long_vectors", (size, k, l), (torch.float32, torch.bfloat16))
    for name, tensor, shape in (
        ("exp_avg", exp_avg, (r, l)),
        ("factor", factor, (r, r)),
        ("inside_avg", inside_avg, (r, k)),
        ("inside_sq", inside_sq, (r, k)),
        ("row", row, (r, 1)),
        ("col", col, (1, l)),
        ("taken", taken, ()),
        ("level", level, ()),
        ("vectors", vectors, (r, r)),
        ("mask", mask, (1, k)),
        ("gain", gain, ()),
        ("agreement", agreement, ()),
    ):
        _check(tensor, name, (size, *shape))
    if activity is not None:
        _check(activity, "activity", (size, 2))


def _eigenbasis(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Tensor,
    factor: Tensor,
    inside_avg: Tensor,
    inside_sq: Tensor,
    row: Tensor,
    col: Tensor,
    taken: Tensor,
    level: Tensor,
    vectors: Tensor,
    mask: Tensor,
    gain: Tensor,
    long_vectors: Tensor,
    agreement: Tensor,
    cautious: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rho: float,
    activity: Tensor | None = None,
) -> None:
    """(U3), (E1), (U11), (U16), decay and step."""
    _eigenbasis_fake(
        params, grads, exp_avg, factor, inside_avg, inside_sq, row, col, taken, level, vectors, mask, gain, long_vectors,
        agreement, cautious, lr, beta1, beta2, eps, weight_decay, rho, activity,
    )  # fmt: skip
    state = {"exp_avg": exp_avg, "inside_avg": inside_avg, "inside_sq": inside_sq, "row": row, "col": col}
    state |= {"vectors": vectors, "mask": mask, "factor": factor}
    if activity is not None:
        state["activity"] = activity
    stacked, finite = _gradients(grads, exp_avg, level)
    taken += finite[:, 0, 0]
    weights, bias = moment_schedule((beta1, beta2), finite, taken[:, None, None])
    with full_precision():
        curvature.accumulate(factor, stacked @ stacked.mT, (1 - rho) * finite)
        damping = update.damping_of(refresh.plain_row(state, taken[:, None, None], bias[1], rho))
        direction = eigenbasis_direction(state, stacked, long_vectors.to(exp_avg.dtype), damping, weights, bias, eps)
    direction.mul_(gain[:, None, None])
    if cautious:
        direction = update.cautious(direction, stacked, agreement)
    _write(params, direction, finite, lr, weight_decay)


def _gram_fake(exp_avg: Tensor, long_vectors: Tensor) -> Tensor:
    size, r, l = exp_avg.shape
    k = long_vectors.shape[1]
    _check(exp_avg, "exp_avg", (size, r, l))
    _check(long_vectors, "long_vectors", (size, k, l), (torch.float32, torch.bfloat16))
    return exp_avg.new_empty(size, k + r, k + r)


def _gram(exp_avg: Tensor, long_vectors: Tensor) -> Tensor:
    """``curvature.gram``."""
    _gram_fake(exp_avg, long_vectors)
    with full_precision():
        return curvature.gram(exp_avg, long_vectors)


def _turn_fake(
    exp_avg: Tensor,
    long_vectors: Tensor,
    row: Tensor,
    col: Tensor,
    coefficients: Tensor,
    plain_row: Tensor,
    inside_sq: Tensor,
    bias1: Tensor,
    bias2: Tensor,
    finite: Tensor,
    eps: float,
) -> Tensor:
    size, r, l = exp_avg.shape
    k = long_vectors.shape[1]
    _gram_fake(exp_avg, long_vectors)
    for name, tensor, shape in (
        ("coefficients", coefficients, (k + 2 * r, k + r)),
        ("row", row, (r, 1)),
        ("col", col, (1, l)),
        ("plain_row", plain_row, (r, 1)),
        ("inside_sq", inside_sq, (1, k)),
        ("bias1", bias1, ()),
        ("bias2", bias2, ()),
        ("finite", finite, ()),
    ):
        _check(tensor, name, (size, *shape))
    return exp_avg.new_empty(size, 2)


def _turn(
    exp_avg: Tensor,
    long_vectors: Tensor,
    row: Tensor,
    col: Tensor,
    coefficients: Tensor,
    plain_row: Tensor,
    inside_sq: Tensor,
    bias1: Tensor,
    bias2: Tensor,
    finite: Tensor,
    eps: float,
) -> Tensor:
    """(U15)."""
    _turn_fake(exp_avg, long_vectors, row, col, coefficients, plain_row, inside_sq, bias1, bias2, finite, eps)
    one, two, taken = (part[:, None, None] for part in (bias1, bias2, finite))
    with full_precision():
        return turn(exp_avg, long_vectors, row, col, coefficients, plain_row, inside_sq, (one, two), taken, eps)


def _refresh_fake(
    exp_avg: Tensor,
    long_vectors: Tensor,
    factor: Tensor,
    inside_avg: Tensor,
    inside_sq: Tensor,
    row: Tensor,
    col: Tensor,
    vectors: Tensor,
    mask: Tensor,
    gain: Tensor,
    factor_values: Tensor,
    long_values: Tensor,
    long_tail: Tensor,
    taken: Tensor,
    finite: Tensor,
    first: int,
    last: int,
    beta1: float,
    beta2: float,
    eps: float,
    rho: float,
    decay: float,
    epsilon_sparse: float,
    k_min: int,
    k_max: int,
    activity: Tensor | None = None,
) -> Tensor:
    size, r, l = exp_avg.shape
    k = long_vectors.shape[1]
    _gram_fake(exp_avg, long_vectors)
    for name, tensor, shape in (
        ("factor", factor, (r, r)),
        ("inside_avg", inside_avg, (r, k)),
        ("inside_sq", inside_sq, (r, k)),
        ("row", row, (r, 1)),
        ("col", col, (1, l)),
        ("vectors", vectors, (r, r)),
        ("mask", mask, (1, k)),
        ("gain", gain, ()),
        ("factor_values", factor_values, (r,)),
        ("long_values", long_values, (k,)),
        ("long_tail", long_tail, ()),
        ("taken", taken, ()),
        ("finite", finite, ()),
    ):
        _check(tensor, name, (size, *shape))
    if activity is not None:
        _check(activity, "activity", (size, 2))
    if not 0 <= first <= last <= size:
        raise ValueError(f"first and last are {first} and {last}: they must be in order and within the {size} matrices")
    return exp_avg.new_empty(last - first)


def _refresh(*arguments: Any) -> Tensor:
    """``refresh.renew`` of the matrices from ``first`` to ``last``, which answers for those whose decompositions fail."""
    failed = _refresh_fake(*arguments).zero_()
    (finite, first, last, *rest), count = arguments[len(refresh.FIELDS) :], len(refresh.FIELDS)
    rows = slice(first, last)
    state = {name: field[rows] for name, field in zip(refresh.FIELDS, arguments[:count], strict=True)}
    numbers = len(refresh.Settings._fields)
    settings = refresh.Settings(*rest[:numbers])
    for activity in rest[numbers:]:
        if activity is not None:
            state["activity"] = activity[rows]
    taken, kept = state["taken"][:, None, None], finite[rows, None, None]
    with full_precision():
        refresh.renew(state, taken, kept, moment_schedule(settings[:2], kept, taken)[1], settings)
    return failed


def _eigh_fake(matrices: Tensor) -> tuple[Tensor, Tensor]:
    size, side = matrices.shape[0], matrices.shape[-1]
    _check(matrices, "matrices", (size, side, side), (torch.float32, torch.float64))
    return matrices.new_empty(size, side), torch.empty_like(matrices, memory_format=torch.contiguous_format)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh``; NaN for all matrices of a stack in which one cannot be decomposed."""
    _eigh_fake(matrices)
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return matrices.new_full(matrices.shape[:2], math.nan), torch.full_like(matrices, math.nan)
    return values, vectors.contiguous()


def _int8_fake(codes: Tensor, scales: Tensor, values: Tensor, weights: Tensor, seed: int) -> None:
    size = values.shape[0]
    shapes = quantization.encoded_shapes(size, values.numel() // max(size, 1))
    _check(codes, "codes", shapes[0], (torch.int8,))
    _check(scales, "scales", shapes[1])
    _check(values, "values", values.shape)
    _check(weights, "weights", (size,))


def _int8(codes: Tensor, scales: Tensor, values: Tensor, weights: Tensor, seed: int) -> None:
    """Decode, ``x <- x + w (value - x)``, (Q1); a matrix of weight zero keeps its codes."""
    _int8_fake(codes, scales, values, weights, seed)
    flat = values.reshape(values.shape[0], -1)
    average = quantization.decode(codes, scales, tuple(flat.shape[1:]), flat.dtype).lerp_(flat, weights[:, None])
    fresh_codes, fresh_scales = quantization.encode(average, seed)
    keep = weights[:, None] == 0
    codes.copy_(torch.where(keep, codes, fresh_codes))
    scales.copy_(torch.where(keep, scales, fresh_scales))


#: The default kernel of each operation, and its fake.
DEFAULTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "adamw_step_": (_adamw, _adamw_fake),
    "eigenbasis_step_": (_eigenbasis, _eigenbasis_fake),
    "eigenbasis_gram": (_gram, _gram_fake),
    "eigenbasis_turn_": (_turn, _turn_fake),
    "eigenbasis_refresh_": (_refresh, _refresh_fake),
    "symmetric_eigh": (_eigh, _eigh_fake),
    "int8_ema_": (_int8, _int8_fake),
}
for _name, (_default, _fake) in DEFAULTS.items():
    _LIBRARY.impl(_name, _default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"scao::{_name}", _fake, lib=_LIBRARY)

adamw_step_ = torch.ops.scao.adamw_step_
eigenbasis_step_ = torch.ops.scao.eigenbasis_step_
eigenbasis_refresh_ = torch.ops.scao.eigenbasis_refresh_
eigenbasis_gram = torch.ops.scao.eigenbasis_gram
eigenbasis_turn_ = torch.ops.scao.eigenbasis_turn_
symmetric_eigh = torch.ops.scao.symmetric_eigh
int8_ema_ = torch.ops.scao.int8_ema_
