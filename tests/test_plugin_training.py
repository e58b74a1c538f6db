"""``optimizer: scao`` through Axolotl's own loaders, builders and trainers, on a tiny Llama, offline, on the CPU."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="needs axolotl")

import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.integrations.base import PluginManager
from axolotl.train import setup_model_and_trainer, train
from axolotl_config import tiny_run
from datasets import Dataset
from safetensors.torch import load_file
from test_trainer import METRICS, tensorboard_tags
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, Trainer

from axolotl_plugin.rules import check_run
from axolotl_plugin.values import Findings
from scao_hf import SCAO, SCAOCallback
from scao_hf.tools.matrices import place, read_matrices
from scao_hf.trainer import unwrap

STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def clean_process() -> Iterator[None]:
    """Axolotl writes to the environment and keeps its plugins in a singleton: both as before afterwards."""
    environment = os.environ.copy()
    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()
    os.environ.clear()
    os.environ.update(environment)


def config(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """A LoRA run of a few steps, curvature from step 3 on; ``changes`` set to None remove keys."""
    base: dict[str, Any] = {
        "scao_warmup_steps": 2,
        "dataset_num_proc": 1,
        "lora_r": 4,
        "lora_alpha": 8,
        "warmup_steps": 2,
        "max_steps": STEPS,
        "micro_batch_size": 2,
        "sequence_len": 96,
    }
    return tiny_run(model, folder, **{**base, **changes})


def load(model: Path, folder: Path, **changes: Any) -> Any:
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(config(model, folder, **changes)))
    return load_cfg(str(file))


def tokens(model: Path, rows: int = 32, steps: int = STEPS) -> TrainDatasetMeta:
    """A data set as Axolotl's preprocessing leaves it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer(f"the number {n} is followed by {n + 1}")["input_ids"] for n in range(rows)]
    data = Dataset.from_list([{"input_ids": t, "attention_mask": [1] * len(t), "labels": t} for t in texts])
    return TrainDatasetMeta(train_dataset=data, total_num_steps=steps)


def build(model: Path, folder: Path, **changes: Any) -> Trainer:
    """The trainer that Axolotl builds, before the first step."""
    return setup_model_and_trainer(load(model, folder, **changes), tokens(model))[0]


def run(model: Path, folder: Path, **changes: Any) -> tuple[PreTrainedModel, Trainer]:
    """A whole run, as ``axolotl train`` makes it once the data are tokenized."""
    trained, _, trainer = train(cfg=load(model, folder, **changes), dataset_meta=tokens(model))
    return trained, trainer


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def distance(first: PreTrainedModel, second: PreTrainedModel) -> float:
    other = weights(second)
    return max(float((value - other[name]).abs().max()) for name, value in weights(first).items())


def check_logs(trainer: Trainer, steps: int) -> None:
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == steps
    assert all(entry.keys() >= METRICS for entry in entries)
    phases = [entry["scao/phase"] for entry in entries]
    assert phases == [1.0] * 2 + [2.0] * (steps - 2)
    assert entries[-1]["loss"] < entries[0]["loss"]


@pytest.fixture(scope="module")
def full_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Trainer, Path]:
    """12 uninterrupted steps with a checkpoint after the 5th."""
    folder = tmp_path_factory.mktemp("axolotl")
    changes = {"save_strategy": "steps", "save_steps": 5, "use_tensorboard": True}
    return *run(tiny_llama, folder, **changes), folder / "out" / "checkpoint-5"


def test_sft(full_run: tuple[PreTrainedModel, Trainer, Path]) -> None:
    model, trainer, checkpoint = full_run
    assert type(unwrap(trainer.optimizer)) is SCAO
    assert trainer.args.optim == "scao"
    check_logs(trainer, STEPS)
    tags = tensorboard_tags(checkpoint.parent)
    assert all(len(tags[f"train/{name}"]) == STEPS for name in METRICS)
    # Every factor has moved, B away from its zeros.
    assert all(float(value.abs().max()) > 0 for value in weights(model).values())
    assert (checkpoint.parent / "adapter_model.safetensors").is_file()
    found = read_matrices(checkpoint)
    assert found is not None and found.steps == list(range(1, STEPS + 1)) and len(found.names) == 28
    assert all(place(name)[0] in ("A", "B") and place(name)[1] in (0, 1) for name in found.names)


