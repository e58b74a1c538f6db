"""What is changed behind the optimizer's back, in its groups, its state or its parameters, acts as with torch's AdamW."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from scao_hf import SCAO, options

SHAPES = [(4, 24), (4, 24), (24, 4), (10, 12), (5,), (3, 4, 2)]
QUICK: dict[str, Any] = {"warmup_steps": 4, "blend_steps": 3, "precond_freq": 2, "min_precond_updates": 1, "k_max": 4}


def make(dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[list[nn.Parameter], SCAO]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    return params, SCAO(params, **{"lr": 0.01, "max_precond_dim": 8, **QUICK, **kwargs})


def train(params: list[nn.Parameter], optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def snapshot(optimizer: SCAO) -> dict[str, Any]:
    """Everything that a step may change, as it is now."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return copy.deepcopy({"weights": params, "state": [*map(optimizer.state.get, params)]})


def assert_alike(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# --- parameter groups ---


def replace_all(optimizer: Any) -> None:
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]  # as Accelerate's setter does


def replace_one(optimizer: Any) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.0}


def replace_in_place(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = 0.0


def move_to_a_group_of_its_own(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    optimizer.param_groups.append({**group, "params": group["params"], "lr": 0.0})
    group["params"] = []


@pytest.mark.parametrize("kind", [torch.optim.AdamW, SCAO])
@pytest.mark.parametrize(
    "replace", [replace_all, replace_one, replace_in_place, move_to_a_group_of_its_own], ids=lambda edit: edit.__name__
)
def test_replaced_groups_are_followed(kind: Any, replace: Callable[[Any], None]) -> None:
    param = nn.Parameter(torch.ones(4, 24))
    optimizer = kind([param], lr=0.1)
    train([param], optimizer, range(2))
    replace(optimizer)
    before = param.detach().clone()
    train([param], optimizer, range(2, 4))
    assert torch.equal(param, before) and optimizer.state[param]["step"] == 4


def test_a_parameter_that_changes_groups_takes_the_other_group_s_options() -> None:
    one, other = nn.Parameter(torch.ones(4, 24)), nn.Parameter(torch.ones(4, 24))
    optimizer = SCAO([{"params": [one]}, {"params": [other], "lr": 0.0}], lr=0.1)
    train([one, other], optimizer, range(2))
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    before = one.detach().clone()
    train([one, other], optimizer, range(2, 4))
    assert torch.equal(one, before) and optimizer.state[one]["step"] == 4


def test_a_group_without_all_options_is_refused() -> None:
    _, optimizer = make()
    optimizer.param_groups = [{"params": group["params"], "lr": 0.1} for group in optimizer.param_groups]
    with pytest.raises(
        ValueError, match=r"a parameter group lacks betas, eps, weight_decay, rule, .*scao_version: add"
    ):
        train([], optimizer, range(1))


# --- options ---

#: For every option a value that existing state (12 steps of ``QUICK``, phase 2) can follow, and one that it cannot.
EDITS: dict[str, tuple[Any, Any]] = {
    "lr": (0.02, None),
    "betas": ((0.8, 0.95), None),
    "eps": (1e-3, None),
    "weight_decay": (0.5, None),
    "rule": (None, "published"),
    "from_scratch": (None, True),
    "warmup_steps": (11, 13),
    "blend_steps": (20, None),
    "min_precond_updates": (5, 7),
    "precond_freq": (5, 20),
    "rho": (0.5, None),
    "epsilon_sparse": (0.9, None),
    "k_min": (4, None),
    "k_max": (None, 8),
    "tau": (0.01, None),
    "max_precond_dim": (None, 16),
    "use_int8_ema": (None, True),
    "cautious": (False, None),
    "moment_dtype": ("int8", None),
    "stochastic_rounding": (True, None),
    "on_nonfinite": ("raise", None),
}


def test_the_edits_cover_every_option() -> None:
    assert set(EDITS) == {"lr", "betas", "eps", "weight_decay", *options.OPTIONS}
    for name, option in options.OPTIONS.items():
        followed, refused = (value is not None for value in EDITS[name])
        assert (followed, refused) == {
            options.AT_ONCE: (True, False),
            options.CONVERTS: (True, False),
            options.LAYOUT: (False, True),
            options.PHASE: (True, True),
        }[option.edited]


@pytest.mark.parametrize("name", [name for name, (value, _) in EDITS.items() if value is not None])
def test_an_edited_option_acts_at_once_and_can_be_resumed(name: str) -> None:
    settings = {"k_min": 1, "epsilon_sparse": 0.6}  # so that both bounds of the rank have an effect
    dtype = torch.bfloat16 if name == "stochastic_rounding" else torch.float32
    params, optimizer = make(dtype, **settings)
    plain, reference = make(dtype, **settings)
    train(params, optimizer, range(12))
    train(plain, reference, range(12))
    optimizer.param_groups[0][name] = EDITS[name][0]
    for param in plain, params:
        param[0].grad = torch.full_like(param[0], float("nan"))  # for on_nonfinite
    if name == "on_nonfinite":
        with pytest.raises(RuntimeError, match="holds NaN or Inf"):
            optimizer.step()
        return
    others, resumed = make(dtype)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # before a step as well as after one
    with torch.no_grad():
        for other, param in zip(others, params, strict=True):
            other.copy_(param)
    for each, at in ((params, optimizer), (plain, reference), (others, resumed)):
        train(each, at, range(12, 18))
    assert not all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))
    assert_alike(params, others)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0][name] == EDITS[name][0]


