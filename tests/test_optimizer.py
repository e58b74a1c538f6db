"""What torch.optim users rely on, and what a training run throws at an optimizer."""

from __future__ import annotations

import ast
import copy
import itertools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scao_hf import SCAO, create_scao_optimizer, ops, options, stacks
from scao_hf.blocks import Packing
from scao_hf.rules import eigenbasis, rule_of
from scao_hf.stacks import build_buckets

QUICK: dict[str, Any] = {"warmup_steps": 3, "blend_steps": 2, "precond_freq": 2, "min_precond_updates": 1, "k_max": 4}
RULES = pytest.mark.parametrize("rule", options.MATRIX_RULES)


def fresh(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def steps(optimizer: SCAO, count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float32).to(param.dtype)
        optimizer.step()


@RULES
def test_it_learns(rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    # Steps of the orthogonal rule are small on matrices as small as these (O4).
    optimizer = SCAO(model.parameters(), lr=0.1 if rule == "orthogonal" else 0.03, rule=rule, **QUICK)
    inputs = torch.randn(64, 12)
    targets = torch.tanh(inputs @ torch.randn(12, 3))
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert optimizer.metrics()["scao/phase"] == 2


@RULES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_every_shape_and_dtype_trains(rule: str, dtype: torch.dtype) -> None:
    shapes = [
        (),
        (1,),
        (7,),
        (0,),
        (0, 4),
        (1, 9),
        (9, 1),
        (2, 2),
        (3, 50),
        (50, 3),
        (5, 3, 2),
        (4, 3, 2, 2),
        (2, 2, 2, 2, 2),
    ]
    params = fresh(*shapes, dtype=dtype)
    before = [param.detach().clone() for param in params]
    optimizer = SCAO(params, lr=0.1, rule=rule, **QUICK)
    steps(optimizer, 8)
    for param, old in zip(params, before, strict=True):
        assert torch.isfinite(torch.view_as_real(param) if param.is_complex() else param).all()
        assert param.numel() == 0 or not torch.equal(param, old)


@RULES
def test_layouts_make_no_difference(rule: str) -> None:
    grid = torch.randn(6, 10)
    conv = torch.randn(4, 3, 2, 2)
    plain = [nn.Parameter(grid.clone()), nn.Parameter(conv.clone())]
    strided = [
        nn.Parameter(torch.empty(10, 6).t().copy_(grid)),
        nn.Parameter(conv.clone().contiguous(memory_format=torch.channels_last)),
    ]
    for params in (plain, strided):
        steps(SCAO(params, lr=0.1, rule=rule, **QUICK), 8)
    for a, b in zip(plain, strided, strict=True):
        torch.testing.assert_close(a, b)


@RULES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gradient_leaves_its_matrix_alone(rule: str, value: float) -> None:
    params = fresh((4, 9), (4, 9), (5,))
    optimizer = SCAO(params, lr=0.1, rule=rule, **QUICK)
    steps(optimizer, 6 if rule == "eigenbasis" else 5)
    kept = {name: v.clone() for name, v in optimizer.state[params[0]].items() if isinstance(v, torch.Tensor)}
    weights = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    assert params[0].grad is not None
    params[0].grad[1, 2] = value
    optimizer.step()  # the first matrix is to be refreshed in this step
    assert torch.equal(params[0], weights[0])
    for name, tensor in kept.items():
        assert torch.equal(optimizer.state[params[0]][name], tensor), name
    assert not torch.equal(params[1], weights[1]) and not torch.equal(params[2], weights[2])
    assert optimizer.metrics()["scao/skipped"] == 1
    steps(optimizer, 4, first=7)
    assert not torch.equal(params[0], weights[0])


def test_a_non_finite_gradient_can_be_an_error_that_changes_nothing() -> None:
    params = fresh((4, 9), (5,))
    optimizer = SCAO(params, on_nonfinite="raise")
    for param in params:
        param.grad = torch.ones_like(param)
    assert params[1].grad is not None
    params[1].grad[0] = float("nan")
    weights = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match="holds NaN or Inf"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, weights, strict=True))


