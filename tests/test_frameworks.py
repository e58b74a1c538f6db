"""examples/frameworks: what is installed is run, and the hooks of the others are called as their sources call them."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from scao_hf import SCAO

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "frameworks"
PAGE = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")


def example(name: str, *arguments: str | Path, cwd: Path) -> str:
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "package"),
    [("accelerate_loop", "accelerate"), ("lightning_module", "lightning"), ("fabric_loop", "lightning")],
)
def test_a_loop_reaches_phase_two_and_shows_the_figures(name: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package, reason=f"needs {package} (make test-frameworks installs it)")
    assert "phase 2" in example(f"{name}.py", cwd=tmp_path)


def test_trl_takes_the_class_of_the_optimizer(tiny_llama: Path, tmp_path: Path) -> None:
    for package in ("trl", "peft", "datasets"):
        pytest.importorskip(package, reason=f"needs {package}, which make test has")
    rows = [{"text": "a" * (4 + n % 5)} for n in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = example(
        "trl_sft.py", "--model", tiny_llama, "--data", "rows.jsonl", "--steps", "12", "--lr", "1e-3", cwd=tmp_path
    )
    assert re.search(r"'scao/phase': '?2", said) and (tmp_path / "runs/trl/adapter_model.safetensors").is_file()
    rates = [float(rate) for rate in re.findall(r"'learning_rate': '?([\d.e-]+)", said)]
    assert rates[0] == pytest.approx(1e-3)


def stepped(optimizer: Any, model: nn.Module) -> float:
    """The phase after 12 steps of a small network."""
    for _ in range(12):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(optimizer.metrics()["scao/phase"])


def test_litgpt_builds_it_from_the_yaml() -> None:
    utils = pytest.importorskip("litgpt.utils", reason="needs litgpt (make test-frameworks installs it)")
    chosen = yaml.safe_load((FOLDER / "litgpt.yaml").read_text(encoding="utf-8"))["optimizer"]
    model = nn.Linear(16, 8)
    optimizer = utils.instantiate_torch_optimizer(chosen, model.parameters())
    assert isinstance(optimizer, SCAO) and optimizer.defaults["lr"] == 2e-4 and stepped(optimizer, model) == 2


def test_torchtune_builds_it_from_its_name() -> None:
    config = pytest.importorskip("torchtune.config", reason="needs torchtune (make test-frameworks installs it)")
    from omegaconf import OmegaConf

    command = (FOLDER / "torchtune.sh").read_text(encoding="utf-8")
    assert "optimizer=scao_hf.SCAO" in command
    chosen = {key: float(value) for key, value in re.findall(r"optimizer\.(\w+)=(\S+)", command)}
    model = nn.Linear(16, 8)
    optimizer = config.instantiate(OmegaConf.create({"_component_": "scao_hf.SCAO", **chosen}), model.parameters())
    assert isinstance(optimizer, SCAO) and optimizer.defaults["lr"] == 2e-4 and stepped(optimizer, model) == 2


def trainer_of(folder: Path, **fields: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        str(folder), learning_rate=3e-4, use_cpu=True, report_to="none", **fields
    )
    return transformers.Trainer(model=nn.Linear(16, 8), args=arguments)


def test_the_plugin_of_swift_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ms-swift makes the class with (args, trainer) and calls create_optimizer."""

    class OptimizerCallback:
        def __init__(self, args: Any, trainer: Any) -> None:
            self.args, self.trainer = args, trainer

    known: dict[str, Any] = {}
    for name, module in (("swift", ModuleType("swift")), ("swift.optimizers", ModuleType("swift.optimizers"))):
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["swift.optimizers"]).update(OptimizerCallback=OptimizerCallback, optimizers_map=known)
    runpy.run_path(str(FOLDER / "swift_plugin.py"))
    trainer = trainer_of(tmp_path, weight_decay=0.5)
    optimizer = known["scao"](trainer.args, trainer).create_optimizer()
    assert isinstance(optimizer, SCAO) and optimizer.param_groups[0]["lr"] == 3e-4
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert type(trainer.callback_handler.callbacks[0]).__name__ == "SCAOCallback"


