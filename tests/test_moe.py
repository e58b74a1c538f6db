"""The fused forward of LoRA on experts against PEFT's own with eager experts, and experts in 4 bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
from moe_models import STYLES, TARGETS, backward, base_model, tokens, with_lora  # noqa: E402

from scao_hf.moe import dequantize_experts, fuse_moe_lora, quantize_experts, unfuse_moe_lora  # noqa: E402
from scao_hf.moe.grouped import GroupedLoRA, Stacked, _has_grouped_kernel, has_grouped_product, route  # noqa: E402
from scao_hf.moe.nf4 import quantized  # noqa: E402
from scao_hf.tools.simulate import set_checkpointing  # noqa: E402

EXPERTS, TOKENS = 6, 11


def outermost(model: Any) -> Any:
    """The module that a mixture's block calls: the first of the nested wrappers."""
    return next(module for module in model.modules() if hasattr(module, "parameter_name"))


def routing(kind: str, hidden: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their two experts each, and what these count; float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, hidden, generator=generator, dtype=torch.float64)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    if kind == "uneven":
        scores[:, 1], scores[:, 3:] = 2.0, -1.0  # expert 1 has every token, 0 and 2 share the rest, 3 to 5 have none
    elif kind == "one token":
        x, scores = x[:1], scores[:1]
    shares, choices = scores.topk(2)
    return x, choices, shares


def passes(model: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """What the experts return, and every gradient."""
    x, choices, shares = (inputs[0].clone().requires_grad_(), inputs[1], inputs[2].clone().requires_grad_())
    model.zero_grad()
    out = outermost(model)(x, choices, shares)
    weight = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).cos()
    (out * weight).sum().backward()
    found = {"out": out.detach(), "x": x.grad, "shares": shares.grad}
    wrapper = outermost(model)
    found |= {name: param.grad for name, param in wrapper.named_parameters() if param.requires_grad}
    return {name: torch.zeros(()) if value is None else value.clone() for name, value in found.items()}


@pytest.mark.parametrize("kind", ["even", "uneven", "one token"])
@pytest.mark.parametrize("style", STYLES)
def test_forward_and_gradients_are_those_of_eager_experts(style: str, kind: str) -> None:
    model = with_lora(base_model(style, experts=EXPERTS, layers=1, dtype=torch.float64))
    inputs = routing(kind)
    expected = passes(model, inputs)
    assert fuse_moe_lora(model) == ["base_model.model.model.layers.0.mlp.experts"]
    found = passes(model, inputs)
    assert found.keys() == expected.keys() and len(found) == 7
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-12
    if kind == "even":
        assert all(value.abs().max() > 1e-3 for value in found.values()), "a test of zeros would show nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token_gives_zero_gradients(dtype: torch.dtype) -> None:
    model = with_lora(base_model("qwen3", experts=EXPERTS, layers=1, dtype=dtype))
    fuse_moe_lora(model)
    x, choices, shares = routing("even")
    found = passes(model, (x[:0].to(dtype), choices[:0], shares[:0].to(dtype)))
    assert found.pop("out").shape == (0, 32) and not any(value.any() for value in found.values())
    assert sum("lora_" in name for name in found) == 4


@pytest.mark.parametrize("kind", ["even", "uneven", "one token"])
@pytest.mark.parametrize("style", STYLES)
def test_float32_takes_grouped_products_which_give_the_same(style: str, kind: str, monkeypatch: Any) -> None:
    from scao_hf.moe import grouped

    if not grouped._has_grouped_kernel("cpu", torch.float32):
        pytest.skip("needs a PyTorch with grouped products on CPUs")
    model = with_lora(base_model(style, experts=EXPERTS, layers=1))
    x, choices, shares = routing(kind)
    inputs = x.float(), choices, shares.float()
    expected = passes(model, inputs)
    monkeypatch.setattr(grouped, "_forward_by_expert", None)
    fuse_moe_lora(model)
    for name, value in passes(model, inputs).items():
        assert (expected[name] - value).norm() <= 1e-5 * expected[name].norm(), name


