"""The CUDA code without a GPU: kernels, launchers and glue through csrc/emulator, in several orders of the threads."""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_states import NUMBERS, RAMP, eigenbasis_state, ramp_numbers, take_step
from torch import Tensor
from torch.utils import deterministic

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import launches  # noqa: E402
import occupancy  # noqa: E402
import tables  # noqa: E402

from scao_hf import SCAO, ops, quantization  # noqa: E402
from scao_hf.rules.eigenbasis import Eigenbasis  # noqa: E402

CSRC = ROOT / "csrc"
ORDERS = (0, 1, 2, 3)
#: Every barrier of csrc/kernels.cuh.
BARRIERS = tuple(range(1, 20))

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the emulator needs it")


@pytest.fixture
def kernels() -> Iterator[ctypes.CDLL]:
    """Memory that the glue takes is NaN at first."""
    assert deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    library = occupancy.emulator()
    yield library
    library.scao_emulator_order(0)
    torch.use_deterministic_algorithms(False)


State = dict[str, Tensor]


def emulate(monkeypatch: pytest.MonkeyPatch, around: Callable[[str, Any], Any] = lambda _, kernel: kernel) -> None:
    """Let the optimizer step parameters on the CPU by the emulated kernels, each as ``around`` makes it."""
    monkeypatch.setattr(ops, "NATIVE", ops.NATIVE | {"cpu"})
    monkeypatch.setitem(ops.KERNELS, "cpu", ops.KERNELS["cuda"])
    for name in ops.KERNELS["cuda"]:
        monkeypatch.setattr(ops, name, around(name, getattr(torch.ops.scao_emulated, name)))


def case(
    r: int, l: int, k: int, dtype: torch.dtype, basis: torch.dtype, size: int = 3
) -> tuple[list[Tensor], list[Tensor], State]:
    """Parameters and gradients, [r, l] and [l, r] in turn, in phase 2, or in phase 1 for k = 0, where r = 1 makes vectors."""
    torch.manual_seed(r * l)
    shapes = [(r, l) if index % 2 else (l, r) for index in range(size)]
    params, grads = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2))
    if k:
        return params, grads, eigenbasis_state(size, r, l, k, basis)
    roots = torch.randn(size, r, r)
    state = {
        "taken": torch.arange(size, dtype=torch.float32) + 11,
        "level": 0.1 * torch.arange(size, dtype=torch.float32),
        "exp_avg": 0.1 * torch.randn(size, r, l),
        "exp_avg_sq": torch.rand(size, r, l),
        "factor": roots @ roots.mT,
    }
    if r == 1:
        del state["factor"]
        params, grads = ([each.reshape(l) for each in stack] for stack in (params, grads))
    return params, grads, state


def step(
    params: list[Tensor], grads: list[Tensor], state: State, cautious: bool = True, numbers: list[float] = NUMBERS
) -> None:
    """By the emulated operation; ``activity`` is the last of the fields where there is one."""
    if "vectors" in state:
        torch.ops.scao_emulated.eigenbasis_step_(params, grads, [*state.values()], numbers, cautious)
    else:
        torch.ops.scao_emulated.adamw_step_(params, grads, [*state.values()], numbers)


