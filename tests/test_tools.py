"""The command line: plans against real allocations, reports of good and bad runs, the doctor, mistakes' messages."""

# ruff: noqa: E402 -- the command line's packages may be missing

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import warnings
import xml.dom.minidom
from collections.abc import Callable
from dataclasses import replace
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner

import scao_hf
from scao_hf import SCAO, create_scao_optimizer, ops, options, reference
from scao_hf.report import STATISTICS_NAME, StatisticsFile
from scao_hf.tools import ToolError, axolotl_yaml, doctor, duration, matrices, rivals, run_report, settings, simulate
from scao_hf.tools import axolotl_keys as keys_of
from scao_hf.tools import page as tool_page
from scao_hf.tools import plan as planning
from scao_hf.tools.cli import app
from scao_hf.tools.page import FIRST, RAMP, SECOND
from scao_hf.tools.shapes import SHAPES, builtin

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "examples" / "axolotl" / "qwen2.5-3b-qlora.yml"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def mistake(*arguments: object) -> str:
    """The one line that a mistake leads to."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("scao-hf: ")
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output
    return str(result.stderr)


# --- migrate

FOREIGN_YAML = """base_model: any/model   # kept
adapter: qlora
load_in_4bit: true
lora_r: {rank}
lora_target_linear: true
{plugins}# the optimizer
optimizer: {optimizer}  # kept too
optim_args:
  other: 1