@pytest.mark.parametrize("logged", [False, True])  # statistics() has the stacks built again
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # the latter natively where there are kernels
def test_ten_non_finite_gradients_in_a_row_are_an_error(dtype: torch.dtype, logged: bool) -> None:
    params = fresh((4, 9), (4, 9), (5,), dtype=dtype)
    optimizer = SCAO([("sound", params[0]), ("broken", params[1]), ("bias", params[2])], lr=0.1, **QUICK)
    steps(optimizer, 5)
    held, skipped = params[1].detach().clone(), 0
    for _ in range(20):
        for param in params:
            param.grad = torch.ones_like(param)
        assert params[1].grad is not None
        params[1].grad[1, 2] = float("nan")
        before = params[0].detach().clone()
        if logged:
            optimizer.statistics()
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "the parameter 'broken' of shape (4, 9) has had a gradient with NaN or Inf in at least 10" in str(
                error
            )
            assert torch.equal(params[0], before)
            break
        skipped += 1
    assert 10 <= skipped < 20 and torch.equal(params[1], held)
    steps(optimizer, 25)  # all is well again
    assert not torch.equal(params[1], held)


@pytest.mark.parametrize("first", range(2))
def test_parameters_in_turn_are_watched_too(first: int) -> None:
    params = fresh((4, 9), (6, 5))
    optimizer = SCAO(params, lr=0.1, **QUICK)
    with pytest.raises(RuntimeError, match=r"of shape \(6, 5\) has had a gradient with NaN or Inf in at least 10"):
        for step in range(first, 100):
            params[0].grad = torch.ones_like(params[0]) if step % 2 else None
            params[1].grad = None if step % 2 else torch.full_like(params[1], float("nan"))
            optimizer.step()


def test_nine_non_finite_gradients_in_a_row_and_again_are_none() -> None:
    params = fresh((4, 9), (5,))
    optimizer = SCAO(params, lr=0.1, **QUICK)
    for step in range(60):
        for param in params:
            param.grad = torch.full_like(param, 1.0 if step % 10 == 9 else float("nan"))
        optimizer.step()
    assert optimizer.state[params[0]]["taken"] == 6


@RULES
@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e25, 3e38])
def test_gradients_of_any_scale_give_finite_steps_downhill(rule: str, scale: float) -> None:
    params = fresh((4, 9), (9, 4), (7,))
    optimizer = SCAO(params, lr=0.1, weight_decay=0.0, rule=rule, **QUICK)
    for _ in range(9):
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.full_like(param, scale) * torch.linspace(0.5, 1, param.numel()).view(param.shape)
        optimizer.step()
        for param, old in zip(params, before, strict=True):
            assert torch.isfinite(param).all()
            assert (param - old).mean() <= 0


@RULES
def test_none_gradients_freezing_and_new_groups(rule: str) -> None:
    params = fresh((4, 9), (4, 9), (9, 4))
    optimizer = SCAO(params[:2], lr=0.1, rule=rule, **QUICK)
    optimizer.step()
    assert not optimizer.state
    steps(optimizer, 6)
    idle = params[1].detach().clone()
    frozen = {name: v.clone() for name, v in optimizer.state[params[1]].items() if isinstance(v, torch.Tensor)}
    for step in range(6, 9):
        params[0].grad = torch.randn(4, 9, generator=torch.Generator().manual_seed(step))
        params[1].grad = None
        optimizer.step()
    assert torch.equal(params[1], idle)
    assert all(torch.equal(optimizer.state[params[1]][name], value) for name, value in frozen.items())
    optimizer.add_param_group({"params": [params[2]], "lr": 0.01})
    steps(optimizer, 6, first=9)
    assert [optimizer.state[param]["step"] for param in params] == [15, 12, 6]
    assert len(optimizer.statistics()) == 3


@RULES
def test_stacking_makes_no_difference(rule: str) -> None:
    together, alone = (
        fresh((4, 9), (4, 9), (9, 4), dtype=torch.float64),
        fresh((4, 9), (4, 9), (9, 4), dtype=torch.float64),
    )
    # A refresh of every matrix in every step: otherwise matrices that are stepped together take turns.
    settings = {**QUICK, "precond_freq": 1}
    optimizer = SCAO(together, lr=0.1, rule=rule, **settings)
    steps(optimizer, 12)
    separate = [SCAO([param], lr=0.1, rule=rule, **settings) for param in alone]
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        for param, single in zip(alone, separate, strict=True):
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float32).double()
            single.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("period", [1, 3, 4, 10, 50])
