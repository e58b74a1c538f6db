"""The run of Axolotl's maintainers, ready for the first card: its YAMLs, its dry run, its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="needs axolotl")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "benchmarks"))

import yardstick
from axolotl.cli.train import do_cli
from axolotl.integrations.base import PluginManager
from test_docs import validated


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Axolotl writes to the environment and keeps its plugins in a singleton."""
    environment = os.environ.copy()
    monkeypatch.syspath_prepend(str(Path(yardstick.__file__).parent / "plugins"))
    yield
    PluginManager.get_instance().plugins.clear()
    os.environ.clear()
    os.environ.update(environment)


def here(file: Path) -> None:
    """A run in this process, which has imported Axolotl already."""
    PluginManager.get_instance().plugins.clear()
    do_cli(config=str(file))


@pytest.mark.parametrize("optimizer", yardstick.RATES)
@pytest.mark.parametrize("bf16", [True, False])
def test_the_settings_are_the_published_ones(optimizer: str, bf16: bool, tmp_path: Path, monkeypatch: Any) -> None:
    cell = {"benchmark": "yardstick", "model": yardstick.MODEL, "data": yardstick.DATA, "device": "A40", "seed": 42}
    cell |= {
        "optimizer": optimizer,
        "lr": yardstick.RATES[optimizer][0],
        "steps": 1500,
        "eval_steps": 25,
        **yardstick.SIZES,
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    settings = yardstick.config(cell, tmp_path / "run")
    monkeypatch.undo()
    assert settings["sequence_len"] * settings["micro_batch_size"] * settings["gradient_accumulation_steps"] == 32_768
    assert (settings["bf16"], settings["fp16"]) == (bf16, not bf16)
    config = validated(settings)
    assert (config.lora_r, config.max_steps, config.warmup_steps, config.lr_scheduler) == (32, 1500, 0, "constant")


def test_the_dry_run_resumes_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second optimizer's run is interrupted after its first checkpoint; the second call ends it, the third runs nothing."""
    asked: list[str] = []

    def launched(file: Path) -> None:
        asked.append(file.parent.name.partition("-")[0])
        text = file.read_text()
        if len(asked) == 2:
            file.write_text(text.replace("max_steps: 12", "max_steps: 6"))
            here(file)
            raise subprocess.CalledProcessError(-9, "axolotl train")
        here(file)

    monkeypatch.setattr(yardstick, "launch", launched)
    command = ["--dry-run", "--folder", str(tmp_path), "--optimizers", "adamw_torch", "scao"]
    assert yardstick.main(command) == 1 and "scao at 0.0003 failed" in capsys.readouterr().err
    assert yardstick.main(command) == 0 and yardstick.main(command) == 0
    assert asked == ["adamw_torch", "scao", "scao"]
    records = [json.loads(line) for line in (tmp_path / "dry" / "yardstick.jsonl").read_text().splitlines()]
    for record in records:
        assert len(record["train_loss"]) == 12 and [each["step"] for each in record["evals"]] == [0, 3, 6, 9, 12]
        assert 0 < record["optimizer_seconds_per_step"] < record["seconds_per_step"]
    steps = [
        json.loads(line)["step"]
        for line in next((tmp_path / "dry").glob("scao-*/clock.jsonl")).read_text().splitlines()
    ]
    assert steps == list(range(1, 13)), "the second call continued the first one's run"
    table = capsys.readouterr().out.splitlines()
    assert {line.split(" | ")[0] for line in table[-2:]} == {"| adamw_torch", "| scao"}


@pytest.mark.long
def test_the_dry_run_as_a_command(tmp_path: Path) -> None:
    """Each run is a process of its own, in which the clock is found and Axolotl's own modules are not hidden."""
    command = [sys.executable, yardstick.__file__, "--dry-run", "--folder", str(tmp_path), "--optimizers", "scao"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("| scao |"), done.stderr[-2000:]


def test_without_a_gpu_it_says_what_can_be_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert yardstick.main([]) == 1 and "this needs a GPU; --dry-run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        yardstick.main(["--steps", "1499"])
    assert "--steps 1499 must be a multiple of --eval-steps 25" in capsys.readouterr().err


def test_the_table_has_steps_to_adamw_s_best_loss() -> None:
    def record(optimizer: str, lr: float, *losses: float) -> dict[str, Any]:
        evals = [{"step": 500 * (at + 1), "loss": loss} for at, loss in enumerate(losses)]
        cell = {"optimizer": optimizer, "lr": lr, "steps": 1500}
        seconds = {"seconds_per_step": 2.0, "optimizer_seconds_per_step": 0.01}
        return {"cell": cell, "evals": evals, **seconds, "peak_active": 2**30, "peak_reserved": 3 * 2**29}

    rows = yardstick.table(
        [
            record("adamw_torch", 1e-3, 0.7, 0.6, 0.55),
            record("adamw_torch", 3e-4, 0.6, 0.55, 0.5),
            record("scao", 3e-4, 0.6, 0.52, 0.44),
        ]
    ).splitlines()[2:]
    assert rows[0] == "| scao | 0.0003 | 0.4400 | 1125 | 1.33x | 2.000 | 0.0100 | 1.50 | 1.00 |"
    assert rows[1].startswith("| adamw_torch | 0.0003 | 0.5000 | 1500 | 1.00x |")
    assert rows[2].startswith("| adamw_torch | 0.001 | 0.5500 | not reached |")
