"""The plugin on a release of Axolotl whose builder has an ``optimizer: scao`` of its own, from the PyPI package ``scao``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="needs axolotl")

import axolotl
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.core.builders.base import TrainerBuilderBase
from axolotl.evaluate import evaluate
from axolotl.train import setup_model_and_trainer
from datasets import Dataset
from test_plugin_training import axolotl_cli, build, clean_process, four_bit_run, load, tokens  # noqa: F401

import scao_hf
from scao_hf import SCAO

OURS = {"plugins": None, "scao_warmup_steps": None, "scao_precond_freq": None, "scao_blend_steps": None}


def other_package(folder: Path) -> Path:
    """A package named ``scao`` in ``folder`` whose optimizer must not be built."""
    (folder / "scao").mkdir(parents=True)
    (folder / "scao" / "__init__.py").write_text(
        "class SCAO:\n    def __init__(self, *args, **kwargs):\n        raise RuntimeError('the other SCAO')\n"
    )
    return folder


@pytest.fixture(params=["without scao", "with scao"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bool:
    """Whether a package ``scao`` can be imported, in a process whose builder has a branch for it."""
    original = TrainerBuilderBase._configure_optimizer

    def configure(self: Any, arguments: dict[str, Any], trainer_arguments: dict[str, Any]) -> None:
        if self.cfg.optimizer != "scao":
            original(self, arguments, trainer_arguments)
            return
        from scao import SCAO as OtherSCAO

        trainer_arguments["optimizer_cls_and_kwargs"] = (OtherSCAO, {"lr": arguments["learning_rate"]})

    monkeypatch.setattr(TrainerBuilderBase, "_configure_optimizer", configure)
    present = request.param == "with scao"
    monkeypatch.setitem(sys.modules, "scao", None)  # and what is imported in its place is gone after the test
    if present:
        monkeypatch.syspath_prepend(str(other_package(tmp_path / "other")))
        del sys.modules["scao"]
    return present


def test_without_the_plugin_the_other_one_is_built(tiny_llama: Path, tmp_path: Path, installed: bool) -> None:
    if not installed:
        with pytest.raises(ModuleNotFoundError, match="scao"):
            build(tiny_llama, tmp_path, **OURS)
        return
    trainer = build(tiny_llama, tmp_path, **OURS)
    with pytest.raises(RuntimeError, match="the other SCAO"):
        trainer.create_optimizer()


def test_with_the_plugin_ours_is_built(
    tiny_llama: Path, tmp_path: Path, installed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = load(tiny_llama, tmp_path)
    for _ in range(2):  # a config can be trained from twice
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="axolotl_plugin.plugin"):
            trainer = setup_model_and_trainer(cfg, tokens(tiny_llama))[0]
        assert type(trainer.create_optimizer()) is SCAO
        assert (cfg.optimizer, trainer.args.optim, trainer.args.optim_args) == ("scao", "scao", None)
        (line,) = [line for line in caplog.messages if "optimizer: scao is " in line]
        assert f"SCAO of scao-hf {scao_hf.__version__} in {Path(scao_hf.__file__).parent}" in line
        assert (f"not the package scao in {tmp_path / 'other' / 'scao'}" in line) is installed


def test_with_the_plugin_ours_is_built_for_preference_tuning(tiny_llama: Path, tmp_path: Path, installed: bool) -> None:
    rows = [{"prompt": f"after {n} comes ", "chosen": f"{n + 1}", "rejected": "no"} for n in range(16)]
    datasets = [{"path": "made/up", "split": "train", "type": "chatml.intel"}]
    # A reference model is loaded as well, so that the hooks of loading run twice.
    cfg = load(
        tiny_llama, tmp_path, rl="dpo", datasets=datasets, gradient_checkpointing=False, rl_adapter_ref_model=True
    )
    meta = TrainDatasetMeta(train_dataset=Dataset.from_list(rows), total_num_steps=6)
    trainer = setup_model_and_trainer(cfg, meta)[0]
    assert type(trainer.create_optimizer()) is SCAO


def test_evaluation_builds_a_trainer_too(tiny_llama: Path, tmp_path: Path, installed: bool) -> None:
    data = tokens(tiny_llama).train_dataset
    metrics = evaluate(
        cfg=load(tiny_llama, tmp_path, val_set_size=8),
        dataset_meta=TrainDatasetMeta(train_dataset=data, eval_dataset=data, total_num_steps=1),
    )
    assert metrics["eval_loss"] > 0


def next_release(folder: Path) -> Path:
    """A tree with Axolotl as it is installed, but for the two edits of its next release; the rest are links."""
    source = Path(axolotl.__file__).parent
    edits = {
        "utils/schemas/enums.py": ('    muon = "muon"\n', '    muon = "muon"\n    scao = "scao"\n'),
        "core/builders/base.py": (
            '            if self.cfg.optimizer == "muon":\n',
            '            if self.cfg.optimizer == "scao":\n'
            "                from scao import SCAO as optimizer_cls\n\n"
            "                optimizer_kwargs.update(adam_kwargs)\n"
            '            elif self.cfg.optimizer == "muon":\n',
        ),
    }
    for name, (before, after) in edits.items():
        text = (source / name).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"Axolotl's {name} is no longer as the edit expects it"
        place = folder / "axolotl" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text.replace(before, after), encoding="utf-8")
    for made in [path for path in (folder / "axolotl").rglob("*") if path.is_dir()] + [folder / "axolotl"]:
        for original in (source / made.relative_to(folder / "axolotl")).iterdir():
            if not (made / original.name).exists() and original.name != "__pycache__":
                (made / original.name).symlink_to(original)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("present", [False, True], ids=["without scao", "with scao"])
def test_command_line(tiny_llama: Path, tmp_path: Path, present: bool) -> None:
    """``axolotl train`` on a tree of the next release, and without the package every command that reads such a config."""
    tree = next_release(tmp_path / "tree")
    if present:
        other_package(tree)
    else:
        (tree / "sitecustomize.py").write_text("import sys\n\nsys.modules['scao'] = None\n")
    bare = four_bit_run(tiny_llama, tmp_path / "bare", **OURS)
    failed = axolotl_cli("train", bare, "--launcher", "python", first=tree)
    assert failed.returncode != 0
    assert ("the other SCAO" if present else "ModuleNotFoundError: import of scao") in failed.stdout[-3000:]

    # Not in 4 bit: in an evaluation on a CPU bitsandbytes fails on matrices this small.
    plain = {"adapter": "lora", "load_in_4bit": False, "val_set_size": 0.2}
    file = four_bit_run(tiny_llama, tmp_path / "run", **plain)
    python = ("--launcher", "python")
    commands = {"preprocess": (), "train": python, "evaluate": python, "merge-lora": ()}
    for command, flags in {"train": python}.items() if present else commands.items():
        done = axolotl_cli(command, file, *flags, first=tree)
        assert done.returncode == 0, done.stdout[-3000:]
        if command == "train":
            assert f"optimizer: scao is SCAO of scao-hf {scao_hf.__version__}" in done.stdout
            assert done.stdout.count("'scao/phase': '2'") + done.stdout.count("'scao/phase': 2.0") == 4
    # The config in the model card can be run again.
    assert "optimizer: scao\n" in (tmp_path / "run" / "out" / "README.md").read_text(encoding="utf-8")
