"""Dtypes, shapes and layouts of parameters."""

from __future__ import annotations

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from faults.core import LR, Lost, Params, Subject, Task, fault, finite, require


def trains(
    subject: Subject, shapes: list[tuple[int, ...]], dtype: torch.dtype | None = None, steps: int = 20
) -> Params:
    """Pull parameters of some shapes towards zero; they must get there by half and stay finite."""
    draw = torch.Generator().manual_seed(0)
    dtype = dtype or subject.dtype
    real = torch.float64 if dtype.is_complex else torch.float32
    params = [Parameter((torch.randn(shape, generator=draw, dtype=real) / 4).to(dtype)) for shape in shapes]
    return pulled(params, subject.build(params, LR), steps)


def pulled(params: Params, optimizer: Optimizer, steps: int = 20) -> Params:
    """Steps with the gradient of half the squared norm."""
    start = sum(float(param.detach().abs().double().square().sum()) for param in params)
    for _ in range(steps):
        for param in params:
            param.grad = param.detach().clone(memory_format=torch.preserve_format)
        optimizer.step()
    require(finite(params), "weights are NaN or Inf")
    end = sum(float(param.detach().abs().double().square().sum()) for param in params)
    require(start == 0 or end < 0.5 * start, f"squared norm {start:.3g} became {end:.3g}")
    return params


def low_precision(subject: Subject, dtype: torch.dtype) -> None:
    """LoRA in low precision must come within twice the loss of float32."""
    full = Task(subject, torch.float32).train()
    low = Task(subject, dtype)
    loss = low.train()
    require(finite(low.params), "weights are NaN or Inf")
    require(loss <= 2 * full, f"loss {loss:.3g} instead of {full:.3g}")


@fault("dtypes and shapes", "bfloat16 parameters")
def bfloat16(subject: Subject) -> None:
    low_precision(subject, torch.bfloat16)


@fault("dtypes and shapes", "float16 LoRA with B = 0")
def float16(subject: Subject) -> None:
    low_precision(subject, torch.float16)


@fault("dtypes and shapes", "float16 parameters and gradients of 1e-6")
def float16_tiny(subject: Subject) -> None:
    param = Parameter(torch.ones(6, 10, dtype=torch.float16))
    optimizer = subject.build([param], LR)
    for _ in range(10):
        param.grad = torch.full_like(param, 1e-6)
        optimizer.step()
    require(finite([param]), "weights are NaN or Inf")
    moved = float((1 - param.float()).mean()) / (10 * LR)
    require(0.3 < moved < 3, f"moves {moved:.2g} lr a step")


@fault("dtypes and shapes", "float64 parameters")
def float64(subject: Subject) -> None:
    trains(subject, [(6, 10), (7,)], torch.float64)


@fault("dtypes and shapes", "complex parameters: trained, or refused by name")
def complex64(subject: Subject) -> None:
    try:
        trains(subject, [(6, 10), (7,)], torch.complex64)
    except Exception as error:  # packages have classes of their own for it
        if isinstance(error, Lost) or "complex" not in str(error):
            raise


@fault("dtypes and shapes", "parameters of several dtypes in one optimizer")
def mixed_dtypes(subject: Subject) -> None:
    draw = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    params = [Parameter((torch.randn(6, 10, generator=draw) / 4).to(dtype)) for dtype in dtypes]
    pulled(params, subject.build(params, LR))


def _shape(name: str, title: str, *shapes: tuple[int, ...]) -> None:
    def case(subject: Subject) -> None:
        trains(subject, list(shapes))

    case.__name__ = name
    fault("dtypes and shapes", title)(case)


_shape("scalar", "a scalar", ())
_shape("one_element", "one element", (1,), (1, 1))
_shape("empty", "an empty parameter among others", (0,), (0, 4), (6, 10))
_shape("one_row", "a matrix of one row", (1, 9))
_shape("one_column", "a matrix of one column", (9, 1))
_shape("conv_4d", "a convolution's four dimensions", (4, 3, 3, 3))
_shape("conv_5d", "a convolution's five dimensions", (4, 3, 2, 2, 2))
_shape("experts", "experts stacked in three dimensions", (5, 6, 8))
_shape("long_and_thin", "600 by 4", (600, 4))
_shape("wide_and_flat", "4 by 600", (4, 600))


@fault("dtypes and shapes", "non-contiguous parameters and gradients")
def non_contiguous(subject: Subject) -> None:
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(6, 10, generator=draw) / 4
    transposed = Parameter(torch.empty(10, 6).t().copy_(start))
    strided = Parameter(torch.randn(6, 10, 2, generator=draw)[..., 0] / 4)
    pulled([transposed, strided], subject.build([transposed, strided], LR))
    plain = Parameter(start.clone())
    pulled([plain], subject.build([plain], LR))
    require(torch.allclose(plain, transposed, rtol=1e-4, atol=1e-5), "the layout changes the result")


@fault("dtypes and shapes", "channels-last convolutions")
def channels_last(subject: Subject) -> None:
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, 5, 5, generator=draw) / 4
    last = Parameter(start.clone().contiguous(memory_format=torch.channels_last))
    plain = Parameter(start.clone())
    pulled([last], subject.build([last], LR))
    pulled([plain], subject.build([plain], LR))
    require(torch.allclose(plain, last, rtol=1e-4, atol=1e-5), "the layout changes the result")