@pytest.mark.parametrize("at", ["step", "state_dict"])
@pytest.mark.parametrize("name", [name for name, (_, value) in EDITS.items() if value is not None])
def test_an_option_that_the_state_cannot_follow_is_refused_and_changes_nothing(name: str, at: str) -> None:
    params, optimizer = make(cautious=False)
    plain, reference = make(cautious=False)
    train(params, optimizer, range(12))
    train(plain, reference, range(15))
    before, value, old = snapshot(optimizer), EDITS[name][1], optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError) as error:
        train(params, optimizer, range(12, 13)) if at == "step" else optimizer.state_dict()
    assert f"{name}={value!r} cannot be followed" in str(error.value) and f"{name}={old!r}" in str(error.value)
    assert_alike(snapshot(optimizer), before)
    optimizer.param_groups[0][name] = old
    train(params, optimizer, range(12, 15))
    assert_alike(params, plain)
    optimizer.param_groups[0][name] = value
    optimizer.state.clear()
    train(params, optimizer, range(2))


@pytest.mark.parametrize(("name", "value"), [("k_max", 8), ("use_int8_ema", True), ("warmup_steps", 6)])
def test_options_of_phase_2_can_be_edited_in_phase_1(name: str, value: Any) -> None:
    params, optimizer = make()
    plain, reference = make(**{name: value})
    train(params, optimizer, range(2))
    optimizer.param_groups[0][name] = value
    train(params, optimizer, range(2, 12))
    train(plain, reference, range(12))
    assert_alike(params, plain)


