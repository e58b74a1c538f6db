"""Float32 products stay in float32 in a step, and what the process had set is there again afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from scao_hf import SCAO
from scao_hf.ops import full_precision

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
newer = pytest.mark.skipif(not NEW, reason=f"torch {torch.__version__} has no fp32_precision: it came with 2.9")


def everywhere(value: str) -> None:
    """``torch.backends.fp32_precision = value``, which torch's own test suite, once imported, forbids."""
    torch._C._set_fp32_precision_setter("generic", "all", value)  # type: ignore[attr-defined, unused-ignore]


def products(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value  # type: ignore[attr-defined, unused-ignore]


def settings() -> list[Any]:
    found = [backend.matmul.fp32_precision for backend in (torch.backends.cuda, torch.backends.mkldnn)] if NEW else []  # type: ignore[attr-defined, unused-ignore]
    try:
        return [*found, torch.get_float32_matmul_precision()]
    except RuntimeError as error:  # torch does not say, once the newer settings have been used
        return [*found, str(error)]


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    if NEW:
        everywhere("none")
        for backend in (torch.backends.cuda, torch.backends.mkldnn):
            backend.matmul.fp32_precision = "none"  # type: ignore[attr-defined, unused-ignore]


def train() -> torch.Tensor:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(4, 9))
    optimizer = SCAO([param], lr=0.1, warmup_steps=2, precond_freq=1, blend_steps=2)
    for _ in range(8):
        param.grad = torch.randn(4, 9)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize(
    ("choose", "value"),
    [
        (torch.set_float32_matmul_precision, "high"),
        (torch.set_float32_matmul_precision, "medium"),
        pytest.param(everywhere, "tf32", marks=newer),  # what transformers does for tf32=True
        pytest.param(products, "tf32", marks=newer),
    ],
)
def test_a_step_is_the_same_and_the_setting_is_put_back(choose: Callable[[str], None], value: str) -> None:
    plain = train()
    choose(value)
    before = settings()
    assert torch.equal(train(), plain)
    assert settings() == before


@newer
def test_the_setting_of_the_whole_process_still_holds_for_products_afterwards() -> None:
    everywhere("tf32")
    train()
    everywhere("ieee")
    assert settings()[:2] == ["ieee", "ieee"]


def test_of_several_threads_the_last_one_puts_the_setting_back() -> None:
    torch.set_float32_matmul_precision("high")
    before = settings()
    first, second = threading.Event(), threading.Event()

    def stay() -> None:
        with full_precision():
            first.set()
            second.wait(10)

    thread = threading.Thread(target=stay)
    thread.start()
    first.wait(10)
    with full_precision():
        second.set()
        thread.join()
        assert settings() != before  # this one is still inside
    assert settings() == before
