"""The CUDA kernels' logic without a GPU: the same source through csrc/emulator, in several orders of the threads."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from kernel_states import NUMBERS, eigenbasis_state, take_step

from scao_hf import quantization
from scao_hf.rules.eigenbasis import Eigenbasis

CSRC = Path(__file__).parent.parent / "csrc"
ORDERS = (0, 1, 2, 3)
#: Every barrier of csrc/kernels.cuh.
BARRIERS = tuple(range(1, 21))
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the emulator needs it")


class View(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_long),
        ("col_stride", ctypes.c_long),
        ("dtype", ctypes.c_int),
    )


POINTERS = (*Eigenbasis.native_fields, "activity")


class State(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in ("long_dtype", "r", "l", "k", "chunks", "cautious")),
        ("scratch", ctypes.c_void_p),
    )


class Numbers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "rho"))


def compile_kernels(folder: Path, *flags: str) -> ctypes.CDLL:
    target = folder / f"emulated{abs(hash(flags))}.so"
    command = ["g++", "-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-DSCAO_EMULATE", *flags, "-x", "c++"]
    subprocess.run([*command, str(CSRC / "launch.cu"), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.scao_cuda_scratch.restype = ctypes.c_long
    library.scao_cuda_eigenbasis.argtypes = (
        *(ctypes.POINTER(View),) * 2, ctypes.c_int, State, Numbers, ctypes.c_void_p,
    )  # fmt: skip
    library.scao_cuda_int8_ema.argtypes = (
        *(ctypes.c_void_p,) * 4, *(ctypes.c_long,) * 3, ctypes.c_uint, ctypes.c_void_p,
    )  # fmt: skip
    return library


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    yield compile_kernels(tmp_path_factory.mktemp("emulated"), "-Wall", "-Wextra", "-Werror")


def case(r: int, l: int, k: int, dtype: torch.dtype, basis: torch.dtype, size: int = 3):
    torch.manual_seed(r * l + k)
    shapes = [(r, l) if index % 2 else (l, r) for index in range(size)]
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    grads = [torch.randn(shape).to(dtype) for shape in shapes]
    return params, grads, eigenbasis_state(size, r, l, k, basis)


def view(tensor: torch.Tensor, r: int, l: int) -> View:
    tall = tuple(tensor.shape) != (r, l)
    return View(tensor.data_ptr(), *(tensor.stride()[::-1] if tall else tensor.stride()), CODES[tensor.dtype])


def step(
    library: ctypes.CDLL,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    state: dict[str, torch.Tensor],
    cautious: bool = True,
    activity: torch.Tensor | None = None,
    numbers: Sequence[float] = NUMBERS,
) -> int:
    size, r, l = state["exp_avg"].shape
    k = state["mask"].shape[-1]
    scratch = torch.full((min(size, 48) * library.scao_cuda_scratch(r, l, k),), float("nan"))
    fields = state | {"activity": activity}
    pointers = (None if fields[name] is None else fields[name].data_ptr() for name in POINTERS)
    arguments = State(*pointers, CODES[state["long_vectors"].dtype], r, l, k, 0, int(cautious), scratch.data_ptr())
    views = [(View * size)(*(view(tensor, r, l) for tensor in tensors)) for tensors in (grads, params)]
    return library.scao_cuda_eigenbasis(*views, size, arguments, Numbers(*numbers), None)


def largest_error(
    params: list[torch.Tensor],
    state: dict[str, torch.Tensor],
    other: list[torch.Tensor],
    expected: dict[str, torch.Tensor],
) -> float:
    """Of any field, over the field's largest entry; for parameters over a step and their own rounding."""
    errors = []
    for name, value in state.items():
        difference = (value.double() - expected[name].double()).abs().max()
        # An entry of the step next to zero may have either sign.
        allowed = 1.5 / params[0].numel() if name == "agreement" else 2e-6 * expected[name].double().abs().max()
        errors.append((difference / allowed).item())
    for found, wanted in zip(params, other, strict=True):
        allowed = 1e-4 * NUMBERS[0] + torch.finfo(found.dtype).eps * wanted.double().abs().max()
        errors.append(((found.double() - wanted.double()).abs().max() / allowed).item())
    return max(error if error == error else float("inf") for error in errors)


@pytest.mark.parametrize(
    ("r", "l", "k", "dtype", "basis"),
    [
        (16, 70, 16, torch.float32, torch.bfloat16),
        (4, 600, 4, torch.bfloat16, torch.bfloat16),
        (5, 37, 3, torch.float16, torch.float32),
        (64, 64, 64, torch.float32, torch.float32),
        (33, 1030, 40, torch.float32, torch.bfloat16),
        (2, 2, 1, torch.float32, torch.bfloat16),
    ],
)
def test_eigenbasis_kernels_equal_pytorch(
    kernels, r: int, l: int, k: int, dtype: torch.dtype, basis: torch.dtype
) -> None:
    results = []
    for order in ORDERS:
        params, grads, state = case(r, l, k, dtype, basis)
        other, expected = [param.clone() for param in params], {name: value.clone() for name, value in state.items()}
        kernels.scao_emulator_order(order)
        cautious = dtype != torch.float16
        assert step(kernels, params, grads, state, cautious) == 0
        take_step(other, grads, expected, native=False, cautious=cautious)
        assert largest_error(params, state, other, expected) <= 1
        results.append([*params, *state.values()])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_more_matrices_than_one_launch_takes(kernels) -> None:
    params, grads, state = case(4, 40, 4, torch.float32, torch.bfloat16, size=100)
    other, expected = [param.clone() for param in params], {name: value.clone() for name, value in state.items()}
    assert step(kernels, params, grads, state) == 0
    take_step(other, grads, expected, native=False)
    assert largest_error(params, state, other, expected) <= 1


