"""PyTorch's OptimizerInfo of SCAO, from which its suite takes the inputs, and what several bodies share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR

pytest.importorskip("expecttest", reason="torch's OptimizerInfo needs expecttest (pip install expecttest)")

from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from scao_hf import SCAO, options

EARLY: dict[str, Any] = {"warmup_steps": 3, "blend_steps": 2, "precond_freq": 3, "min_precond_updates": 1}


def inputs(device: Any = "cpu", dtype: Any = None) -> list[OptimizerInput]:
    """Every rule and kind of state, with the general options that torch tries."""
    given: list[tuple[str, dict[str, Any]]] = [
        ("default", {}),
        ("early curvature", dict(EARLY)),
        ("learning rate", {"lr": 1e-2, **EARLY}),
        ("tensor learning rate", {"lr": torch.tensor(1e-2), **EARLY}),
        ("weight decay", {"weight_decay": 0.1, **EARLY}),
        ("no weight decay", {"weight_decay": 0.0, **EARLY}),
        ("betas", {"betas": (0.8, 0.95), **EARLY}),
        ("published", {"rule": "published", **EARLY}),
        ("int8 curvature", {"use_int8_ema": True, **EARLY}),
        ("bounded natural gradient", {"tau": 1.0, **EARLY}),
    ]
    if "moment_dtype" in options.OPTIONS:
        given += [(f"{kind} moments", {"moment_dtype": kind, **EARLY}) for kind in ("bfloat16", "int8")]
    return [OptimizerInput(params=None, kwargs=kwargs, desc=words) for words, kwargs in given]


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    """Torch's own for all optimizers, and SCAO's options."""
    found = []
    for given in get_error_inputs_for_all_optims(torch.device(device), dtype):
        if "Tensor lr must be 1-element" in given.error_regex:
            given.error_regex = "lr is a tensor of 2 elements"
        found.append(given)
    for kwargs, words in (
        ({"lr": -1e-2}, "lr=-0.01"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"rule": "adam"}, "rule='adam'"),
        ({"precond_freq": 0}, "precond_freq=0"),
    ):
        given = OptimizerInput(params=None, kwargs=kwargs, desc=words)
        found.append(ErrorOptimizerInput(given, error_type=ValueError, error_regex=words))
    sparse = Parameter(torch.ones(3, 2))
    sparse.grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (3, 2))
    given = OptimizerInput(params=[sparse], kwargs={}, desc="sparse gradient")
    found.append(
        ErrorOptimizerInput(
            given, error_on=OptimizerErrorEnum.STEP_ERROR, error_type=RuntimeError, error_regex="sparse gradients"
        )
    )
    return found


INFO = OptimizerInfo(
    SCAO,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=(
        [lambda opt: StepLR(opt, gamma=0.99, step_size=10)],
        [lambda opt: ReduceLROnPlateau(opt)],
        [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
        [lambda opt: StepLR(opt, gamma=0.99, step_size=10), lambda opt: ExponentialLR(opt, gamma=0.999)],
        [lambda opt: ConstantLR(opt, factor=0.4, total_iters=4), lambda opt: ReduceLROnPlateau(opt)],
    ),
    supported_impls=(),
    not_og_supported_flags=(),
)


INPUTS = INFO.optim_inputs_func("cpu")


EVERY = pytest.mark.parametrize("given", INPUTS, ids=lambda given: given.desc.replace(" ", "-"))


def build(params: Any, given: OptimizerInput, **changes: Any) -> SCAO:
    return INFO.optim_cls(params, **{**copy.deepcopy(given.kwargs), **changes})


def linear(contiguous: bool = True, dtype: torch.dtype = torch.float32) -> tuple[list[Parameter], Callable[[], Tensor]]:
    """A weight and a bias that should map an input to zero, and the loss with gradients."""
    if contiguous:
        weight, bias = torch.randn(10, 5, dtype=dtype), torch.randn(10, dtype=dtype)
    else:
        weight, bias = torch.randn(10, 5, 2, dtype=dtype)[..., 0], torch.randn(10, 2, dtype=dtype)[..., 0]
    params, point = [Parameter(weight), Parameter(bias)], torch.randn(5, dtype=dtype)

    def loss() -> Tensor:
        for param in params:
            param.grad = None
        value = (params[0].mv(point) + params[1]).square().sum()
        value.backward()
        return value

    return params, loss


def values(params: list[Parameter]) -> list[Tensor]:
    """Copies with the same strides."""
    return [torch.empty_strided(param.size(), param.stride()).copy_(param.detach()) for param in params]


def equal(first: list[Any], second: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def trained(given: OptimizerInput, steps: int, contiguous: bool = True) -> tuple[list[Parameter], SCAO, Any]:
    params, loss = linear(contiguous)
    optimizer = build(params, given)
    for _ in range(steps):
        optimizer.step(loss)
    return params, optimizer, loss


def same_state(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_state(first[key], second[key]) for key in first)
    return bool(first == second)


def follow(params: list[Parameter], optimizer: Optimizer, twins: list[Parameter], other: Optimizer, loss: Any) -> None:
    """Both take five steps with the same gradients and end at the same weights, to the bit."""
    for _ in range(5):
        loss()
        for param, twin in zip(params, twins, strict=True):
            twin.grad = None if param.grad is None else param.grad.clone()
        optimizer.step()
        other.step()
        assert equal(params, twins)
