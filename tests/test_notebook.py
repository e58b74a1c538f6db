"""The notebooks for a free T4, every cell run in a kernel of its own, with a tiny model in place of Qwen2.5-3B."""

from __future__ import annotations

# ruff: noqa: E402 -- what the notebook needs may be missing
import json
import os
import re
import shutil
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

for package in ("nbclient", "nbformat", "ipykernel", "peft", "bitsandbytes", "datasets", "typer", "matplotlib"):
    pytest.importorskip(package, reason=f"the notebook needs {package}")

import nbformat
import yaml
from environments import copy_sources, run, setuptools_wheel, show_torch
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_examples import chat_model  # noqa: F401 -- a fixture

from scao_hf.tools.axolotl_yaml import from_yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK, AXOLOTL = (ROOT / "examples" / name for name in ("colab_t4.ipynb", "colab_axolotl.ipynb"))


def cells(kind: str, path: Path = NOTEBOOK) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def parameters(path: Path) -> dict[str, Any]:
    """What the cell with the settings sets."""
    chosen: dict[str, Any] = {}
    exec(next(cell.source for cell in cells("code", path) if "parameters" in cell.metadata.get("tags", ())), chosen)
    return chosen


@pytest.mark.parametrize("path", [NOTEBOOK, AXOLOTL])
def test_a_notebook_is_valid_and_saved_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in cells("code", path))


def test_its_settings_are_those_of_the_reference_configuration() -> None:
    chosen = parameters(NOTEBOOK)
    reference = from_yaml(ROOT / "examples" / "axolotl" / "qwen2.5-3b-qlora.yml")
    found = [chosen[name] for name in ("MODEL", "RANK", "BATCH", "LENGTH")]
    assert found == [reference.model, reference.rank, reference.batch, reference.sequence]


def begin(folder: Path, work: Path, repo: str, path: Path = NOTEBOOK) -> str:
    """Run a notebook up to its plan in a new environment without SCAO, from ``work``; what the cells print."""
    made = run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    assert made.returncode == 0, made.stderr
    python = folder / "env" / "bin" / "python"
    show_torch(python)
    setuptools_wheel(folder)
    notebook = nbformat.read(path, as_version=4)
    plan = next(i for i, cell in enumerate(notebook.cells) if '"plan"' in cell.source)
    notebook.cells = notebook.cells[: plan + 1]
    install = next(cell for cell in notebook.cells if cell.cell_type == "code")
    install.source = install.source.replace('REPO, BRANCH = ""', f"REPO, BRANCH = {repo!r}")
    notebook.cells.append(nbformat.v4.new_code_cell("import scao_hf\nprint(scao_hf.__file__)"))
    kernel = AsyncKernelManager()
    kernel.kernel_spec.argv[0] = str(python)
    client = NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(work)}})
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    client.execute(env={**environment, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)})
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))


@pytest.mark.parametrize(
    ("place", "path"),
    [("Colab", NOTEBOOK), ("a clone", NOTEBOOK), ("Colab", AXOLOTL)],
    ids=lambda value: str(value)[-13:],
)
def test_the_first_cells_install_scao_and_plan(place: str, path: Path, tmp_path: Path) -> None:
    """Colab opens the notebook alone, in an empty folder; in a clone it lies in ``examples``."""
    if path == AXOLOTL and find_spec("axolotl") is None:
        pytest.skip("its notebook needs axolotl")
    clone, work = tmp_path / "clone", tmp_path / "content"
    for folder in (clone, work):
        folder.mkdir()
    copy_sources(clone)
    if place == "Colab":
        if shutil.which("git") is None:
            pytest.skip("git is not on PATH")
        commit = "git init -q -b main && git add -A && git -c user.name=any -c user.email=any@any commit -q -m any"
        assert run("sh", "-c", commit, cwd=clone).returncode == 0
        printed = begin(tmp_path, work, str(clone), path)
    else:
        (clone / "examples").mkdir()
        printed = begin(tmp_path, clone / "examples", "", path)
    assert "16 GB (yours)" in printed
    if path == AXOLOTL:
        assert "scao_use_int8_ema: true" in printed and "Written: config.scao.yml" in printed
    assert printed.splitlines()[-1].startswith(str(tmp_path / "env"))


@pytest.mark.parametrize(
    ("repo", "message"), [("", "set REPO in this cell to the repository"), ("/nowhere", "git says above why")]
)
def test_an_installation_that_fails_says_why(repo: str, message: str, tmp_path: Path) -> None:
    work = tmp_path / "content"
    work.mkdir()
    with pytest.raises(CellExecutionError, match=message):
        begin(tmp_path, work, repo)


