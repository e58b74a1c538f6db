"""What SECURITY.md says about what users write: command lines, YAML and options end in clear errors and run nothing."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from strange_values import STRANGE

from scao_hf import SCAO, options

ROOT = Path(__file__).resolve().parents[1]

WORDS = [
    "--",
    "-1",
    "1e999",
    "nan",
    "../..",
    "é" * 50,
    "$(touch hacked)",
    "`id`",
    "; touch hacked",
    "%s",
    "{}",
    "",
]


def test_strange_arguments_end_in_an_error_and_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typer_testing = pytest.importorskip("typer.testing", reason="needs typer")
    from scao_hf.tools.cli import app

    monkeypatch.chdir(tmp_path)
    runner = typer_testing.CliRunner()
    chance = random.Random(0)
    flags = ["--lora-r", "--batch", "--seq", "--gpu", "--model", "--set", "--out"]
    for _ in range(60):
        command = chance.choice(["plan", "report", "compare"])
        arguments = [chance.choice([*WORDS, *flags]) for _ in range(chance.randrange(1, 5))]
        result = runner.invoke(app, [command, *arguments])
        assert result.exit_code != 0, (command, arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert not (tmp_path / "hacked").exists()


def test_a_yaml_cannot_build_objects(tmp_path: Path) -> None:
    typer_testing = pytest.importorskip("typer.testing", reason="needs typer")
    from scao_hf.tools.cli import app

    path = tmp_path / "config.yml"
    path.write_text(f"base_model: !!python/object/apply:os.system ['touch {tmp_path}/hacked']\n", encoding="utf-8")
    result = typer_testing.CliRunner().invoke(app, ["plan", str(path)])
    assert result.exit_code != 0 and "YAML" in result.output
    assert not (tmp_path / "hacked").exists()


def test_strange_values_of_options_are_refused_by_name() -> None:
    chance = random.Random(0)
    param = torch.nn.Parameter(torch.zeros(3, 4))
    accepted = 0
    for _ in range(400):
        name = chance.choice([*options.OPTIONS, "betas", "lr", "eps", "weight_decay"])
        value = chance.choice(STRANGE)
        try:
            SCAO([param], **{name: value})
            accepted += 1
        except (ValueError, TypeError) as error:
            assert name in str(error) or "beta" in str(error), (name, value, error)
    assert 0 < accepted < 200


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_outputs_have_the_permissions_of_the_users_umask(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    code = (
        "import os, sys; os.umask(0o077); from scao_hf.tools.cli import app\n"
        "sys.argv = ['scao-hf', 'report', sys.argv[1]]; app()"
    )
    (tmp_path / "trainer_state.json").write_text(
        '{"log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], "max_steps": 2, "global_step": 2}'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("scao-report.html", "scao-report.png"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) & 0o077 == 0


def test_strange_values_in_a_yaml_are_accepted_or_refused_by_key() -> None:
    """Through the plugin's own fields, as Axolotl merges them into its schema; nothing else may be raised."""
    pytest.importorskip("axolotl", reason="needs axolotl")
    from axolotl_plugin.args import SCAOArgs

    chance = random.Random(0)
    keys = [f"scao_{name}" for name in (*options.OPTIONS, "fuse_moe", "k_mx", "")] + ["scao", "optim_args"]
    words: list[Any] = [value for value in STRANGE if not isinstance(value, (torch.Tensor, bytes))]
    words += ["1e-3", "k_max=8", "k_max=8,=", "betas=0.9", {"k_max": "x"}, {"betas": [0.9]}, [[]], "a" * 10_000]
    refused = 0
    for _ in range(600):
        config = {key: chance.choice(words) for key in chance.sample(keys, chance.randint(1, 3))}
        try:
            SCAOArgs.model_validate({"optimizer": "scao", "learning_rate": 1e-3, **config})
        except ValueError as error:  # pydantic's is one
            refused += 1
            assert any(key and key in str(error) for key in config), (config, str(error)[:500])
    assert 300 < refused < 600