def test_matrices_take_turns_and_every_step_refreshes_as_much(period: int) -> None:
    """(S1) Seen from outside: the step in which a matrix's basis changes."""
    shapes = [(3, 8), (8, 3), (5,), (4, 6), (3, 8)] * 4 + [(2, 12)] * 6
    params = fresh(*shapes)
    optimizer = SCAO(params, warmup_steps=2, precond_freq=period, min_precond_updates=1, k_max=2)
    steps(optimizer, max(2, period))
    matrices = [param for param in params if param.ndim == 2]
    times: list[list[int]] = [[] for _ in matrices]
    entries, counts = [0] * (3 * period), [0] * (3 * period)
    for since in range(1, 3 * period + 1):
        before = [optimizer.state[param]["long_values"].clone() for param in matrices]
        for param in params[1:]:  # the first one is left out: that must not move the others' turns
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(since))
        params[0].grad = None
        optimizer.step()
        for index, (param, old) in enumerate(zip(matrices, before, strict=True)):
            if not torch.equal(optimizer.state[param]["long_values"], old):
                times[index].append(since)
                entries[since - 1] += param.numel()
                counts[since - 1] += 1
    assert times[0] == []
    for rows in times[1:]:
        assert rows == [rows[0], rows[0] + period, rows[0] + 2 * period] and rows[0] <= period
    total, largest = sum(param.numel() for param in matrices), 24
    assert all(abs(found - total / period) < 2 * largest for found in entries)
    assert max(counts) - min(counts) <= 2


def test_turns_are_even_on_a_large_model() -> None:
    """(S1) The LoRA factors of 36 layers, r = 16: entries in each slot, whole stacks covered, runs that do not overlap."""
    sides = {"q": (2048, 2048), "k": (2048, 256), "gate": (2048, 11008), "down": (11008, 2048)}
    shapes = [shape for _ in range(36) for l, m in sides.values() for shape in ((16, l), (m, 16))]
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer = SCAO(params, precond_freq=10)
    buckets = build_buckets(optimizer.param_groups, {}, lambda param: True)
    assert len(buckets) == 3
    total, refreshed = sum(param.numel() for param in params), []
    for step in range(30, 40):
        rows = [range(*bucket.due(step).indices(len(bucket.members))) for bucket in buckets]
        refreshed.append(
            sum(len(run) * bucket.shape[0] * bucket.shape[1] for run, bucket in zip(rows, buckets, strict=True))
        )
    assert sum(refreshed) == total
    assert max(abs(entries - total / 10) for entries in refreshed) <= 16 * 11008


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # the latter natively where there are kernels
def test_cautious_steps_leave_out_what_the_gradient_disagrees_with(dtype: torch.dtype) -> None:
    """(U16)."""
    moved: list[torch.Tensor] = []
    shares: list[float] = []
    for cautious in (True, False):
        (param,) = fresh((4, 30), dtype=dtype)
        optimizer = SCAO([param], lr=0.1, weight_decay=0.0, cautious=cautious, **QUICK)
        for step in range(9):
            param.grad = torch.randn(4, 30, generator=torch.Generator().manual_seed(step), dtype=torch.float32).to(
                dtype
            )
            if step == 8 and cautious:
                shares.append(float(optimizer.state[param]["agreement"]))
            before = param.detach().clone()
            optimizer.step()
        assert param.grad is not None
        moved.append(before - param.detach())
        shares.append(float(optimizer.state[param]["agreement"]))
    agrees = moved[1] * param.grad > 0
    assert 0.2 < agrees.double().mean() < 1
    torch.testing.assert_close(moved[0], moved[1] * agrees / max(shares[0], 0.5), rtol=1e-4, atol=1e-7)
    assert shares[1] == pytest.approx(agrees.double().mean().item(), abs=0.02) and shares[2] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gradient_of_zeros_leaves_the_share_that_agreed(dtype: torch.dtype) -> None:
    (param,) = fresh((4, 30), dtype=dtype)
    optimizer = SCAO([param], lr=0.1, weight_decay=0.0, **QUICK)
    steps(optimizer, 8)
    held, share = param.detach().clone(), optimizer.state[param]["agreement"].clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, held) and optimizer.state[param]["agreement"] == share
    steps(optimizer, 1, first=8)
    assert 0.01 < (param.detach() - held).abs().max() < 1


def test_the_published_rule_is_not_cautious() -> None:
    with pytest.raises(ValueError, match="cautious=True"):
        SCAO(fresh((4, 9)), rule="published", cautious=True)