def test_resume_gives_the_same_weights(
    tiny_llama: Path, tmp_path: Path, full_run: tuple[PreTrainedModel, Trainer, Path]
) -> None:
    model, _, checkpoint = full_run
    torch.load(checkpoint / "optimizer.pt", weights_only=True)
    resumed, trainer = run(tiny_llama, tmp_path, resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == STEPS
    assert distance(resumed, model) == 0.0


def test_resume_with_another_layer_frozen(
    tiny_llama: Path, tmp_path: Path, full_run: tuple[PreTrainedModel, Trainer, Path]
) -> None:
    _, _, checkpoint = full_run
    changed = {"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj"], "max_steps": 7}
    changed["resume_from_checkpoint"] = str(checkpoint)
    with pytest.raises(ValueError, match=r"only the saved state has \[.*k_proj.* \(frozen or removed since\)"):
        run(tiny_llama, tmp_path, **changed)
    with pytest.warns(
        RuntimeWarning, match="partial_resume: the state of 8 parameters is loaded; only in the saved state"
    ):
        _, trainer = run(tiny_llama, tmp_path, **changed, scao_partial_resume=True)
    optimizer = unwrap(trainer.optimizer)
    assert isinstance(optimizer, SCAO) and {entry["step"] for entry in optimizer.state.values()} == {7}


