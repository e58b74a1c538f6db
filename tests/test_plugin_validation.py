"""The validation of the plugin, row by row, through that of Axolotl: plugin registered, schemas merged."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="needs axolotl")

import torch
from axolotl.cli.config import load_cfg, prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from pydantic import BaseModel

from axolotl_plugin import SCAOPlugin
from axolotl_plugin.args import SCAOArgs
from axolotl_plugin.plugin import _log_choice
from scao_hf import SCAO
from scao_hf.options import OPTIONS, SWITCHES, Option

PLUGIN = "axolotl_plugin.SCAOPlugin"
EXAMPLES = Path(__file__).parent.parent / "examples" / "axolotl"

#: A 4-bit QLoRA config that raises no warning: what the tests below change is what they see.
BASE: dict[str, Any] = {
    "base_model": "made/up",
    "plugins": [PLUGIN],
    "optimizer": "scao",
    "datasets": [{"path": "data.jsonl", "type": "alpaca"}],
    "learning_rate": 1e-3,
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "sequence_len": 128,
    "bf16": False,
    "fp16": False,
}
LORA_16BIT = {"adapter": "lora", "load_in_4bit": False}


@pytest.fixture(autouse=True)
def plugins() -> Iterator[None]:
    """Axolotl's plugin manager is a singleton: start and end each test without plugins."""
    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()


def validate(n_gpu: int = 1, **changes: Any) -> DictDefault:
    """The config as ``axolotl train`` gets it from the base config with ``changes`` (None removes a key)."""
    cfg = DictDefault({key: value for key, value in {**BASE, **changes}.items() if value is not None})
    prepare_plugins(cfg)
    capabilities = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": n_gpu, "compute_capability": None}
    torch_version = torch.__version__.split("+")[0]
    return validate_config(cfg, capabilities=capabilities, env_capabilities={"torch_version": torch_version})


def errors_of(**changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        validate(**changes)
    return str(caught.value)


def warnings_of(caplog: pytest.LogCaptureFixture, **changes: Any) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        validate(**changes)
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("axolotl_plugin"))


def illegal(option: Option) -> list[Any]:
    """Values of a wrong type and, where there is a range, outside of it."""
    if option.choices:
        return ["other", 3]
    if option.kind is bool:
        return ["perhaps", 3]
    outside = [option.low if option.open_low else option.low - 1] if option.low is not None else []
    return ["many", True, [1], float("nan"), *outside, *([option.high] if option.open_high else [])]


def test_base_config_is_accepted_silently(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(caplog) == ""
    cfg = validate()
    assert cfg.optimizer == "scao"
    assert not [key for key in cfg if key.startswith("scao_")]  # None is "not passed": the signature owns the defaults


def test_every_option_is_a_field_with_its_description() -> None:
    fields = SCAOArgs.model_fields
    assert set(fields) == {f"scao_{name}" for name in (*OPTIONS, *SWITCHES)}
    for name, option in OPTIONS.items():
        assert option.doc in str(fields[f"scao_{name}"].description)
        assert option.valid in str(fields[f"scao_{name}"].description)
        assert fields[f"scao_{name}"].default is None
    assert SCAOArgs(optimizer="scao", scao_k_max=8).scao_k_max == 8  # valid on its own, without Axolotl's schema


def test_defaults_of_fields_that_axolotl_may_have_are_not_taken_for_passed_options() -> None:
    class Later(BaseModel):
        optimizer: str = "scao"
        adapter: str = "qlora"
        load_in_4bit: bool = True
        scao_k_max: int = 128
        scao_k_min: int = 8

    class Merged(Later, SCAOArgs):  # type: ignore[misc, valid-type]
        """In the order in which Axolotl merges the fields of plugins into its own."""

    assert Merged(scao_k_min="5").model_dump(exclude_none=True).items() >= {"scao_k_min": 5}.items()
    assert Merged().scao_k_max is None


@pytest.mark.parametrize("name", OPTIONS)
def test_illegal_values_are_refused_with_the_range(name: str) -> None:
    for value in illegal(OPTIONS[name]):
        message = errors_of(**{f"scao_{name}": value})
        assert f"{name}={value!r} is not valid: it must be {OPTIONS[name].valid}" in message


def test_values_are_read_as_yaml_gives_them() -> None:
    cfg = validate(scao_epsilon_sparse="1e-2", scao_k_max="12", scao_use_int8_ema="true", scao_rule=" Published ")
    assert cfg.scao_epsilon_sparse == 0.01  # YAML 1.1 reads 1e-2 as text
    assert (cfg.scao_k_max, cfg.scao_use_int8_ema, cfg.scao_rule) == (12, True, "published")


@pytest.mark.parametrize("name", ["SCAO", " scao ", "Scao\n"])
def test_optimizer_name_is_normalised(name: str) -> None:
    assert validate(optimizer=name).optimizer == "scao"


@pytest.mark.parametrize("name", ["scoa", "sca0", "SCAOO"])
def test_misspelt_optimizer_is_caught(name: str) -> None:
    assert f"optimizer: '{name}' is unknown (did you mean 'scao'?)" in errors_of(optimizer=name)


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "lion_8bit", "muon", "polora"])
def test_other_optimizers_are_left_alone(caplog: pytest.LogCaptureFixture, name: str) -> None:
    assert warnings_of(caplog, optimizer=name) == ""