def test_experts_that_are_idle_in_some_steps(kernels) -> None:
    """(X3), in more launches than one."""
    params, grads, state = case(4, 40, 4, torch.float32, torch.bfloat16, size=60)
    other, expected = [param.clone() for param in params], {name: value.clone() for name, value in state.items()}
    activity = torch.stack([torch.arange(60) % 7 + 1.0, torch.logspace(-4, -1, 60)], 1)
    assert step(kernels, params, grads, state, activity=activity) == 0
    take_step(other, grads, expected | {"activity": activity}, native=False)
    assert largest_error(params, state, other, expected) <= 1


def test_a_step_without_gradient_keeps_the_share_that_agreed(kernels) -> None:
    params, grads, state = case(8, 600, 8, torch.float32, torch.bfloat16)
    grads[1].zero_()
    before = state["agreement"].clone()
    assert step(kernels, params, grads, state) == 0
    assert (state["agreement"] == before).tolist() == [False, True, False]


def test_skipping_and_bounding(kernels) -> None:
    params, grads, state = case(8, 600, 8, torch.float32, torch.bfloat16)
    grads[0][599, 7], grads[1][3, 70] = float("inf"), float("nan")
    grads[2] *= 1e30
    other, expected = [param.clone() for param in params], {name: value.clone() for name, value in state.items()}
    before = [param.clone() for param in params]
    assert step(kernels, params, grads, state) == 0
    take_step(other, grads, expected, native=False)
    assert largest_error(params, state, other, expected) <= 1
    assert [torch.equal(a, b) for a, b in zip(params, before, strict=True)] == [True, True, False]


def int8(library: ctypes.CDLL, values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    numel = values.shape[1]
    codes, scales = quantization.encode(values.flip(0), seed=8)
    key = quantization._mix(torch.tensor(9)).item()
    arguments = (tensor.data_ptr() for tensor in (codes, scales, values, weights))
    assert library.scao_cuda_int8_ema(*arguments, numel, scales.shape[1], scales.numel(), key, None) == 0
    return codes, scales


@pytest.mark.parametrize("numel", [1, 128, 300])
def test_int8_kernel_gives_the_codes_of_the_codec(kernels, numel: int) -> None:
    torch.manual_seed(numel)
    values, weights = torch.randn(4, numel), torch.tensor([1.0, 0.0, 0.3, 0.6])
    expected_codes, expected_scales = quantization.encode(values.flip(0), seed=8)
    quantization.ema_(expected_codes, expected_scales, values, weights, 9)
    for order in ORDERS:
        kernels.scao_emulator_order(order)
        codes, scales = int8(kernels, values, weights)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
        assert (codes.int() - expected_codes.int()).abs().max() <= 1
        assert torch.equal(codes[0], expected_codes[0])


def test_every_barrier_has_a_number_of_its_own() -> None:
    text = (CSRC / "kernels.cuh").read_text()
    assert sorted(int(number) for number in re.findall(r"SCAO_SYNC\((\d+)\);", text)) == list(BARRIERS)
    assert text.count("__syncthreads") == 1


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_removed_barrier_is_noticed(kernels, barrier: int) -> None:
    noticed = False
    kernels.scao_emulator_drop(barrier)
    for order in ORDERS:
        kernels.scao_emulator_order(order)
        params, grads, state = case(33, 130, 40, torch.float32, torch.bfloat16, size=2)
        grads[1] *= 1e30
        other, expected = [param.clone() for param in params], {name: value.clone() for name, value in state.items()}
        noticed |= step(kernels, params, grads, state) != 0
        take_step(other, grads, expected, native=False)
        noticed |= largest_error(params, state, other, expected) > 1
        torch.manual_seed(0)
        values, weights = torch.randn(3, 300), torch.ones(3)
        codes, _ = int8(kernels, values, weights)
        noticed |= not torch.equal(codes, quantization.encode(values, seed=9)[0])
    kernels.scao_emulator_drop(0)
    assert noticed


SANITIZED = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
import torch, test_emulator as t
library = t.compile_kernels(Path({folder!r}), "-fsanitize=address")
params, grads, state = t.case(5, 530, 3, torch.float32, torch.bfloat16)
t.step(library, params, grads, state)
t.int8(library, torch.randn(3, 300), torch.ones(3))
print("clean", flush=True)
if {break_it}:
    state["row"] = torch.zeros(1)
    t.step(library, params, grads, state)
"""


@pytest.mark.parametrize("break_it", [False, True])
def test_address_sanitizer(tmp_path: Path, break_it: bool) -> None:
    """No access outside the tensors; and a tensor that is too short is noticed."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    code = SANITIZED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), break_it=break_it)
    environment = {
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": str(CSRC.parent),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "clean" in run.stdout, run.stderr[-2000:]
    assert ("heap-buffer-overflow" in run.stderr) == break_it
    assert (run.returncode != 0) == break_it
