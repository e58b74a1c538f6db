"""Promises with a figure: how far one gradient can move a weight, how alike two ways to the same step are, what is held."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

from faults.core import LR, STEPS, Subject, Task, copies  # noqa: E402
from faults.numerics import failing, no_convergence  # noqa: E402
from survival import variants  # noqa: E402

from scao_hf import SCAO, ops, options, quantization  # noqa: E402

VARIANTS = pytest.mark.parametrize("subject", variants(), ids=lambda subject: subject.name.replace(" ", "-"))
EARLY: dict[str, Any] = {"warmup_steps": 5, "blend_steps": 3, "min_precond_updates": 1, "precond_freq": 5}


@VARIANTS
def test_a_spike_moves_no_matrix_by_more_than_two_learning_rates(subject: Subject) -> None:
    """Root mean square over the matrix; an undamaged step is half a learning rate here, the largest one measured 1.87."""
    task, largest = Task(subject), 0.0
    for step in range(STEPS):
        task.backward(step)
        if step == 40:
            for param in task.params:
                param.grad.mul_(1e6 if param.dtype != torch.float16 else 1e3)
        before = copies(task.params)
        task.optimizer.step()
        moves = [param.detach().float() - old.float() for param, old in zip(task.params, before, strict=True)]
        largest = max(largest, *(float(move.square().mean().sqrt()) / LR for move in moves))
    assert largest <= 2


def moves(grads: list[torch.Tensor], **chosen: Any) -> list[torch.Tensor]:
    """The steps of a matrix that is given these gradients, in learning rates."""
    param, lr, found = torch.nn.Parameter(torch.zeros_like(grads[0])), 1e-3, []
    optimizer = SCAO([param], lr=lr, weight_decay=0.0, **chosen)
    for grad in grads:
        before, param.grad = param.detach().clone(), grad.clone()
        optimizer.step()
        found.append((param.detach() - before) / lr)
    return found


def of_rank_two(shape: tuple[int, int], steps: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Two columns that span the range of all gradients, and the gradients, ``[r, l]`` with r < l."""
    generator = torch.Generator().manual_seed(1)
    span = torch.linalg.qr(torch.randn(shape[0], 2, generator=generator))[0]
    return span, [span @ torch.randn(2, shape[1], generator=generator) for _ in range(steps)]