def test_decoded_converted_and_ragged_weights_are_read_expert_by_expert_on_a_cpu() -> None:
    rows, weight = torch.ones(4, 8), torch.ones(2, 16, 8)
    factors = [torch.ones(2, 4, 8), torch.ones(2, 4, 16)]
    able = has_grouped_product(rows, Stacked(weight, False), factors)
    assert able == _has_grouped_kernel("cpu", torch.float32)
    assert not has_grouped_product(rows.bfloat16(), Stacked(weight, False), factors)
    assert not has_grouped_product(rows, Stacked(weight[:, :15], False), factors)
    assert not has_grouped_product(rows, Stacked(weight, False), [torch.ones(2, 3, 8), torch.ones(2, 3, 16)])


@pytest.mark.parametrize("hidden, inner, rank", [(34, 54, 3), (32, 64, 1), (20, 12, 5)])
def test_ragged_sizes(hidden: int, inner: int, rank: int) -> None:
    model = with_lora(base_model("qwen3", experts=EXPERTS, layers=1, hidden=hidden, inner=inner).double(), rank=rank)
    inputs = routing("uneven", hidden)
    expected = passes(model, inputs)
    fuse_moe_lora(model)
    for name, value in passes(model, inputs).items():
        assert (expected[name] - value).abs().max() <= 1e-12


@pytest.mark.parametrize("targets", [TARGETS[:1], TARGETS[1:], TARGETS[::-1]])
def test_wrappers_in_any_order_and_number(targets: list[str]) -> None:
    model = with_lora(base_model("qwen3", experts=EXPERTS, layers=1, dtype=torch.float64), targets=targets)
    inputs = routing("even")
    expected = passes(model, inputs)
    fuse_moe_lora(model)
    for name, value in passes(model, inputs).items():
        assert (expected[name] - value).abs().max() <= 1e-12


def test_two_active_adapters_and_a_scaling_of_zero() -> None:
    from peft import LoraConfig

    model = with_lora(base_model("qwen3", experts=EXPERTS, layers=1, dtype=torch.float64))
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=8, target_modules=[], target_parameters=TARGETS))
    model.base_model.set_adapter(["default", "second"])
    for name, param in model.named_parameters():
        if "lora_B.second" in name:
            torch.nn.init.normal_(param, std=0.1)
    inputs = routing("even")
    results = []
    for scaling in (None, 0.0):
        if scaling is not None:
            for module in model.modules():
                if hasattr(module, "parameter_name"):
                    module.scaling["second"] = scaling
        expected = passes(model, inputs)
        fuse_moe_lora(model)
        found = passes(model, inputs)
        unfuse_moe_lora(model)
        assert all((found[name] - value).abs().max() <= 1e-12 for name, value in expected.items())
        results.append(found["out"])
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_choices_outside_the_experts_count_for_nothing() -> None:
    choices = torch.tensor([[0, 3], [3, 1], [1, 0]])
    found = route(choices, 3)
    assert found.sizes == [2, 2, 0] and found.ends.tolist() == [2, 4, 4]
    assert choices.flatten()[found.order].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_the_grouped_product_for_gpus_gives_the_same(dtype: torch.dtype, bound: float) -> None:
    # torch's grouped product has a CPU kernel as well, so that the code that GPUs run is run here.
    torch.manual_seed(0)
    rows, weight = torch.randn(40, 16, dtype=dtype, requires_grad=True), torch.randn(4, 24, 16, dtype=dtype)
    a, b = (torch.randn(4, 8, side, dtype=dtype, requires_grad=True) for side in (16, 24))
    where = route(torch.randint(0, 3, (20, 2)), 4)
    results = []
    for grouped in (False, True):
        out = GroupedLoRA.apply(rows, Stacked(weight, False), where, [0.5], grouped, a, b)
        results.append([out, *torch.autograd.grad(out.square().sum(), (rows, a, b))])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= bound * other.abs().max()


