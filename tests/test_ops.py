"""Native kernels against the PyTorch ones: values, layouts, skipping, thread counts, and which kernels are in use."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_states import NUMBERS, eigenbasis_state, take_step
from torch.utils._python_dispatch import TorchDispatchMode

from scao_hf import SCAO, ops, quantization
from scao_hf.rules.eigenbasis import Eigenbasis

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: (r, l, k): every templated r, ragged l, k and r that fill no register, the largest of each.
SIZES = (
    [(r, l, 16) for r in (4, 8, 16, 32, 64) for l in (64, 128, 130)]
    + [(2, 3, 1), (3, 9, 9), (5, 37, 3), (16, 17, 16), (16, 200, 17), (20, 70, 20), (16, 65, 40)]
    + [(100, 130, 128), (128, 128, 8)]
)  # fmt: skip
native = pytest.mark.skipif("cpu" not in ops.NATIVE, reason=f"no native CPU kernels: {ops.backend()['cpu']}")


def members(size: int, r: int, l: int, dtype: torch.dtype, tall: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    shape = (l, r) if tall else (r, l)
    return [torch.randn(shape).to(dtype) for _ in range(size)], [torch.randn(shape).to(dtype) for _ in range(size)]


def adamw_state(size: int, r: int, l: int, factor: bool) -> dict[str, torch.Tensor]:
    state = {
        "taken": torch.arange(size, dtype=torch.float32) + 3,
        "level": 0.1 * torch.arange(size, dtype=torch.float32),
        "exp_avg": torch.randn(size, r, l),
        "exp_avg_sq": torch.rand(size, r, l),
    }
    return state | {"factor": torch.randn(size, r, r)} if factor else state


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    scale = expected.double().abs().max().clamp_min(1e-30)
    error = ((found.double() - expected.double()).abs().max() / scale).item()
    assert error <= tolerance, f"{name}: {error:.2g} of the largest entry"


def compare(params, grads, state, step: float = NUMBERS[0], **options: Any) -> None:
    """Both paths on copies: state to 2e-6 of its largest entry, parameters to 1e-4 of a step and one rounding."""
    other_params = [param.clone() for param in params]
    other = {name: value.clone() for name, value in state.items()}
    take_step(params, grads, state, native=True, **options)
    take_step(other_params, grads, other, native=False, **options)
    for name, value in state.items():
        if name == "agreement":  # an entry of the step next to zero may have either sign
            torch.testing.assert_close(value, other[name], rtol=0, atol=1.5 / params[0].numel())
        else:
            close(value, other[name], 2e-6, name)
    for found, expected in zip(params, other_params, strict=True):
        rounding = torch.finfo(found.dtype).eps * expected.abs().max().item()
        assert (found.double() - expected.double()).abs().max().item() <= 1e-4 * step + rounding


@native
@pytest.mark.parametrize(("r", "l", "k"), SIZES)
def test_eigenbasis_kernel_equals_pytorch(r: int, l: int, k: int) -> None:
    torch.manual_seed(r * l + k)
    for dtype in DTYPES:
        for tall in (False, True):
            for basis in (torch.bfloat16, torch.float32):
                # Float32 has loops of its own for each layout, and for each with and without the mask.
                for cautious in (True, False) if dtype == torch.float32 else (not tall,):
                    params, grads = members(3, r, l, dtype, tall)
                    state = eigenbasis_state(3, r, l, k, basis)
                    compare(params, grads, state, cautious=cautious)


@native
@pytest.mark.parametrize("lr", [0.0, 1e-40])
@pytest.mark.parametrize(("r", "l", "k"), [(16, 64, 16), (16, 70, 16), (12, 64, 4)])
def test_which_entries_agree_does_not_depend_on_the_rate(r: int, l: int, k: int, lr: float) -> None:
    """A schedule may reach zero, and a tiny rate times a step underflows; the share of the next step must not suffer."""
    torch.manual_seed(r * l + k)
    for dtype in DTYPES:
        for tall in (False, True):
            params, grads = members(3, r, l, dtype, tall)
            state = eigenbasis_state(3, r, l, k)
            compare(params, grads, state, lr, lr=lr)


@native
def test_experts_that_are_idle_in_some_steps_are_stepped_as_in_pytorch() -> None:
    """The curvature averages fewer gradients than the second moments, which they weigh less in (X3)."""
    torch.manual_seed(0)
    params, grads = members(3, 16, 70, torch.float32, False)
    activity = torch.tensor([[11.0, 1 - 0.99**11], [2.0, 0.02], [40.0, 1e-3]])
    compare(params, grads, eigenbasis_state(3, 16, 70, 16) | {"activity": activity})


@pytest.mark.parametrize("kernel", [pytest.param("native", marks=native), "pytorch"])
def test_a_step_without_gradient_keeps_the_share_that_agreed(kernel: str) -> None:
    torch.manual_seed(0)
    for tall in (False, True):
        params, grads = members(3, 16, 70, torch.float32, tall)
        grads[1].zero_()
        state = eigenbasis_state(3, 16, 70, 16)
        before = state["agreement"].clone()
        take_step(params, grads, state, native=kernel == "native")
        assert (state["agreement"] == before).tolist() == [False, True, False]


def symmetric(kind: str, count: int, n: int) -> torch.Tensor:
    """Stacks that are hard to decompose, each in its way."""
    x = torch.randn(count, n, n)
    if kind == "indefinite":
        return x + x.mT
    if kind == "rank deficient":
        x = x[:, :, : max(1, n // 4)]
    if kind == "rising":
        x = x * torch.logspace(-12, 0, n)[:, None]
    if kind == "falling":
        x = x * torch.logspace(0, -12, n)[:, None]
    if kind == "repeated":
        return torch.eye(n) + (x[:, :, :1] @ x[:, :, :1].mT) * (torch.arange(count) % 3)[:, None, None]
    return x @ x.mT * {"zero": 0.0, "tiny": 1e-38, "huge": 1e34}.get(kind, 1.0)


KINDS = ("indefinite", "random", "rank deficient", "rising", "falling", "repeated", "zero", "tiny", "huge")


@native
@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 32, 33, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_eigh_kernel(kind: str, n: int) -> None:
    """As exact as LAPACK in float32: values and residuals within 1e-6 of the norm, vectors orthonormal to 4e-6.

    The largest entry of a vector is positive.
    """
    torch.manual_seed(n)
    matrices = symmetric(kind, 21, n)
    values, vectors = ops.symmetric_eigh(matrices)
    assert torch.equal(values, values.sort(1)[0])
    exact, q = matrices.double(), vectors.double()
    norm = torch.linalg.matrix_norm(exact).clamp_min(1e-300)
    assert ((values.double() - torch.linalg.eigvalsh(exact)).abs().amax(1) / norm).max() <= 1e-6
    assert ((exact @ q - q * values.double()[:, None, :]).abs().amax((1, 2)) / norm).max() <= 1e-6
    assert (q.mT @ q - torch.eye(n)).abs().max() <= 4e-6
    assert (vectors.amax(1) >= -vectors.amin(1)).all()


@native
def test_eigh_keeps_what_is_small() -> None:
    """Rows twelve orders of magnitude apart, in any order: no large one leaks into the vectors of a small one."""
    torch.manual_seed(0)
    scales = torch.logspace(-6, 6, 6)[torch.stack([torch.randperm(6) for _ in range(40)])]
    rows = torch.randn(40, 6, 20) * scales[:, :, None]
    matrices = rows @ rows.mT
    values, vectors = ops.symmetric_eigh(matrices)
    exact, _ = torch.linalg.eigh(matrices.double())
    assert ((values.double() - exact).abs() / exact.abs())[exact > 1e-10 * exact[:, -1:]].max() <= 1e-2
    leaks = vectors.square() * scales.square()[:, :, None]  # of rows into vectors, as energy
    assert (leaks.sum(1) <= 100 * values.abs()).all()


@native
def test_eigh_does_not_depend_on_neighbours_or_threads() -> None:
    torch.manual_seed(0)
    matrices = torch.cat([symmetric(kind, 4, 16) for kind in KINDS])
    matrices[7] = float("nan")
    whole = ops.symmetric_eigh(matrices)
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        for cut in (1, 3, 17, len(matrices)):
            parts = [ops.symmetric_eigh(part) for part in matrices.split(cut)]
            for index, found in enumerate(map(torch.cat, zip(*parts, strict=True))):
                assert found.numpy().tobytes() == whole[index].numpy().tobytes()
    torch.set_num_threads(threads)


@native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_eigh_marks_matrices_that_are_not_finite(bad: float) -> None:
    matrices = torch.eye(9).repeat(20, 1, 1)
    matrices[11, 8, 3] = matrices[11, 3, 8] = bad
    values, vectors = ops.symmetric_eigh(matrices)
    good = torch.arange(20) != 11
    assert values[good].isfinite().all() and vectors[good].isfinite().all()
    assert values[11].isnan().all() and vectors[11].isnan().all()
    with pytest.warns(RuntimeWarning, match="side 9 failed"):
        assert ops.eigh(matrices, torch.zeros(20)) is None


@native
@pytest.mark.parametrize(("r", "l"), [(1, 1), (1, 5000), (4, 9), (16, 130), (33, 70), (128, 128)])
def test_adamw_kernel_equals_pytorch(r: int, l: int) -> None:
    torch.manual_seed(r * l)
    for dtype in DTYPES:
        for tall in (False, True):
            params, grads = members(3, r, l, dtype, tall)
            compare(params, grads, adamw_state(3, r, l, factor=r > 1))


@native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (15, 69), (7, 40)])
def test_a_matrix_with_a_nonfinite_gradient_is_left_alone(bad: float, place: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for state in (eigenbasis_state(3, 16, 70, 16), adamw_state(3, 16, 70, factor=True)):
        params, grads = members(3, 16, 70, torch.float32, False)
        grads[1][place] = bad
        before = [param.clone() for param in params], {name: value.clone() for name, value in state.items()}
        take_step(params, grads, state, native=True)
        for index in range(3):
            assert torch.equal(params[index], before[0][index]) == (index == 1)
            assert torch.equal(state["taken"][index], before[1]["taken"][index]) == (index == 1)
        for name, value in state.items():
            assert torch.equal(value[1], before[1][name][1]), name
            assert torch.isfinite(value).all()


@native
def test_huge_gradients_are_bounded_as_in_pytorch() -> None:
    torch.manual_seed(0)
    params, grads = members(2, 16, 70, torch.float32, True)
    grads[0] *= 1e30
    compare(params, grads, eigenbasis_state(2, 16, 70, 16), step=1.0)


@native
def test_a_tiny_residual_keeps_its_precision() -> None:
    """A gradient that lies in the kept directions to one part in a thousand: no difference of large sums is taken."""
    torch.manual_seed(0)
    params, grads = members(2, 16, 256, torch.float32, False)
    state = eigenbasis_state(2, 16, 256, 16, torch.float32)
    for name in ("row", "col", "exp_avg", "level"):
        state[name].zero_()
    state["mask"].fill_(1)
    state["long_vectors"] = torch.linalg.qr(torch.randn(2, 256, 16))[0].mT.contiguous()
    for index, grad in enumerate(grads):
        grad.copy_(torch.randn(16, 16) @ state["long_vectors"][index] + 1e-3 * torch.randn(16, 256))
    exact = {name: value.double() for name, value in state.items()}
    take_step(params, grads, state, native=True)
    rotated = exact["vectors"].mT @ torch.stack(grads).double()
    outside = rotated - rotated @ exact["long_vectors"].mT @ exact["long_vectors"]
    close(state["row"], 0.01 * outside.square().mean(2, keepdim=True), 1e-3, "row")
    close(state["exp_avg"], 0.1 * outside, 1e-3, "exp_avg")


@native
def test_any_strides_are_read_and_written() -> None:
    torch.manual_seed(0)
    wide = [torch.randn(40, 150)[3:19, 5:135] for _ in range(2)] + [torch.randn(150, 40)[5:135, 3:19]]
    wide.append(torch.randn(32, 260)[::2, ::2])
    grads = [torch.randn(16, 130), torch.randn(1, 130).expand(16, 130), torch.randn(130, 16), torch.randn(130, 16).T]
    params = [param.clone() for param in wide]
    state = eigenbasis_state(4, 16, 130, 16)
    other = {name: value.clone() for name, value in state.items()}
    take_step(wide, grads, state, native=True)
    take_step(params, grads, other, native=False)
    for found, expected in zip(wide, params, strict=True):
        close(found, expected, 1e-6, "params")


@native
def test_results_do_not_depend_on_the_thread_count() -> None:
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.manual_seed(0)
        params, grads = members(7, 16, 300, torch.float32, False)
        state = eigenbasis_state(7, 16, 300, 16)
        codes = torch.zeros(7, 384, dtype=torch.int8), torch.zeros(7, 3)
        torch.set_num_threads(count)
        take_step(params, grads, state, native=True)
        ops.int8_ema_(*codes, torch.stack(grads)[:, 0].contiguous(), torch.ones(7), 5)
        results.append([*params, *state.values(), *codes])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@native
@pytest.mark.parametrize("numel", [1, 127, 128, 1000])
def test_int8_kernel_gives_the_codes_of_the_codec(numel: int) -> None:
    torch.manual_seed(numel)
    values, weights = torch.randn(5, numel), torch.tensor([1.0, 0.0, 1.0, 0.05, 0.6])
    codes, scales = (torch.zeros(shape) for shape in quantization.encoded_shapes(5, numel))
    codes = codes.to(torch.int8)
    for seed in (3, 4):
        other_codes, other_scales = codes.clone(), scales.clone()
        ops.int8_ema_(codes, scales, values, weights, seed)
        quantization.ema_(other_codes, other_scales, values, weights, seed)
        torch.testing.assert_close(scales, other_scales, rtol=1e-6, atol=0)
        # Weights below one: the mean may be rounded once or twice, which moves a code at a threshold by one.
        assert (codes.int() - other_codes.int()).abs().max() <= 1
        assert (codes != other_codes).float().mean() < 2e-3
    once, scale = quantization.encode(values, seed=4)
    ops.int8_ema_(codes.zero_(), scales.zero_(), values, torch.ones(5), 4)
    assert torch.equal(codes, once) and torch.equal(scales, scale)


def test_noise_is_uniform_and_differs_between_seeds_and_blocks() -> None:
    noise = torch.stack([quantization.uniform_noise([200], [seed], torch.device("cpu")) for seed in range(3)])
    assert noise.min() >= 0 and noise.max() < 1
    counts = torch.histc(noise, 16, 0, 1)
    assert (counts / noise.numel() - 1 / 16).abs().max() < 0.003
    flat = noise.flatten(0, 1)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 0.5
    assert len(torch.unique(flat)) > 0.99 * flat.numel()


def test_the_kernels_know_the_fields_of_the_rule() -> None:
    """Their names, their order and how many entries one matrix has."""
    text = (ROOT / "csrc" / "state.h").read_text().partition("#define SCAO_FIELDS")[2].partition("template")[0]
    found = dict(re.findall(r"FIELD\((\w+), ([^)]*)\)", text))
    assert f"#define SCAO_INTERFACE {ops.INTERFACE}\n" in (ROOT / "csrc" / "state.h").read_text()
    assert [*found, "long_vectors"] == list(Eigenbasis.native_fields)
    for name in list(found)[2:]:
        sides = [side for side in Eigenbasis.fields[name].sides.split() if side != "1"]
        assert found[name] == (" * ".join(sides) or "1"), name


@native
@pytest.mark.parametrize("test", ["test_schema", "test_faketensor"])
def test_opcheck(test: str) -> None:
    torch.manual_seed(0)
    params, grads = members(2, 4, 12, torch.float32, False)
    calls = [
        (ops.symmetric_eigh, (torch.eye(5).repeat(2, 1, 1),)),
        (ops.eigenbasis_step_, (params, grads, [*eigenbasis_state(2, 4, 12, 3).values()], NUMBERS, True)),
        (ops.adamw_step_, (params, grads, [*adamw_state(2, 4, 12, factor=True).values()], NUMBERS)),
        (ops.adamw_step_, (params, grads, [*adamw_state(2, 4, 12, factor=False).values()], NUMBERS)),
        (
            ops.int8_ema_,
            (torch.zeros(2, 128, dtype=torch.int8), torch.ones(2, 1), torch.randn(2, 9), torch.ones(2), 1),
        ),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=test)


@native
@pytest.mark.parametrize("name", ["vectors", "mask", "gain", "col", "long_vectors", "taken", "level", "agreement"])
def test_wrong_shapes_are_refused(name: str) -> None:
    params, grads = members(2, 4, 12, torch.float32, False)
    state = eigenbasis_state(2, 4, 12, 3)
    state[name] = state[name][..., :-1]
    with pytest.raises(RuntimeError, match=name):
        ops.eigenbasis_step_(params, grads, [*state.values()], NUMBERS, True)


@native
@pytest.mark.parametrize("rule", ["eigenbasis", "published"])
@pytest.mark.parametrize("int8", [False, True])
def test_the_optimizer_steps_the_same_with_and_without(rule: str, int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        shapes = [(16, 70), (70, 16), (4, 40), (9,), (3, 2, 2)]
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = SCAO(params, rule=rule, use_int8_ema=int8, warmup_steps=3, blend_steps=2, precond_freq=4)
        for _ in range(20):
            for param in params:
                param.grad = torch.randn_like(param)
            versions = [param._version for param in params]
            optimizer.step()
            assert all(param._version > version for param, version in zip(params, versions, strict=True))
        return [param.detach().clone() for param in params]

    calls = []
    for name in ops.KERNELS["cpu"]:
        kernel = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, k=kernel, n=name: (calls.append(n), k(*args))[1])
    fast = run()
    used = set(calls)
    monkeypatch.setattr(ops, "NATIVE", frozenset())
    calls.clear()
    slow = run()
    if rule == "eigenbasis":
        assert used == {"adamw_step_", "symmetric_eigh"} | (set() if int8 else {"eigenbasis_step_"})
        assert not calls
        for a, b in zip(fast, slow, strict=True):
            # The signs of eigenvectors are the solver's choice, and -x is not rounded as x is.
            torch.testing.assert_close(a, b, rtol=0, atol=5e-4 if int8 else 1e-4)
    else:
        assert used == {"adamw_step_", "symmetric_eigh"} | ({"int8_ema_"} if int8 else set())


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (40,)])
def test_decay_and_step_are_rounded_once(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither path rounds the decayed weight before the step: both are the step in float32, then one rounding."""
    torch.manual_seed(0)
    start, grads = torch.randn(shape).to(dtype), [torch.randn(shape).to(dtype) for _ in range(30)]
    ends = []
    for kernels in (ops.NATIVE, frozenset()):
        monkeypatch.setattr(ops, "NATIVE", kernels)
        param = torch.nn.Parameter(start.clone())
        optimizer = SCAO([param], lr=2e-3, weight_decay=0.5)
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        ends.append(param.detach())
    assert (ends[0] == ends[1]).float().mean() > 0.9