@pytest.fixture(params=["as built", "pytorch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The native code as it is built, or as without it."""
    if request.param == "pytorch":
        monkeypatch.setattr(ops, "NATIVE", frozenset())
    return str(request.param)


KEPT = pytest.mark.parametrize(
    "kept", [{}, {"moment_dtype": "int8"}, {"use_int8_ema": True}], ids=["float32", "int8 moments", "int8 bases"]
)


@pytest.mark.usefixtures("kernels")
@KEPT
def test_equal_gradients_move_no_entry_by_more_than_a_learning_rate(kept: dict[str, Any]) -> None:
    """Rank one: all directions but one hold rounding errors alone, which were stepped as far as the gradient (3.9)."""
    for seed in range(3):
        left, right = (torch.randn(side, 1, generator=torch.Generator().manual_seed(seed)) for side in (48, 32))
        grad = left @ right.T if seed else torch.ones(48, 32)
        largest = max(float(move.abs().max()) for move in moves([grad] * 40, warmup_steps=2, precond_freq=2, **kept))
        assert largest <= (1.1 if not kept else 1.5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("moment_dtype", ["float32", "int8"])
@pytest.mark.parametrize("entries", [torch.linspace(0.1, 1, 32), torch.logspace(-3, 0, 32), torch.arange(1.0, 17)])
def test_a_constant_diagonal_gradient_moves_no_entry_by_more_than_one_and_a_half_learning_rates(
    moment_dtype: str, entries: torch.Tensor
) -> None:
    """A second moment of rank one is far too small on the diagonal: the steps were up to 2400 learning rates."""
    for early in ({}, {"warmup_steps": 2, "precond_freq": 2}):
        found = moves([torch.diag(entries)] * 60, moment_dtype=moment_dtype, **early)
        assert max(float(move.abs().max()) for move in found) <= 1.1


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("tall", [False, True])
def test_gradients_of_rank_two_give_steps_of_rank_two(tall: bool) -> None:
    """What six directions without a gradient hold is rounding: up to 88 % of a step were in them."""
    span, grads = of_rank_two((8, 64), 30)
    chosen: dict[str, Any] = {"warmup_steps": 4, "blend_steps": 0, "precond_freq": 2, "cautious": False}
    for rounded, allowed in ((torch.float32, 0.01), (torch.bfloat16, 0.05)):
        given = [grad.to(rounded).float() for grad in grads]
        for move in moves([grad.T.contiguous() for grad in given] if tall else given, **chosen)[5:]:
            step = move.T if tall else move
            assert (step - span @ (span.T @ step)).norm() <= allowed * step.norm()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("cautious", [True, False])
def test_the_rounding_of_a_gradient_of_rank_two_makes_no_difference(cautious: bool) -> None:
    """In the ramp and after it; steps differed by as much as they are long."""
    _, grads = of_rank_two((8, 64), 40)
    chosen: dict[str, Any] = {"warmup_steps": 4, "blend_steps": 20, "precond_freq": 2, "cautious": cautious}
    noise = torch.Generator().manual_seed(5)
    others = [grad * (1 + 1e-7 * torch.randn(grad.shape, generator=noise)) for grad in grads]
    for one, other in zip(moves(grads, **chosen), moves(others, **chosen), strict=True):
        assert (one - other).norm() <= 0.02 * one.norm()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_rows_and_columns_without_a_gradient_stay(kernels: str, shape: tuple[int, int]) -> None:
    """Exactly with the native eigensolver; LAPACK's eigenvectors have rounding errors where a factor has rows of zeros."""
    generator = torch.Generator().manual_seed(0)
    grads = [1 + torch.randn(shape, generator=generator) for _ in range(60)]
    for grad in grads:
        grad[::3] = 0
        grad[:, ::4] = 0
    kept = torch.ones(shape, dtype=torch.bool)
    kept[::3] = kept[:, ::4] = False
    for chosen in ({}, {"cautious": False}):
        total = sum(moves(grads, warmup_steps=3, precond_freq=3, blend_steps=5, **chosen))
        assert isinstance(total, torch.Tensor) and total[kept].abs().min() > 0
        native = kernels != "pytorch" and "cpu" in ops.NATIVE
        assert total[~kept].abs().max() <= (0 if native else 0.01)


def split_and_whole(dtype: torch.dtype, steps: int = 40, **chosen: Any) -> float:
    """How far two runs end from each other, one with batches of 64, one with four parts of each."""
    ends = []
    for parts in (1, 4):
        task = Task(Subject("scao", lambda params, lr: SCAO(params, lr, weight_decay=0.0, **EARLY, **chosen)), dtype)
        x, y, size = task.x.to(dtype), task.y.to(dtype), 64 // parts
        for step in range(steps):
            task.optimizer.zero_grad()
            for part in range(parts):
                rows = slice(first := 64 * step % 256 + size * part, first + size)
                a, b, c = task.params
                loss = (x[rows] @ a.T @ b.T + c - y[rows]).square().mean() / parts
                loss.backward()
            task.optimizer.step()
        ends.append(task.params)
    return max(float((a - b).detach().abs().max()) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("moment_dtype", options.OPTIONS["moment_dtype"].choices)
@pytest.mark.parametrize("rule", options.MATRIX_RULES)
def test_parts_of_a_batch_are_the_whole_batch(rule: str, moment_dtype: str) -> None:
    """The order of a sum apart, which float64 hides; kept moments are float64 there, or rounded by the same noise."""
    assert split_and_whole(torch.float64, rule=rule, moment_dtype=moment_dtype) <= 1e-9


def test_in_float32_parts_of_a_batch_differ_by_rounding_alone() -> None:
    assert split_and_whole(torch.float32, rule="published") <= 1e-4
    # A cautious step leaves entries out by their sign, and the sign of an entry next to zero is a matter of rounding.
    assert split_and_whole(torch.float32) <= LR / 10


@VARIANTS
def test_a_decomposition_that_goes_on_failing_is_said_once(subject: Subject) -> None:
    task = Task(subject)
    task.train(0, 40)
    with warnings.catch_warnings(record=True) as caught, failing(no_convergence()) as calls:
        warnings.simplefilter("default")  # once for each place and text, as Python shows them
        task.train(40, STEPS)
    texts = Counter(str(warning.message) for warning in caught if "decomposition" in str(warning.message))
    assert len(calls) > 10
    sides = {text.split(" of side ")[1].split()[0] for text in texts}
    # Both attempts, in the places (one for each kind of basis) where a side of this length is decomposed.
    assert texts and sum(texts.values()) <= 4 * len(sides)


@pytest.mark.parametrize("rule", options.MATRIX_RULES)
def test_stacked_experts_hold_at_most_three_times_their_bytes(rule: str) -> None:
    param = torch.nn.Parameter(torch.empty(128, 64, 48, device="meta"))
    assert SCAO([param], rule=rule).memory_report()["peak"] <= 3 * 4 * param.numel()


def test_a_basis_in_int8_is_kept_within_two_percent() -> None:
    """What ``use_int8_ema`` keeps in int8 under SCAO's own rule; the factor that is decomposed stays in float32."""
    basis = torch.linalg.qr(torch.randn(400, 16, generator=torch.Generator().manual_seed(0)))[0].T[None].contiguous()
    codes, scales = quantization.encode(basis, 0)
    decoded = quantization.decode(codes, scales, (16, 400), torch.float32)
    assert (decoded - basis).norm() <= 0.02 * basis.norm()
    task = Task(Subject("int8", lambda params, lr: SCAO(params, lr, use_int8_ema=True, **EARLY)))
    task.train()
    factor = task.optimizer.state[task.params[0]]["factor"]
    values = torch.linalg.eigvalsh(factor)
    assert factor.dtype == torch.float32 and values.min() >= -1e-6 * values.max()