ERRORS = {
    "unknown key": ({"scao_rnk": 4}, "scao_rnk is not an option of SCAO (did you mean 'scao_k_max'?)"),
    "misspelt key": ({"scao_precond_frq": 4}, "did you mean 'scao_precond_freq'?"),
    "nested block": ({"scao": {"k_max": 8}}, "options are flat keys, scao_k_max: 8"),
    "contradiction": ({"scao_k_min": 9, "scao_k_max": 8}, "k_min=9 must not exceed k_max=8"),
    "optim_args malformed": ({"optim_args": "k_max=8,rho"}, "optim_args: 'k_max=8,rho' is malformed"),
    "optim_args two signs": ({"optim_args": "k_max=8=9"}, "is malformed"),
    "optim_args twice": ({"optim_args": "k_max=8,k_max=9"}, "a key is given twice"),
    "optim_args unknown": (
        {"optim_args": "k_mx=8"},
        "k_mx is not an option of SCAO (did you mean 'k_max'?)",
    ),
    "optim_args of the PyPI package": (
        {"optim_args": {"precond_freq": 10, "k_max": 64, "sparsity": 0.3}},
        "optim_args: sparsity is not an option of SCAO (it belongs to the PyPI package scao, another project's: remove it)",
    ),
    "key of the PyPI package": ({"scao_lazy_precond": True}, "remove it; the nearest here is scao_precond_freq)"),
    "optim_args range": ({"optim_args": {"rho": 2}}, "optim_args: rho=2 is not valid: it must be a number in [0, 1)"),
    "optim_args lr": ({"optim_args": {"lr": 1}}, "set learning_rate in the config instead"),
    "optim_args betas": ({"optim_args": {"betas": 0.9}}, "betas=0.9 is not valid"),
    "optim_args and field": ({"optim_args": "k_max=8", "scao_k_max": 9}, "scao_k_max: 9 and optim_args: k_max=8"),
    "optim_args and betas": ({"optim_args": {"betas": [0.8, 0.9]}, "adam_beta1": 0.9}, "also set as adam_beta1"),
    "optim_args and eps": ({"optim_args": {"eps": 1e-6}, "adam_epsilon": 1e-8}, "also set as adam_epsilon"),
    "learning rate": ({"learning_rate": 0}, "learning_rate: 0.0 must be a finite number above 0"),
    "negative learning rate": ({"learning_rate": -1e-3}, "learning_rate: -0.001"),
    "weight decay": ({"weight_decay": -0.1}, "weight_decay: -0.1 must be a number in [0, inf)"),
    "beta1": ({"adam_beta1": 1.0}, "adam_beta1: 1.0 must be a number in [0, 1)"),
    "beta2": ({"adam_beta2": -0.5}, "adam_beta2: -0.5 must be a number in [0, 1)"),
    "epsilon": ({"adam_epsilon": 0.0}, "adam_epsilon: 0.0 must be a number in [1e-30, inf)"),
    "DeepSpeed without its file": (
        {"deepspeed": "x.json"},
        "deepspeed: x.json: SCAO does not run under this configuration: there is no such file here",
    ),
    "DeepSpeed from a folder": ({"deepspeed": "."}, "it cannot be read ([Errno 21] Is a directory: '.')"),
    "DeepSpeed without ZeRO": ({"deepspeed": {"bf16": {"enabled": True}}}, "zero_optimization.stage is 0"),
    "DeepSpeed's own Adam": (
        {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
        "offload_optimizer replaces SCAO with DeepSpeed's Adam",
    ),
    "FSDP1": ({"fsdp_config": {"offload_params": False}, "fsdp_version": 1}, "FSDP1 flattens the matrices"),
    "FSDP2 in host memory": (
        {"fsdp_config": {"offload_params": True}, "fsdp_version": 2},
        "offload_params: true keeps",
    ),
    "tensor parallel": ({"tensor_parallel_size": 2}, "tensor_parallel_size: 2 splits"),
    "context parallel": ({"context_parallel_size": 2}, "context_parallel_size: 2 splits"),
    "sequence parallel": ({"sequence_parallel_degree": 2}, "sequence_parallel_degree: 2 splits"),
    "ReLoRA": ({"relora": True, "jagged_restart_steps": 50}, "relora: True: restarts"),
    "jagged restarts": ({"jagged_restart_steps": 50}, "jagged_restart_steps: 50: restarts"),
    "LISA": ({**LORA_16BIT, "adapter": None, "lisa_n_layers": 2, "lisa_step_interval": 9}, "lisa_step_interval: 9"),
    "LoftQ": ({"peft": {"loftq_config": {"loftq_bits": 4}}}, "LoftQ has to see the unquantized weights"),
    "fp16 adapter": ({"fp16": True, "peft_autocast_adapter_dtype": False}, "leaves the adapter in float16"),
    "warm-up of SCAO": ({"max_steps": 30, "scao_warmup_steps": 30}, "max_steps: 30 would end before phase 2"),
    "default warm-up": ({"max_steps": 3}, "max_steps: 3 would end before phase 2"),
    "published warm-up": ({"max_steps": 200, "scao_rule": "published"}, "is 10 x 20; max_steps: 200"),
    "refresh interval": ({"max_steps": 50, "scao_precond_freq": 60}, "is 1 x 60; max_steps: 50 would end"),
}


@pytest.mark.parametrize("row", ERRORS)
def test_error(row: str) -> None:
    changes, message = ERRORS[row]
    assert message in errors_of(**changes)
    # The rule belongs to SCAO: the same config passes, or fails for another reason, with AdamW.
    try:
        validate(**{**changes, "optimizer": "adamw_torch"})
    except (ValueError, ImportError) as error:
        assert message not in str(error)


WARNINGS = {
    "no adapter": ({**LORA_16BIT, "adapter": None}, "no adapter, so every weight is trained"),
    "no adapter, 16 bit": ({**LORA_16BIT, "adapter": None, "bf16": "auto"}, "33 MiB of state (AdamW: 16 MiB)"),
    "part of the weights": (
        {**LORA_16BIT, "adapter": None, "unfrozen_parameters": ["lm_head"]},
        "unfrozen_parameters: ['lm_head']: whole weights are trained, in blocks",
    ),
    "16-bit LoRA": (LORA_16BIT, "adapter: lora on a 16-bit base model"),
    "8-bit LoRA": ({**LORA_16BIT, "load_in_8bit": True}, "adapter: lora on an 8-bit base model"),
    "DoRA": ({"peft_use_dora": True}, "magnitude vectors have one side"),
    "modules to save": ({"lora_modules_to_save": ["embed_tokens", "lm_head"]}, "AdamW: 2374 MiB"),
    "unfrozen parameters": ({"unfrozen_parameters": ["lm_head"]}, "unfrozen_parameters: ['lm_head']: whole weights"),
    "LoRA+ with decay": ({"loraplus_lr_ratio": 16, "weight_decay": 0.1}, "weight_decay: 0.1 is passed on to LoRA+"),
    "LoRA+ with groups": ({"loraplus_lr_ratio": 16, "embedding_lr": 1e-4}, "no effect of embedding_lr"),
    "one_cycle": ({"lr_scheduler": "one_cycle", "embedding_lr": 1e-4}, "one_cycle gives every group the same"),
    "keys of others": ({"adam_beta3": 0.9, "dion_lr": 0.1}, "adam_beta3, dion_lr belong to other optimizers"),
    "the Trainer's name": ({"optim": "adamw_bnb_8bit"}, "optim belong to other optimizers and have no effect"),
    "bf16 adapter": ({"bf16": "full", "peft_autocast_adapter_dtype": False}, "leaves the adapter in bfloat16"),
    "half of the run": ({"max_steps": 30, "scao_warmup_steps": 20}, "lasts 20 steps: scao_warmup_steps is 20"),
    "rare refresh": ({"max_steps": 80, "scao_precond_freq": 60}, "1 x 60, more than half of max_steps: 80"),
    "LR warm-up": ({"max_steps": 50, "warmup_steps": 50}, "warmup_steps: 50 is not below max_steps: 50"),
    "save_only_model": ({"save_only_model": True, "resume_from_checkpoint": "runs/x"}, "saves no optimizer state"),
    "auto resume": ({"save_only_model": True, "auto_resume_from_checkpoints": True}, "saves no optimizer state"),
    "on-policy RL": (
        {"rl": "grpo", "trl": {"beta": 0.1, "num_generations": 2}, "micro_batch_size": 2},
        "rl: grpo: SCAO has not been",
    ),
    "ZeRO-3 with 4 bits": ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "ZeRO-3 with a quantized base model"),
    "Grokfast": ({"plugins": [PLUGIN, "axolotl.integrations.grokfast.GrokfastPlugin"]}, "GrokfastPlugin changes"),
}