learning_rate: 2e-4
{more}"""


@pytest.mark.parametrize(
    ("plugins", "optimizer", "rank", "more", "expected", "said"),
    [
        ("", "adamw_torch_fused", 16, "", {}, "adamw_torch_fused 8.0, SCAO 8.0 at its peak"),
        (
            *("plugins: [a.B]\n", "adamw_bnb_8bit", 16, ""),
            *({"moment_dtype": "int8", "use_int8_ema": True}, "about 4 times as large"),
        ),
        (
            *("", "lion_8bit", 16, ""),
            *({"moment_dtype": "int8", "use_int8_ema": True}, "int8 state: SCAO's float32 state is about 4 times"),
        ),
        (
            *("plugins:\n  - a.B\n", "paged_adamw_32bit", 8, ""),
            *({"moment_dtype": "int8", "use_int8_ema": True}, "where a paged one"),
        ),
        (
            "plugins:\n- a.B\n",
            "adamw_torch",
            16,
            "max_steps: 30",
            {},
            "without which `optimizer: scao` is not this SCAO",
        ),
        ("plugins:\n", "adamw_torch", 16, "scao_k_max: 4\nmax_steps: 5", {"k_max": 4}, "more than half of max_steps"),
        ("plugins: []\n", "muon", 16, "adam_beta2: 0.999", {}, "2e-4 was chosen for muon"),
    ],
)
def test_migrate_rewrites_a_yaml_and_says_why(
    tmp_path: Path, plugins: str, optimizer: str, rank: int, more: str, expected: dict[str, Any], said: str
) -> None:
    yaml = pytest.importorskip("yaml")
    path, target = tmp_path / "config.yml", tmp_path / "config.scao.yml"
    path.write_text(FOREIGN_YAML.format(optimizer=optimizer, rank=rank, more=more, plugins=plugins), encoding="utf-8")
    result = run("migrate", path)
    assert result.exit_code == 0, result.output
    assert (
        said in result.output and f"-optimizer: {optimizer}" in result.output and "optim_args: removed" in result.output
    )
    before, text = yaml.safe_load(path.read_text()), target.read_text()
    after = yaml.safe_load(text)
    assert after["plugins"] == ["axolotl_plugin.SCAOPlugin", *(["a.B"] if "a.B" in plugins else [])]
    own = {key.removeprefix("scao_"): value for key, value in after.items() if key.startswith("scao_")}
    assert (after["optimizer"], own) == ("scao", expected)
    kept = {key: value for key, value in before.items() if key not in ("optimizer", "optim_args", "plugins")}
    assert kept.items() <= after.items()
    assert "# kept\n" in text and "# kept too\n" in text and "# the optimizer\n" in text
    again = run("migrate", target)
    assert "nothing to change" in again.output and not (tmp_path / "config.scao.scao.yml").exists()


def test_migrate_names_what_scao_refuses_and_never_overwrites(tmp_path: Path) -> None:
    path, target = tmp_path / "config.yml", tmp_path / "config.scao.yml"
    path.write_text(
        "base_model: any/model\nadapter: lora\ndeepspeed: zero3.json\nfsdp: [full_shard]\n", encoding="utf-8"
    )
    result = run("migrate", path)
    assert result.exit_code == 1 and target.is_file()
    assert "refuse this until you change" in result.output
    assert "zero3.json: SCAO does not run" in result.output and "FSDP1 flattens" in result.output
    assert run("migrate", path).exit_code == 1  # the same again
    assert "cannot be written to (Is a directory)" in mistake("migrate", path, "--out", tmp_path)
    target.write_text("base_model: mine\n", encoding="utf-8")
    assert "exists with other content" in mistake("migrate", path)
    assert target.read_text(encoding="utf-8") == "base_model: mine\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no file"),
        ("base_model: m\noptimizer: scaoo\n", "optimizer: 'scaoo' is unknown (did you mean 'scao'?)"),
        ("base_model: [", "is not a YAML file"),
        ("learning_rate: 1", "has no base_model"),
        ("{base_model: a/b, adapter: lora}", "written in braces"),
        ("base_model: a/b\nplugins: axolotl", "plugins is 'axolotl': it must be a list"),
        ("base_model: a/b\n...\n", "cannot be edited as it is laid out"),
        ("x: &x {optimizer: muon}\nbase_model: a/b\n<<: *x\n", "cannot be edited as it is laid out"),
        ("x: &x {optim_args: a=1}\nbase_model: a/b\noptimizer: muon\n<<: *x\n", "without anchors"),
        ("base_model: a/b\noptim_args: a=1\noptim_args: a=2\n", "write each key once"),
    ],
)
def test_migrate_says_what_is_wrong_with_a_yaml(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "config.yml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert said in mistake("migrate", path)
    assert not (tmp_path / "config.scao.yml").exists()


def test_migrate_keeps_the_line_ends_and_names_commands_that_can_be_pasted(tmp_path: Path) -> None:
    path, target = tmp_path / "my config.yml", tmp_path / "my config.scao.yml"
    path.write_bytes(b"\xef\xbb\xbfbase_model: a/b\r\noptimizer: muon\r\ntorchdistx_path:\r\nseed: 1\r\n")
    output = run("migrate", path).output
    assert target.read_bytes() == (
        b"\xef\xbb\xbfbase_model: a/b\r\noptimizer: scao\r\nplugins:\r\n  - axolotl_plugin.SCAOPlugin\r\n"
        b"scao_moment_dtype: bfloat16\r\nseed: 1\r\n"
    )
    assert f"Next: scao-hf plan '{target}', then scao-hf compare '{target}' --against muon\n" in output
    assert "torchdistx_path: removed, SCAO does not read it" in output and "None" not in output
    copy = tmp_path / "copy.yml"  # which is asked for, so that the next command finds it
    output = run("migrate", target, "--out", copy).output
    assert "nothing to change" in output and f"then scao-hf compare {copy}\n" in output
    assert copy.read_bytes() == target.read_bytes()


def test_the_package_needs_nothing_of_the_tools_and_they_say_what_they_need() -> None:
    code = (
        "import sys, scao_hf; bad = {'transformers', 'typer', 'matplotlib', 'scao_hf.tools'} & set(sys.modules)\n"
        "if bad: sys.exit(str(bad))\n"
        "sys.modules['typer'] = None; import scao_hf.tools as t; t.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "scao-hf: typer is not installed, which the command line needs: pip install 'scao-hf[cli]'\n"
    assert done.returncode == 2


@pytest.mark.parametrize(("words", "code"), [(["plan", "config.yml"], 2), (["doctor"], 0)])
def test_without_transformers_the_commands_that_need_it_say_so(words: list[str], code: int) -> None:
    program = (
        f"import sys; sys.modules['transformers'] = None\nsys.argv[1:] = {words!r}; import scao_hf.tools as t; t.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    said = "scao-hf: transformers is not installed, which the command line needs: pip install 'scao-hf[cli]'\n"
    assert done.stderr.endswith(said) if code else "Nothing is broken." in done.stdout


# --- plan: shapes and weights


@pytest.mark.parametrize("name", SHAPES)
def test_built_in_shape_has_the_published_number_of_parameters(name: str) -> None:
    known = builtin(f"publisher/{name}-Instruct")
    assert known is not None and known == builtin(name.lower())
    model = planning.build_model(transformers.AutoConfig.for_model(known[0], **known[1]))
    assert sum(param.numel() for param in model.parameters()) == SHAPES[name][1]


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "Qwen2.5-7B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-v0.3"),
        ("google/gemma-2-2b-it", "Gemma-2-2B"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama-1.1B"),
        ("microsoft/Phi-3-mini-4k-instruct", "Phi-3-mini"),
    ],
)
def test_usual_spellings_are_known(spelling: str, name: str) -> None:
    assert builtin(spelling) == builtin(name)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-3B-Coder", "Qwen/Qwen2.5-14B", "x/my-Qwen2.5-3B"])
def test_other_models_are_not_taken_for_known_ones(name: str) -> None:
    assert builtin(name) is None


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(32, 32), (33, 65), (7, 9), (576, 1536)])
def test_nf4_bytes_are_those_of_bitsandbytes(shape: tuple[int, int], double_quant: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = bnb.nn.Params4bit(
        torch.randn(shape), requires_grad=False, quant_type="nf4", compress_statistics=double_quant
    )
    weight = weight.to("cpu")
    assert planning.nf4_bytes(math.prod(shape), double_quant) == (storage_bytes([weight.data]), constants_of(weight))


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def constants_of(weight: Any) -> int:
    state = weight.quant_state
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return storage_bytes([state.absmax, state.code, *nested])


def qlora(
    config: Any, rank: int = 16, upcast: bool = False, bits: int = 4, dtype: torch.dtype = torch.bfloat16, **lora: Any
) -> Any:
    """The real thing on the CPU: NF4 or int8 by bitsandbytes, LoRA by peft, random weights."""
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    config._attn_implementation = "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            sides = (layer.in_features, layer.out_features, layer.bias is not None)
            if bits == 4:
                quantised = bnb.nn.Linear4bit(*sides, dtype, True, "nf4")
                quantised.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            else:
                quantised = bnb.nn.Linear8bitLt(*sides, has_fp16_weights=False, threshold=6.0)
                quantised.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False)
            if layer.bias is not None:
                quantised.bias = layer.bias
            model.set_submodule(name, quantised.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    model.requires_grad_(False)
    if upcast:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    cast = lora.pop("autocast_adapter_dtype", True)
    config = peft.LoraConfig(r=rank, target_modules="all-linear", **lora)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=cast)
    model.enable_input_require_grads()
    return model.train()


def tiny(family: str = "llama", **fields: Any) -> Any:
    sides = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    return transformers.AutoConfig.for_model(family, **{**sides, **heads, "tie_word_embeddings": False, **fields})


@pytest.mark.parametrize("chosen", [{}, {"moment_dtype": "int8", "use_int8_ema": True}])
def test_what_a_step_of_scao_takes_is_that_of_the_cpu_allocator(monkeypatch: Any, chosen: dict[str, Any]) -> None:
    monkeypatch.setattr(ops, "NATIVE", frozenset())

    def optimizer(device: str) -> SCAO:
        params = [torch.ones(shape, device=device) for shape in 5 * [(16, 1024), (1024, 16)] + [(7,)]]
        for param in params:
            param.grad = torch.ones_like(param)
        return SCAO(params, warmup_steps=2, min_precond_updates=1, precond_freq=2, from_scratch=False, **chosen)

    real = optimizer("cpu")
    real.step()  # the first one makes the state, too
    found = max(allocated(real.step, prepared=True) for _ in range(4))
    assert abs(simulate.optimizer_peak(optimizer("meta")) / found - 1) < simulate.STATED_ERROR


def test_a_step_of_scao_that_takes_more_than_activations_is_in_the_plan(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    short, long = (planning.make_plan(settings.Settings(str(tmp_path), sequence=length)) for length in (2, 2048))
    rows = {row.name: row.size for row in short.rows}
    peak = short.peaks["on"].peak
    assert rows["a step of SCAO"] == short.temporary - peak > 0
    assert (
        "a step of SCAO" not in {row.name for row in long.rows} and long.to_dict()["scao_temporary"] == short.temporary
    )


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True)])
def test_plan_is_exact_to_the_byte(tmp_path: Path, family: str, tied: bool, upcast: bool) -> None:
    config = tiny(family, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    asked = settings.Settings(str(tmp_path), rank=4, batch=1, sequence=16, upcast=upcast, scao={"k_max": 8})
    plan = planning.make_plan(asked)
    sizes = {row.name: row.size for row in plan.rows}

    model: Any = qlora(config, rank=4, upcast=upcast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))  # bitsandbytes casts biases in its first step
    quantised = [param for param in model.parameters() if type(param).__name__ == "Params4bit"]
    trainable = [param for param in model.parameters() if param.requires_grad]
    weights = {id(param): param for param in (*quantised, *trainable)}
    rest = [param for param in (*model.parameters(), *model.buffers()) if id(param) not in weights]
    assert sizes["4-bit NF4 weights"] == storage_bytes([weight.data for weight in quantised])
    assert sizes["their quantisation constants"] == sum(map(constants_of, quantised))
    assert sizes["unquantised weights"] == sum(param.numel() * param.element_size() for param in rest)
    assert sizes["LoRA weights"] == sizes["gradients"] == storage_bytes(trainable)
    assert (plan.lora_pairs, plan.trainable) == (len(trainable) // 2, sum(param.numel() for param in trainable))

    optimizers = [SCAO(trainable, k_max=8), torch.optim.AdamW(trainable)]
    held = []
    for step in range(12):
        for optimizer in optimizers:
            for param in trainable:
                param.grad = torch.randn_like(param)
            optimizer.step()
        if step in (0, 11):
            held.append([state_bytes(optimizer) for optimizer in optimizers])
    assert [plan.scao["peak"], plan.scao["total"]] == [max(held[0][0], held[1][0]), held[1][0]]
    assert plan.adamw == held[0][1]
    assert sum(size for name, size in sizes.items() if name.startswith("SCAO")) == max(held[0][0], held[1][0])


HEADS = ("embed_tokens", "lm_head")


@pytest.mark.parametrize(
    ("chosen", "lora"),
    [
        ({"four_bit": False, "eight_bit": True}, {"bits": 8}),
        ({"half_adapter": True}, {"autocast_adapter_dtype": False}),
        ({"modules_to_save": HEADS}, {"modules_to_save": list(HEADS)}),
        (
            {"modules_to_save": HEADS, "tied_copies": True},
            {"modules_to_save": list(HEADS), "ensure_weight_tying": True},
        ),
    ],
    ids=["int8", "16-bit adapter", "copies", "tied copies"],
)
def test_other_weights_are_exact_to_the_byte(tmp_path: Path, chosen: dict[str, Any], lora: dict[str, Any]) -> None:
    config = tiny("qwen2", tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    plan = planning.make_plan(settings.Settings(str(tmp_path), rank=4, batch=1, sequence=16, **chosen))
    sizes = {row.name: row.size for row in plan.rows}
    model = qlora(config, rank=4, **lora)
    frozen = {id(param): param.data for param in (*model.parameters(), *model.buffers()) if not param.requires_grad}
    scales = [param.SCB for param in model.parameters() if type(param).__name__ == "Int8Params"]
    quantised = [param for param in model.parameters() if type(param).__name__ == "Params4bit"]
    held = storage_bytes(list(frozen.values())) + storage_bytes(scales) + sum(map(constants_of, quantised))
    names = ("4-bit NF4 weights", "int8 weights", "their quantisation constants", "unquantised weights")
    assert sum(sizes.get(name, 0) for name in names) == held
    trainable = [param for param in model.parameters() if param.requires_grad]
    assert sizes["LoRA weights"] + sizes.get("trainable copies", 0) == sizes["gradients"] == storage_bytes(trainable)
    assert plan.trainable == sum(param.numel() for param in trainable)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("adamw_bnb_8bit", ("AdamW", 8)),
        ("paged_adamw_32bit", ("AdamW", 32)),
        ("lion_8bit", ("Lion", 8)),
        ("lion_32bit", ("Lion", 32)),
    ],
)
def test_states_of_others_are_those_of_bitsandbytes(name: str, made: tuple[str, int]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    params = [nn.Parameter(torch.zeros(side, dtype=torch.bfloat16)) for side in ((64, 64), (63, 65), (100, 100), (7,))]
    optimizer = getattr(bnb.optim, made[0])(params, optim_bits=made[1])
    for index, param in enumerate(params):
        optimizer.init_state(optimizer.param_groups[0], param, 0, index)
    held = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")  # the same for all parameters
    ]
    assert rivals.state_bytes(name, params, []) == storage_bytes(held)
    kept = rivals.state_bytes(name, params, params[2:3])  # as the Trainer asks for embeddings
    assert kept == rivals.state_bytes(name, params[:2] + params[3:], []) + 4 * 10_000 * rivals.STATES[name][0]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for entry in optimizer.state.values()
        for name, value in entry.items()
        if isinstance(value, torch.Tensor) and name != "step"  # AdamW's step counter lies in the CPU's memory
    )


@pytest.fixture
def casts_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA's autocast is on, peft leaves casts to it; it does not ask for the CPU's."""
    asks = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: asks(*device) if device else True)


