"""What a training loop does with an optimizer beside stepping it, and whether a run can be repeated."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from faults.core import LR, STEPS, Lost, Subject, Task, clean_loss, copies, equal_states, fault, finite, require, same


@fault("lifecycle", "one parameter without a gradient stays as it is")
def no_gradient(subject: Subject) -> None:
    task = Task(subject)
    task.train(0, 10)
    before = copies(task.params)
    for step in range(10, 40):
        task.backward(step)
        task.params[1].grad = None
        task.optimizer.step()
    require(torch.equal(task.params[1], before[1]), "it moved")
    require(task.train(40) < 3 * clean_loss(subject), "training does not go on")


@fault("lifecycle", "no gradient at all, before and in a run")
def no_gradients(subject: Subject) -> None:
    task = Task(subject)
    for count in (0, 10):
        task.train(0, count)
        before = copies(task.params)
        for param in task.params:
            param.grad = None
        task.optimizer.step()
        require(same(task.params, before), "weights moved")
    task.train(10, 20)


@fault("lifecycle", "a layer frozen and thawed")
def frozen_and_thawed(subject: Subject) -> None:
    task = Task(subject)
    task.train(0, 30)
    task.params[0].requires_grad_(False)
    task.train(30, 50)
    task.params[0].requires_grad_(True)
    loss = task.train(50, STEPS)
    require(loss <= 1.5 * clean_loss(subject), f"loss {loss:.3g}")


@fault("lifecycle", "a parameter group added in a run")
def group_added(subject: Subject) -> None:
    task = Task(subject)
    task.optimizer = subject.build(task.params[:2], LR)
    task.train(0, 20)
    task.optimizer.add_param_group({"params": [task.params[2]], "lr": LR / 2})
    loss = task.train(20, STEPS)
    require(float(task.params[2].detach().float().abs().max()) > 0, "the new parameter does not move")
    require(loss <= 1.5 * clean_loss(subject), f"loss {loss:.3g}")


@fault("lifecycle", "two adapters trained in turns")
def adapters_in_turns(subject: Subject) -> None:
    first, second = Task(subject), Task(subject)
    optimizer = subject.build([*first.params, *second.params], LR)
    for step in range(2 * STEPS):
        active, idle = (first, second) if step // 10 % 2 == 0 else (second, first)
        active.backward(step)
        for param in idle.params:
            param.grad = None
        before = copies(idle.params)
        optimizer.step()
        require(same(idle.params, before), "the idle adapter moved")
    for task in (first, second):
        loss = float(task.loss())
        require(loss <= 1.5 * clean_loss(subject), f"loss {loss:.3g}")


def refused(subject: Subject, lr: float) -> None:
    """A learning rate must be refused when the optimizer is built."""
    try:
        subject.build([Parameter(torch.ones(3, 3))], lr)
    except Exception as error:  # packages have classes of their own for it
        require("lr" in str(error) or "learning rate" in str(error), f"{type(error).__name__}: {error}"[:100])
        return
    raise Lost("it is accepted")


@fault("lifecycle", "a learning rate of NaN is refused")
def lr_nan(subject: Subject) -> None:
    refused(subject, math.nan)


@fault("lifecycle", "a negative learning rate is refused")
def lr_negative(subject: Subject) -> None:
    refused(subject, -1.0)


@fault("lifecycle", "a sparse gradient is a clear error and changes nothing")
def sparse_gradient(subject: Subject) -> None:
    table = torch.nn.Embedding(5, 4, sparse=True)
    before = copies([table.weight])
    table(torch.tensor([1])).sum().backward()
    optimizer = subject.build(list(table.parameters()), LR)
    try:
        optimizer.step()
    except Exception as error:  # packages have classes of their own for it
        require("sparse" in f"{type(error).__name__} {error}".lower(), f"the error does not say so: {error}"[:100])
        require(same([table.weight], before), "weights moved")
        return
    require(finite([table.weight]) and not same([table.weight], before), "silently ignored")


@fault("lifecycle", "a learning rate that is a tensor")
def lr_tensor(subject: Subject) -> None:
    rate = torch.tensor(LR)
    # The same number to the last bit: a cautious step leaves an entry out or not, by the sign of a product.
    plain, tensor = Task(subject, lr=float(rate)), Task(subject, lr=rate)
    plain.train(0, 20)
    tensor.train(0, 20)
    gap = max(float((a - b).detach().float().abs().max()) for a, b in zip(plain.params, tensor.params, strict=True))
    require(gap <= LR / 4, f"differs by {gap:.2g} from a number")


@fault("lifecycle", "a closure")
def closure(subject: Subject) -> None:
    task, plain = Task(subject), Task(subject)
    plain.train(0, 20)
    for step in range(20):
        task.backward(step)
        expected = float(task.loss(slice(step * 16 % 256, step * 16 % 256 + 16)))
        got = task.optimizer.step(lambda step=step: task.backward(step))
        require(got is not None and abs(float(got) - expected) < 1e-5, "the closure's loss is not returned")
    require(same(task.params, plain.params), "another result than without")


@fault("lifecycle", "OneCycleLR, which changes betas")
def one_cycle(subject: Subject) -> None:
    task = Task(subject)
    schedule = torch.optim.lr_scheduler.OneCycleLR(task.optimizer, max_lr=2 * LR, total_steps=STEPS + 1)
    start = float(task.loss())
    for step in range(STEPS):
        task.train(step, step + 1)
        schedule.step()
    loss = float(task.loss())
    require(loss < 0.5 * start, f"loss {start:.3g} became {loss:.3g}")


@fault("lifecycle", "a step that GradScaler skips changes nothing")
def grad_scaler(subject: Subject) -> None:
    task = Task(subject, torch.float32)
    task.train(0, 20)
    before, state = copies(task.params), copy.deepcopy(task.optimizer.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    task.backward(20)
    task.params[0].grad.view(-1)[0] = math.inf
    scaler.scale(torch.ones(()))
    scaler.step(task.optimizer)
    scaler.update()
    require(same(task.params, before), "weights moved")
    require(equal_states(state, task.optimizer.state_dict()), "the state changed")
    task.train(20, 25)


@fault("lifecycle", "a deep copy goes on alike")
def deep_copy(subject: Subject) -> None:
    clone_goes_on(subject, copy.deepcopy)


@fault("lifecycle", "a pickled copy goes on alike")
def pickled(subject: Subject) -> None:
    clone_goes_on(subject, lambda optimizer: pickle.loads(pickle.dumps(optimizer)))


def clone_goes_on(subject: Subject, clone: Callable[[Optimizer], Optimizer]) -> None:
    """A copy of the optimizer, with its parameters, must take the same steps."""
    task = Task(subject)
    task.train(0, 20)
    optimizer = clone(task.optimizer)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    twin = Task(subject, params=copies(params))
    twin.params, twin.optimizer = params, optimizer
    task.train(20, 40)
    twin.train(20, 40)
    require(same(task.params, twin.params), "the copy takes other steps")


@fault("lifecycle", "four small batches or one large one")
def accumulation(subject: Subject) -> None:
    whole, parts = Task(subject, torch.float32), Task(subject, torch.float32)
    for step in range(40):
        whole.backward(4 * step, 64)
        whole.optimizer.step()
        sums: list[Tensor] = []
        for part in range(4):
            parts.backward(4 * step + part)
            grads = [param.grad / 4 for param in parts.params]
            sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else grads
        for param, grad in zip(parts.params, sums, strict=True):
            param.grad = grad
        parts.optimizer.step()
    gap = max(float((a - b).detach().abs().max()) for a, b in zip(whole.params, parts.params, strict=True))
    require(gap <= 2 * LR, f"weights differ by {gap:.2g}")


@fault("reproducibility", "torch's random generator is left alone")
def random_numbers(subject: Subject) -> None:
    task = Task(subject)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    task.train(0, 40)
    require(torch.equal(before, torch.get_rng_state()), "the global generator has moved")


@fault("reproducibility", "the same run twice")
def twice(subject: Subject) -> None:
    first, second = Task(subject), Task(subject)
    first.train(0, 60)
    torch.manual_seed(7)
    second.train(0, 60)
    require(same(first.params, second.params), "two runs differ")