def test_tensor_lr_closure_and_scheduler_act_as_in_torch() -> None:
    plain, tensor = fresh((4, 9)), fresh((4, 9))
    lr = torch.tensor(0.1)
    first, second = SCAO(plain, lr=0.1, **QUICK), SCAO(tensor, lr=lr, **QUICK)
    steps(first, 6)
    steps(second, 6)
    torch.testing.assert_close(plain[0], tensor[0])
    lr.zero_()
    held = tensor[0].detach().clone()
    steps(second, 1, first=6)
    assert torch.equal(tensor[0], held)

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        first.zero_grad()
        loss = plain[0].square().sum()
        loss.backward()
        return loss

    expected = plain[0].detach().square().sum()
    assert first.step(closure) == expected
    cycle = torch.optim.lr_scheduler.OneCycleLR(first, max_lr=0.1, total_steps=10)
    betas = first.param_groups[0]["betas"]
    steps(first, 1)
    cycle.step()
    assert first.param_groups[0]["betas"] != betas
    steps(first, 2)


def test_a_schedule_that_ends_below_zero_by_rounding_ends_no_run_and_no_resume() -> None:
    params = fresh((4, 9))
    optimizer = SCAO(params, lr=1e-3, **QUICK)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0.0, total_iters=10)
    for step in range(10):
        steps(optimizer, 1, first=step)
        schedule.step()
    assert -1e-18 < optimizer.param_groups[0]["lr"] < 0
    steps(optimizer, 1, first=10)
    resumed = SCAO(params, lr=1e-3, **QUICK)
    resumed.load_state_dict(optimizer.state_dict())
    steps(resumed, 1, first=11)
    assert resumed.state[params[0]]["step"] == 12