def allocated(step: Callable[[], object], prepared: bool = False) -> int:
    """The most that a step has allocated at once, after another one where it is not ``prepared``."""
    if not prepared:
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


WIDE = {"vocab_size": 8000, "hidden_size": 64}


@pytest.mark.usefixtures("casts_as_on_a_gpu")
@pytest.mark.parametrize(
    ("fields", "batch", "bits", "upcast", "float32"),
    [
        *((fields, batch, 4, upcast, False) for fields, batch in (({}, 4), (WIDE, 2)) for upcast in (False, True)),
        *((fields, batch, 4, False, True) for fields, batch in (({}, 4), (WIDE, 2))),
        *(
            (WIDE, 2, 8, upcast, False) for upcast in (False, True)
        ),  # in a layer, a CPU's int8 product has float32 copies
    ],
)
def test_peak_is_that_of_the_cpu_allocator(
    monkeypatch: Any, fields: dict[str, int], batch: int, bits: int, upcast: bool, float32: bool
) -> None:
    if bits == 8:  # the product of GPUs; on a CPU bitsandbytes decodes the weights instead
        products = pytest.importorskip("bitsandbytes.autograd._functions")
        monkeypatch.setattr(products, "MatMul8bitFp", products.MatMul8bitLt)
    dtype = torch.float32 if float32 else torch.bfloat16
    model = qlora(tiny(**fields), upcast=upcast, bits=bits, dtype=dtype)
    planned = planning.build_model(tiny(**fields), dtype)
    planning.prepare(planned, settings.Settings("any", upcast=upcast, four_bit=bits == 4, eight_bit=bits == 8))
    tokens = torch.randint(0, 512, (batch, 128))
    for param in model.parameters():
        param.grad = torch.zeros_like(param) if param.requires_grad else None

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not float32):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()

    for checkpointing, reentrant in ((False, False), (True, True), (True, False)):
        if checkpointing:
            simulate.set_checkpointing(model, True, reentrant)
        peak = allocated(step)
        estimate = simulate.step_peaks(planned, batch, 128, checkpointing, reentrant=reentrant).peak
        assert abs(estimate / peak - 1) < simulate.STATED_ERROR / 2, (checkpointing, reentrant, estimate, peak)


@pytest.mark.usefixtures("casts_as_on_a_gpu")
def test_peak_of_preference_tuning_is_that_of_trl(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "axolotl", reason="counts as the TRL that Axolotl pins does; TRL 1.16 takes three times as much"
    )
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    config, batch, length = tiny(vocab_size=2000, hidden_size=64), 1, 512
    half = length // 2
    rows = {"prompt": ["a" * half] * 4, "chosen": ["b" * (half - 1)] * 4, "rejected": ["c" * (half - 1)] * 4}
    common = {"max_length": length, "use_cpu": True, "bf16": True, "report_to": "none"}
    trainer = trl.DPOTrainer(
        model=qlora(config),
        args=trl.DPOConfig(str(tmp_path), per_device_train_batch_size=batch, gradient_checkpointing=False, **common),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny_llama),
    )
    trainer.current_gradient_accumulation_steps = 1
    model, inputs = trainer.accelerator.prepare_model(trainer.model), next(iter(trainer.get_train_dataloader()))
    assert inputs["input_ids"].shape == (2 * batch, length)
    for param in model.parameters():
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    asked = settings.Settings("any", batch=batch, sequence=length, objective="dpo", reference=True)
    planned = planning.build_model(config)
    planning.prepare(planned, asked)
    for checkpointing in (False, True):
        if checkpointing:
            simulate.set_checkpointing(trainer.model, True)
        peak = allocated(lambda: trainer.training_step(model, inputs))
        estimate = simulate.step_peaks(
            planned, asked.sequences, length, checkpointing, objective="dpo", reference=True
        ).peak
        assert abs(estimate / peak - 1) < simulate.STATED_ERROR / 2, (checkpointing, estimate, peak)


