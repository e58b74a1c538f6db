"""LoRA on stacked experts: what is found, how it is packed, and that each expert is stepped as a matrix of its own."""

from __future__ import annotations

import copy
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scao_hf import SCAO, create_scao_optimizer, ops, options, reference
from scao_hf.blocks import Packing, unpack
from scao_hf.experts import find_experts
from scao_hf.rules import eigenbasis
from scao_hf.rules.base import Bucket, Step
from scao_hf.rules.eigenbasis import Eigenbasis, plain_row

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
from moe_models import STYLES, TARGETS, backward, base_model, tokens, with_lora  # noqa: E402

QUICK: dict[str, Any] = {"warmup_steps": 4, "blend_steps": 3, "precond_freq": 4, "min_precond_updates": 1, "k_max": 4}
EXPERTS, RANK, LONG = 5, 3, 17


def packed_shape(side: str) -> tuple[int, int]:
    return (EXPERTS * RANK, LONG) if side == "A" else (LONG, EXPERTS * RANK)


def packed(side: str, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(1)
    return torch.nn.Parameter(torch.randn(packed_shape(side), generator=generator, dtype=torch.float64).to(dtype))


def gradients(side: str, steps: int, idle: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(steps):
        grad = torch.randn(packed_shape(side), generator=generator, dtype=torch.float64)
        grad = grad * torch.linspace(0.1, 2, grad.shape[1], dtype=grad.dtype)
        if idle is not None:
            unpack(grad, Packing(side, EXPERTS))[idle].zero_()
        found.append(grad)
    return found


@pytest.mark.parametrize("style", STYLES)
def test_unpacked_factors_are_those_that_peft_multiplies(style: str) -> None:
    model = with_lora(base_model(style))
    found = find_experts(model)
    adapted = [module for module in model.modules() if hasattr(module, "parameter_name")]
    assert len(adapted) == 4 and len(found) == 8
    for module in adapted:
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        product = 2 * unpack(b, found[b]) @ unpack(a, found[a])
        delta = module.get_delta_weight("default")
        torch.testing.assert_close(delta, product if delta.shape == product.shape else product.mT)


@pytest.mark.parametrize("style", ["qwen3", "mixtral"])
def test_the_ordinary_list_of_seven_modules_gives_packed_factors_that_are_found(style: str) -> None:
    from peft import LoraConfig, get_peft_model

    names = ["w1", "w2", "w3"] if style == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", *names])
    model = get_peft_model(base_model(style), config)
    found = find_experts(model)
    experts = {name for name, param in model.named_parameters() if "experts" in name and "lora_" in name}
    assert experts and {name for name, param in model.named_parameters() if param in found} == experts
    # PEFT doubles the rank of the fused gate_up projection.
    ranks = {unpack(param, packing).shape[1] for param, packing in found.items() if packing.side == "A"}
    assert ranks == {4, 8}


def test_a_model_without_experts_and_frozen_adapters_give_nothing() -> None:
    model = with_lora(base_model("qwen3"))
    assert find_experts(base_model("qwen3")) == {}
    model.requires_grad_(False)
    assert find_experts(model) == {}


@pytest.mark.parametrize("rule", options.MATRIX_RULES)
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_packed_step_is_the_step_of_separate_parameters(side: str, rule: str) -> None:
    whole = packed(side)
    packing = Packing(side, EXPERTS)
    parts = [torch.nn.Parameter(part.clone()) for part in unpack(whole.detach(), packing)]
    settings = {**QUICK, "rule": rule, "lr": 0.01, "weight_decay": 0.1}
    together, apart = SCAO([whole], experts={whole: packing}, **settings), SCAO(parts, **settings)
    for grad in gradients(side, 30):
        whole.grad = grad
        for part, own in zip(parts, unpack(grad, packing), strict=True):
            part.grad = own.clone()
        together.step()
        apart.step()
    assert together.metrics()["scao/phase"] == 2
    difference = unpack(whole.detach(), packing) - torch.stack([part.detach() for part in parts])
    assert difference.abs().max() <= 1e-12


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_packed_step_is_the_reference_rule_expert_by_expert(side: str) -> None:
    whole, packing = packed(side), Packing(side, EXPERTS)
    start = whole.detach().clone()
    settings = {**QUICK, "precond_freq": 1, "lr": 0.01, "weight_decay": 0.1}
    optimizer = SCAO([whole], experts={whole: packing}, **settings)
    grads = gradients(side, 20)
    for grad in grads:
        whole.grad = grad.clone()
        optimizer.step()
    group = optimizer.param_groups[0]
    for expert in range(EXPERTS):

        def small_first(tensor: Tensor, expert: int = expert) -> Tensor:
            matrix = unpack(tensor, packing)[expert]
            return matrix if side == "A" else matrix.T

        alone = reference.eigenbasis(small_first(start), [small_first(grad) for grad in grads], group)[-1]
        # The bases of the long side are held in the state's own dtype, float64 here.
        assert (alone - small_first(whole.detach())).abs().max() <= 1e-8


@pytest.mark.parametrize("active", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("kernels", ["as built", "pytorch"])
def test_the_second_moment_from_the_curvature_is_adamws_at_every_activity(
    active: float, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(U12), which the size of the steps is measured by, was 6.6 times as large for experts with every tenth token."""
    if kernels == "pytorch":
        monkeypatch.setattr(ops, "NATIVE", frozenset())
    draw = torch.Generator().manual_seed(1)
    whole, packing = torch.nn.Parameter(torch.zeros(EXPERTS * 4, 60)), Packing("A", EXPERTS)
    optimizer = SCAO([whole], lr=1e-3, experts={whole: packing}, **QUICK)
    square = torch.zeros(EXPERTS, 4, 60)
    for step in range(60):
        grad = torch.randn(EXPERTS, 4, 60, generator=draw) + 0.3
        grad *= (torch.rand(EXPERTS, generator=draw) < active)[:, None, None] if step > 1 else 1
        square.lerp_(grad.square(), 0.01)
        whole.grad = grad.flatten(0, 1)
        optimizer.step()
        if step > 5:
            state = {name: value for name, value in optimizer.state[whole].items() if isinstance(value, Tensor)}
            bucket = Bucket(optimizer.param_groups[0], (4, 60), step, torch.float32, Eigenbasis())
            row = plain_row(Step(bucket, state, step, slice(0, 0), finite=torch.ones(EXPERTS, 1, 1)))
            assert (row.mean((1, 2)) / square.mean((1, 2)) - 1).abs().max() < 0.1


@pytest.mark.parametrize("rule", ["eigenbasis", "published"])
def test_a_state_without_activity_goes_on_as_it_was(rule: str) -> None:
    """Layout version 2: saved again as such, and its steps are those of experts that have tokens in every step."""
    whole, packing = packed("A"), Packing("A", EXPERTS)

    def fresh() -> tuple[torch.nn.Parameter, SCAO]:
        param = torch.nn.Parameter(whole.detach().clone())
        return param, SCAO([param], lr=0.01, rule=rule, experts={param: packing}, **QUICK)

    (param, optimizer), (other, loaded) = fresh(), fresh()
    grads = gradients("A", 16)
    for grad in grads[:10]:
        param.grad = grad.clone()
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        del entry["activity"], entry["checksum"]
    saved["param_groups"][0]["scao_version"] = 2
    with torch.no_grad():
        other.copy_(param)
    loaded.load_state_dict(saved)
    for grad in grads[10:]:
        param.grad, other.grad = grad.clone(), grad.clone()
        optimizer.step()
        loaded.step()
    assert "activity" not in loaded.state[other] and loaded.state_dict()["param_groups"][0]["scao_version"] == 2
    torch.testing.assert_close(param, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_idle_expert_keeps_its_curvature_and_its_moments_decay(dtype: torch.dtype) -> None:
    whole, packing = packed("B", dtype), Packing("B", EXPERTS)
    optimizer = SCAO([whole], lr=0.01, weight_decay=0, experts={whole: packing}, **QUICK)
    for grad in gradients("B", 12):
        whole.grad = grad.to(dtype)
        optimizer.step()
    state = optimizer.state[whole]
    before = {name: field.clone() for name, field in state.items() if isinstance(field, Tensor)}
    others = [expert for expert in range(EXPERTS) if expert != 2]
    for grad in gradients("B", 9, idle=2):
        whole.grad = grad.to(dtype)
        optimizer.step()
    now = optimizer.state[whole]
    assert torch.equal(now["factor"][2], before["factor"][2])
    assert all(not torch.equal(now["factor"][expert], before["factor"][expert]) for expert in others)
    inside = [torch.linalg.vector_norm(s["inside_avg"][2]) for s in (before, now)]
    assert inside[1] < 0.5 * inside[0], "0.9^9 is 0.39"
    # Nothing new is seen from one refresh to the next, so the basis of the small side stays, but for signs.
    basis = now["vectors"][2].clone()
    for grad in gradients("B", 9, idle=2):
        whole.grad = grad.to(dtype)
        optimizer.step()
    turned = (optimizer.state[whole]["vectors"][2].mT @ basis).abs()
    torch.testing.assert_close(turned, torch.eye(RANK, dtype=turned.dtype), atol=2e-3, rtol=0)
    assert torch.isfinite(whole).all()


def test_fewer_tokens_than_the_rank_take_bounded_steps() -> None:
    torch.manual_seed(0)
    whole, packing = torch.nn.Parameter(torch.zeros(4 * 8, 40)), Packing("A", 4)
    optimizer = SCAO([whole], lr=1.0, weight_decay=0, experts={whole: packing}, **QUICK)
    largest = 0.0
    for _ in range(60):
        whole.grad = (torch.randn(4, 8, 2) @ torch.randn(4, 2, 40)).flatten(0, 1)
        before = whole.detach().clone()
        optimizer.step()
        largest = max(largest, float((whole.detach() - before).square().mean().sqrt()))
    assert optimizer.metrics()["scao/phase"] == 2
    assert largest <= 1.05, "AdamW's steps have an RMS of one learning rate at most"


@pytest.mark.parametrize(("dtype", "settled", "bound"), [(torch.float64, 0, 1e-6), (torch.float32, 10, 0.03)])
def test_steps_do_not_depend_on_the_basis_of_directions_without_gradients(
    dtype: torch.dtype, settled: int, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts that only ever see two directions of eight: any basis of the other six is an eigenbasis.

    A decomposition may return another one each time. Momentum and second moments move along with it, so that nothing
    jumps; in float32 but for the ramp, in which rounding errors of those directions still count.
    """
    right, random = ops.eigh, torch.Generator().manual_seed(3)
    turned: list[int] = []

    def turning(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor] | None:
        found = right(factor, damping)
        assert found is not None
        values, vectors = found[0], found[1].clone()
        for index, null in enumerate(values <= 1e-6 * values[:, :1]):
            if (count := int(null.sum())) > 1:
                rotation = torch.linalg.qr(torch.randn(count, count, generator=random, dtype=torch.float64))[0]
                vectors[index][:, null] = vectors[index][:, null] @ rotation.to(vectors)
                turned.append(count)
        return values, vectors

    paths = []
    for decomposition in (right, turning):
        monkeypatch.setattr(eigenbasis, "eigh", decomposition)
        draw = torch.Generator().manual_seed(0)
        whole = torch.nn.Parameter(torch.randn(4 * 8, 40, generator=draw, dtype=torch.float64).to(dtype))
        optimizer = SCAO([whole], lr=0.01, weight_decay=0, experts={whole: Packing("A", 4)}, **QUICK)
        seen = torch.randn(4, 8, 2, generator=draw, dtype=torch.float64)
        path = [whole.detach().clone()]
        for _ in range(30):
            whole.grad = (seen @ torch.randn(4, 2, 40, generator=draw, dtype=torch.float64)).flatten(0, 1).to(dtype)
            optimizer.step()
            path.append(whole.detach().clone())
        paths.append(torch.stack(path).diff(dim=0)[settled:])
    assert turned.count(6) >= 12, "there was nothing to turn"
    difference = (paths[0] - paths[1]).flatten(1).norm(dim=1) / paths[0].flatten(1).norm(dim=1)
    assert difference.max() <= bound


def test_curvature_of_a_large_mixture_is_a_twentieth_of_its_adapter() -> None:
    # Qwen3-30B-A3B: 48 layers of 128 experts, hidden 2048, expert width 768; r = 16, 32 for gate and up together.
    shapes = {"A": [(128 * 32, 2048), (128 * 16, 768)], "B": [(2 * 768, 128 * 32), (2048, 128 * 16)]}
    params = {
        torch.nn.Parameter(torch.empty(shape, device="meta")): Packing(side, 128)
        for side, both in shapes.items()
        for shape in both
    }
    report = SCAO(list(params), experts=params).memory_report()
    adapter = sum(4 * param.numel() for param in params)
    assert report["curvature"] <= 0.05 * adapter
    # As one matrix each, the small sides would be blocks that mix experts, as large as they may be.
    assert SCAO(list(params), max_precond_dim=512).memory_report()["curvature"] > 4 * report["curvature"]


@pytest.mark.parametrize("settings", [{}, {"use_int8_ema": True}, {"rule": "published"}, {"moment_dtype": "int8"}])
def test_resume_is_bit_exact(settings: dict[str, Any]) -> None:
    def fresh() -> tuple[torch.nn.Parameter, SCAO]:
        whole = packed("B", torch.float32)
        return whole, SCAO([whole], lr=0.01, experts={whole: Packing("B", EXPERTS)}, **{**QUICK, **settings})

    grads = [grad.float() for grad in gradients("B", 20, idle=1)]
    straight, optimizer = fresh()
    for grad in grads:
        straight.grad = grad.clone()
        optimizer.step()
    for pause in (1, 4, 9):
        first, before = fresh()
        for grad in grads[:pause]:
            first.grad = grad.clone()
            before.step()
        buffer = io.BytesIO()
        torch.save(before.state_dict(), buffer)
        buffer.seek(0)
        second, after = fresh()
        with torch.no_grad():
            second.copy_(first)
        after.load_state_dict(torch.load(buffer, weights_only=True))
        for grad in grads[pause:]:
            second.grad = grad.clone()
            after.step()
        assert torch.equal(second, straight), f"paused after {pause}"


def test_state_of_another_packing_is_refused() -> None:
    whole = packed("A")
    saved = SCAO([whole], experts={whole: Packing("A", EXPERTS)})
    whole.grad = torch.randn_like(whole)
    saved.step()
    for other in (SCAO([whole]), SCAO([whole], experts={whole: Packing("A", RANK)})):
        with pytest.raises(
            ValueError, match=r"of 5 stacked experts, the optimizer.s group of (ordinary|A factors of 3)"
        ):
            other.load_state_dict(copy.deepcopy(saved.state_dict()))


def test_a_wrong_number_of_experts_is_refused_by_name_and_number() -> None:
    whole = packed("A")
    with pytest.raises(ValueError, match=r"A of shape \(15, 17\) cannot hold 4 experts"):
        SCAO([whole], experts={whole: Packing("A", 4)})


def test_groups_added_later_may_name_their_experts() -> None:
    plain, whole = torch.nn.Parameter(torch.randn(4, 6)), packed("B")
    optimizer = SCAO([plain])
    optimizer.add_param_group(
        {"params": [plain.new_zeros(3).requires_grad_(), whole], "experts": {whole: Packing("B", 5)}}
    )
    kinds = [(group.get("expert_side"), group.get("expert_count")) for group in optimizer.param_groups]
    assert kinds == [(None, None), (None, None), ("B", 5)]


@pytest.mark.parametrize("style", STYLES)
def test_create_scao_optimizer_trains_expert_by_expert(style: str) -> None:
    model = with_lora(base_model(style), random_b=False)
    optimizer = create_scao_optimizer(model, lr=5e-3, **QUICK)
    losses = []
    for _ in range(16):
        optimizer.zero_grad()
        losses.append(float(backward(model)))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    names = [row["name"] for row in optimizer.statistics()]
    assert len(names) == 8 * 4 and all(name.endswith("]") for name in names)
    for param, packing in find_experts(model).items():
        assert optimizer.state[param]["factor"].shape[0] == packing.experts == 4
        assert len({float(norm) for norm in optimizer.state[param]["factor"].flatten(1).norm(dim=1)}) == 4


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": line.tolist(), "labels": line.tolist()} for line in tokens(rows=16)]


def arguments(tmp_path: Path, **extra: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        per_device_train_batch_size=2,
        logging_steps=2,
        **{"max_steps": 8, "save_strategy": "no", **extra},
    )


def test_the_trainer_finds_the_experts_and_resumes_exactly(tmp_path: Path) -> None:
    from scao_hf import SCAOTrainer

    def run(folder: str, resume: bool = False, **extra: Any) -> dict[str, Tensor]:
        model = with_lora(base_model("qwen3"), random_b=False)
        trainer = SCAOTrainer(
            model=model, args=arguments(tmp_path / folder, **extra), train_dataset=rows(), scao_kwargs=QUICK
        )
        trainer.train(resume_from_checkpoint=resume)
        sides = [group.get("expert_side") for group in trainer.optimizer.param_groups]
        assert sides == ["A", "B"]
        return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}

    saving = {"save_strategy": "steps", "save_steps": 6}
    straight = run("whole", **saving)
    run("parts", **saving)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-8")
    resumed = run("parts", resume=True, **saving)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize("loraplus", [None, 4.0])
def test_the_axolotl_plugin_finds_the_experts(tmp_path: Path, loraplus: float | None) -> None:
    pytest.importorskip("axolotl")
    from axolotl.utils.dict import DictDefault

    from axolotl_plugin import SCAOPlugin

    model = with_lora(base_model("qwen3"), random_b=False)
    config = DictDefault(
        {"optimizer": "scao", "scao_warmup_steps": 2, "scao_precond_freq": 2, "loraplus_lr_ratio": loraplus}
    )
    trainer = transformers.Trainer(model=model, args=arguments(tmp_path), train_dataset=rows())
    SCAOPlugin().post_trainer_create(config, trainer)
    if loraplus is None:
        trainer.create_optimizer()
        optimizer = trainer.optimizer
    else:
        from peft.optimizers import create_loraplus_optimizer

        cls, kwargs = trainer.optimizer_cls_and_kwargs
        optimizer = create_loraplus_optimizer(model, cls, loraplus_lr_ratio=loraplus, **kwargs)
    kinds = {
        (group.get("expert_side"), group.get("expert_count")) for group in optimizer.param_groups if group["params"]
    }
    assert kinds == {("A", 4), ("B", 4)}
    assert len([param for group in optimizer.param_groups for param in group["params"]]) == len(TARGETS) * 4