def test_every_cell_runs(chat_model: Path, tmp_path: Path) -> None:  # noqa: F811 -- pytest's way
    data = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"after {n}", "input": "", "output": f"{n + 1}, then {n + 2}"} for n in range(64)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    smaller = f"MODEL, DATA, OUTPUT = {str(chat_model)!r}, {str(data)!r}, {str(tmp_path / 'run')!r}\n"
    smaller += "RANK, BATCH, ACCUMULATION, LENGTH, STEPS, LEARNING_RATE = 4, 2, 1, 96, 12, 1e-2\n"
    smaller += "SCAO_OPTIONS = {'warmup_steps': 3, 'precond_freq': 3, 'blend_steps': 2}"
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(smaller))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment)
    printed = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "16 GB (yours)" in printed and "58 rows, 6 held out" in printed
    assert "minutes for 12 steps with AdamW, and as long with SCAO" in printed
    losses = re.findall(
        r"(?:AdamW|SCAO ) +loss ([\d.]+) over the last 4 steps, held-out ([\d.]+), [\d.]+ minutes, peak", printed
    )
    assert len(losses) == 2 and losses[0][0] != losses[1][0] and losses[0][1] != losses[1][1]
    assert re.search(r"The held-out loss was [\d.]+ at step 12", printed)
    assert re.search(r"SCAO's loss is [\d.]+% (lower|higher), and lower on \d of 4 batches\.", printed)
    assert "first logged at step 4 and is in full effect from step 6" in printed
    shown = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs if "data" in output
    ]
    assert any("image/png" in output["data"] for output in shown)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "scao-report.html").is_file()
    with zipfile.ZipFile(tmp_path / "run-adapter.zip") as archive:
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(archive.namelist())


@pytest.mark.parametrize(
    ("line", "folder", "against"),
    [
        ('output_dir: "runs/my run"  # quoted', "runs/my run", "adamw_torch_fused"),
        ("optimizer: Muon", "model-out", "muon"),
        ("optimizer: scao", "model-out", "adamw_torch"),
    ],
)
def test_the_notebook_of_axolotl_reads_any_yaml(line: str, folder: str, against: str, tmp_path: Path) -> None:
    config, shown, commands = tmp_path / "config.yml", [], []
    config.write_text(line + "\n", encoding="utf-8")
    names: dict[str, Any] = {"run": lambda *words: commands.append(words), "Image": shown.append, "display": id}
    names |= {"Path": Path, "YAML": config, "SCAO_YAML": config, "COMPARE_STEPS": 40}
    for word in ('"compare"', '"report"'):
        exec(next(cell.source for cell in cells("code", AXOLOTL) if word in cell.source), names)
    assert shown == [f"{folder}/scao-report.png"]
    assert commands[0][:5] == ("scao_hf", "compare", config, "--against", against)


@pytest.mark.long
def test_the_notebook_of_axolotl_migrates_compares_and_trains(
    chat_model: Path,  # noqa: F811 -- pytest's way
    tmp_path: Path,
) -> None:
    pytest.importorskip("axolotl")
    rows = [{"instruction": f"after {n}", "input": "", "output": f"{n + 1}, then {n + 2}"} for n in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    smaller = yaml.safe_load(parameters(AXOLOTL)["EXAMPLE"])
    smaller |= {
        "base_model": str(chat_model),
        "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": "alpaca"}],
    }
    # bitsandbytes' 4-bit weights give no gradient on a CPU once they were evaluated, and its 8-bit AdamW needs a GPU.
    smaller |= {"val_set_size": 0, "optimizer": "adamw_torch", "fp16": False, "sequence_len": 512, "max_steps": 14}
    smaller |= {"gradient_accumulation_steps": 1, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    smaller |= {f"lora_{part}_kernel": False for part in ("qkv", "o", "mlp", "embedding")}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(smaller, sort_keys=False), encoding="utf-8")
    notebook = nbformat.read(AXOLOTL, as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("COMPARE_STEPS = 14"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env={**environment, "AXOLOTL_DO_NOT_TRACK": "1"})
    printed = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert len(printed.splitlines()) < 1000, "the progress of compare fills the notebook"
    assert "+optimizer: scao" in printed and "scao against adamw_torch: loss" in printed
    assert "first logged at step 6" in printed  # migrate has shortened phase 1 for a run of 14 steps
    with zipfile.ZipFile(tmp_path / "runs/axolotl-adapter.zip") as archive:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(archive.namelist())