def test_checkpointing_is_set_under_the_name_that_transformers_has_for_it(monkeypatch: Any) -> None:
    base = transformers.PreTrainedModel
    planned = planning.build_model(tiny())
    expected = [simulate.step_peaks(planned, 2, 64, flag) for flag in (True, False)]
    if not hasattr(base, "activation_checkpointing_enable"):
        for way in ("enable", "disable"):
            monkeypatch.setattr(
                base, f"activation_checkpointing_{way}", getattr(base, f"gradient_checkpointing_{way}"), raising=False
            )
            monkeypatch.delattr(base, f"gradient_checkpointing_{way}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert [simulate.step_peaks(planned, 2, 64, flag) for flag in (True, False)] == expected
    assert expected[0].kept < expected[1].kept


def test_reference_configuration_fits_a_16_gb_card_with_a_margin() -> None:
    plan = planning.make_plan(axolotl_yaml.from_yaml(REFERENCE))
    assert (plan.lora_pairs, plan.trainable) == (252, 29_933_568)
    assert 5.5 * 2**30 < plan.total < 8 * 2**30
    assert plan.free(16) > 6 * 2**30 > plan.margin
    assert plan.scao["peak"] < 1.01 * plan.adamw


def test_advice_makes_it_fit(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    plan = planning.make_plan(settings.Settings(str(tmp_path), batch=512, sequence=4096, checkpointing=False))
    assert plan.free(16) < 0
    changes = planning.advice(plan, 16)
    assert [text for text, _ in changes] == ["micro_batch_size: 1, accumulation steps x 512"]
    assert plan.free(16) + sum(size for _, size in changes) >= plan.margin
    assert planning.make_plan(settings.with_overrides(plan.settings, batch=1)).free(16) > 0
    changes = planning.advice(plan, 0.1)  # what costs least comes first, and what is not enough is said in one line
    words = ["micro_batch_size", "the cut_cross_entropy plugin", "gradient_checkpointing: true", "sequence_len: 256"]
    assert [text[: len(word)] for (text, _), word in zip(changes, words, strict=True)] == words


def test_plan_prints_a_table_and_json(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    result = run("plan", "--model", tmp_path, "--seq", 128, "--gpu", 6, "--targets", "q_proj, v_proj")
    assert result.exit_code == 0, result.output
    for words in (
        "4-bit NF4 weights",
        "6 LoRA pairs of rank 16",
        "6 GB (yours)",
        "fits",
        "SCAO: moments",
        "adamw_torch",
        "TRL's SFTTrainer computes its loss in chunks",
    ):
        assert words in " ".join(result.output.split())
    text = GOOD.replace("Qwen/Qwen2.5-0.5B", str(tmp_path))
    result = run("plan", yaml_file(tmp_path, text), "--batch", 3, "--no-checkpointing", "--json")
    plan = json.loads(result.stdout)
    assert plan["settings"]["batch"] == 3 and plan["cards"]["16"]["fits"] is True
    assert plan["total"] == sum(row["size"] for row in plan["rows"])
    peaks = plan["activations"]
    assert peaks["checkpointing_on"]["kept"] < peaks["checkpointing_off"]["kept"]
    assert peaks["checkpointing_off"]["kept"] in [row["size"] for row in plan["rows"]]


def test_a_step_that_cannot_be_followed_is_said_to_be_missing(tmp_path: Path, monkeypatch: Any) -> None:
    def unreadable(*_: Any) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    tiny().save_pretrained(tmp_path)
    monkeypatch.setattr(planning, "step_peaks", unreadable)
    assert "NOT counted: activations and logits" in " ".join(run("plan", "--model", tmp_path).output.split())


def test_training_without_an_adapter_counts_every_parameter(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    asked = settings.Settings(str(tmp_path), adapter=False, four_bit=False, sequence=32, scao={"rule": "orthogonal"})
    plan = planning.make_plan(asked)
    assert plan.trainable == plan.parameters
    assert {row.name: row.size for row in plan.rows}["gradients"] == 2 * plan.parameters
    model = transformers.AutoModelForCausalLM.from_config(tiny(), dtype=torch.bfloat16)
    assert plan.scao == create_scao_optimizer(model, rule="orthogonal").memory_report()


def test_a_plan_names_the_option_that_holds_the_moments_of_16_bit_weights_in_16_bit(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    whole = settings.Settings(str(tmp_path), adapter=False, four_bit=False, sequence=32)
    plan = planning.make_plan(whole)
    assert plan.adamw == 4 * plan.parameters < plan.scao["peak"]
    half = planning.make_plan(replace(whole, scao={"moment_dtype": "bfloat16"}))
    sizes = f"{plan.scao['peak'] / 2**20:,.0f} to {half.scao['peak'] / 2**20:,.0f} MiB at its peak"
    assert [sizes in note and "scao_moment_dtype: bfloat16" in note for note in plan.notes] == [True]
    assert not half.notes and not planning.make_plan(settings.Settings(str(tmp_path), rank=4, sequence=32)).notes


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "config.yml"
    path.write_text(text, encoding="utf-8")
    return path


GOOD = "base_model: Qwen/Qwen2.5-0.5B\nadapter: qlora\nload_in_4bit: true\nlora_target_linear: true\nsequence_len: 64\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is not a YAML file"),
        ("- 1", "has no base_model"),
        ("optimizer: scao", "has no base_model"),
        (GOOD + "load_in_8bit: true", "load_in_4bit and load_in_8bit exclude each other"),
        (GOOD.replace("qlora", "lora"), "load_in_4bit has no effect in Axolotl with adapter: lora"),
        (GOOD.replace("load_in_4bit: true", ""), "adapter: qlora needs load_in_4bit: true"),
        (
            GOOD + "deepspeed: deepspeed_configs/zero3.json",
            "deepspeed_configs/zero3.json: SCAO does not run under this configuration",
        ),
        (
            GOOD + "fsdp_version: 2\nfsdp_config: {offload_params: true}",
            "fsdp_config.offload_params: true keeps the shards",
        ),
        (GOOD + "fsdp_version: 2\nfsdp_config: {x: 1}", "fsdp_config cannot be planned: weights and state are spread"),
        (
            GOOD + "fsdp_version: 2\nfsdp: [full_shard]\nfsdp_config: {x: 1}",
            "fsdp, fsdp_config cannot be planned: weights and state are spread",
        ),
        (GOOD + "rl: grpo", "rl: grpo cannot be planned: it generates with the model in training"),
        (
            GOOD + "rl: grpo\nvllm: {gpu_memory_utilization: 0.85}",
            "it generates with vLLM, which takes 85% of its card",
        ),
        (
            GOOD + "rl: grpo\ntrl: {use_vllm: true, vllm_gpu_memory_utilization: 0.3}",
            "vLLM, which takes 30% of its card",
        ),
        (GOOD + "rl: orpo", "rl: orpo cannot be planned: only dpo, ipo and plain fine-tuning can"),
        (GOOD + "attn_implementation: eager", "eager attention cannot be planned"),
        (GOOD + "bnb_config_kwargs: {llm_int8_skip_modules: [a]}", "llm_int8_skip_modules cannot be planned"),
        (GOOD + "unfrozen_parameters: [lm_head]", "unfrozen_parameters cannot be planned: which weights are trained"),
        (GOOD + "optimizer: scoa", "optimizer: 'scoa' is unknown (did you mean 'scao'?)"),
        (GOOD + "optimizer: scao\nmax_steps: 3", "max_steps: 3 would end before phase 2"),
        (GOOD + "max_steps: many", "max_steps: many must be a number"),
        (GOOD.replace("-0.5B", "-0.5B-bnb-4bit").replace("qlora", "lora").replace("load_in_4bit: true", ""), "already"),
        (GOOD.replace("qlora", "ia3"), "adapter 'ia3' cannot be planned"),
        (GOOD.replace("lora_target_linear", "x"), "there is no LoRA target"),
        (GOOD + "scao_kmax: 4", "did you mean 'scao_k_max'?"),
        (GOOD + "scao_sparsity: 0.3", "not an option of SCAO (it belongs to the PyPI package scao"),
        (GOOD + "scao_k_max: 0", "k_max=0 is not valid"),
        (GOOD + "lora_r: big", "rank is 'big': it must be an integer of at least 1 (lora_r or --lora-r)"),
        (GOOD + "lora_dropout: big", "could not convert string to float: 'big'"),
        (GOOD.replace("adapter: qlora", ""), "4-bit weights cannot be trained without an adapter"),
        (
            GOOD.replace("lora_target_linear: true", "lora_target_modules: [qproj]"),
            "no layer matches the LoRA targets qproj: this model has down_proj, gate_proj",
        ),
        (
            GOOD.replace("lora_target_linear: true", "lora_target_modules: [q_proj, foo, lm_head]"),
            "no layer matches the LoRA targets foo, lm_head: this model has",
        ),
        (GOOD.replace("lora_target_linear: true", "lora_target_modules: '('"), "are not a valid regular expression"),
        (GOOD + "lora_modules_to_save: [wte]", "lora_modules_to_save names wte"),
        (GOOD + "lora_modules_to_save: lm_head", "lora_modules_to_save is 'lm_head': it must be a list"),
        (
            GOOD.replace("lora_target_linear: true", "lora_target_modules: 5"),
            "lora_target_modules is 5: it must be a list",
        ),
        (GOOD + "plugins: axolotl_plugin.SCAOPlugin", "it must be a list"),
        (GOOD + "bnb_config_kwargs: nf4", "bnb_config_kwargs is 'nf4': it must be a mapping"),
        (GOOD + "lora_target_parameters: [mlp.experts.down_proj]", "LoRA on stacked experts would not be counted"),
        (GOOD + "quantize_moe_experts: true", "stacked experts in 4 bit would not be counted"),
    ],
)
def test_mistakes_in_a_yaml(tmp_path: Path, text: str, words: str) -> None:
    assert words in mistake("plan", yaml_file(tmp_path, text))


def test_everything_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    text = (
        GOOD
        + "scao_kmax: 4\nscao_warmup: 3\ndeepspeed: zero3.json\nlora_r: 0.5\nlora_dropout: big\nqat: {a: 1}\nrl: kto\n"
    )
    said = mistake("plan", yaml_file(tmp_path, text))
    for words in (
        "scao_kmax is not an option of SCAO (did you mean 'scao_k_max'?)",
        "scao_warmup is not an option of SCAO (did you mean 'scao_warmup_steps'?)",
        "deepspeed: zero3.json: SCAO does not run",
        "could not convert string to float: 'big'",
        "qat cannot be planned",
        "rl: kto cannot be planned",
    ):
        assert words in said


def test_what_a_yaml_leaves_to_axolotl(tmp_path: Path) -> None:
    """Precision, checkpointing and the reference of a preference, as Axolotl's loader has them."""
    full = "base_model: any\nsequence_len: 64\n"
    cases: list[tuple[str, dict[str, Any]]] = [
        (
            GOOD,
            {"upcast": False, "float32": False, "reentrant": True, "objective": "sft", "rival": "adamw_torch_fused"},
        ),
        (GOOD + "optimizer: scao", {"rival": "adamw_torch"}),
        (GOOD + "optimizer: ADAMW_bnb_8bit\noptim_args: {x: 1}", {"rival": "adamw_bnb_8bit", "scao": {}}),
        (GOOD + "optimizer: scao\noptim_args: {k_max: 4}\nscao_k_min: 2", {"scao": {"k_max": 4, "k_min": 2}}),
        (GOOD + "bf16: false", {"float32": True}),
        (GOOD + "lora_r: '64'\nmicro_batch_size: 2.0\nsequence_len: '512'", {"rank": 64, "batch": 2, "sequence": 512}),
        (GOOD + "bf16: false\nfp16: true", {"float32": False}),
        (GOOD + "peft_autocast_adapter_dtype: false", {"half_adapter": True}),
        (GOOD + "gradient_checkpointing_kwargs: {use_reentrant: false}", {"reentrant": False}),
        (GOOD + "rl: dpo", {"objective": "dpo", "reference": True, "reentrant": False, "sequences": 2}),
        (GOOD + "rl: ipo\nprecompute_ref_log_probs: true", {"objective": "ipo", "reference": False}),
        (GOOD.replace("qlora", "lora").replace("4bit", "8bit"), {"eight_bit": True, "four_bit": False}),
        (GOOD + "learning_rate: 5e-4\nmax_steps: '100'", {"model": "Qwen/Qwen2.5-0.5B"}),
        (full, {"upcast": True, "adapter": False}),
        (full + "flash_attention: true", {"upcast": False}),
        (full + "attn_implementation: flash_attention_2", {"upcast": False}),
        (full + "model_config: {num_hidden_layers: 2}", {"shape": {"num_hidden_layers": 2}}),
    ]
    for text, expected in cases:
        found = axolotl_yaml.from_yaml(yaml_file(tmp_path, text))
        assert {name: getattr(found, name) for name in expected} == expected, text


def test_notes_say_what_is_not_counted(tmp_path: Path) -> None:
    keys = (
        "liger_fused_linear_cross_entropy: true\ntorch_compile: true\nmicro_batchsize: 8\neta_min: 0\n"
        "gradient_checkpointing: offload\n"
    )
    plugins = (
        "plugins: [axolotl_plugin.SCAOPlugin, my.Plugin, axolotl.integrations.liger.LigerPlugin]\noptimizer: scao\n"
    )
    notes = axolotl_yaml.from_yaml(yaml_file(tmp_path, GOOD + keys + plugins)).notes
    assert notes == (
        "what these plugins change is not counted: my.Plugin",
        "the run needs less than is counted here, because of liger_fused_linear_cross_entropy",
        "the run needs less: gradient_checkpointing: offload moves activations away",
        "what these keys add is not counted: torch_compile",
        "Axolotl does not read `eta_min`",
        "Axolotl does not read `micro_batchsize` (did you mean 'micro_batch_size'?)",
    )


def test_a_preference_takes_twice_the_sequences_and_a_copy_where_all_is_trained(tmp_path: Path) -> None:
    tiny(vocab_size=4000).save_pretrained(tmp_path)
    base = GOOD.replace("Qwen/Qwen2.5-0.5B", str(tmp_path))
    texts = base, base + "rl: dpo", base.replace("adapter: qlora\nload_in_4bit: true\n", "rl: dpo\n")
    plain, dpo, full = (planning.make_plan(axolotl_yaml.from_yaml(yaml_file(tmp_path, text))) for text in texts)
    one, two = plain.peaks["off"], dpo.peaks["off"]
    assert 1.9 * one.kept < two.kept < 2 * one.kept and two.head > 2 * one.head
    assert dpo.total > plain.total and "reference model" not in {row.name for row in dpo.rows}
    sizes = {row.name: row.size for row in full.rows}
    assert sizes["reference model"] == sizes["unquantised weights"]


def test_scao_is_compared_with_the_optimizer_of_the_yaml(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    base = GOOD.replace("Qwen/Qwen2.5-0.5B", str(tmp_path)) + "lora_r: 64\n"
    shown = " ".join(run("plan", yaml_file(tmp_path, base + "optimizer: adamw_bnb_8bit")).output.split())
    assert "adamw_bnb_8bit" in shown and "With `scao_moment_dtype: int8` and `scao_use_int8_ema: true` it is" in shown
    plan = json.loads(run("plan", yaml_file(tmp_path, base + "optimizer: adamw_bnb_8bit"), "--json").stdout)
    assert plan["rival_state"]["adamw_bnb_8bit"] < 0.3 * plan["adamw_state"]
    assert plan["scao_int8_state"] < 0.5 * plan["scao_state"]["peak"]
    shown = " ".join(run("plan", yaml_file(tmp_path, base + "optimizer: muon")).output.split())
    assert "the state of muon is not known: SCAO is compared with AdamW" in shown and "With `scao_" not in shown


def test_a_yaml_is_planned_where_axolotl_is_not_installed(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    path = yaml_file(tmp_path, GOOD.replace("Qwen/Qwen2.5-0.5B", str(tmp_path)) + "optimizer: scao")
    code = (
        "import sys; sys.modules['axolotl'] = None; from scao_hf.tools.cli import app\n"
        f"app(['plan', {str(path)!r}, '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["model"] == str(tmp_path)


def test_every_key_of_axolotl_and_its_plugins_is_known() -> None:
    pytest.importorskip("axolotl")
    import axolotl.integrations
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from pydantic import BaseModel

    models: set[type[BaseModel]] = {AxolotlInputConfig}
    for folder in Path(axolotl.integrations.__path__[0]).glob("*/args.py"):
        if folder.parent.name == "llm_compressor":  # imports the package of that name; its one key is llmcompressor
            continue
        module = vars(importlib.import_module(f"axolotl.integrations.{folder.parent.name}.args"))
        models |= {kind for kind in module.values() if isinstance(kind, type) and issubclass(kind, BaseModel)}
    keys = {field.alias or name for model in models for name, field in model.model_fields.items()}
    top = {field.alias or name for name, field in AxolotlInputConfig.model_fields.items()}
    groups = [keys_of.READ, set(keys_of.REFUSED), keys_of.LESS, keys_of.MORE, keys_of.OTHER]
    assert sum(map(len, groups)) == len(set().union(*groups)), "a key is in two groups"
    assert not set().union(*groups) - keys - {"llmcompressor"}, "no such key in Axolotl"
    assert not top - set().union(*groups), "say what these change in memory"


def test_a_yaml_is_read_as_the_plugin_reads_it(tmp_path: Path) -> None:
    text = "scao_k_max: '8'\nscao_rho: 9e-1\nscao_tau: none\nscao_k_min:\nscao_fuse_moe: true\noptimizer: ' SCAO'\n"
    found = axolotl_yaml.from_yaml(yaml_file(tmp_path, GOOD + text + "plugins: [axolotl_plugin.SCAOPlugin]"))
    assert found.scao == {"k_max": 8, "rho": 0.9}
    assert not found.notes


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "axolotl").glob("*.yml")), ids=lambda path: path.stem)
def test_every_example_can_be_planned_or_says_why_not(path: Path) -> None:
    if "moe" in path.stem:
        with pytest.raises(ToolError, match="stacked experts would not be counted"):
            axolotl_yaml.from_yaml(path)
    else:
        assert not axolotl_yaml.from_yaml(path).notes


def test_a_yaml_without_the_plugin_is_planned_and_told(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    text = GOOD.replace("Qwen/Qwen2.5-0.5B", str(tmp_path)) + "lora_modules_to_save: [embed_tokens]"
    result = run("plan", yaml_file(tmp_path, text))
    shown = " ".join(result.output.split())
    assert result.exit_code == 0
    assert "the YAML says `optimizer: adamw_torch_fused`: planned as if it said scao, with the line" in shown
    assert "trainable copies" in shown
    result = run("plan", yaml_file(tmp_path, text + "\noptimizer: scao"))
    assert "the YAML lacks `plugins: [axolotl_plugin.SCAOPlugin]`" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"optimizer": "scao"}, True),
        ({"optimizer": " SCAO", "plugins": None}, True),
        ({"optimizer": "scao", "plugins": ["some.Other"]}, True),
        ({"optimizer": "scao", "plugins": ["some.Other", "axolotl_plugin.SCAOPlugin"]}, False),
        ({"optimizer": "adamw_torch"}, False),
        ({}, False),
    ],
)
def test_a_yaml_that_would_train_with_another_scao_is_known(raw: dict[str, Any], told: bool) -> None:
    note = axolotl_yaml.plugin_note(raw)
    assert (note is not None) is told
    assert not told or "without which `optimizer: scao` is not this SCAO" in str(note)