def errors_of(
    params: list[Tensor],
    grads: list[Tensor],
    state: State,
    cautious: bool = True,
    ramp: bool = False,
    lr: float = NUMBERS[0],
) -> float:
    """Take a step by both paths; the largest error, over a field's largest entry, or over a step and its rounding."""
    other, expected = [param.clone() for param in params], {name: value.clone() for name, value in state.items()}
    step(params, grads, state, cautious, [lr, *(ramp_numbers() if ramp else NUMBERS)[1:]])
    take_step(other, grads, expected, cautious=cautious, lr=lr, **(RAMP if ramp else {}))
    errors = []
    for name, value in state.items():
        difference = (value.double() - expected[name].double()).abs().max()
        # An entry of the step next to zero may have either sign.
        allowed = 1.5 / params[0].numel() if name == "agreement" else 2e-6 * expected[name].double().abs().max()
        errors.append((difference / allowed).item())
    for found, wanted in zip(params, other, strict=True):
        allowed = 1e-4 * lr + torch.finfo(found.dtype).eps * wanted.double().abs().max()
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
        (16, 600, 0, torch.float32, torch.float32),
        (5, 37, 0, torch.float16, torch.float32),
        (64, 70, 0, torch.bfloat16, torch.float32),
        (1, 1300, 0, torch.float32, torch.float32),
    ],
)
def test_a_step_of_the_kernels_equals_pytorchs(
    kernels: ctypes.CDLL, r: int, l: int, k: int, dtype: torch.dtype, basis: torch.dtype
) -> None:
    """In phase 2, in phase 1 and of vectors."""
    results = []
    for order in ORDERS:
        params, grads, state = case(r, l, k, dtype, basis)
        kernels.scao_emulator_order(order)
        assert errors_of(params, grads, state, cautious=dtype != torch.float16) <= 1
        results.append([*params, *state.values()])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize(
    ("r", "l", "k", "basis"),
    [(16, 70, 16, torch.bfloat16), (5, 37, 3, torch.float32), (33, 1030, 40, torch.bfloat16), (2, 2, 1, torch.float32)],
)
def test_a_step_of_the_ramp_equals_pytorchs(kernels: ctypes.CDLL, r: int, l: int, k: int, basis: torch.dtype) -> None:
    """Mixed with AdamW's, which the mask of cautious steps does not touch."""
    for order in ORDERS:
        kernels.scao_emulator_order(order)
        params, grads, state = case(r, l, k, torch.float32, basis)
        activity = torch.stack([torch.arange(3) + 7.0, torch.logspace(-3, -1, 3)], 1)
        experts = {"activity": activity} if order == 1 else {}
        assert errors_of(params, grads, state | experts, cautious=order != 2, ramp=True) <= 1


@pytest.mark.parametrize("k", [0, 2])
def test_more_matrices_than_one_launch_takes(kernels: ctypes.CDLL, k: int) -> None:
    """A launch is of so many matrices, and a step of so many launches, as the model of a GPU's launches says."""
    for size, times in ((launches.BATCH, 1), (launches.BATCH + 6, 2)):
        before = kernels.scao_emulator_launches()
        assert errors_of(*case(2, 4, k, torch.float32, torch.bfloat16, size)) <= 1
        made = kernels.scao_emulator_launches() - before
        assert made == times * launches.NATIVE["eigenbasis_step_" if k else "adamw_step_"]