@pytest.mark.parametrize("pause", [2, 12])
@pytest.mark.parametrize("kinds", [("float32", "int8"), ("int8", "bfloat16"), ("bfloat16", "float32")])
def test_moments_are_converted(kinds: tuple[str, str], pause: int) -> None:
    params, optimizer = make(moment_dtype=kinds[0])
    for _ in range(2):  # there and back
        train(params, optimizer, range(pause))
        before = params[0].detach().clone(), optimizer.state[params[0]]["step"]
        kinds = kinds[::-1]
        optimizer.param_groups[0]["moment_dtype"] = kinds[0]
        _, other = make(moment_dtype=kinds[0])
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert [*optimizer.state[params[0]]] and torch.equal(params[0], before[0])
        train(params, optimizer, range(1))
        assert optimizer.state[params[0]]["step"] == before[1] + 1 and torch.isfinite(params[0]).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("rule", "shampoo"),
        ("warmup_steps", 1.5),
        ("blend_steps", -1),
        ("min_precond_updates", 0),
        ("precond_freq", 0),
        ("rho", 1.0),
        ("epsilon_sparse", 1.0),
        ("k_min", 0),
        ("k_max", True),
        ("tau", 0.0),
        ("max_precond_dim", 1),
        ("use_int8_ema", 1),
        ("cautious", "no"),
        ("moment_dtype", "int4"),
        ("on_nonfinite", "ignore"),
    ],
)
def test_an_illegal_edit_is_refused_in_the_constructor_s_words(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as expected:
        make(**{name: value})
    params, optimizer = make()
    train(params, optimizer, range(2))
    before, old = snapshot(optimizer), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    for act in (optimizer.step, optimizer.state_dict):
        with pytest.raises(ValueError) as error:
            act()
        assert str(error.value) == str(expected.value)
    assert_alike(snapshot(optimizer), before)
    optimizer.param_groups[0][name] = old
    train(params, optimizer, range(2, 3))


@pytest.mark.parametrize("name", [name for name, option in options.OPTIONS.items() if not option.optional])
def test_none_is_no_default_after_construction(name: str) -> None:
    _, optimizer = make()
    optimizer.param_groups[0][name] = None
    with pytest.raises(ValueError, match=f"{name}=None is not valid"):
        optimizer.step()


def test_two_edits_that_contradict_each_other_are_refused() -> None:
    _, optimizer = make()
    optimizer.param_groups[0]["k_min"] = 9
    with pytest.raises(ValueError, match="k_min=9 must not exceed k_max=4"):
        optimizer.step()


# --- state ---


def copied(optimizer: SCAO) -> None:
    for entry in optimizer.state.values():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                entry[name] = value.clone()


def copied_twice(optimizer: SCAO) -> None:
    copied(optimizer)  # to the host and back: the second copies may be where the first tensors were
    copied(optimizer)


def one_field_copied(optimizer: SCAO) -> None:
    entry = next(iter(optimizer.state.values()))
    name = next(name for name in entry if name.startswith("exp_avg"))  # of one block of several where the rule cuts it
    entry[name] = entry[name].clone()


def data_set(optimizer: SCAO) -> None:
    for entry in optimizer.state.values():
        for value in entry.values():
            if isinstance(value, Tensor):
                value.data = value.data.clone()


def swapped(optimizer: SCAO) -> None:
    for entry in optimizer.state.values():
        for value in entry.values():
            if isinstance(value, Tensor):
                torch.utils.swap_tensors(value, value.clone())


def in_float64(optimizer: SCAO) -> None:
    for entry in optimizer.state.values():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                entry[name] = value.double()


def entries_replaced(optimizer: SCAO) -> None:
    for param, entry in optimizer.state.items():
        optimizer.state[param] = dict(entry)


def whole_state_replaced(optimizer: SCAO) -> None:
    optimizer.state = {param: copy.deepcopy(entry) for param, entry in optimizer.state.items()}  # type: ignore[assignment]


MOVES = [
    copied,
    copied_twice,
    one_field_copied,
    data_set,
    swapped,
    in_float64,
    entries_replaced,
    whole_state_replaced,
]


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
@pytest.mark.parametrize("rule", options.RULES)
def test_replaced_state_is_taken_up(rule: str, move: Callable[[SCAO], None]) -> None:
    params, optimizer = make(rule=rule)
    plain, reference = make(rule=rule)
    train(plain, reference, range(14))
    for first, last in ((0, 2), (2, 6), (6, 12), (12, 14)):
        train(params, optimizer, range(first, last))
        move(optimizer)
    assert_alike(params, plain)
    train(params, optimizer, range(14, 15))
    train(plain, reference, range(14, 15))
    assert_alike(optimizer.state_dict()["state"], reference.state_dict()["state"])


@pytest.mark.parametrize("name", ["exp_avg", "factor", "inside_sq", "gain"])
def test_a_reset_acts_whether_it_is_assigned_or_made_in_place(name: str) -> None:
    runs = []
    for assigned in (False, True):
        params, optimizer = make()
        train(params, optimizer, range(10))
        entry = optimizer.state[params[1]]
        if assigned:
            entry[name] = torch.full_like(entry[name], 0.5)
        else:
            entry[name].fill_(0.5)
        train(params, optimizer, range(10, 14))
        runs.append(params)
    plain, reference = make()
    train(plain, reference, range(14))
    assert_alike(*runs)
    assert not torch.equal(runs[0][1], plain[1]) and torch.equal(runs[0][0], plain[0])


def test_states_that_change_places_act_there() -> None:
    params, optimizer = make()
    train(params, optimizer, range(10))
    state, before = optimizer.state, snapshot(optimizer)["state"]
    state[params[0]], state[params[1]] = state[params[1]], state[params[0]]
    for param in params:
        param.grad = None
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    torch.testing.assert_close(state[params[0]]["exp_avg"], before[1]["exp_avg"] * 0.9)


def test_state_that_is_moved_away_frees_its_memory_at_once() -> None:
    params, optimizer = make()
    train(params, optimizer, range(9))
    for move in (copied, data_set, lambda optimizer: optimizer.state.clear()):
        old = [
            StorageWeakRef(value.untyped_storage())
            for entry in optimizer.state.values()
            for value in entry.values()
            if isinstance(value, Tensor)
        ]
        move(optimizer)
        assert all(storage.expired() for storage in old)
        train(params, optimizer, range(9))


def test_the_step_counter_can_be_edited() -> None:
    params, optimizer = make()
    train(params, optimizer, range(9))
    optimizer.state[params[0]]["step"] = 20
    optimizer.state[params[1]]["step"] = torch.tensor(30)
    train(params, optimizer, range(9, 10))
    assert [optimizer.state[param]["step"] for param in params[:3]] == [21, 31, 10]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entry: entry.update(step=2), r"exp_avg_sq=None .* of shape \(4, 24\) after 2 steps: it must be"),
        (lambda entry: entry.update(step=1.5), "step=1.5 for a parameter"),
        (lambda entry: entry.pop("exp_avg"), "exp_avg=None for the parameter 'first' of shape"),
        (lambda entry: entry.update(exp_avg=7), "exp_avg=7 for"),
        (
            lambda entry: entry.update(exp_avg=torch.zeros(2)),
            r"exp_avg=torch.float32 \(2,\) .* torch.float32 \(4, 24\)",
        ),
        (lambda entry: entry.update(exp_avg=entry["exp_avg"].int()), "exp_avg=torch.int32"),
    ],
)
def test_a_state_that_fits_no_step_is_refused_and_changes_nothing(change: Any, words: str) -> None:
    first, other = nn.Parameter(torch.ones(4, 24)), nn.Parameter(torch.ones(4, 24))
    optimizer = SCAO([("first", first), ("other", other)], **QUICK)
    train([first, other], optimizer, range(9))
    kept = dict(optimizer.state[first])
    change(optimizer.state[first])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert_alike(snapshot(optimizer), before)
    optimizer.state[first] = kept
    change(optimizer.state[other])
    with pytest.raises(ValueError, match=words.replace("first", "other")):
        optimizer.step()