def test_gradients_and_the_global_generator_are_left_alone() -> None:
    params = fresh((4, 9))
    optimizer = SCAO(params, use_int8_ema=True, **QUICK)
    before = torch.get_rng_state()
    params[0].grad = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    grad = params[0].grad.clone()
    for _ in range(7):
        optimizer.step()
    assert torch.equal(params[0].grad, grad)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sparse_gradient_is_a_clear_error() -> None:
    embedding = nn.Embedding(5, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    dense = fresh((4, 9))
    dense[0].grad = torch.ones(4, 9)
    optimizer = SCAO([*dense, *embedding.parameters()])
    with pytest.raises(RuntimeError, match="SparseAdam"):
        optimizer.step()
    assert not optimizer.state


def test_a_gradient_that_becomes_sparse_is_the_same_error_and_changes_nothing() -> None:
    params = fresh((4, 9), (5,))
    optimizer = SCAO(params, **QUICK)
    steps(optimizer, 2)
    before = [param.detach().clone() for param in params]
    params[1].grad = torch.ones(5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert [optimizer.state[param]["step"] for param in params] == [2, 2]
    steps(optimizer, 2, first=2)
    assert [optimizer.state[param]["step"] for param in params] == [4, 4]


def test_gradients_that_autograd_leaves_conjugated() -> None:
    weight, plain = fresh((3, 4), (3, 4), dtype=torch.complex64)
    with torch.no_grad():
        plain.copy_(weight)
    optimizers = SCAO([weight], lr=0.1), SCAO([plain], lr=0.1)
    for _ in range(3):
        weight.grad = None
        (weight.conj() * torch.full((3, 4), 1 + 2j)).sum().abs().backward()
        assert weight.grad is not None and weight.grad.is_conj()
        plain.grad = weight.grad.resolve_conj()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(weight, plain)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    params, (other, flattened) = fresh((4, 9)), fresh((4, 9), (7,))
    optimizer = SCAO(params, **QUICK)
    flattened._fsdp_flattened = True  # type: ignore[attr-defined]
    for bad in ([other, other], [other, flattened]):
        with pytest.raises(ValueError, match=r"twice in a parameter group|FSDP1"):
            optimizer.add_param_group({"params": bad})
    # Of a group that becomes two, the second one is refused.
    with pytest.raises(ValueError, match="FSDP1"):
        optimizer.add_param_group({"params": [other, flattened], "experts": {flattened: Packing("A", 1)}})
    optimizer.add_param_group({"params": [other]})
    assert len(optimizer.param_groups) == len(optimizer._had_matrices) == 2
    steps(optimizer, 6)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_given_twice_is_a_clear_error() -> None:
    """As tied weights are in a list put together by hand; torch warns, and steps them twice."""
    (param,) = fresh((4, 9))
    with pytest.raises(
        ValueError, match=r"the parameter of shape \(4, 9\) is twice in a parameter group: pass it once"
    ):
        SCAO([param, param])
    with pytest.raises(ValueError, match=r"the parameter 'embed' of shape \(4, 9\) is twice"):
        SCAO([("embed", param), ("head", param)])


def test_parameters_and_groups_can_be_taken_out() -> None:
    matrix, vector, other = fresh((4, 9), (5,), (7,))
    optimizer = SCAO([{"params": [matrix, vector]}, {"params": [other]}], **QUICK)
    steps(optimizer, 2)
    optimizer.param_groups[0]["params"].pop(0)
    steps(optimizer, 2)
    optimizer.param_groups.pop(0)
    steps(optimizer, 2)
    assert [optimizer.state[param]["step"] for param in (matrix, vector, other)] == [2, 4, 6]


def test_a_plan_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    build = SCAO._stack
    monkeypatch.setattr(SCAO, "_stack", lambda *args: made.append(1) or build(*args))
    steps(SCAO(fresh((4, 9), (9, 4), (5,)), **QUICK), 12)
    assert len(made) == 1


def test_a_failed_decomposition_keeps_the_last_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in options.MATRIX_RULES:
        params = fresh((4, 9))
        optimizer = SCAO(params, lr=0.1, rule=rule, **QUICK)
        steps(optimizer, 5)
        with monkeypatch.context() as patch:

            def failing(_: torch.Tensor) -> None:
                raise torch.linalg.LinAlgError("no convergence")

            patch.setattr(torch.linalg, "eigh", failing)
            patch.setattr(ops, "NATIVE", frozenset())
            steps(optimizer, 4, first=5)
        steps(optimizer, 4, first=9)
        assert torch.isfinite(params[0]).all()


class Breaking(TorchDispatchMode):
    """Raises ``error`` in place of the operation of that number."""

    def __init__(self, number: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = number, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.left -= 1
            if self.left == 0:
                raise self.error
        return func(*args, **(kwargs or {}))


#: What a solver of another device, a full device, a backend without an operation and a user raise.
ERRORS = (
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
    torch.AcceleratorError("HIP error: out of memory") if hasattr(torch, "AcceleratorError") else RuntimeError("HIP"),
    NotImplementedError(
        "The operator 'aten::_linalg_eigh.eigenvalues' is not currently implemented for the MPS device"
    ),
    MemoryError(),
    KeyboardInterrupt(),
)


@pytest.mark.parametrize(
    ("where", "device", "chosen"),
    [
        ("_enter", "another", {"moment_dtype": "int8"}),
        ("_refresh", "another", {}),
        ("_refresh", "cpu", {"use_int8_ema": True, "moment_dtype": "bfloat16"}),
        ("_refresh", "cpu", {"rule": "published"}),
        ("_refresh", "cpu", {"rule": "published", "use_int8_ema": True, "moment_dtype": "int8"}),
    ],
)
def test_what_ends_a_refresh_at_any_of_its_operations_leaves_the_state_whole(
    where: str, device: str, chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and state are those of a step without a refresh to the bit, can be resumed, and the next steps are taken."""
    monkeypatch.setattr(ops, "NATIVE", frozenset())
    on_cpu = eigenbasis.refresh_bases

    def on_host(*args: Any) -> Any:
        with mock.patch.object(eigenbasis, "refresh_bases", on_cpu):
            return eigenbasis.refresh_bases_on_host(*args)

    if device == "another":
        monkeypatch.setattr(eigenbasis, "refresh_bases", on_host)
    before = 2 if where == "_enter" else 3
    options = {"rule": "eigenbasis", "lr": 0.1, **QUICK, **chosen}
    optimizer = SCAO(fresh((4, 9), (9, 4)), **options)
    rule = type(rule_of(optimizer.param_groups[0], True))
    steps(optimizer, before)

    def stepped(number: int, error: BaseException, ended: bool = True) -> tuple[SCAO, bool]:
        """A copy's next step, in which that operation of the refresh raises; whether it did."""
        copied = copy.deepcopy(optimizer)
        mode, refreshed = Breaking(number, error), getattr(rule, where)

        def watched(*args: Any) -> None:
            with mode:
                if ended:
                    refreshed(*args)

        with monkeypatch.context() as patch:
            patch.setattr(rule, where, watched)
            try:
                steps(copied, 1, first=before)
            except type(error) as raised:
                assert raised is error
                return copied, True
        return copied, False

    without, _ = stepped(-1, MemoryError(), ended=False)
    expected = [{**state, "weights": param} for param, state in without.state.items()]
    for state, earlier in zip(expected, optimizer.state.values(), strict=True):
        if where == "_enter":  # the last step of phase 1 is taken once more; encoded moments are those before it
            state |= {name: earlier[name] for name in earlier if name.endswith(("step", "taken", "codes", "scales"))}
    for number in itertools.count(1):
        broken, raised = stepped(number, ERRORS[number % len(ERRORS)])
        if not raised:
            break
        for (param, state), wanted in zip(broken.state.items(), expected, strict=True):
            found = {**state, "weights": param}
            different = [name for name in wanted if not torch.equal(*map(torch.as_tensor, (found[name], wanted[name])))]
            assert found.keys() == wanted.keys() and not different, (number, different)
        if number % 10 == 0:
            SCAO(fresh((4, 9), (9, 4)), **options).load_state_dict(broken.state_dict())
            steps(broken, 4, first=before + 1)
            assert all(torch.isfinite(param).all() for param in broken.param_groups[0]["params"])
    assert number > 50


@pytest.mark.parametrize(
    ("before", "owner", "function", "stride"),
    [(0, stacks, "build_buckets", 1), (2, eigenbasis.Eigenbasis, "step", 7)],
    ids=["new state", "last of phase 1"],
)
def test_what_ends_a_step_at_any_of_its_operations_leaves_a_state_that_resumes(
    before: int, owner: Any, function: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "NATIVE", frozenset())
    optimizer, whole = SCAO(fresh((4, 9)), **QUICK), getattr(owner, function)
    steps(optimizer, before)
    for number in itertools.count(1, stride):
        broken = copy.deepcopy(optimizer)
        with monkeypatch.context() as patch:
            mode = Breaking(number, KeyboardInterrupt())
            patch.setattr(owner, function, lambda *args, mode=mode: within(mode, whole, *args))
            try:
                steps(broken, 1, first=before)
                break
            except KeyboardInterrupt:
                pass
        SCAO(fresh((4, 9)), **QUICK).load_state_dict(broken.state_dict())
        steps(broken, 2, first=before)
        assert broken.param_groups[0]["params"][0].isfinite().all(), number
    assert number > 10


def within(mode: Breaking, function: Any, *args: Any) -> Any:
    with mode:
        return function(*args)


def test_a_decomposition_that_never_worked_leaves_adam_s_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(ops, "NATIVE", frozenset())
    for rule in ("eigenbasis", "published"):
        params = fresh((4, 9))
        before = params[0].detach().clone()
        optimizer = SCAO(params, lr=0.1, weight_decay=0.0, rule=rule, **QUICK)
        for _ in range(9):
            params[0].grad = torch.full((4, 9), 0.5)
            optimizer.step()
        assert torch.isfinite(params[0]).all()
        torch.testing.assert_close(before - params[0].detach(), torch.full((4, 9), 0.9), rtol=0.05, atol=0)


def test_named_parameters_and_statistics() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 8))
    optimizer = create_scao_optimizer(model, lr=0.1, weight_decay=0.05, **QUICK)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "2.weight"]
    steps(optimizer, 8)
    rows = optimizer.statistics()
    assert [row["name"] for row in rows] == ["0.weight", "2.weight"]
    assert all(row["phase"] == 2 and row["rank"] >= 1 and 0 < row["captured_mass"] <= 1 for row in rows)
    steps(optimizer, 1, first=8)


def test_metrics_before_and_after() -> None:
    params = fresh((4, 9))
    optimizer = SCAO(params, **QUICK)
    figures = ("phase", "blend", "rank", "captured_mass", "curvature_norm", "damped", "skipped")
    names = [f"scao/{figure}" for figure in figures]
    assert optimizer.metrics() == dict.fromkeys(names, 0.0)
    steps(optimizer, 1)
    assert optimizer.metrics()["scao/phase"] == 1
    steps(optimizer, 6, first=1)
    metrics = optimizer.metrics()
    assert metrics["scao/phase"] == 2 and metrics["scao/blend"] == 1 and 1 <= metrics["scao/rank"] <= 4
    assert all(type(value) is float for value in metrics.values())


def test_a_matrix_at_the_bound_of_its_step_counts_as_damped() -> None:
    params = fresh((4, 9), (4, 9))
    optimizer = SCAO(params, **QUICK)
    steps(optimizer, 8)
    for gain, damped in ((2.0, 1), (0.5, 1), (1.9, 0)):
        for param, value in zip(params, (gain, 1.0), strict=True):
            optimizer.state[param]["gain"].fill_(value)
        assert [row["damped"] for row in optimizer.statistics()] == [damped, 0]
        assert optimizer.metrics()["scao/damped"] == damped / 2


def test_nothing_trainable_is_a_clear_error() -> None:
    model = nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        create_scao_optimizer(model)


@pytest.mark.parametrize("make", [SCAO, lambda model: SCAO([{"params": model}])])
def test_a_model_in_the_place_of_parameters_is_a_clear_error(make: Any) -> None:
    for model in (nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))):
        with pytest.raises(TypeError, match=r"SCAO was given a \w+: pass model.parameters\(\)"):
            make(model)
    SCAO(nn.ParameterList([nn.Parameter(torch.ones(3, 3))]))


