"""What a training loop does with an optimizer besides stepping it, and whether a run can be repeated."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import pickle
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from faults.core import (
    LR,
    STEPS,
    Lost,
    Subject,
    Task,
    clean_loss,
    copies,
    distance,
    equal_states,
    fault,
    finite,
    require,
    same,
)


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
    require(task.train(40) < 3 * clean_loss(subject), "training does not continue")


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


@fault("lifecycle", "two adapters trained alternately")
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
    gap = distance(plain.params, tensor.params)
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


@fault("lifecycle", "a deep copy trains on as the original does")
def deep_copy(subject: Subject) -> None:
    clone_goes_on(subject, copy.deepcopy)


@fault("lifecycle", "a pickled copy trains on as the original does")
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
    losses_agree(*whole_and_parts(subject))


def whole_and_parts(subject: Subject) -> tuple[Task, Task]:
    """A run of large batches, and one of the same gradients summed up from four small batches each."""
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
    return whole, parts


@fault("lifecycle", "four micro-batches or one batch, whose gradients differ by rounding alone")
def micro_batches(subject: Subject) -> None:
    whole, parts = Task(subject, torch.float32), Task(subject, torch.float32)
    for step in range(STEPS):
        whole.backward(step)
        whole.optimizer.step()
        for param in parts.params:
            param.grad = None
        for part in range(4):
            first = step * 16 % 256 + 4 * part
            (parts.loss(slice(first, first + 4)) / 4).backward()
        parts.optimizer.step()
    losses_agree(whole, parts)


def losses_agree(whole: Task, parts: Task) -> None:
    """Two runs whose gradients differ by rounding must end at one loss; their weights differ where a code is rounded apart."""
    losses = float(whole.loss()), float(parts.loss())
    require(abs(losses[0] - losses[1]) <= 0.01 * losses[0], f"loss {losses[1]:.4g} instead of {losses[0]:.4g}")


def undisturbed(subject: Subject, disturb: Callable[[Task], object], reason: str, first: int = 30) -> None:
    """A run that is disturbed after ``first`` steps must end as one that is not, and its state must be saved as it is."""
    plain, other = Task(subject), Task(subject)
    for task in (plain, other):
        task.train(0, first)
    disturb(other)
    for task in (plain, other):
        task.train(first, first + 15)
    gap = distance(plain.params, other.params)
    require(gap == 0, f"{reason}: weights differ by {gap:.2g}")
    saved = copy.deepcopy(other.optimizer.state_dict())
    again = Task(subject, params=[Parameter(param) for param in copies(other.params)])
    again.optimizer.load_state_dict(saved)
    for task in (plain, again):
        task.train(first + 15, first + 20)
    gap = distance(plain.params, again.params)
    require(gap == 0, f"{reason}: weights differ by {gap:.2g} after resuming")


@fault("lifecycle", "state moved to the host and back between steps")
def state_moved(subject: Subject) -> None:
    def move(task: Task) -> None:
        for entry in task.optimizer.state.values():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    entry[key] = value.to("cpu", copy=True)

    undisturbed(subject, move, "the state that was put back is not used")


@fault("lifecycle", "parameters swapped for others of equal values, as FSDP2 and Module.to do")
def params_swapped(subject: Subject) -> None:
    def swap(task: Task) -> None:
        for param in task.params:
            param.grad = None
            torch.utils.swap_tensors(param, Parameter(param.detach().clone()))

    undisturbed(subject, swap, "the new values are not used")


@fault("lifecycle", "param_groups replaced by copies, as Accelerate does")
def groups_replaced(subject: Subject) -> None:
    def replace(task: Task) -> None:
        task.optimizer.param_groups = [dict(group) for group in task.optimizer.param_groups]

    undisturbed(subject, replace, "the new groups are not used")
    task = Task(subject)
    task.train(0, 30)
    replace(task)
    for group in task.optimizer.param_groups:
        group["lr"] = 0.0
    before = copies(task.params)
    task.train(30, 35)
    require(same(task.params, before), "their learning rate of 0 is ignored")


@fault("lifecycle", "a learning rate of 0 in one step, and as before in the next")
def lr_zero(subject: Subject) -> None:
    # Given gradients: an optimizer's next step must not depend on how far the weights have moved.
    draw = torch.Generator().manual_seed(0)
    shapes = ((4, 16), (12, 4), (12,))
    runs = [[Parameter(torch.zeros(shape, dtype=subject.dtype)) for shape in shapes] for _ in range(2)]
    optimizers = [subject.build(params, LR) for params in runs]
    means = [torch.randn(shape, generator=draw) for shape in shapes]
    for step in range(45):
        grads = [mean + torch.randn(mean.shape, generator=draw) for mean in means]
        before = [copies(params) for params in runs]
        for params, optimizer in zip(runs, optimizers, strict=True):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(param.dtype)
            paused = optimizer is optimizers[1] and step == 40
            for group in optimizer.param_groups:
                group["lr"] = 0.0 if paused else LR
            optimizer.step()
        if step == 40:
            require(same(runs[1], before[1]), "weights moved")
        if step > 40:
            sizes = [
                math.sqrt(sum(float((a - b).detach().float().square().sum()) for a, b in zip(*pair, strict=True)))
                for pair in zip(runs, before, strict=True)
            ]
            require(0.9 < sizes[1] / sizes[0] < 1.1, f"the next step is {sizes[1] / sizes[0]:.2f} times as large")


@fault("lifecycle", "what a wrapper (Lookahead) keeps in the state is left, saved and loaded")
def foreign_state_keys(subject: Subject) -> None:
    task = Task(subject)
    task.train(0, 10)
    slow = copies(task.params)
    for param, value in zip(task.params, slow, strict=True):
        task.optimizer.state[param]["slow_weights"] = value
    task.train(10, 40)
    for param, value in zip(task.params, slow, strict=True):
        require(task.optimizer.state[param].get("slow_weights") is value, "they are gone after a step")
    saved = copy.deepcopy(task.optimizer.state_dict())
    again = Task(subject, params=[Parameter(param) for param in copies(task.params)])
    again.optimizer.load_state_dict(saved)
    for param, value in zip(again.params, slow, strict=True):
        found = again.optimizer.state[param].get("slow_weights")
        require(found is not None and torch.equal(found, value), "they are not in the checkpoint")
    again.train(40, 45)


#: Options that choose an implementation, which nobody edits in a run.
IMPLEMENTATIONS = {"foreach", "fused", "capturable", "differentiable"}


@fault("lifecycle", "an option edited in a run works, or is refused by name")
def options_edited(subject: Subject) -> None:
    arguments = inspect.signature(type(Task(subject).optimizer).__init__).parameters
    group = Task(subject).optimizer.param_groups[0]
    names = [name for name in arguments if name not in IMPLEMENTATIONS and isinstance(group.get(name), int)]
    for name in names:
        task = Task(subject)
        task.train(0, 20)
        for group in task.optimizer.param_groups:
            group[name] = not group[name] if isinstance(group[name], bool) else 2 * group[name]
        try:
            task.train(20, 35)
        except Exception as error:  # packages have classes of their own for it
            require(name in str(error), f"{name}: {type(error).__name__}: {error}")
            continue
        require(finite(task.params), f"{name}: weights are NaN or Inf")
        again = Task(subject, params=[Parameter(param) for param in copies(task.params)])
        try:
            again.optimizer.load_state_dict(copy.deepcopy(task.optimizer.state_dict()))
            again.train(35, 40)
        except Exception as error:  # whatever it raises, a checkpoint of its own must load
            raise Lost(f"{name}: its own checkpoint does not load: {type(error).__name__}: {error}") from error


@fault("lifecycle", "a model cast to bfloat16 in a run trains on, or the error says so")
def cast(subject: Subject) -> None:
    task = Task(subject, torch.float32)
    start = task.train(0, 20)
    for param in task.params:
        param.grad = None
        param.data = param.data.to(torch.bfloat16)
    try:
        loss = task.train(20, STEPS)
    except Exception as error:  # packages have classes of their own for it
        require("bfloat16" in str(error).lower(), f"{type(error).__name__}: {error}")
        return
    require(finite(task.params) and loss < start, f"loss {start:.3g} became {loss:.3g}")


class Said(logging.Handler):
    """Collects what is logged as a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@fault("lifecycle", "only frozen parameters: said, not silent")
def all_frozen(subject: Subject) -> None:
    params = [Parameter(torch.ones(4, 6), requires_grad=False)]
    said, level = Said(), logging.root.manager.disable
    logging.disable(logging.NOTSET)
    logging.getLogger().addHandler(said)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = subject.build(params, LR)
            for _ in range(3):
                optimizer.step()
    except Exception:  # packages have classes of their own for it; an error is not silent
        return
    finally:
        logging.getLogger().removeHandler(said)
        logging.disable(level)
    words = " ".join([*said.messages, *(str(warning.message) for warning in caught)])
    require(any(word in words for word in ("frozen", "requires_grad", "train", "gradient")), "silent")


@fault("lifecycle", "torch.compile around the step, without hitting its limit")
def compiled(subject: Subject) -> None:
    plain, task = Task(subject, torch.float32), Task(subject, torch.float32)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        step = torch.compile(task.optimizer.step, backend="eager")
        for index in range(20):
            plain.train(index, index + 1)
            task.backward(index)
            step()
    gap = distance(plain.params, task.params)
    require(gap <= LR / 4, f"weights differ by {gap:.2g}")


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