@pytest.mark.parametrize("row", WARNINGS)
def test_warning(caplog: pytest.LogCaptureFixture, row: str) -> None:
    changes, message = WARNINGS[row]
    if row == "bf16 adapter":
        changes = {**changes, "bf16": None, "bfloat16": True}
    assert message in warnings_of(caplog, **changes)
    assert message not in warnings_of(caplog, **{**changes, "optimizer": "adamw_torch"})


def test_a_run_that_trains_part_of_the_weights_is_not_said_to_train_all(caplog: pytest.LogCaptureFixture) -> None:
    part = {**LORA_16BIT, "adapter": None, "unfrozen_parameters": ["lm_head"]}
    assert "every weight" not in warnings_of(caplog, **part) and "adapter" not in caplog.text


def test_the_log_has_the_state_of_adamw_in_the_precision_of_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    for dtype, size in ((torch.float32, "8.0"), (torch.bfloat16, "4.0")):
        trainer: Any = SimpleNamespace(model=torch.nn.Linear(1024, 1024, bias=False, dtype=dtype))
        with caplog.at_level(logging.INFO):
            _log_choice(trainer, {}, "")
        assert f"(AdamW's {size} MiB)" in caplog.messages[-1]


def test_the_log_knows_the_weights_that_zero_3_has_cut_while_they_were_loaded(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = torch.nn.Linear(1024, 1024, bias=False)
    vocabulary, trainer = {model.weight}, SimpleNamespace(model=model)
    model.weight.ds_id, model.weight.ds_shape, model.weight.ds_numel = 0, model.weight.shape, 2**20
    model.weight.data = torch.empty(0)
    with caplog.at_level(logging.INFO):
        _log_choice(trainer, {"vocabulary": vocabulary, "partial_resume": False}, "")
    assert "(AdamW's 8.0 MiB) for 1048576 trainable parameters" in caplog.messages[-1]


ALLOWED = {
    "clipping": {"max_grad_norm": 1.0},
    "accumulation": {"gradient_accumulation_steps": 8},
    "packing": {"sample_packing": True, "attn_implementation": "sdpa"},
    "checkpointing": {"gradient_checkpointing": True},
    "offloading": {"gradient_checkpointing": True, "activation_offloading": True},
    "torch.compile": {"torch_compile": True},
    "optim_args dict": {"optim_args": {"k_max": 8, "rho": "9e-1", "betas": [0.8, 0.9], "tau": None}},
    "optim_args text": {"optim_args": "k_max=8, rho=0.9, use_int8_ema=false, tau=none"},
    "per-group rates": {"embedding_lr": 1e-4, "lr_groups": [{"name": "v", "modules": ["v_proj"], "lr": 1e-4}]},
    "LoRA+": {"loraplus_lr_ratio": 16},
    "preference tuning": {"rl": "dpo"},
    "save_only_model without resume": {"save_only_model": True},
    "DDP": {"ddp": True, "n_gpu": 2},
    "FSDP2": {
        "fsdp_config": {"offload_params": False, "state_dict_type": "SHARDED_STATE_DICT"},
        "fsdp_version": 2,
        "n_gpu": 2,
    },
    "DeepSpeed": {"deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}, "n_gpu": 2},
    "long enough": {"max_steps": 21},
}


@pytest.mark.parametrize("row", ALLOWED)
def test_allowed(caplog: pytest.LogCaptureFixture, row: str) -> None:
    assert warnings_of(caplog, **ALLOWED[row]) == ""


def test_a_full_state_dict_under_fsdp_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    said = errors_of(fsdp_config={"state_dict_type": "FULL_STATE_DICT"}, fsdp_version=2, n_gpu=2)
    assert "state_dict_type: FULL_STATE_DICT: a run that is resumed" in said and "set SHARDED_STATE_DICT" in said
    final = {"state_dict_type": "SHARDED_STATE_DICT", "final_state_dict_type": "FULL_STATE_DICT"}
    for config in (final, {"offload_params": False}):
        assert warnings_of(caplog, fsdp_config=config, fsdp_version=2, n_gpu=2) == ""


def test_expert_parallelism_is_refused() -> None:
    plugins = [PLUGIN, "axolotl.integrations.expert_parallel.ExpertParallelPlugin"]
    assert "expert_parallel_size: 2 splits" in errors_of(plugins=plugins, expert_parallel_size=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"load_in_4bit": False},
        {"load_in_4bit": False, "load_in_8bit": True},
        {"gptq": True},
        {"adapter": None},
        {"qat": {"weight_dtype": "int4"}},
    ],
)
def test_what_axolotl_itself_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        validate(**changes)
    assert "does not work with SCAO" not in str(caught.value)