def test_mistakes_of_the_plan(tmp_path: Path) -> None:
    assert "nothing to plan" in mistake("plan")
    assert "there is no file nowhere.yml" in mistake("plan", "nowhere.yml")
    assert "nothing to plan" in mistake("plan", "--model", "")
    for size in (-1, "nan", "inf", 1e300):
        assert "--gpu is" in mistake("plan", REFERENCE, "--gpu", size)
    assert "batch is 0" in mistake("plan", "--model", "SmolLM2-135M", "--batch", 0)
    said = mistake("plan", "--model", "SmolLM2-135M", "--targets", "q_proj,foo")
    assert "no layer matches the LoRA targets foo: this model has down_proj, " in said
    (tmp_path / "train.py").write_text("", encoding="utf-8")
    assert "is a script, which cannot be planned: pass --model NAME" in mistake("plan", tmp_path / "train.py")
    assert "holds no config.json" in mistake("plan", "--model", tmp_path)
    assert "./nowhere does not exist" in mistake("plan", "--model", "./nowhere")
    assert "is neither a folder nor a model name" in mistake("plan", "--model", "a/b/c")
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}', encoding="utf-8")
    assert "cannot use its config.json" in mistake("plan", "--model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    assert "no causal language model can be built" in mistake("plan", "--model", tmp_path)


def test_unknown_model_offline_lists_what_is_known(monkeypatch: Any) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_: Any, **__: Any) -> str:
        raise hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    message = mistake("plan", "--model", "acme/Secret-9B")
    assert (
        "the Hugging Face hub cannot be reached" in message and "Qwen2.5-3B, " in message and "SmolLM2-135M" in message
    )


# --- report


def history(
    steps: int, start: int = 10, skipped: float = 0.0, scao: bool = True, damped: float = 0.0
) -> list[dict[str, float]]:
    rows = []
    for step in range(1, steps + 1):
        row: dict[str, float] = {"step": step, "loss": 3 - step / 50, "learning_rate": 1e-3 / step, "grad_norm": 1.0}
        if scao:
            blend = min(1.0, max(0.0, (step - start) / 11))
            row |= {"scao/phase": 2.0 if blend else 1.0, "scao/blend": blend, "scao/rank": 12.0 * (blend > 0)}
            row |= {
                "scao/captured_mass": 0.9 * (blend > 0),
                "scao/curvature_norm": 1e-4 * step,
                "scao/damped": damped,
                "scao/skipped": skipped,
            }
        rows.append(row)
    return rows