# --- parameters ---


def test_data_of_parameters_can_be_replaced() -> None:
    params, optimizer = make()
    plain, reference = make()
    train(params, optimizer, range(9))
    train(plain, reference, range(14))
    params[0].data = params[0].data.clone()
    params[1].data = params[1].data.t().contiguous().t()
    params[5].data = params[5].data.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    train(params, optimizer, range(9, 14))
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_a_parameter_of_another_shape_is_refused_before_anything_changes() -> None:
    params, optimizer = make()
    train(params, optimizer, range(9))
    params[0].data = torch.zeros(6, 24)
    for param in params:
        param.grad = torch.ones_like(param)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"exp_avg=torch.float32 \(4, 24\) for the parameter of shape \(6, 24\)"):
        optimizer.step()
    assert_alike(snapshot(optimizer), before)
    del optimizer.state[params[0]]
    optimizer.step()


@pytest.fixture
def swapping() -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)  # as DTensors do without it
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pause", [0, 2, 9])
def test_modules_can_be_cast_in_a_run(swapping: None, dtype: torch.dtype, pause: int) -> None:
    model = nn.Sequential(nn.Linear(24, 4), nn.Linear(4, 12))
    params = list(model.parameters())
    optimizer = SCAO(params, lr=0.01, **QUICK)
    train(params, optimizer, range(pause))
    twin = copy.deepcopy(model)
    model.to(dtype)
    assert [*map(id, model.parameters())] == [*map(id, params)]
    for param, other in zip(params, twin.parameters(), strict=True):
        other.data = param.detach().clone()
    resumed = SCAO(twin.parameters(), lr=0.01, **QUICK)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(params, optimizer, range(pause, 12))
    train(list(twin.parameters()), resumed, range(pause, 12))
    assert params[0].dtype == dtype
    assert_alike(params, list(twin.parameters()))
    model.to(torch.float32)
    train(params, optimizer, range(12, 14))
    assert all(torch.isfinite(param).all() for param in params)