def test_resume_without_optimizer_state_warns(
    tiny_llama: Path,
    tmp_path: Path,
    full_run: tuple[PreTrainedModel, Trainer, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, _, checkpoint = full_run
    bare = tmp_path / "checkpoint-5"
    bare.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "optimizer.pt":
            (bare / file.name).write_bytes(file.read_bytes())
    with caplog.at_level(logging.WARNING):
        resumed, _ = run(tiny_llama, tmp_path, resume_from_checkpoint=str(bare))
    assert "resuming at step 5 without SCAO's state" in caplog.text
    assert distance(resumed, model) > 0.0


def test_resume_from_adamw_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    plain = {"optimizer": "adamw_torch", "scao_warmup_steps": None, "scao_precond_freq": None, "scao_blend_steps": None}
    _, trainer = run(tiny_llama, tmp_path, max_steps=2, save_strategy="steps", save_steps=2, **plain)
    # With another optimizer the plugin leaves the trainer as it is.
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert not [known for known in trainer.callback_handler.callbacks if isinstance(known, SCAOCallback)]
    with pytest.raises(ValueError, match="written by another optimizer"):
        run(tiny_llama, tmp_path, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_dpo(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"after {n} comes ", "chosen": f"{n + 1}", "rejected": "no"} for n in range(16)]
    cfg = load(
        tiny_llama,
        tmp_path,
        rl="dpo",
        datasets=[{"path": "made/up", "split": "train", "type": "chatml.intel"}],
        max_steps=6,
        gradient_checkpointing=False,
    )
    meta = TrainDatasetMeta(train_dataset=Dataset.from_list(rows), total_num_steps=6)
    model, _, trainer = train(cfg=cfg, dataset_meta=meta)
    assert "DPO" in type(trainer).__name__
    assert type(unwrap(trainer.optimizer)) is SCAO
    check_logs(trainer, 6)
    assert all(float(value.abs().max()) > 0 for value in weights(model).values())


def groups_of(model: Path, folder: Path, **changes: Any) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The parameter groups that reach SCAO, and the name of each parameter by its id."""
    trainer = build(model, folder, **changes)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is SCAO
    return optimizer.param_groups, {id(param): name for name, param in trainer.model.named_parameters()}


def test_training_arguments_reach_the_groups(tiny_llama: Path, tmp_path: Path) -> None:
    ((group,), _) = groups_of(
        tiny_llama, tmp_path, weight_decay=0.05, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6
    )
    found = {name: group[name] for name in ("lr", "weight_decay", "betas", "eps", "warmup_steps", "rule")}
    assert found == {
        "lr": 0.01,
        "weight_decay": 0.05,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "warmup_steps": 2,
        "rule": "auto",
    }


def test_what_the_config_leaves_out_is_the_rules_default(tiny_llama: Path, tmp_path: Path) -> None:
    ((group,), _) = groups_of(tiny_llama, tmp_path, adam_beta1=0.8, scao_warmup_steps=None)
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.99), 1e-8, 0.0)
    assert group["warmup_steps"] == 3


@pytest.mark.parametrize(
    "optim_args",
    [{"k_max": 6, "rho": "9e-1", "use_int8_ema": True}, "k_max=6, rho=0.9, use_int8_ema=true"],
    ids=["dict", "text"],
)
def test_optim_args_are_merged_with_the_fields(tiny_llama: Path, tmp_path: Path, optim_args: Any) -> None:
    ((group,), _) = groups_of(tiny_llama, tmp_path, optim_args=optim_args, scao_k_min=3)
    assert (group["k_max"], group["rho"], group["use_int8_ema"], group["k_min"]) == (6, 0.9, True, 3)
    assert (group["warmup_steps"], group["betas"]) == (2, (0.9, 0.99))


def test_lr_groups(tiny_llama: Path, tmp_path: Path) -> None:
    groups, names = groups_of(
        tiny_llama, tmp_path, lr_groups=[{"name": "values", "modules": ["v_proj"], "lr": 0.003}], weight_decay=0.1
    )
    rates = {names[id(param)]: group["lr"] for group in groups for param in group["params"]}
    assert {rate for name, rate in rates.items() if "v_proj" in name} == {0.003}
    assert {rate for name, rate in rates.items() if "v_proj" not in name} == {0.01}
    assert {group["weight_decay"] for group in groups} == {0.1}


def test_embedding_lr(tiny_llama: Path, tmp_path: Path) -> None:
    groups, names = groups_of(
        tiny_llama, tmp_path, embedding_lr=0.0005, lora_modules_to_save=["embed_tokens", "lm_head"]
    )
    rates = {names[id(param)]: group["lr"] for group in groups for param in group["params"]}
    assert {rate for name, rate in rates.items() if "modules_to_save" in name} == {0.0005}
    assert {rate for name, rate in rates.items() if "lora_" in name} == {0.01}


def test_loraplus(tiny_llama: Path, tmp_path: Path) -> None:
    groups, names = groups_of(tiny_llama, tmp_path, loraplus_lr_ratio=16.0, weight_decay=0.1)
    found = {names[id(param)]: (group["lr"], group["weight_decay"]) for group in groups for param in group["params"]}
    assert {value for name, value in found.items() if "lora_A" in name} == {(0.01, 0.1)}
    assert {value for name, value in found.items() if "lora_B" in name} == {(0.16, 0.1)}


def test_full_fine_tuning_logs_its_state(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="axolotl_plugin.plugin"):
        trainer = build(tiny_llama, tmp_path, adapter=None, lora_target_linear=None)
    optimizer = trainer.create_optimizer()
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    words = {param for group in optimizer.param_groups if group.get("vocabulary") for param in group["params"]}
    assert words == {trainer.model.get_input_embeddings().weight, trainer.model.get_output_embeddings().weight}
    assert f"Its state takes {optimizer.memory_report()['peak'] / 2**20:.1f} MiB" in caplog.text


def test_real_length_of_the_run_is_checked(tiny_llama: Path, tmp_path: Path) -> None:
    """Without max_steps the length is known only when the trainer is built."""
    cfg = load(tiny_llama, tmp_path, max_steps=None, scao_warmup_steps=8)
    with pytest.raises(ValueError, match="the run's 8 steps would end before phase 2"):
        setup_model_and_trainer(cfg, tokens(tiny_llama, rows=16, steps=8))


def test_precision_that_auto_chose_is_checked() -> None:
    get = {"peft_autocast_adapter_dtype": False, "bf16": "auto"}.get
    findings = Findings()
    check_run(get, SimpleNamespace(fp16=True, bf16=False, max_steps=-1), {}, findings)
    assert "leaves the adapter in float16" in findings.errors[0]
    findings = Findings()
    check_run(get, SimpleNamespace(fp16=False, bf16=True, max_steps=-1), {}, findings)
    assert not findings.errors
    assert "leaves the adapter in bfloat16" in findings.warnings[0]


def axolotl_cli(command: str, file: Path, *flags: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``axolotl COMMAND file`` in a process of its own, which looks for packages in ``first`` before all others."""
    places = [str(first or ""), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "axolotl.cli.main", command, str(file), *flags],
        cwd=file.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def command_line(file: Path, *flags: str) -> str:
    """What ``axolotl train`` prints, in a process of its own."""
    done = axolotl_cli("train", file, "--launcher", "python", *flags)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def four_bit_run(model: Path, folder: Path, **changes: Any) -> Path:
    """A YAML and its JSONL of a 4-bit run of six steps."""
    folder.mkdir(exist_ok=True)
    rows = [{"instruction": f"after {n}", "input": "", "output": f"comes {n + 1}"} for n in range(32)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = {"adapter": "qlora", "load_in_4bit": True, "max_steps": 6, "sequence_len": 256}
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(config(model, folder, **{**own, **changes})))
    return file


def test_command_line(tiny_llama: Path, tmp_path: Path) -> None:
    """``axolotl train`` on a YAML and a JSONL file, 4-bit."""
    said = command_line(four_bit_run(tiny_llama, tmp_path))
    assert "optimizer: scao with lr=0.01" in said
    assert said.count("'scao/phase': '2'") + said.count("'scao/phase': 2.0") == 4, said[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_command_line_resumes_to_the_bit(tiny_llama: Path, tmp_path: Path) -> None:
    """``axolotl train --resume-from-checkpoint`` over a 4-bit base ends where the run has ended that was never stopped."""
    saving = {"save_strategy": "steps", "save_steps": 3, "scao_use_int8_ema": True}
    command_line(four_bit_run(tiny_llama, tmp_path / "whole", **saving))
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-3"
    resumed = four_bit_run(tiny_llama, tmp_path / "resumed", **saving)
    command_line(resumed, "--resume-from-checkpoint", str(checkpoint))
    ends = [load_file(tmp_path / name / "out" / "adapter_model.safetensors") for name in ("whole", "resumed")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"][0]["use_int8_ema"]