def run_folder(folder: Path, rows: list[dict[str, float]], max_steps: int = 0, checkpoint: str = "") -> Path:
    target = folder / checkpoint
    target.mkdir(parents=True, exist_ok=True)
    state = {"global_step": rows[-1]["step"] if rows else 0, "max_steps": max_steps, "log_history": rows}
    (target / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


NAMES = [f"model.layers.{layer}.mlp.up_proj.lora_{side}.weight" for layer in range(4) for side in "AB"]


def matrix_records(folder: Path, steps: int, start: int = 0, every: int = 2, jump: int = -1) -> Path:
    """scao_statistics.jsonl as the callback writes it, each layer with a rank of its own."""
    chosen = {**options.resolve("eigenbasis", {}), "precond_freq": 5, "warmup_steps": 10, "k_max": 9}
    file = StatisticsFile(folder / STATISTICS_NAME, every * StatisticsFile.RECORDS)
    for step in range(start + every, steps + 1, every):
        assert file.due(step) and (step == start + every or not file.due(step - 1))
        rows = [
            {
                "name": name,
                "rank": (step > 10) * (3 + index // 2 + 3 * (index % 2)),
                "captured_mass": 0.9 * (step > 10),
                "curvature_norm": (1000.0 if step == jump and index == 5 else 1.0) * (1 + index),
                "damped": 0,
                "skipped": 4 * (index == 3),
            }
            for index, name in enumerate(NAMES)
        ]
        file.append(start, step, chosen, rows, ms=[1.0, 1234.4 if step == 60 else 2.0 + step / 100], write=True)
    return folder


def test_report_draws_matrices_by_layer_and_side(tmp_path: Path) -> None:
    folder = matrix_records(run_folder(tmp_path, history(60)), 60)
    report = run_report.write_report(folder)
    page = report.html.read_text(encoding="utf-8")
    assert page.count("<svg ") == 10 and page.count("LoRA A") == 3 and page.count("data:image/png;base64") >= 6
    said = " ".join(report.findings)
    assert "Each of the 8 matrices refreshes its basis every 5 steps, at staggered steps" in said
    assert "phase 2 begins after step 10" in said
    assert "took 1.51 ms (median); the slowest was step 60 with 1,234 ms" in said


def test_heat_maps_have_a_row_for_each_layer_and_a_panel_for_each_side(tmp_path: Path) -> None:
    found = matrices.read_matrices(matrix_records(tmp_path, 20))
    assert found is not None and found.steps == list(range(2, 21, 2))
    grid = matrices.grid(found, "rank")
    assert list(grid) == ["A", "B"] and grid["A"][0] == ["0", "1", "2", "3"]
    assert [row[-1] for row in grid["A"][1]] == [3, 4, 5, 6] and [row[-1] for row in grid["B"][1]] == [6, 7, 8, 9]
    assert grid["A"][1][0][:5] == [0] * 5
    assert matrices.place("h.3.attn.weight") == ("", 3) and matrices.place("lm_head.weight") == ("", None)
    assert matrices.place("model.layers.11.q.lora_B.default.weight") == ("B", 11)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rule": "published"}, "refreshes its basis every 5 steps, all at once"),
    ],
)
def test_report_judges_matrices(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    found = matrices.read_matrices(matrix_records(tmp_path, 60))
    assert found is not None
    assert words not in " ".join(matrices.findings(found, False))
    found.options |= changes
    assert words in " ".join(matrices.findings(found, False))


def test_a_larger_k_max_is_advised_only_where_little_is_held(tmp_path: Path) -> None:
    found = matrices.read_matrices(matrix_records(tmp_path, 60))
    assert found is not None
    found.options["k_max"] = 3  # which every matrix uses up; they hold 90 % of the curvature
    assert "k_max" not in " ".join(matrices.findings(found, False))
    found.figures["captured_mass"][-1] = [0.4] * len(NAMES)
    (said,) = matrices._limited(found)
    assert said.startswith("8 of 8 matrices use all 3 directions that k_max allows, and these hold only 40% of")
    assert "compare with k_max 6," in said


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0524, "0.052 s"), (9.94, "9.9 s"), (45.2, "45 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 5 min")],
)
def test_times_are_told_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_report_takes_the_yaml_and_tells_time_tokens_and_held_out_loss(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    evaluations: list[dict[str, float]] = [{"step": 30, "eval_loss": 1.5}, {"step": 60, "eval_loss": 1.75}]
    end = {"step": 60, "train_runtime": 200.0, "train_steps_per_second": 0.3, "tokens/total": 40_000.0}
    run_folder(tmp_path / "outputs" / "mine", [*history(60), *evaluations, end])
    said = run("report", yaml_file(tmp_path, GOOD + "output_dir: ./outputs/mine")).output
    assert "The held-out loss was 1.75 at step 60, and 1.5 at its lowest, at step 30." in said
    assert "Training took 3 min 20 s, 3.3 s a step, 200 tokens/s." in said
    assert (tmp_path / "outputs" / "mine" / run_report.HTML_NAME).is_file()


def test_report_names_the_matrices_that_stand_out(tmp_path: Path) -> None:
    found = matrices.read_matrices(matrix_records(tmp_path, 60, jump=40))
    assert found is not None
    said = " ".join(matrices.findings(found, True))
    assert f"{NAMES[5]} has seen its curvature jump 1000-fold" in said
    assert f"{NAMES[3]} was left as it was for 4 steps" in said
    assert "left as it was" not in " ".join(matrices.findings(found, False))


@pytest.mark.parametrize(
    ("rule", "damped", "words"),
    [
        ("eigenbasis", 0, "No matrix is damped at the end"),
        ("eigenbasis", 2, "2 of 8 matrices are damped at the end: to be as large as AdamW's, their steps"),
        ("published", 8, "8 of 8 matrices have a factor that is damped by a ten-thousandth of its mean"),
    ],
)
def test_report_counts_damped_matrices(tmp_path: Path, rule: str, damped: int, words: str) -> None:
    found = matrices.read_matrices(matrix_records(tmp_path, 60))
    assert found is not None
    found.options["rule"] = rule
    found.figures["damped"][-1][:damped] = [1.0] * damped
    assert words in " ".join(matrices.findings(found, False))
    assert "no direction in use" not in " ".join(matrices.findings(found, False))
    found.figures["rank"][-1][0] = 0.0
    assert "1 of 8 matrices have no direction in use" in " ".join(matrices.findings(found, False))


def test_damped_matrices_are_drawn_where_there_are_any(tmp_path: Path) -> None:
    for damped in (0.0, 0.25):
        page = run_report.write_report(run_folder(tmp_path, history(30, damped=damped))).html
        assert ("Damped matrices" in page.read_text(encoding="utf-8")) is (damped > 0)


def test_records_of_a_resumed_run_follow_on_and_a_new_run_begins_anew(tmp_path: Path) -> None:
    matrix_records(tmp_path, 20)
    matrix_records(tmp_path, 30, start=10)
    found = matrices.read_matrices(tmp_path / "checkpoint-30")
    assert found is not None and found.steps == list(range(2, 31, 2)) and len(found.milliseconds) == 30
    with (tmp_path / STATISTICS_NAME).open("a") as file:
        file.write('{"step": 32, "ra')  # the run was killed here
    again = matrices.read_matrices(tmp_path)
    assert again is not None and again.steps == found.steps
    matrix_records(tmp_path, 8)
    again = matrices.read_matrices(tmp_path)
    assert again is not None and again.steps == [2, 4, 6, 8]
    with (tmp_path / STATISTICS_NAME).open("a") as file:
        file.write("{}\n")
    run_folder(tmp_path, history(30))
    assert "is damaged: delete it" in mistake("report", tmp_path)


def test_peaks_of_the_gradient_norm_are_named(tmp_path: Path) -> None:
    rows = history(30)
    rows[19]["grad_norm"] = 11.0
    said = run_report.findings(run_report.read_run(run_folder(tmp_path, rows)))
    assert any("over 10 times its median at step 20:" in sentence for sentence in said)
    assert not any(
        "10 times its median" in s for s in run_report.findings(run_report.read_run(run_folder(tmp_path, history(30))))
    )


def test_report_of_a_whole_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "my <run>", history(20), checkpoint="checkpoint-9")
    run_folder(folder, history(60), checkpoint="checkpoint-60")
    result = run("report", folder, "--out", tmp_path / "new" / "out")
    assert result.exit_code == 0, result.output
    assert "The training loss fell from 2.93 to 1.85 in 60 steps" in result.output
    assert "first logged at step 11 and is in full effect from step 21" in result.output
    assert "12 directions were in use on average, holding 90% of" in result.output
    assert "No step was skipped" in result.output
    page = (tmp_path / "new" / "out" / run_report.HTML_NAME).read_text(encoding="utf-8")
    assert page.count("<svg ") == 6 and "Run my &lt;run&gt;" in page
    # Self-contained, without scripts, for both colour schemes and for phones.
    assert "<script" not in page and "@import" not in page and 'src="' not in page and 'href="http' not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    for colour, _ in tool_page._COLOURS.values():
        assert colour not in page.partition("</style>")[2], "a colour that the dark scheme cannot change"
    for svg in page.split("<svg ")[1:]:
        xml.dom.minidom.parseString("<svg " + svg.partition("</svg>")[0] + "</svg>")
    assert (tmp_path / "new" / "out" / run_report.PNG_NAME).read_bytes().startswith(b"\x89PNG")