def test_bfloat16_and_autocast_follow_the_weights_and_autocast() -> None:
    model = with_lora(base_model("qwen3", experts=EXPERTS, layers=1))
    inputs = tuple(value if value.dtype == torch.int64 else value.float() for value in routing("even"))
    expected = passes(model, inputs)
    fuse_moe_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = passes(model, inputs)
    for name, value in expected.items():
        error = (lowered[name] - value).norm() / value.norm()
        assert 1e-4 < error < 3e-2, f"{name}: bfloat16 has 8 bits"


def test_disabled_and_merged_adapters_saving_and_undoing_are_pefts(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plain = with_lora(base_model("mixtral"))
    fused = copy.deepcopy(plain)
    names = fuse_moe_lora(fused)
    ids = tokens()
    with torch.no_grad():
        for model in (plain, fused):
            model.eval()
        torch.testing.assert_close(fused(ids).logits, plain(ids).logits)
        with plain.disable_adapter(), fused.disable_adapter():
            assert torch.equal(fused(ids).logits, plain(ids).logits)
        for model, folder in ((plain, "plain"), (fused, "fused")):
            model.save_pretrained(tmp_path / folder)
        saved = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "fused")]
        assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])
        plain.merge_adapter()
        fused.merge_adapter()
        assert torch.equal(fused(ids).logits, plain(ids).logits)
        plain.unmerge_adapter()
        fused.unmerge_adapter()
        assert unfuse_moe_lora(copy.deepcopy(fused)) == names
        assert torch.equal(unfused(copy.deepcopy(fused))(ids).logits, plain(ids).logits)
        for module in fused.merge_and_unload().modules():
            assert "forward" not in vars(module)


def test_fusing_leaves_nothing_on_the_wrappers_but_what_is_called() -> None:
    model = with_lora(base_model("qwen3"))
    wrappers = [module for module in model.modules() if hasattr(module, "parameter_name")]
    before = [set(vars(wrapper)) for wrapper in wrappers]
    fuse_moe_lora(model)
    added = [set(vars(wrapper)) - had for wrapper, had in zip(wrappers, before, strict=True)]
    assert added == [{"forward", "merge"}, {"merge"}] * 2  # the outer wrapper of each of two layers, and the inner one
    unfuse_moe_lora(model)
    assert [set(vars(wrapper)) for wrapper in wrappers] == before


def unfused(model: Any) -> Any:
    unfuse_moe_lora(model)
    return model


def test_router_logits_and_checkpointing_are_kept() -> None:
    model = with_lora(base_model("qwen3"))
    want = model(tokens(), output_router_logits=True).router_logits
    loss = backward(model)
    grads = {name: param.grad.clone() for name, param in model.named_parameters() if param.requires_grad}
    fuse_moe_lora(model)
    got = model(tokens(), output_router_logits=True).router_logits
    assert len(got) == len(want) == 2
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    model.zero_grad()
    set_checkpointing(model, True)
    model.enable_input_require_grads()
    model.train()
    torch.testing.assert_close(backward(model), loss)
    for name, param in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(param.grad, grads[name], atol=1e-5, rtol=1e-4)


def test_what_cannot_be_fused_is_refused_by_name_and_nothing_is_changed() -> None:
    with pytest.raises(ValueError, match="no LoRA on stacked experts"):
        fuse_moe_lora(base_model("qwen3"))
    model = with_lora(base_model("qwen3"))
    experts = outermost(model).get_base_layer()
    experts.down_proj.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: Qwen3MoeExperts\.down_proj is trained itself"):
        fuse_moe_lora(model)
    assert unfuse_moe_lora(model) == []


# 4 bit -------------------------------------------------------------------------------------------------------------


def four_bit_and_decoded(style: str) -> tuple[Any, Any]:
    """A model with LoRA on 4-bit experts, fused, and its twin with the decoded weights and PEFT's own forward."""
    pytest.importorskip("bitsandbytes")
    # Not deep copies of each other: torch gives these one class, from which the first to be decoded takes the property.
    model, twin = (with_lora(base_model(style)) for _ in range(2))
    quantize_experts(model)
    quantize_experts(twin)
    dequantize_experts(twin)
    fuse_moe_lora(model)
    return model, twin