def test_an_optimizer_of_frozen_parameters_says_so_at_its_first_step() -> None:
    model = nn.Linear(3, 3).requires_grad_(False)
    optimizer = SCAO(model.parameters())
    with pytest.warns(RuntimeWarning, match="none of the 2 parameters of this optimizer requires a gradient"):
        optimizer.step()
    model.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(optimizer, 3)


def test_ten_steps_without_any_gradient_are_a_warning_and_nine_are_none() -> None:
    (param,) = fresh((4, 9))
    optimizer = SCAO([param])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for _ in range(9):
                param.grad = None
                optimizer.step()
            steps(optimizer, 1)
    param.grad = None
    with pytest.warns(RuntimeWarning, match="has had a gradient in 10 steps") as caught:
        for _ in range(30):
            optimizer.step()
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("shapes", "warned"), [([(1, 40), (40, 1), (5,)], True), ([(1, 40), (4, 9)], False), ([(40,), (3, 3, 3)], False)]
)
def test_a_rank_of_one_is_said_to_be_adamw(shapes: list[tuple[int, ...]], warned: bool) -> None:
    named = [(f"p{index}", param) for index, param in enumerate(fresh(*shapes))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SCAO([{"params": named}, {"params": [("embedding", fresh((9, 4))[0])], "rule": "adamw"}])
    assert [("'p0' of shape (1, 40) is one of 2 with a side" in str(each.message)) for each in caught] == [
        True
    ] * warned


def test_a_compiled_step_is_the_same_step_and_compiles_nothing() -> None:
    from torch._dynamo.utils import counters

    plain, compiled = fresh((4, 9), (9, 4), (5,)), fresh((4, 9), (9, 4), (5,))
    reference, optimizer = SCAO(plain, lr=0.1, **QUICK), SCAO(compiled, lr=0.1, **QUICK)
    steps(reference, 12)
    torch._dynamo.reset()
    counters.clear()
    optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    steps(optimizer, 12)
    frames = counters["frames"]["total"]
    for step in range(12, 24):  # a schedule sets another learning rate before every step
        for each in (reference, optimizer):
            each.param_groups[0]["lr"] = 0.1 / (step - 10)
            steps(each, 1, first=step)
    assert counters["frames"]["total"] == frames
    for a, b in zip(plain, compiled, strict=True):
        assert torch.equal(a, b)
    assert counters["stats"]["unique_graphs"] == 0 and counters["frames"]["total"] < 20


def test_the_groups_are_told_in_full() -> None:
    wide, tall, bias, frozen, large = fresh((4, 9), (9, 4), (5,), (6, 6), (80, 80))
    frozen.requires_grad_(False)
    head = {"params": [bias], "weight_decay": 0.0, "lr": torch.tensor(0.002)}
    optimizer = SCAO([{"params": [wide, tall, frozen, large]}, head], lr=0.01)
    assert optimizer.describe().splitlines() == [
        "group 0: 2 parameters (72 entries) by eigenbasis, lr 0.01, weight decay 0.01",
        "group 0: 1 parameter (36 entries) frozen",
        "group 0: 1 parameter (6,400 entries) by auto, lr 0.01, weight decay 0.01",
        "group 1: 1 parameter (5 entries) by adamw, lr 0.002, weight decay 0",
    ]
    optimizer.look_at_weights()
    assert "1 parameter (6,400 entries) by orthogonal" in optimizer.describe()


@pytest.mark.parametrize("rule", ["eigenbasis", "published"])
@pytest.mark.parametrize(("lr", "decay", "gradient"), [(1e-3, 0.1, 0.0), (1e-4, 0.0, 1.0), (1e-4, 1.0, 1.0)])
def test_bfloat16_weights_lose_neither_small_steps_nor_decay(
    rule: str, lr: float, decay: float, gradient: float
) -> None:
    """Each step is below half the distance of two bfloat16 numbers at 1. On average weights go where those in float32 do."""
    shapes = (8, 96), (96, 8), (300,), (3, 5, 20)
    exact, lost, kept = (
        [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
        for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    optimizers = [
        SCAO(
            params, lr=lr, weight_decay=decay, rule=rule, stochastic_rounding=rounding, cautious=False, warmup_steps=10
        )
        for params, rounding in ((exact, True), (lost, False), (kept, True))
    ]
    for _ in range(60):
        for optimizer in optimizers:
            for param in optimizer.param_groups[0]["params"]:
                param.grad = torch.full_like(param, gradient)
            optimizer.step()
    for one, two, three in zip(exact, lost, kept, strict=True):
        moved = 1 - float(one.detach().mean())
        assert moved > 1e-3 and torch.equal(two, torch.ones_like(two))
        # A weight is at one of two or three neighbours: five deviations of the mean.
        bound = 5 * 2**-8 * (three.numel() * 0.5) ** 0.5 / three.numel() + 1e-5
        assert abs(1 - float(three.detach().double().mean()) - moved) < bound, (tuple(one.shape), moved)


def test_stochastic_rounding_skips_and_resumes_to_the_bit() -> None:
    first, second = (fresh((8, 96), (96, 8), dtype=torch.bfloat16) for _ in range(2))
    one, two = (SCAO(params, lr=1e-3, stochastic_rounding=True, **QUICK) for params in (first, second))
    steps(one, 6)
    steps(two, 6)
    before = first[0].detach().clone()
    first[0].grad, first[1].grad = torch.full_like(first[0], torch.nan), torch.ones_like(first[1])
    state = copy.deepcopy(one.state_dict())
    one.step()
    assert torch.equal(first[0], before)
    two.load_state_dict(state)
    second[0].grad, second[1].grad = first[0].grad, first[1].grad
    two.step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@RULES
def test_a_step_inside_autocast_is_the_same_step(rule: str) -> None:
    plain, lowered = fresh((4, 9)), fresh((4, 9))
    steps(SCAO(plain, lr=0.1, rule=rule, **QUICK), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps(SCAO(lowered, lr=0.1, rule=rule, **QUICK), 8)
    assert torch.equal(plain[0], lowered[0])


ROOT = Path(__file__).parent.parent
#: Which modules of scao_hf each one may import; a name not listed may import none of them.
ARROWS = {
    "__init__": {"optimizer", "trainer", "ops"},
    "__main__": {"tools"},
    "blocks": set(),
    "checkpoint": {"distributed", "experts", "integrity", "names", "options", "rules"},
    "checks": {"experts", "optimizer", "rules", "zero"},
    "distributed": {"distributed", "blocks", "integrity", "names", "rules"},
    "experts": {"blocks", "names"},
    "initial": {"distributed"},
    "integrity": set(),
    "moe": {"moe", "blocks", "experts"},
    "names": set(),
    "notices": {"distributed", "names", "rules"},
    "ops": set(),
    "optimizer": {
        *("blocks", "checkpoint", "distributed", "experts", "initial", "names", "notices", "ops"),
        *("options", "report", "rules", "stacks"),
    },
    "options": set(),
    "presets": {"options"},
    "quantization": set(),
    "reference": set(),
    "report": {"rules"},
    "rules": {"rules", "blocks", "experts", "ops", "options", "quantization"},
    "stacks": {"blocks", "distributed", "names", "options", "rules"},
    "tools": {
        *("tools", "experts", "optimizer", "options", "ops", "quantization", "reference", "rules", "report"),
        *("stacks", "trainer", "zero", "__init__"),
    },
    "trainer": {"checks", "distributed", "experts", "names", "optimizer", "options", "report", "rules", "zero"},
    "zero": {"blocks", "distributed", "experts", "names", "optimizer", "report"},
}


def test_imports_run_one_way() -> None:
    for path in sorted((ROOT / "scao_hf").rglob("*.py")):
        module = path.relative_to(ROOT / "scao_hf").parts[0].removesuffix(".py")
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "scao_hf":
                rest = node.module.split(".")[1:]
                imported |= {rest[0]} if rest else {alias.name for alias in node.names}
        internal = imported & (ARROWS.keys() | {"rules"})
        assert internal <= ARROWS.get(module, set()), f"{path.name} imports {internal - ARROWS.get(module, set())}"


def test_importing_the_core_loads_torch_alone() -> None:
    code = (
        "import sys, scao_hf; print([m for m in ('transformers', 'accelerate', 'axolotl', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_trainer_integration_without_transformers_names_the_install_line() -> None:
    code = "import sys; sys.modules['transformers'] = None; import scao_hf; scao_hf.SCAO; scao_hf.SCAOTrainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode and "pip install 'scao-hf[hf]'" in done.stderr