@pytest.mark.parametrize("lr", [0.0, 1e-40])
def test_which_entries_agree_does_not_depend_on_the_rate(kernels: ctypes.CDLL, lr: float) -> None:
    """A schedule may reach zero, and a tiny rate times a step underflows; the share of the next step must not suffer."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert errors_of(*case(16, 70, 16, dtype, torch.bfloat16), lr=lr) <= 1


def test_a_tiny_residual_keeps_its_precision(kernels: ctypes.CDLL) -> None:
    """A gradient that lies in the kept directions to one part in a thousand: no difference of large sums is taken."""
    params, grads, state = case(16, 256, 16, torch.float32, torch.float32, size=2)
    for name in ("row", "col", "exp_avg", "level"):
        state[name].zero_()
    state["mask"].fill_(1)
    state["long_vectors"] = torch.linalg.qr(torch.randn(2, 256, 16))[0].mT.contiguous()
    exact = {name: value.double() for name, value in state.items()}
    made = [torch.randn(16, 16) @ basis + 1e-3 * torch.randn(16, 256) for basis in state["long_vectors"]]
    grads[0].copy_(made[0].mT)
    grads[1].copy_(made[1])
    step(params, grads, state)
    rotated = exact["vectors"].mT @ torch.stack(made).double()
    outside = rotated - rotated @ exact["long_vectors"].mT @ exact["long_vectors"]
    for name, expected in (("row", 0.01 * outside.square().mean(2, keepdim=True)), ("exp_avg", 0.1 * outside)):
        assert (state[name] - expected).abs().max() <= 1e-3 * expected.abs().max(), name


def test_any_strides_are_read_and_written(kernels: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    params = [torch.randn(40, 150)[3:19, 5:135] for _ in range(2)] + [torch.randn(150, 40)[5:135, 3:19]]
    params.append(torch.randn(32, 260)[::2, ::2])
    grads = [torch.randn(16, 130), torch.randn(1, 130).expand(16, 130), torch.randn(130, 16), torch.randn(130, 16).T]
    assert errors_of(params, grads, eigenbasis_state(4, 16, 130, 16)) <= 1


@pytest.mark.parametrize("name", ["vectors", "mask", "gain", "col", "long_vectors", "taken", "level", "agreement"])
def test_wrong_shapes_are_refused(kernels: ctypes.CDLL, name: str) -> None:
    params, grads, state = case(4, 12, 3, torch.float32, torch.bfloat16, size=2)
    state[name] = state[name][..., :-1].contiguous()
    with pytest.raises(RuntimeError, match=name):
        step(params, grads, state)


def test_opcheck(kernels: ctypes.CDLL) -> None:
    """The operations change what their schemas say and nothing else."""
    emulated, check = torch.ops.scao_emulated, torch.library.opcheck
    for k in (3, 0):
        params, grads, state = case(4, 12, k, torch.float32, torch.bfloat16)
        operation, more = (emulated.eigenbasis_step_, (True,)) if k else (emulated.adamw_step_, ())
        check(operation.default, (params, grads, [*state.values()], NUMBERS, *more), test_utils="test_schema")
    codes = torch.zeros(2, 128, dtype=torch.int8)
    average = (codes, torch.ones(2, 1), torch.randn(2, 9), torch.ones(2), 1)
    check(emulated.int8_ema_.default, average, test_utils="test_schema")
    check(ops.symmetric_eigh.default, (torch.eye(5).repeat(2, 1, 1),), test_utils="test_faketensor")


@pytest.mark.parametrize("rule", ["eigenbasis", "published"])
@pytest.mark.parametrize("int8", [False, True])
def test_the_optimizer_steps_the_same_by_kernels(
    kernels: ctypes.CDLL, rule: str, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both phases, ramp and refreshes, 16-bit weights that are rounded once, vectors."""

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        shapes = [(8, 70), (70, 8), (4, 40), (9,), (3, 2, 2)]
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        params += [torch.nn.Parameter(torch.randn(8, 70).bfloat16())]
        optimizer = SCAO(params, rule=rule, use_int8_ema=int8, warmup_steps=3, blend_steps=2, precond_freq=4)
        for _ in range(14):
            for param in params:
                param.grad = torch.randn_like(param)
            versions = [param._version for param in params]
            optimizer.step()
            assert all(param._version > version for param, version in zip(params, versions, strict=True))
        return [param.detach().float() for param in params]

    slow, used = run(), set()
    emulate(monkeypatch, lambda name, kernel: lambda *args: (used.add(name), kernel(*args))[1])
    fast = run()
    assert used == {"adamw_step_"} | (
        ({"int8_ema_"} if int8 else set()) if rule == "published" else set() if int8 else {"eigenbasis_step_"}
    )
    for a, b in zip(fast[:-1], slow, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-4 if int8 else 1e-4)
    assert (fast[-1] == slow[-1]).float().mean() > 0.9


def test_experts_that_are_idle_in_some_steps(kernels: ctypes.CDLL) -> None:
    """(X3)."""
    params, grads, state = case(4, 40, 4, torch.float32, torch.bfloat16, size=60)
    activity = torch.stack([torch.arange(60) % 7 + 1.0, torch.logspace(-4, -1, 60)], 1)
    assert errors_of(params, grads, state | {"activity": activity}) <= 1


def test_a_step_without_gradient_keeps_the_share_that_agreed(kernels: ctypes.CDLL) -> None:
    params, grads, state = case(8, 600, 8, torch.float32, torch.bfloat16)
    grads[1].zero_()
    before = state["agreement"].clone()
    step(params, grads, state)
    assert (state["agreement"] == before).tolist() == [False, True, False]


@pytest.mark.parametrize(("r", "k"), [(8, 8), (8, 0), (1, 0)])
def test_skipping_and_bounding(kernels: ctypes.CDLL, r: int, k: int) -> None:
    params, grads, state = case(r, 600, k, torch.float32, torch.bfloat16)
    grads[0].view(-1)[-1], grads[1].view(-1)[70] = float("inf"), float("nan")
    grads[2] *= 1e30
    before = [param.clone() for param in params]
    assert errors_of(params, grads, state) <= 1
    assert [torch.equal(a, b) for a, b in zip(params, before, strict=True)] == [True, True, False]


