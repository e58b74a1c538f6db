"""The rule of matrices with two large sides, and who gets it: its equations, limits, states and the model's vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scao_hf import SCAO, create_scao_optimizer
from scao_hf.experts import find_vocabulary
from scao_hf.rules.orthogonal import STEP_SIZE, polar

LR = 1e-2


def moves(grads: list[Tensor], **options: Any) -> list[Tensor]:
    """The steps that a matrix of zeros takes, in learning rates."""
    param = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = SCAO([param], lr=LR, weight_decay=0.0, **options)
    steps = []
    for grad in grads:
        before = param.detach().clone()
        param.grad = grad.clone()
        optimizer.step()
        steps.append((before - param.detach()) / LR)
    return steps


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_polar_keeps_the_singular_vectors_and_makes_the_values_nearly_one() -> None:
    left, right = torch.linalg.qr(draw(40, 40)).Q, torch.linalg.qr(draw(90, 40, seed=1)).Q
    values = torch.logspace(0, -1.5, 40, dtype=torch.float64)
    inside = left.T @ polar((left * values @ right.T)[None])[0] @ right
    torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-12)
    assert inside.diagonal().min() > 0.6 and inside.diagonal().max() < 1.25


@pytest.mark.parametrize("shape", [(70, 200), (200, 70), (80, 80)])
def test_every_row_and_column_moves_alike_by_the_size_of_a_step(shape: tuple[int, int]) -> None:
    last = moves([draw(*shape, seed=step) for step in range(30)], rule="orthogonal")[-1]
    rms = STEP_SIZE * math.sqrt(min(shape))
    # The iteration ends between 0.7 and 1.2.
    assert float(last.square().mean().sqrt()) == pytest.approx(0.87 * rms, rel=0.1)
    for dim in (0, 1):
        sizes = last.square().mean(dim).sqrt()
        assert sizes.max() < 1.6 * sizes.min()


def rescaled(matrix: Tensor) -> Tensor:
    """With rows of different sizes, as training leaves them."""
    return matrix * draw(len(matrix), 1, seed=9).exp()


@pytest.mark.parametrize(
    ("weights", "random"),
    [
        ([draw(65, 65, seed=seed) for seed in range(5)], True),
        ([draw(70, 200).to(torch.bfloat16) * 1e-20], True),
        ([torch.rand(80, 90) - 0.5], True),
        ([nn.init.orthogonal_(torch.empty(100, 70))], True),
        ([torch.distributions.Cauchy(0, 1).sample((90, 90))], True),
        ([draw(80, 90), draw(80, 90), torch.zeros(90, 80)], True),
        ([rescaled(draw(70, 200))], False),
        ([rescaled(draw(200, 70)).mT.to(torch.bfloat16)], False),
        ([rescaled(draw(80, 90)), rescaled(draw(90, 80)), draw(80, 90)], False),
        ([draw(128, 300), torch.zeros(200, 128)] * 4, False),
        ([draw(66, 70), torch.zeros(70, 66)] * 32, False),
        ([draw(66, 70), torch.zeros(70, 66)] * 33, False),
        ([draw(66, 70)] * 2 + [draw(66, 70), torch.zeros(70, 66)] * 4, False),
    ],
    ids="square,tiny,uniform,orthogonal,heavy,zeros,rows,columns,one new layer,LoRA,64 of LoRA,66 of LoRA,new and LoRA".split(
        ","
    ),
)
def test_auto_looks_at_the_weights(weights: list[Tensor], random: bool) -> None:
    params = [nn.Parameter(weight.clone() if weight.dtype == torch.bfloat16 else weight.float()) for weight in weights]
    optimizer = SCAO([{"params": [param]} for param in params])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert {group["from_scratch"] for group in optimizer.param_groups} == {random}
    assert all(("col" in optimizer.state[param]) == random for param in params)


@pytest.mark.parametrize("frozen", [torch.empty(70, 80, device="meta"), torch.randint(-9, 9, (70, 80)).to(torch.int8)])
def test_auto_does_not_look_at_weights_without_values(frozen: Tensor) -> None:
    trained = nn.Parameter(rescaled(draw(70, 200)).float())
    optimizer = SCAO([*[nn.Parameter(frozen, requires_grad=False) for _ in range(3)], trained])
    trained.grad = torch.ones_like(trained)
    optimizer.step()
    assert optimizer.param_groups[0]["from_scratch"] is False


def test_what_the_weights_were_is_kept_with_the_state() -> None:
    param = nn.Parameter(draw(70, 90).float())
    optimizer = SCAO([param])
    param.grad = draw(70, 90, seed=1).float()
    optimizer.step()
    trained = nn.Parameter(rescaled(draw(70, 90)).float())
    resumed = SCAO([trained])
    resumed.load_state_dict(optimizer.state_dict())
    trained.grad = param.grad
    resumed.step()
    assert resumed.param_groups[0]["from_scratch"] is True and "col" in resumed.state[trained]


def test_auto_takes_the_orthogonal_rule_where_both_sides_are_large() -> None:
    params = [nn.Parameter(draw(*shape).float()) for shape in ((65, 300), (300, 65), (64, 300), (300,))]
    optimizer = SCAO(params, from_scratch=True, warmup_steps=2, precond_freq=2)
    for step in range(4):
        for param in params:
            param.grad = draw(*param.shape, seed=step).float()
        optimizer.step()
    held = [set(optimizer.state[param]) - {"step", "taken", "level"} for param in params]
    assert held[0] == held[1] == {"exp_avg", "col"}
    assert "vectors" in held[2] and held[3] == {"exp_avg", "exp_avg_sq"}
    assert [row["block"] for row in optimizer.statistics()] == [[65, 300], [65, 300], [64, 300]]


def test_a_gradient_of_one_entry_is_no_whole_matrix_s_step() -> None:
    """The size follows the rank: one direction of 80 moves as much as it would among all of them."""
    grad = torch.zeros(80, 120)
    grad[3, 5] = 1.0
    step = moves([grad], rule="orthogonal")[0]
    assert float(step[3, 5]) == pytest.approx(STEP_SIZE * math.sqrt(80 * 120), rel=0.35)
    assert int(step.count_nonzero()) == 1


@pytest.mark.parametrize("first", [0, 3])
def test_a_step_without_gradient_is_finite(first: int) -> None:
    grads = [draw(70, 80, seed=step).float() for step in range(first)] + [torch.zeros(70, 80)] * 3
    assert all(bool(step.isfinite().all()) for step in moves(grads, rule="orthogonal"))
    if not first:
        assert not any(bool(step.any()) for step in moves(grads, rule="orthogonal"))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    grads = [draw(70, 80, seed=step).float() for step in range(4)]
    grads[2][0, 0] = math.nan
    steps = moves(grads, rule="orthogonal")
    assert not steps[2].any() and steps[3].isfinite().all()
    torch.testing.assert_close(steps[3], moves([grads[0], grads[1], grads[3]], rule="orthogonal")[2])


@pytest.mark.parametrize(("moment_dtype", "most"), [("float32", 4.07), ("bfloat16", 2.07), ("int8", 1.1)])
def test_bytes_of_a_state(moment_dtype: str, most: float) -> None:
    param = nn.Parameter(torch.empty(512, 2048, device="meta"))
    report = SCAO([param], from_scratch=True, moment_dtype=moment_dtype).memory_report()
    assert report["peak"] == report["total"] <= most * param.numel()


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16", "int8"])
def test_a_resumed_run_continues_to_the_bit(moment_dtype: str) -> None:
    def run(param: nn.Parameter, optimizer: SCAO, steps: range) -> None:
        for step in steps:
            param.grad = draw(70, 90, seed=step).float()
            optimizer.step()

    whole = nn.Parameter(torch.zeros(70, 90))
    optimizer = SCAO([whole], from_scratch=True, moment_dtype=moment_dtype)
    run(whole, optimizer, range(4))
    resumed = nn.Parameter(whole.detach().clone())
    other = SCAO([resumed], moment_dtype=moment_dtype)
    other.load_state_dict(optimizer.state_dict())
    run(whole, optimizer, range(4, 8))
    run(resumed, other, range(4, 8))
    assert torch.equal(whole, resumed)


def test_a_state_of_the_eigenbasis_continues_by_its_rule() -> None:
    param = nn.Parameter(draw(70, 90).float())
    older = SCAO([param], rule="eigenbasis")
    param.grad = draw(70, 90, seed=1).float()
    older.step()
    newer = SCAO([param])
    newer.load_state_dict(older.state_dict())
    newer.step()
    assert newer.param_groups[0]["rule"] == "eigenbasis"
    with pytest.raises(ValueError, match="belongs to rule='eigenbasis', the optimizer has rule='orthogonal'"):
        SCAO([param], rule="orthogonal").load_state_dict(older.state_dict())


class Model(nn.Module):
    """Tied and untied ways to a vocabulary, with layers as wide as it is large."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 80)
        self.body = nn.Linear(80, 96)
        self.back = nn.Linear(96, 80)
        self.lm_head = nn.Linear(80, 96, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.back(self.body(self.embed(tokens))))
        return out