def test_all_errors_come_at_once() -> None:
    message = errors_of(
        scao_rnk=4, scao_rho=2, deepspeed="x.json", optim_args="foo=1", max_steps=3, learning_rate=-1, adam_beta1=2
    )
    lines = [line for line in message.splitlines() if line.startswith("  - ")]
    expected = ("scao_rnk", "scao_rho=2", "deepspeed", "foo", "max_steps: 3", "learning_rate", "adam_beta1")
    assert len(lines) == len(expected)
    assert all(any(word in line for line in lines) for word in expected)


def test_axolotls_errors_come_along() -> None:
    message = errors_of(scao_rnk=4, sequence_len="long")
    assert "scao_rnk" in message
    assert "sequence_len" in message
    # Without an error of ours, Axolotl's own is not touched.
    assert "SCAO" not in errors_of(sequence_len="long")


def test_options_with_another_optimizer_only_warn(caplog: pytest.LogCaptureFixture) -> None:
    changes = {"optimizer": "adamw_torch", "scao_k_max": 8, "scao_rnk": 3, "scao_rho": 7, "scao": {"k_max": 3}}
    assert "optimizer: adamw_torch does not read scao_k_max, scao_rho, scao_rnk, scao" in warnings_of(caplog, **changes)


@pytest.mark.parametrize("mode", ["merge_lora", "inference"])
def test_merging_and_inference_are_not_judged(caplog: pytest.LogCaptureFixture, mode: str) -> None:
    changes = {"load_in_4bit": False, "adapter": "lora", "deepspeed": "x.json", "max_steps": 3}
    assert warnings_of(caplog, **{mode: True}, **changes) == ""