def int8(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = quantization.encode(values.flip(0), seed=8)
    torch.ops.scao_emulated.int8_ema_(codes, scales, values, weights, 9)
    return codes, scales


@pytest.mark.parametrize("numel", [1, 128, 300])
def test_int8_kernel_gives_the_codes_of_the_codec(kernels: ctypes.CDLL, numel: int) -> None:
    torch.manual_seed(numel)
    values, weights = torch.randn(4, numel), torch.tensor([1.0, 0.0, 0.3, 0.6])
    expected_codes, expected_scales = quantization.encode(values.flip(0), seed=8)
    quantization.ema_(expected_codes, expected_scales, values, weights, 9)
    for order in ORDERS:
        kernels.scao_emulator_order(order)
        codes, scales = int8(values, weights)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
        assert (codes.int() - expected_codes.int()).abs().max() <= 1
        assert torch.equal(codes[0], expected_codes[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (40,)])
def test_decay_and_step_are_rounded_once(
    kernels: ctypes.CDLL, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither path rounds the decayed weight before the step: both are the step in float32, then one rounding."""
    torch.manual_seed(0)
    start, grads = torch.randn(shape).to(dtype), [torch.randn(shape).to(dtype) for _ in range(30)]
    ends = []
    for native in (False, True):
        if native:
            emulate(monkeypatch)
        param = torch.nn.Parameter(start.clone())
        optimizer = SCAO([param], lr=2e-3, weight_decay=0.5, warmup_steps=10, blend_steps=10, precond_freq=10)
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        ends.append(param.detach())
    assert (ends[0] == ends[1]).float().mean() > 0.9


def test_ctrl_c_in_a_kernel_leaves_a_state_that_resumes(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python raises it once the kernel, which it cannot end, has taken the step."""
    ending = [False]

    def around(_: str, kernel: Any) -> Any:
        def call(*args: Any) -> None:
            kernel(*args)
            if ending[0]:
                raise KeyboardInterrupt

        return call

    def made() -> SCAO:
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 9), (7,))]
        return SCAO(params, warmup_steps=2, blend_steps=2, precond_freq=2, min_precond_updates=1)

    emulate(monkeypatch, around)
    optimizer = made()
    for step in range(16):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn_like(param)
        ending[0] = step % 2 == 0
        with pytest.raises(KeyboardInterrupt) if ending[0] else contextlib.nullcontext():
            optimizer.step()
        made().load_state_dict(optimizer.state_dict())
    assert optimizer.metrics()["scao/phase"] == 2


