"""PyTorch's contract for optimizers, over its own OptimizerInfo: the bodies are ours, the inputs come from the info.

``test/test_optim.py`` of PyTorch is not in its wheel. What does not apply to SCAO is listed with the reason, and printed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

pytest.importorskip("expecttest", reason="torch's OptimizerInfo needs expecttest (pip install expecttest)")

import test_torch_suite_states
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInput,
)
from torch_suite import EARLY, EVERY, INFO, INPUTS, build, equal, error_inputs, linear, trained, values

from scao_hf import SCAO

#: What PyTorch's suite asks of optimizers that have these, and SCAO has not.
INAPPLICABLE = {
    "foreach and fused implementations against the loop (11 bodies)": "SCAO has one implementation and no such arguments",
    "differentiable steps": "SCAO has no differentiable argument",
    "capturable steps, CUDA graphs and state on CUDA (8 bodies)": "SCAO has no capturable argument; CUDA only",
    "maximize": "SCAO has no maximize argument: negate the loss",
    "amsgrad and other flags of one algorithm": "flags of other algorithms",
    "sparse gradients": "refused with an error (test_errors)",
    "several devices in one optimizer": "needs two devices",
    "loading states of before step was a tensor": "SCAO's step has been an integer from the first version on",
}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def test_what_does_not_apply() -> None:
    print()
    for body, reason in INAPPLICABLE.items():
        print(f"inapplicable: {body}: {reason}")
    everything = {**globals(), **vars(test_torch_suite_states)}
    bodies = [name for name, value in everything.items() if name.startswith("test_") and inspect.isfunction(value)]
    print(f"{len(bodies) - 1} bodies, {len(INPUTS)} configurations, {len(INAPPLICABLE)} groups that do not apply")
    arguments = inspect.signature(SCAO.__init__).parameters
    # An argument that SCAO gains makes its bodies apply.
    assert not {"foreach", "fused", "differentiable", "capturable", "maximize", "amsgrad"} & set(arguments)


def test_infos_name_no_global_flags() -> None:
    for given in INPUTS:
        assert not {"foreach", "fused", "differentiable"} & set(given.kwargs)


@pytest.mark.parametrize("index", range(len(error_inputs("cpu", torch.float32))))
def test_errors(index: int) -> None:
    wrong = INFO.optim_error_inputs_func("cpu", torch.float32)[index]
    params, kwargs = wrong.optimizer_error_input.params, wrong.optimizer_error_input.kwargs
    if params is None:
        params = [Parameter(torch.randn(2, 3))]
    if wrong.error_type is UserWarning:  # a parameter that is given twice: torch warns that this will be an error
        assert "duplicate parameters" in wrong.error_regex
        with pytest.warns(UserWarning, match=wrong.error_regex), pytest.raises(ValueError, match="pass it once"):
            INFO.optim_cls(params, **kwargs)
    elif wrong.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            INFO.optim_cls(params, **kwargs)
    else:
        optimizer = INFO.optim_cls(params, **kwargs)
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            optimizer.step()


def descends(optimizer: SCAO, loss: Callable[[], Tensor], chain: Sequence[Any] = ()) -> None:
    """Thirty steps, each followed by the schedulers, end below the start."""
    start = loss().item()
    for _ in range(30):
        value = optimizer.step(loss)
        for scheduler in chain:
            scheduler.step(value) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    assert loss().item() < start


@EVERY
@pytest.mark.parametrize("contiguous", [True, False])
def test_it_goes_in_the_right_direction(given: OptimizerInput, contiguous: bool) -> None:
    params, loss = linear(contiguous)
    descends(build(params, given), loss)


@EVERY
@pytest.mark.parametrize("schedulers", range(len(INFO.scheduler_inputs)))
def test_it_goes_in_the_right_direction_with_schedulers(given: OptimizerInput, schedulers: int) -> None:
    params, loss = linear()
    optimizer = build(params, given)
    descends(optimizer, loss, [make(optimizer) for make in INFO.scheduler_inputs[schedulers]])


@pytest.mark.parametrize("schedulers", range(len(INFO.scheduler_inputs)))
def test_groups_with_a_scheduler(schedulers: int) -> None:
    params, loss = linear()
    optimizer = SCAO([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.01}], lr=1e-3, **EARLY)
    descends(optimizer, loss, [make(optimizer) for make in INFO.scheduler_inputs[schedulers]])


@EVERY
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_learning_rate_is_a_number(given: OptimizerInput, shape: tuple[int, ...]) -> None:
    params, loss = linear()
    twins = [Parameter(value) for value in values(params)]
    plain = build(params, given, lr=1e-2)
    tensor = build(twins, given, lr=torch.full(shape, 1e-2))
    for _ in range(5):
        loss()
        for param, twin in zip(params, twins, strict=True):
            twin.grad = None if param.grad is None else param.grad.clone()
        plain.step()
        tensor.step()
        for param, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(param, twin, rtol=1e-4, atol=1e-4)


@EVERY
def test_complex_numbers_are_pairs_of_real_ones(given: OptimizerInput) -> None:
    number = Parameter(torch.randn(6, 4, dtype=torch.complex64))
    pair = Parameter(torch.view_as_real(number).detach().clone())
    first, second = build([number], given), build([pair], given)
    for _ in range(8):
        number.grad = torch.randn_like(number)
        pair.grad = torch.view_as_real(number.grad).clone()
        first.step()
        second.step()
        torch.testing.assert_close(torch.view_as_real(number), pair)


@EVERY
def test_without_gradients_a_step_does_nothing(given: OptimizerInput) -> None:
    params, _ = linear()
    before = values(params)
    optimizer = build(params, given)
    optimizer.step()
    assert equal(params, before) and not optimizer.state


@EVERY
def test_gradients_of_zero_leave_the_decay_alone(given: OptimizerInput) -> None:
    params, _ = linear()
    before = values(params)
    optimizer = build(params, given)
    group = optimizer.param_groups[0]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), old * (1 - float(group["lr"]) * group["weight_decay"]))


@EVERY
def test_it_can_be_printed(given: OptimizerInput) -> None:
    text = repr(build(linear()[0], given))
    assert text.startswith("SCAO (") and "precond_freq" in text and repr(build(linear()[0], given)) == text


@EVERY
def test_groups_have_weight_decay_and_learning_rate_of_their_own(given: OptimizerInput) -> None:
    weight, bias = Parameter(torch.ones(4, 6)), Parameter(torch.ones(4))
    kwargs = {name: value for name, value in given.kwargs.items() if name not in ("lr", "weight_decay")}
    optimizer = SCAO(
        [{"params": [weight], "weight_decay": 0.5, "lr": 0.1}, {"params": [bias], "lr": 0.0}], lr=1e-3, **kwargs
    )
    weight.grad, bias.grad = torch.zeros(4, 6), torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 6), 0.95))
    assert torch.equal(bias, torch.ones(4))


def test_step_hooks_run_and_can_change_arguments() -> None:
    params, loss = linear()
    optimizer = SCAO(params)
    seen: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("all before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("all after")),
    ]
    optimizer.step(loss)
    assert sorted(seen) == ["after", "all after", "all before", "before"]
    assert seen.index("before") < seen.index("after")
    for handle in handles:
        handle.remove()
    optimizer.step(loss)
    assert len(seen) == 4
    optimizer.register_step_pre_hook(lambda _, args, kwargs: ((optimizer, loss), {}))
    before = values(params)
    assert optimizer.step() is not None and not equal(params, before)


@EVERY
def test_the_default_dtype_changes_nothing(given: OptimizerInput) -> None:
    params, _, _ = trained(given, 8)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            start, loss = linear(dtype=torch.float32)
            optimizer = build(start, given)
            for _ in range(8):
                optimizer.step(loss)
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal(params, start)


@EVERY
def test_parameters_of_several_dtypes(given: OptimizerInput) -> None:
    params = [
        Parameter(torch.ones(4, 6, dtype=dtype))
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ]
    optimizer = build(params, given, lr=0.1, weight_decay=0.0)
    for _ in range(5):
        grad = torch.randn(4, 6)
        for param in params:
            param.grad = grad.to(param.dtype)
        optimizer.step()
    for param in params:
        torch.testing.assert_close(param.detach().double(), params[0].detach(), rtol=0, atol=0.1)


@EVERY
def test_a_model_with_buffers_and_a_frozen_layer_trains(given: OptimizerInput) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model[0].weight.requires_grad_(False)
    kept = model[0].weight.detach().clone()
    optimizer = build(model.parameters(), given, lr=1e-2)
    points, targets = torch.randn(32, 6), torch.randn(32, 2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(points) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and torch.equal(model[0].weight, kept)


@EVERY
def test_zero_grad_clears_by_none_or_by_zeros(given: OptimizerInput) -> None:
    params, loss = linear()
    optimizer = build(params, given)
    loss()
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is not None and not param.grad.any() for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


def rosenbrock(point: Tensor) -> Tensor:
    return (1 - point[0]) ** 2 + 100 * (point[1] - point[0] ** 2) ** 2


@EVERY
def test_rosenbrock_falls(given: OptimizerInput) -> None:
    point = Parameter(torch.tensor([1.5, 1.5]))
    optimizer = build([point], given, lr=1e-2, weight_decay=0.0)
    start = rosenbrock(point.detach()).item()
    for _ in range(200):
        optimizer.zero_grad()
        rosenbrock(point).backward()
        optimizer.step()
    assert rosenbrock(point.detach()).item() < 0.01 * start