def test_register_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scao_hf", None)
    with pytest.raises(RuntimeError, match=r"pip install 'scao-hf\[axolotl\]'"):
        validate()


def test_hooks_do_nothing_for_another_optimizer() -> None:
    plugin, cfg = SCAOPlugin(), DictDefault({"optimizer": "adamw_torch"})
    trainer = SimpleNamespace()
    assert plugin.get_training_args(cfg) is None
    plugin.post_trainer_create(cfg, trainer)
    assert vars(trainer) == {}


def test_cli_config_with_errors_stops_before_anything_is_loaded(tmp_path: Path) -> None:
    text = (EXAMPLES / "qwen2.5-3b-qlora.yml").read_text()
    broken = tmp_path / "broken.yml"
    broken.write_text(text.replace("optimizer: scao", "optimizer: scoa"))
    with pytest.raises(ValueError, match="did you mean 'scao'"):
        load_cfg(str(broken))


@pytest.fixture
def qwen_config(tmp_path: Path) -> Path:
    """The architecture of Qwen/Qwen2.5-3B, as its config.json on the hub has it, without the weights."""
    from transformers import Qwen2Config

    Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


def test_reference_config(qwen_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """examples/axolotl/qwen2.5-3b-qlora.yml: Axolotl's validation, and the adapter's shapes on the meta device."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr(os, "environ", os.environ.copy())  # load_cfg writes to it
    # Only what needs a network is replaced: the name on the hub by a folder with the same config.json.
    cfg = load_cfg(
        str(EXAMPLES / "qwen2.5-3b-qlora.yml"), base_model=str(qwen_config), output_dir=str(tmp_path / "out")
    )
    assert (cfg.optimizer, cfg.adapter, cfg.load_in_4bit, cfg.model_config_type) == ("scao", "qlora", True, "qwen2")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(qwen_config))
    lora = LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=list(cfg.lora_target_modules))
    model = get_peft_model(model, lora)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert len([name for name in trainable if "lora_A" in name]) == 252
    assert sum(param.numel() for param in trainable.values()) == 29_933_568  # the 29.93 M of the file's comment
    report = SCAO(trainable.items()).memory_report()
    assert report["parameters"] == 29_933_568
    assert report["total"] < 8 * report["parameters"]  # AdamW's state