def test_the_check_of_a_gpu_record_calls_every_kernel_and_notices_a_wrong_one(
    kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SHAPES", (*((4, 20), (20, 4)) * 6, (300,)))
    monkeypatch.setattr(gpu, "SCENARIOS", gpu.SCENARIOS[::2])
    emulate(monkeypatch)
    found = gpu.kernels("cpu")
    assert found["passed"] and set(found["calls"]) == set(ops.KERNELS["cuda"]), found
    right = ops.eigenbasis_step_

    def wrong(params: Any, grads: Any, state: Any, *rest: Any) -> None:
        right(params, grads, state, *rest)
        state[2].mul_(1.001)

    monkeypatch.setattr(ops, "eigenbasis_step_", wrong)
    found = gpu.kernels("cpu")
    assert not found["passed"] and found["differences"]["eigenbasis_step_"] > 5e-4
    for entries in (2, 5):

        def tied(params: Any, grads: Any, state: Any, *rest: Any, entries: int = entries) -> None:
            right(params, grads, state, *rest)
            state[Eigenbasis.native_fields.index("agreement")].sub_(entries / state[2][0].numel())

        monkeypatch.setattr(ops, "eigenbasis_step_", tied)
        assert gpu.kernels("cpu")["passed"] == (entries == 2), "the sign of two entries may hang on rounding"
    monkeypatch.setitem(ops.KERNELS, "cpu", (*ops.KERNELS["cpu"], "int8_ema_new"))
    monkeypatch.setattr(ops, "int8_ema_new", lambda *_: None, raising=False)
    assert "int8_ema_new" in gpu.kernels("cpu")["never_called"]


def test_every_barrier_has_a_number_of_its_own() -> None:
    text = (CSRC / "kernels.cuh").read_text()
    assert sorted(int(number) for number in re.findall(r"SCAO_SYNC\((\d+)\);", text)) == list(BARRIERS)
    assert text.count("__syncthreads") == 1


def is_right() -> bool:
    """Of steps in both phases, the last matrix bounded, gradients not stored as the parameters are, and of int8."""
    for k in (40, 0):
        params, grads, state = case(33, 130, k, torch.float32, torch.bfloat16, size=2)
        grads = [grads[0].mT.contiguous().mT, (1e30 * grads[1]).mT.contiguous().mT]
        if errors_of(params, grads, state) > 1:
            return False
    torch.manual_seed(0)
    values, weights = torch.randn(3, 300), torch.ones(3)
    return torch.equal(int8(values, weights)[0], quantization.encode(values, seed=9)[0])


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_removed_barrier_is_noticed(kernels: ctypes.CDLL, barrier: int) -> None:
    kernels.scao_emulator_drop(barrier)
    try:
        for order in ORDERS:
            kernels.scao_emulator_order(order)
            try:
                if not is_right():
                    return
            except RuntimeError as error:  # some threads alone have come to a barrier
                assert "a launch failed with CUDA error" in str(error)
                return
        pytest.fail("no result has changed")
    finally:
        kernels.scao_emulator_drop(0)


#: r = 5 has warps that are in two branches of `project` at once; r = 33 and k = 40 have rows that warps share.
@pytest.mark.parametrize(("r", "k"), [(2, 1), (5, 3), (8, 8), (12, 20), (16, 16), (33, 40), (64, 64)])
@pytest.mark.parametrize("tall", [False, True])
def test_two_threads_at_most_ask_a_bank_for_two_words(r: int, k: int, tall: bool) -> None:
    for name, launch in occupancy.measured(r, k, tall).items():
        assert launch.worst <= 2, name


def test_the_table_of_resident_warps_is_what_the_kernels_take() -> None:
    made = occupancy.table()
    page = occupancy.PAGE.read_text(encoding="utf-8")
    assert tables.fill(page, {"occupancy": made}) == page, "run `python examples/benchmarks/occupancy.py --write`"
    rows = {row[0]: row for row in (line.strip("| ").split(" | ") for line in made.splitlines()[2:])}
    assert int(rows["16"][3].split()[0]) >= 16, "on a T4, whose multiprocessors hold 32"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_no_kernel_takes_more_registers_than_the_table_says() -> None:
    found = occupancy.registers("75")
    assert set(found) == {kernel for step in occupancy.STEPS.values() for kernel in step} | {"int8_ema"}
    assert max(found.values()) <= occupancy.REGISTERS["75"], found


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("kernels.cuh", "r * odd(k) + 2 * r + k : tile", "r * odd(k) + r : tile"),
        ("launch.cu", "const dim3 blocks(state.chunks, count)", "const dim3 blocks(state.chunks - 1, count)"),
    ],
)
def test_wrong_sizes_of_a_launch_are_noticed(tmp_path: Path, file: str, old: str, new: str) -> None:
    """Too little shared memory; a grid that is too small. In a process of its own, as an operation is registered once."""
    source = shutil.copytree(CSRC, tmp_path / "csrc")
    text = (source / file).read_text()
    assert text.count(old) == 1
    (source / file).write_text(text.replace(old, new))
    code = BROKEN.format(tests=str(Path(__file__).parent), folder=str(tmp_path), source=str(source))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0, run.stdout
    # What the last chunk's sums should have been is whatever lay in that memory: the weights differ by anything up to inf.
    assert re.search(r"a launch failed with CUDA error 2|AssertionError: (inf|nan|\d)", run.stderr), run.stderr[-2000:]


BROKEN = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
import torch, test_emulator as t
t.occupancy.build(Path({folder!r}), source=Path({source!r}))
torch.use_deterministic_algorithms(True)
error = t.errors_of(*t.case(16, 600, 16, torch.float32, torch.bfloat16))
assert error <= 1, error
"""

SANITIZED = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
import torch, test_emulator as t
t.occupancy.build(Path({folder!r}), "-fsanitize=address")
for k in (3, 0):
    params, grads, state = t.case(5, 530, k, torch.float32, torch.bfloat16)
    t.step(params, grads, state)
t.int8(torch.randn(3, 300), torch.ones(3))
print("clean", flush=True)
if {break_it}:
    state["factor"].untyped_storage().resize_(4)
    t.step(params, grads, state)
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