@pytest.mark.parametrize(
    "grad",
    [
        lambda plain: plain.t().contiguous().t(),
        lambda plain: torch.cat([plain, plain], 1)[:, : plain.shape[1]],
        lambda plain: plain.repeat_interleave(2, 0)[::2],
        lambda plain: plain.clone().requires_grad_(),
    ],
    ids=["transposed", "columns", "rows", "requires grad"],
)
def test_layouts_of_gradients_make_no_difference(grad: Callable[[Tensor], Tensor]) -> None:
    runs = []
    for change in (lambda plain: plain, grad):
        weight = nn.Parameter(torch.ones(6, 24))
        optimizer = SCAO([weight], **QUICK)
        for step in range(10):
            plain = torch.randn(6, 24, generator=torch.Generator().manual_seed(step))
            weight.grad = change(plain) if step % 3 else plain
            optimizer.step()
        runs.append(weight)
    torch.testing.assert_close(*runs)


# --- what wrappers keep in the state ---


class Lookahead:
    """Fast and slow weights, the slow ones in ``optimizer.state``, as several published wrappers have it."""

    def __init__(self, optimizer: SCAO, place: Callable[[nn.Parameter], dict[str, Any]]) -> None:
        self.optimizer, self.place, self.count = optimizer, place, 0

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.count += 1
        if self.count % 3:
            return
        for param in (param for group in self.optimizer.param_groups for param in group["params"]):
            slow = self.place(param).setdefault("slow_param", param.detach().clone())
            slow.add_(param - slow, alpha=0.5)
            param.copy_(slow)
            self.place(param)["counter"] = self.count
            self.place(param)["notes"] = {"slow": [slow.dtype]}


def test_what_a_wrapper_keeps_in_the_state_stays_there_and_is_saved() -> None:
    inside, first = make()
    outside, second = make()
    kept: dict[nn.Parameter, dict[str, Any]] = {}
    train(inside, Lookahead(first, lambda param: first.state[param]), range(12))
    train(outside, Lookahead(second, lambda param: kept.setdefault(param, {})), range(12))
    assert_alike(inside, outside)
    assert_alike(
        [first.state[param]["slow_param"] for param in inside], [kept[param]["slow_param"] for param in outside]
    )
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    _, resumed = make(torch.bfloat16)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for mine, theirs in zip(resumed.state.values(), first.state.values(), strict=True):
        assert torch.equal(mine["slow_param"], theirs["slow_param"]) and mine["slow_param"] is not theirs["slow_param"]
        assert (mine["counter"], mine["notes"]) == (12, theirs["notes"])


def test_what_a_wrapper_keeps_before_the_first_step_is_no_state_of_ours() -> None:
    params, optimizer = make()
    for param in params:
        optimizer.state[param]["slow_param"] = param.detach().clone()
    assert optimizer.statistics() == []
    _, other = make()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(params, optimizer, range(6))
    assert all("slow_param" in entry for entry in [*optimizer.state.values(), *other.state.values()])