def test_four_bit_codes_are_decoded_block_by_block() -> None:
    pytest.importorskip("bitsandbytes")
    model = with_lora(base_model("qwen3", layers=1))  # rows of 32, half a block
    experts = outermost(model).get_base_layer()
    original = experts.gate_up_proj.detach().clone()
    quantize_experts(model)
    four_bit = quantized(experts, "gate_up_proj")
    assert four_bit is not None
    codes = torch.stack([four_bit.codes.flatten() // 16, four_bit.codes.flatten() % 16], 1).flatten().long()
    expected = (four_bit.state.code[codes].view(-1, 64) * four_bit.state.absmax[:, None]).view_as(original)
    assert (expected - original).norm() < 0.11 * original.norm(), "NF4 loses about a tenth"
    torch.testing.assert_close(four_bit.stack(torch.float32), expected.mT)
    read = four_bit.reader(torch.float32)
    for expert, matrix in enumerate(expected):
        torch.testing.assert_close(read(expert), matrix.mT)


@pytest.mark.parametrize("style", STYLES)
def test_four_bit_experts_train_as_their_decoded_weights_do(style: str) -> None:
    model, twin = four_bit_and_decoded(style)
    experts = outermost(model).get_base_layer()
    assert experts.parametrizations["down_proj"].original.dtype == torch.uint8
    losses = [backward(m) for m in (model, twin)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    others = dict(twin.named_parameters())
    reached = 0
    for name, param in model.named_parameters():
        if param.requires_grad:
            reached += 1
            difference = (param.grad - others[name].grad).norm() / others[name].grad.norm()
            assert difference < 1e-4 and param.grad.norm() > 0
    assert reached == 8


def test_quantised_bytes_are_counted_and_bounded() -> None:
    pytest.importorskip("bitsandbytes")
    model = base_model("qwen3")
    weights = sum(param.numel() for name, param in model.named_parameters() if "experts" in name)
    before = sum(param.nbytes for param in model.parameters())
    done = quantize_experts(model)
    assert done.names == [
        f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]
    assert done.bfloat16_bytes == 2 * weights
    codes = [param for name, param in model.named_parameters() if "parametrizations" in name]
    held = sum(param.nbytes for param in codes)
    assert held == weights // 2 and done.bytes == held + weights // 64 * 4 <= 0.29 * done.bfloat16_bytes
    assert sum(param.nbytes for param in model.parameters()) == before - 4 * weights + held
    with pytest.raises(ValueError, match="nothing to quantise"):
        quantize_experts(model)


def test_double_quantised_scales_are_read_too() -> None:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model, twin = (with_lora(base_model("qwen3", layers=1)) for _ in range(2))
    for each in (model, twin):
        experts = outermost(each).get_base_layer()
        for name in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(experts, name, compress_statistics=True, quant_type="nf4", blocksize=64)
    dequantize_experts(twin)
    fuse_moe_lora(model)
    torch.testing.assert_close(backward(model), backward(twin), rtol=1e-5, atol=1e-5)


def test_merging_into_four_bit_is_an_error_and_works_after_decoding() -> None:
    model, twin = four_bit_and_decoded("qwen3")
    with pytest.raises(RuntimeError, match=r"cannot be merged.*dequantize_experts"):
        model.merge_adapter()
    names = dequantize_experts(model)
    assert len(names) == 4
    merged, expected = model.merge_and_unload(), twin.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens()).logits, expected(tokens()).logits)


def test_experts_that_would_not_train_end_the_run_by_name(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from scao_hf import SCAOTrainer

    model = with_lora(base_model("qwen3"), random_b=False)
    quantize_experts(model)
    rows = [{"input_ids": line.tolist(), "labels": line.tolist()} for line in tokens(rows=8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, save_strategy="no", report_to="none", use_cpu=True
    )

    def trainer() -> Any:
        return SCAOTrainer(
            model=model, args=arguments, train_dataset=rows, scao_kwargs={"warmup_steps": 1, "precond_freq": 1}
        )

    with pytest.raises(RuntimeError, match=r"no gradient has reached .*layers\.0\.mlp\.experts.*lora_.*fuse_moe_lora"):
        trainer().train()
    fuse_moe_lora(model)
    trainer().train()


# Axolotl -----------------------------------------------------------------------------------------------------------

MIXTURE = "qwen3-30b-a3b-moe-lora.yml"


def mixture_config(**changes: Any) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    path = Path(__file__).resolve().parent.parent / "examples" / "axolotl" / MIXTURE
    config = {**yaml.safe_load(path.read_text(encoding="utf-8")), **changes}
    return {key: value for key, value in config.items() if value is not None}


@pytest.mark.parametrize("first", [True, False])
def test_axolotls_kernels_may_stand_beside_scao(first: bool) -> None:
    pytest.importorskip("axolotl")
    from test_docs import validated

    plugins = ["axolotl_plugin.SCAOPlugin", "axolotl.integrations.kernels.KernelsPlugin"]
    keys = {"plugins": plugins if first else plugins[::-1], "use_kernels": True, "use_scattermoe": True}
    config = validated(mixture_config(**keys, scao_fuse_moe=None))
    assert (config.optimizer, config.experts_implementation, config.use_scattermoe) == ("scao", "scattermoe", True)
    with pytest.raises(ValueError, match="scao_fuse_moe: true and use_scattermoe: true both replace the forward"):
        validated(mixture_config(**keys))
    # Without ScatterMoE the kernels' plugin knows nothing of ours, and ours does not go through its registry.
    config = validated(mixture_config(plugins=keys["plugins"]))
    assert config.scao_fuse_moe is True and config.experts_implementation in (None, "eager")


def test_fusing_needs_an_adapter_and_any_optimizer() -> None:
    pytest.importorskip("axolotl")
    from test_docs import validated

    assert validated(mixture_config(optimizer="adamw_torch")).scao_fuse_moe is True
    with pytest.raises(ValueError, match="without adapter: lora or qlora has nothing to fuse"):
        validated(mixture_config(adapter=None, load_in_4bit=None, quantize_moe_experts=None))


@pytest.mark.parametrize("optimizer", ["scao", "adamw_torch"])
def test_the_axolotl_plugin_fuses_what_it_trains(optimizer: str, tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    from axolotl.utils.dict import DictDefault

    from axolotl_plugin import SCAOPlugin

    rows = [{"input_ids": line.tolist(), "labels": line.tolist()} for line in tokens(rows=8)]
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True)
    model = with_lora(base_model("qwen3"))
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    config = {"optimizer": optimizer, "scao_fuse_moe": True, "scao_warmup_steps": 1, "scao_precond_freq": 1}
    SCAOPlugin().post_trainer_create(DictDefault(config), trainer)
    assert "forward" in vars(outermost(model))
    trainer.train()


def test_the_gpu_run_has_valid_configs_and_says_what_it_lacks(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    pytest.importorskip("axolotl")
    from test_docs import validated

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples" / "benchmarks"))
    import moe_gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in moe_gpu.RUNS:
        for bf16 in (True, False):
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, bf16=bf16: bf16)
            config = moe_gpu.config(name, tmp_path, 30)
            assert (config["bf16"], config["fp16"]) == (bf16, not bf16)
            assert validated(config).optimizer == "scao"
    monkeypatch.undo()
    moe_gpu.prepare(tmp_path)
    assert (tmp_path / "model" / "config.json").exists() and (tmp_path / "text.jsonl").stat().st_size > 10_000
    if not torch.cuda.is_available():
        assert moe_gpu.main(["--folder", str(tmp_path)]) == 1
        assert "needs a GPU" in capsys.readouterr().err


def test_the_example_script_runs(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    import os
    import subprocess
    import sys

    script = Path(__file__).resolve().parent.parent / "examples" / "train_moe.py"
    command = [sys.executable, str(script), "--steps", "12", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "0.281 of their bfloat16" in done.stdout and "fused: 2 expert modules" in done.stdout
    assert (tmp_path / "adapter_model.safetensors").exists()