class Dispatched(TorchDispatchMode):
    """Counts the operations that do work: views and the profiler's marks do none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.namespace == "profiler")
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", [pytest.param("native", marks=native), "pytorch"])
def test_an_ordinary_step_dispatches_as_much_for_many_matrices_as_for_few(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native kernels: one operation a shape. In PyTorch 114, most of them on one number a matrix."""
    if path == "pytorch":
        monkeypatch.setattr(ops, "NATIVE", frozenset())
    counts = []
    for size in (3, 6):
        params = [torch.nn.Parameter(torch.randn(16, 64)) for _ in range(size)]
        optimizer = SCAO(params, warmup_steps=2, blend_steps=0, precond_freq=12)
        for _ in range(21):
            for param in params:
                param.grad = torch.randn(16, 64)
            with Dispatched() as dispatched:
                optimizer.step()
        # The last step is the ninth of phase 2: nobody's turn, whether three or six share the twelve slots.
        counts.append(dispatched.count)
    assert counts[0] == counts[1]
    assert counts[0] <= (1 if path == "native" else 114)


@pytest.mark.parametrize("options", [{}, {"use_int8_ema": True, "moment_dtype": "int8"}, {"rule": "published"}])
def test_nothing_that_deterministic_algorithms_refuse_on_cuda(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``full_determinism`` of a Trainer makes errors of them; the list is that of torch.use_deterministic_algorithms."""
    monkeypatch.setattr(ops, "NATIVE", frozenset())
    param = torch.nn.Parameter(torch.randn(8, 20))
    optimizer = SCAO([param], warmup_steps=2, blend_steps=2, precond_freq=2, min_precond_updates=1, **options)
    with Dispatched() as dispatched:
        for _ in range(8):
            param.grad = torch.randn(8, 20)
            optimizer.step()
    assert "_linalg_eigh" in dispatched.names
    assert not dispatched.names & {"cumsum", "put_", "histc", "bincount", "median", "kthvalue", "scatter_reduce"}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
    )


def test_each_gpu_is_judged_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is too old, the driver of another does not load the kernels: the first has them all the same."""
    current = [0]

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        current[0] = index
        yield

    monkeypatch.setattr(ops, "_CUDA", SimpleNamespace(scao_cuda_probe=lambda: 209 if current[0] == 2 else 0))
    monkeypatch.setattr(ops, "NATIVE", frozenset({"cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 9), (6, 1), (9, 0))[index])
    monkeypatch.setattr(torch.cuda, "device", device)
    ops._refused_by.cache_clear()
    try:
        said = ops.backend()["cuda"]
        natives = [ops._is_native(torch.device("cuda", index)) for index in range(3)]
    finally:
        ops._refused_by.cache_clear()
    assert natives == [True, False, False]
    assert said.startswith("native: not on cuda:1 (compute capability 6.1 is below 7.5), cuda:2 (") and "209" in said


def test_importing_asks_no_gpu_anything() -> None:
    """A process that is forked afterwards could not use CUDA, and CUDA_VISIBLE_DEVICES would come too late."""
    code = """
import pathlib, torch
def refuse(*_): raise AssertionError("CUDA was asked")
for name in ("is_available", "device_count", "get_device_capability", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
torch.version.cuda, pathlib.Path.exists = "13.0", lambda path: True
torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError("a built extension"))
from scao_hf import ops
print(ops._CUDA_REASON)
"""
    done = python(code)
    assert done.stdout == "_C_cuda.so could not be loaded: a built extension\n", done.stderr[-1000:]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one instruction set")
def test_a_processor_without_avx2_has_pytorchs_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are compiled for it, and end the process elsewhere."""
    path = Path(__file__)
    monkeypatch.delenv("SCAO_DISABLE_EXT", raising=False)
    assert ops._refusal("cpu", path) is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert ops._refusal("cpu", path) == "they need AVX2, and torch finds DEFAULT"


def test_kernels_can_be_switched_off_and_required() -> None:
    show = "import scao_hf.ops as o; print(o.backend()['cpu'])"
    assert python(show, SCAO_DISABLE_EXT="1").stdout == "pytorch: SCAO_DISABLE_EXT is set\n"
    refused = python(show, SCAO_DISABLE_EXT="1", SCAO_REQUIRE_EXT="cpu")
    assert refused.returncode and "no native cpu kernels: SCAO_DISABLE_EXT is set" in refused.stderr
    unknown = python(show, SCAO_REQUIRE_EXT="tpu")
    assert unknown.returncode and "it must be cpu, cuda or cpu,cuda" in unknown.stderr


def build(tmp_path: Path, choice: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    return subprocess.run(
        command, env={**os.environ, "SCAO_BUILD_EXT": choice, **environment}, cwd=ROOT, capture_output=True, text=True
    )


def test_the_cuda_compiler_is_found_off_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of clouds have it in /usr/local/cuda/bin alone."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    with mock.patch("setuptools.setup"):
        setup = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setitem(setup["nvcc"].__globals__, "TOOLKIT", tmp_path)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=rf"no nvcc on PATH or in {tmp_path}/bin"):
        setup["nvcc"]()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(0o755)
    assert setup["nvcc"]() == str(tmp_path / "bin" / "nvcc")


def test_a_build_that_was_asked_for_and_is_impossible_fails_clearly(tmp_path: Path) -> None:
    failed = build(tmp_path, "cpu", CXX="no-such-compiler")
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10)
    reason = f"the torch in {Path(torch.__file__).parent} has no stable ABI" if old else "no C++ compiler"
    assert failed.returncode and f"SCAO_BUILD_EXT=cpu: building scao_hf._C_cpu failed: {reason}" in failed.stderr
    skipped = build(tmp_path, "auto", CXX="no-such-compiler", CUDA_HOME=str(tmp_path))
    assert skipped.returncode == 0 and skipped.stderr.count("left out: building scao_hf._C_c") == 2
    unknown = build(tmp_path, "yes")
    assert unknown.returncode and "SCAO_BUILD_EXT='yes' is not valid: it must be one of 0, cpu" in unknown.stderr
    assert build(tmp_path, "0").returncode == 0 and not list(tmp_path.rglob("*.so"))