def test_bands_follow_the_phases(tmp_path: Path) -> None:
    found = run_report.read_run(run_folder(tmp_path, history(60)))
    assert tool_page.bands(*found.of("scao/blend")) == [(0, 10, FIRST), (10, 20, RAMP), (20, 60, SECOND)]


@pytest.mark.parametrize(
    ("rows", "max_steps", "words"),
    [
        (history(8), 0, "Phase 2 was never reached in 8 steps"),
        (history(15), 0, "the run ended on the ramp to its full effect"),
        (history(30, scao=False), 0, "The log has no scao/ figures"),
        (history(30, skipped=7.0), 0, "7 times a matrix was left as it was"),
        (history(30), 90, "The log ends at step 30 of 90"),
        ([*history(30), {"step": 31, "loss": math.nan}], 0, "The loss was NaN or infinite at step 31"),
        ([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}], 0, "did not fall: it went from 1 to 2"),
    ],
)
def test_report_says_what_is_unusual(tmp_path: Path, rows: list[dict[str, float]], max_steps: int, words: str) -> None:
    said = run_report.findings(run_report.read_run(run_folder(tmp_path, rows, max_steps)))
    assert words in " ".join(said)


@pytest.mark.parametrize("value", [1e308, -1e308, math.inf, math.nan])
def test_a_run_that_diverged_is_reported(tmp_path: Path, value: float) -> None:
    rows = history(40)
    for row in rows[15:]:
        row |= dict.fromkeys(("loss", "eval_loss", "learning_rate", "grad_norm", "scao/skipped"), value)
    folder = matrix_records(run_folder(tmp_path, rows), 40)
    path = folder / STATISTICS_NAME
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in lines[8:]:
        record["curvature_norm"] = [value] * len(NAMES)
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    report = run_report.write_report(folder)
    said = " ".join(report.findings)
    assert "The loss was NaN or infinite at step 16" in said and "nan" not in said and "inf " not in said
    assert report.html.is_file() and report.png.is_file()


@pytest.mark.parametrize("name", [r"$\frac$ {x}%s [x] <b>&", "two\nlines", os.fsdecode(b"byte \xff")])
def test_report_of_a_folder_with_any_name(tmp_path: Path, name: str) -> None:
    folder = matrix_records(run_folder(tmp_path / name, history(30, skipped=4)), 30)
    text = (folder / STATISTICS_NAME).read_text(encoding="utf-8")
    matrix = r"lone \ud800 $\\frac$ <i>"
    (folder / STATISTICS_NAME).write_text(text.replace(NAMES[3], matrix), encoding="utf-8")
    result = run("report", folder)
    assert result.exit_code == 0, result.output
    page = (folder / run_report.HTML_NAME).read_text(encoding="utf-8")
    assert f"Run {escape(os.fsencode(name).decode(errors='replace'))}</h1>" in page
    assert "lone ? $\\frac$ &lt;i&gt;" in page and r"lone \ud800" in result.stdout
    assert (folder / run_report.PNG_NAME).read_bytes().startswith(b"\x89PNG")


def test_report_without_scao_figures_shows_the_rest(tmp_path: Path) -> None:
    result = run("report", run_folder(tmp_path, history(30, scao=False)))
    page = (tmp_path / run_report.HTML_NAME).read_text(encoding="utf-8")
    assert result.exit_code == 0 and page.count("<svg ") == 3 and "The log has no scao/ figures" in page


def test_mistakes_of_the_report(tmp_path: Path) -> None:
    assert "does not exist: pass the output_dir" in mistake("report", tmp_path / "nowhere")
    assert "is empty" in mistake("report", tmp_path)
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    assert "notes.txt is a file: pass the output_dir of the run" in mistake("report", tmp_path / "notes.txt")
    said = mistake("report", yaml_file(tmp_path, GOOD + "output_dir: ./outputs/mine"))
    assert "outputs/mine does not exist: pass the output_dir of a run" in said
    (tmp_path / "compared" / "scao-x1" / "run").mkdir(parents=True)
    said = mistake("report", tmp_path / "compared")
    assert "compared holds the runs of a comparison: pass one of them" in said and "scao-x1" in said
    assert "has no trainer_state.json" in mistake("report", tmp_path)
    (tmp_path / "trainer_state.json").write_text("{", encoding="utf-8")
    assert "is damaged or no Trainer's" in mistake("report", tmp_path)
    assert "holds no training loss" in mistake("report", run_folder(tmp_path, []))
    run_folder(tmp_path, history(30))
    assert "cannot be written to" in mistake("report", tmp_path, "--out", tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "change",
    [
        {"log_history": [{"step": None, "loss": 1.0}]},
        {"log_history": [{"step": "soon", "loss": 1.0}]},
        {"log_history": [{"step": 1, "loss": 10**400}]},
        {"log_history": 5},
        {"global_step": "many"},
        {"max_steps": math.inf},
    ],
)
def test_a_damaged_state_file_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    run_folder(tmp_path, history(30))
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    assert "trainer_state.json is damaged or no Trainer's" in mistake("report", tmp_path)