def test_embeddings_and_heads_take_adamw_s_steps() -> None:
    torch.manual_seed(0)
    model = Model()
    assert find_vocabulary(model) == {model.embed.weight, model.lm_head.weight}
    optimizer = create_scao_optimizer(model, lr=LR)
    apart = {id(param) for group in optimizer.param_groups if group.get("vocabulary") for param in group["params"]}
    assert apart == {id(model.embed.weight), id(model.lm_head.weight)}
    theirs = nn.Parameter(model.embed.weight.detach().clone())
    reference = torch.optim.AdamW([theirs], lr=LR, betas=optimizer.param_groups[0]["betas"], weight_decay=0.01)
    for step in range(5):
        optimizer.zero_grad()
        model(torch.arange(step, 60)).square().mean().backward()
        theirs.grad = model.embed.weight.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(model.embed.weight.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "adamw"),
    [
        ({"from_scratch": True}, True),
        ({"rule": "orthogonal"}, True),
        ({"from_scratch": False}, False),
        ({"rule": "eigenbasis"}, False),
        ({"rule": "published"}, False),
    ],
)
def test_embeddings_take_the_rule_of_the_other_matrices_unless_that_is_the_orthogonal_one(
    options: dict[str, Any], adamw: bool
) -> None:
    model = Model()
    optimizer = create_scao_optimizer(model, **options)
    model(torch.arange(9)).sum().backward()
    optimizer.step()
    plain = {"step", "taken", "level", "exp_avg", "exp_avg_sq"}
    assert (set(optimizer.state[model.embed.weight]) == plain) == adamw


def test_a_group_can_ask_for_adamw_in_a_plain_loop() -> None:
    model = Model()
    rest = [param for name, param in model.named_parameters() if name != "embed.weight"]
    optimizer = SCAO([{"params": rest}, {"params": [model.embed.weight], "rule": "adamw"}])
    model(torch.arange(9)).sum().backward()
    optimizer.step()
    assert set(optimizer.state[model.embed.weight]) == {"step", "taken", "level", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_figures_do_not_ask_for_moments_that_are_encoded(kind: str) -> None:
    param = torch.nn.Parameter(torch.randn(80, 70))
    optimizer = SCAO([param], rule="orthogonal", moment_dtype=kind)
    param.grad = torch.randn(80, 70)
    optimizer.step()
    assert optimizer.metrics()["scao/rank"] == 70 and optimizer.statistics()[0]["rank"] == 70