def test_the_launcher_of_llamafactory_gives_its_trainers_scao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trainers call Trainer.create_optimizer where none of its own optimizers is chosen."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(
        transformers.Trainer, "get_optimizer_cls_and_kwargs", transformers.Trainer.get_optimizer_cls_and_kwargs
    )
    made: list[Any] = []

    def run_exp(callbacks: list[Any]) -> None:
        trainer = trainer_of(tmp_path)
        made.extend([trainer.create_optimizer(), *callbacks])

    tuner = ModuleType("llamafactory.train.tuner")
    vars(tuner)["run_exp"] = run_exp
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", tuner)
    runpy.run_path(str(FOLDER / "llamafactory_launcher.py"), run_name="__main__")
    assert isinstance(made[0], SCAO) and made[0].param_groups[0]["lr"] == 3e-4
    assert type(made[1]).__name__ == "SCAOCallback"


def test_the_plugin_of_llamafactorys_version_1_takes_the_options_of_its_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trainer calls what is registered under ``optim_config.name`` with the model and that whole mapping."""
    registered: dict[str, Any] = {}

    class OptimizerPlugin:
        def __init__(self, name: str) -> None:
            self.name = name

        def register(self) -> Any:
            return lambda function: registered.setdefault(self.name, function)

    plugins, trainers = "llamafactory.v1.plugins.trainer_plugins.optimizer", "llamafactory.v1.trainers.sft_trainer"
    for path in (plugins, trainers):
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:count]), ModuleType(parts[count - 1]))
    vars(sys.modules[plugins])["OptimizerPlugin"] = OptimizerPlugin
    started: list[int] = []
    vars(sys.modules[trainers])["run_sft"] = lambda: started.append(1)
    runpy.run_path(str(FOLDER / "llamafactory_v1.py"), run_name="__main__")
    made = registered["scao"](nn.Linear(6, 4), {"name": "scao", "lr": 3e-4, "k_max": 8})
    assert isinstance(made, SCAO) and started == [1]
    assert (made.param_groups[0]["lr"], made.param_groups[0]["k_max"]) == (3e-4, 8)
    for wrong, message in (({}, "no lr"), ({"lr": 3e-4, "kmax": 8}, "kmax")):
        with pytest.raises((TypeError, ValueError), match=message):
            registered["scao"](nn.Linear(6, 4), {"name": "scao", **wrong})


def test_the_script_for_unsloth_passes_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    passed: dict[str, Any] = {}

    class Trainer:
        def __init__(self, **fields: Any) -> None:
            passed.update(fields)
            self.callback_handler = SimpleNamespace(callbacks=[])

        def train(self) -> None:
            assert len(self.callback_handler.callbacks) == 1

    model = SimpleNamespace(save_pretrained=lambda folder: None)
    loader = SimpleNamespace(
        from_pretrained=lambda *_, **__: (model, "tokenizer"), get_peft_model=lambda model, **_: model
    )
    unsloth = ModuleType("unsloth")
    vars(unsloth).update(FastLanguageModel=loader, UnslothTrainer=Trainer, UnslothTrainingArguments=dict)
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    arguments = ["--model", "any", "--data", str(tmp_path / "rows.jsonl"), "--lr", "5e-4"]
    monkeypatch.setattr(sys, "argv", ["unsloth_sft.py", *arguments])
    runpy.run_path(str(FOLDER / "unsloth_sft.py"), run_name="__main__")
    assert passed["optimizer_cls_and_kwargs"] == (SCAO, {"lr": 5e-4, "weight_decay": 0.0})


def test_the_page_names_every_file_and_no_other() -> None:
    named = set(re.findall(r"`([\w.]+\.(?:py|sh|yaml))`", PAGE))
    assert named == {path.name for path in FOLDER.iterdir() if path.is_file()}