@pytest.mark.parametrize(
    ("header", "record"),
    [
        ({}, {"rank": [1.0]}),
        ({}, {"rank": [None, 1.0]}),
        ({}, {"optimizer_ms": ["fast"]}),
        ({"options": {}}, {}),
        ({"options": {"rule": "eigenbasis", "k_max": "many"}}, {}),
        ({"options": None}, {}),
    ],
)
def test_a_damaged_file_of_statistics_is_named(tmp_path: Path, header: dict[str, Any], record: dict[str, Any]) -> None:
    run_folder(tmp_path, history(30))
    first = {"from": 0, "matrices": ["a", "b"], "options": {"rule": "eigenbasis"}, **header}
    figures = {key: [0.0, 0.0] for key in ("rank", "captured_mass", "curvature_norm", "damped", "skipped")}
    lines = [first, {"step": 1, **figures, "optimizer_ms": [1.0], **record}]
    (tmp_path / "scao_statistics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    assert "scao_statistics.jsonl is damaged" in mistake("report", tmp_path)


def test_report_of_a_real_trainer(tmp_path: Path) -> None:
    from scao_hf import SCAOTrainer

    model = transformers.LlamaForCausalLM(tiny(vocab_size=32, hidden_size=16, num_hidden_layers=1, head_dim=2))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=8, logging_steps=1, save_steps=8, report_to="none", use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 64
    chosen = {"warmup_steps": 2, "precond_freq": 2, "blend_steps": 2}
    SCAOTrainer(model=model, args=arguments, train_dataset=rows, scao_kwargs=chosen).train()
    report = run_report.write_report(tmp_path)
    said = " ".join(report.findings)
    assert "first logged at step 3 and is in full effect from step 5" in said
    assert "Each of the 9 matrices refreshes its basis every 2 steps" in said
    found = matrices.read_matrices(tmp_path)
    assert found is not None and found.steps == list(range(1, 9)) and len(found.milliseconds) == 8
    assert all(rank > 0 for rank in found.figures["rank"][-1]) and not any(found.figures["rank"][0])
    drawn = 10 + any(any(record) for record in found.figures["damped"])
    page = report.html.read_text(encoding="utf-8")
    assert page.count("<svg ") == drawn
    settings = dict(found.about)
    assert settings["learning rate"] == "5e-05, linear" and settings["batch"] == "8 x 1 accumulated"
    assert "warmup_steps=2" in settings["SCAO"] and "k_max" not in settings["SCAO"]
    assert f"torch {torch.__version__}" in settings["versions"] and f"<td>{settings['trained']}</td>" in page
    assert len(found.whole) == 8 and max(found.whole) > max(found.milliseconds.values())
    assert re.search(r"took [\d.e+]+ ms \(median\) of [\d.e+]+ ms for the whole step: [\d.]+%", said)
    assert "8 steps took " in said and " a step." in said


# --- doctor


@pytest.mark.parametrize("rule", options.MATRIX_RULES)
def test_doctor_finds_both_rules_sound(rule: str) -> None:
    text, sound = doctor.self_test(rule, "cpu")
    assert sound and text.count("ok") == 2


def test_doctor_tests_every_native_kernel_of_the_cpu(monkeypatch: Any) -> None:
    called: set[str] = set()

    def counted(name: str) -> Any:
        kernel = getattr(ops, name)
        return lambda *arguments: (called.add(name), kernel(*arguments))[1]

    for name in ops.KERNELS["cpu"]:
        monkeypatch.setattr(ops, name, counted(name))
    assert all(doctor.self_test(rule, "cpu")[1] for rule in options.MATRIX_RULES) and doctor.average_test("cpu")[1]
    if "cpu" not in ops.NATIVE:
        pytest.skip("needs the native kernels: the others were tested")
    assert called == set(ops.KERNELS["cpu"])


def test_doctor_finds_a_broken_average(monkeypatch: Any) -> None:
    right = doctor.average_codes
    monkeypatch.setattr(
        doctor, "average_codes", lambda codes, scales, values, w, seed: right(codes, scales, values, w / 2, seed)
    )
    text, sound = doctor.average_test("cpu")
    assert not sound and text.startswith("WRONG")


def test_doctor_finds_a_broken_rule(monkeypatch: Any) -> None:
    right = reference.eigenbasis
    monkeypatch.setattr(reference, "eigenbasis", lambda w, g, o: [w * 1.5 for w in right(w, g, o)])
    monkeypatch.setattr(doctor, "axolotl_plugin", lambda: ("loads", True))
    result = run("doctor")
    assert result.exit_code == 1
    assert "float32 WRONG" in result.output and "BROKEN: the eigenbasis rule is wrong on cpu" in result.output


def test_doctor_tries_bitsandbytes(monkeypatch: Any) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    assert doctor.four_bit("cpu")[0].startswith("ok")

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("libbitsandbytes_cuda999.so is\nmissing")

    monkeypatch.setattr(functional, "quantize_4bit", broken)
    assert doctor.four_bit("cpu") == ("fails: RuntimeError: libbitsandbytes_cuda999.so is missing", False)
    monkeypatch.setattr(doctor, "_version", lambda _: "not installed")
    assert doctor.four_bit("cpu") == ("not tried: bitsandbytes is not installed", True)


def test_doctor_prints_a_block_for_bug_reports(monkeypatch: Any) -> None:
    monkeypatch.setattr(doctor, "axolotl_plugin", lambda: ("loads", True))
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("```\n") and "\n```\nNothing is broken." in result.output
    for words in ("torch ", "transformers ", "bitsandbytes ", "cuda ", "backend, cpu ", torch.__version__):
        assert words in result.output
    found = json.loads(run("doctor", "--json").stdout)
    assert found["rows"]["torch"] == torch.__version__ and found["problems"] == [] and found["note"] is None


def test_doctor_names_the_command_that_builds_missing_kernels(monkeypatch: Any) -> None:
    monkeypatch.delenv("SCAO_DISABLE_EXT", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = [(f"backend, {device}", str(ops._refusal(device, Path("nowhere")))) for device in ("cpu", "cuda")]
    said = doctor.Findings(rows, []).text.splitlines()[-1]
    assert said == "Steps on cpu would be faster with native kernels: the backend row has the command."
    assert doctor.Findings([("backend, cpu", "native"), rows[1]], []).text.endswith("Nothing is broken.")


def test_the_shell_completes_commands() -> None:
    command = [sys.executable, "-m", "scao_hf"]
    asked = {"_SCAO_HF_COMPLETE": "complete_bash", "COMP_WORDS": "scao-hf comp", "COMP_CWORD": "1"}
    code = "import sys; from scao_hf.tools.cli import app; app(prog_name='scao-hf')"
    done = subprocess.run([command[0], "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["compare"], done.stderr


def test_doctor_tells_two_packages_of_the_name_apart(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(doctor, "axolotl_plugin", lambda: ("loads", True))
    monkeypatch.setattr(doctor, "other_package", lambda: Path("/somewhere/scao"))
    text = GOOD + "optimizer: scao"
    assert (
        "the YAML lacks"
        not in run("doctor", yaml_file(tmp_path, text + "\nplugins: [axolotl_plugin.SCAOPlugin]")).output
    )
    result = run("doctor", yaml_file(tmp_path, text))
    assert result.exit_code == 0 and "package scao " in result.output and "another project's" in result.output
    assert result.output.splitlines()[-1].startswith(f"{tmp_path / 'config.yml'}: the YAML lacks `plugins:")
    assert run("doctor", tmp_path / "nowhere.yml").exit_code == 2
    monkeypatch.setattr(doctor, "other_package", lambda: None)
    assert "not installed" in next(row for row in run("doctor").output.splitlines() if row.startswith("package scao "))


def test_doctor_says_why_the_plugin_does_not_load(monkeypatch: Any) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _: "0.19.0")
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no module")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert doctor.axolotl_plugin() == ("does not load: ImportError: no module", False)
    monkeypatch.setattr(doctor, "_version", lambda _: "not installed")
    assert doctor.axolotl_plugin() == ("not tried: axolotl is not installed", True)


# --- the command line as a whole


def test_axolotl_serves_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Axolotl's own command line, with the entry point as pyproject.toml declares it."""
    pytest.importorskip("axolotl")
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 to read pyproject.toml")
    from axolotl.cli import plugins
    from axolotl.cli.main import cli
    from click.testing import CliRunner as ClickRunner

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = [
        importlib.metadata.EntryPoint(name, value, plugins.ENTRY_POINT_GROUP)
        for name, value in declared["entry-points"][plugins.ENTRY_POINT_GROUP].items()
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == plugins.ENTRY_POINT_GROUP else [])
    monkeypatch.setattr(cli, "_plugin_commands", None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    listed = ClickRunner().invoke(cli, ["--help"])
    assert listed.exit_code == 0 and "scao " in listed.output, listed.output
    helped = ClickRunner().invoke(cli, ["scao", "--help"])
    assert all(word in helped.output for word in ("plan", "compare", "report", "doctor")), helped.output
    done = ClickRunner().invoke(cli, ["scao", "report", str(run_folder(tmp_path, history(60)))])
    assert done.exit_code == 0 and "The training loss fell" in done.output, done.output
    wrong = ClickRunner().invoke(cli, ["scao", "report", str(tmp_path / "nowhere")])
    assert wrong.exit_code == 2 and "does not exist: pass the output_dir" in wrong.output + wrong.stderr
    version = ClickRunner().invoke(cli, ["scao", "--version"])
    assert (version.exit_code, version.output) == (0, f"scao-hf {scao_hf.__version__}\n")
    (tmp_path / "config.yml").write_text("base_model: x", encoding="utf-8")
    after = ClickRunner().invoke(cli, ["scao", "compare", str(tmp_path / "config.yml"), "--", "--model", "x"])
    assert after.exit_code == 2 and "arguments after -- are for a script" in after.output + after.stderr


def test_help_says_what_each_argument_is() -> None:
    for command, words in (
        ("plan", "CONFIG is an Axolotl YAML"),
        ("compare", "CONFIG is an Axolotl YAML, or a Python script"),
        ("report", "RUN_DIR is the output folder"),
    ):
        assert words in " ".join(run(command, "--help").output.split())
    assert run("--version").output == f"scao-hf {scao_hf.__version__}\n"
    assert "what fills the card" in " ".join(run("--help").output.split())


def test_the_entry_points_lead_to_the_commands(monkeypatch: Any) -> None:
    """In a group of click, as Axolotl's is, whichever click typer is made of."""
    click = pytest.importorskip("click")
    from click.testing import CliRunner as ClickRunner

    from scao_hf.tools import main
    from scao_hf.tools.axolotl_command import command

    assert callable(main)
    group = click.Group(commands={"scao": command})
    helped = ClickRunner().invoke(group, ["scao", "--help"])
    assert helped.exit_code == 0 and all(word in helped.output for word in ("plan", "compare", "report", "doctor"))
    for broken in (False, True):
        found = doctor.Findings([("a", "b")], ["c"] * broken)
        monkeypatch.setattr(doctor, "examine", lambda found=found: found)
        done = ClickRunner().invoke(group, ["scao", "doctor"])
        assert (done.output, done.exit_code) == (found.text + "\n", int(broken))
        assert done.exception is None or isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("llama-3.1-8b-qlora-24gb.yml", 24),
        ("llama-3.2-3b-qlora.yml", 12),
        ("mistral-7b-qlora.yml", 16),
        ("qwen2.5-3b-dpo.yml", 16),
        ("qwen2.5-3b-qlora.yml", 16),
    ],
)
def test_example_fits_the_card_that_it_names(name: str, card: int) -> None:
    plan = planning.make_plan(axolotl_yaml.from_yaml(ROOT / "examples" / "axolotl" / name))
    assert plan.free(card) > plan.margin and not plan.notes


def test_tool_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="rank is 0"):
        settings.Settings("any", rank=0)
    assert issubclass(ToolError, ValueError)
