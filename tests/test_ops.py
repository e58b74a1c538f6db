"""The native eigensolver, what the kernels know of a rule, how many operations a step is, and which kernels are in use."""

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
from kernel_states import eigenbasis_state, take_step
from torch.utils._python_dispatch import TorchDispatchMode

from scao_hf import SCAO, ops, quantization
from scao_hf.rules.eigenbasis import Eigenbasis

ROOT = Path(__file__).parent.parent
native = pytest.mark.skipif("cpu" not in ops.NATIVE, reason=f"no native CPU kernels: {ops.backend()['cpu']}")


def test_a_step_without_gradient_keeps_the_share_that_agreed() -> None:
    torch.manual_seed(0)
    for shape in ((16, 70), (70, 16)):
        params, grads = ([torch.randn(shape) for _ in range(3)] for _ in range(2))
        grads[1].zero_()
        state = eigenbasis_state(3, 16, 70, 16)
        before = state["agreement"].clone()
        take_step(params, grads, state)
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
    text = (ROOT / "csrc" / "state.h").read_text().partition("#define SCAO_FIELDS")[2].partition("struct State")[0]
    found = dict(re.findall(r"FIELD\((\w+), ([^)]*)\)", text))
    assert f"#define SCAO_INTERFACE {ops.INTERFACE}\n" in (ROOT / "csrc" / "state.h").read_text()
    assert [*found, "long_vectors"] == list(Eigenbasis.native_fields)
    for name in list(found)[2:]:
        sides = [side for side in Eigenbasis.fields[name].sides.split() if side != "1"]
        assert found[name] == (" * ".join(sides) or "1"), name


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


def test_an_ordinary_step_dispatches_as_much_for_many_matrices_as_for_few() -> None:
    """114 operations, most of them on one number a matrix."""
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
    assert counts[0] == counts[1] <= 114


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
