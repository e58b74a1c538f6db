"""What SECURITY.md says: nothing runs on load, nothing is opened by a step, damaged and foreign input ends in an error."""

from __future__ import annotations

import ast
import copy
import importlib.metadata
import io
import math
import os
import pickle
import random
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scao_hf import SCAO, options

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for name in ("scao_hf", "axolotl_plugin") for path in (ROOT / name).rglob("*.py"))
EARLY: dict[str, Any] = {"warmup_steps": 3, "blend_steps": 2, "precond_freq": 2, "min_precond_updates": 1}


def trained(steps: int = 7, **chosen: Any) -> tuple[list[torch.nn.Parameter], SCAO]:
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((4, 30), (20, 6), (9,))]
    optimizer = SCAO(params, lr=0.01, **{**EARLY, **chosen})
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=draw)
        optimizer.step()
    return params, optimizer


# ---- what the code may contain ------------------------------------------------------------------------------------


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            found.append((ast.unparse(node.func), node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_is_made_of_data_and_no_shell_of_strings(path: Path) -> None:
    for name, node in calls(path):
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert name not in {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads"}, name
        assert name not in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}, name
        assert "shell" not in keywords, f"{name} with shell={keywords.get('shell')}"
        assert "trust_remote_code" not in keywords, name
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"
        assert not name.startswith(("tempfile.mktemp", "urllib", "requests", "socket", "http")), name
        assert name not in {"os.chmod", "os.umask"} and not name.endswith(".chmod"), name


def test_the_core_needs_torch_alone() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None and re.fullmatch(r'"torch>=2\.\d+"', listed[1])


AUDITED = """
import sys
import torch
import torch._dynamo  # torch loads it at the first optimizer, and makes its cache folder
seen = []
def hook(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "urllib.")):
        seen.append(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append(f"open {arguments[0]}")
    if event in ("os.mkdir", "os.remove", "os.rename", "os.chmod"):
        seen.append(event)
sys.dont_write_bytecode = True
sys.addaudithook(hook)
from scao_hf import SCAO
params = [torch.nn.Parameter(torch.randn(4, 30)), torch.nn.Parameter(torch.randn(9))]
optimizer = SCAO(params, warmup_steps=2, precond_freq=2, blend_steps=1)
for _ in range(8):
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
optimizer.metrics(), optimizer.statistics(), optimizer.memory_report()
print(seen)
"""


def test_importing_and_stepping_opens_no_socket_starts_no_process_and_writes_no_file() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", AUDITED], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
    broken = AUDITED.replace("optimizer.metrics()", "__import__('socket').socket().close(), optimizer.metrics()")
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, env=environment, check=True)
    assert "socket" in done.stdout


def test_the_extension_comes_from_the_package_alone() -> None:
    text = (ROOT / "scao_hf" / "ops.py").read_text(encoding="utf-8")
    assert 'Path(__file__).with_name(f"_C_{device}.so")' in text
    loads = [ast.unparse(node) for name, node in calls(ROOT / "scao_hf" / "ops.py") if "load_library" in name]
    assert loads == ["torch.ops.load_library(str(path))"]
    assert not any("cpp_extension" in path.read_text(encoding="utf-8") for path in SOURCES)


# ---- checkpoints --------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def test_a_checkpoint_cannot_run_code() -> None:
    _, optimizer = trained()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = Malicious()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("rule", options.RULES)
@pytest.mark.parametrize("moment_dtype", options.OPTIONS["moment_dtype"].choices)
def test_states_need_no_allow_listing(rule: str, moment_dtype: str) -> None:
    _, optimizer = trained(rule=rule, use_int8_ema=True, moment_dtype=moment_dtype)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))


def snapshot(optimizer: SCAO) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return bool(first == second)


def test_every_one_of_300_flipped_bits_is_noticed() -> None:
    params, optimizer = trained(use_int8_ema=True)
    before, weights = snapshot(optimizer), [param.detach().clone() for param in params]
    chance = random.Random(0)
    for _ in range(300):
        wrong = copy.deepcopy(before)
        entry = wrong["state"][chance.randrange(3)]
        name = chance.choice([name for name, value in entry.items() if isinstance(value, torch.Tensor)])
        entry[name] = entry[name].contiguous()
        data = entry[name].view(-1).view(torch.uint8)
        data[chance.randrange(data.numel())] ^= 1 << chance.randrange(8)
        with pytest.raises(ValueError, match=r"checksum|NaN or Inf"):
            optimizer.load_state_dict(wrong)
    assert equal(before, optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(params, weights, strict=True))


#: What a mutation puts in the place of something.
STRANGE: list[Any] = [None, -1, 0, 2**70, 1e400, math.nan, "", "published", [], {}, (), True, b"x", torch.zeros(0)]
STRANGE += [torch.full((4, 30), math.nan), torch.zeros(2, 3, dtype=torch.int8), [torch.zeros(1)], {"step": 3}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nested structure."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def mutated(state: dict[str, Any], chance: random.Random) -> None:
    """Change, drop or add something, somewhere."""
    path = chance.choice(places(state))
    holder: Any = state
    for key in path[:-1]:
        holder = holder[key]
    kind = chance.randrange(4)
    if kind == 0:
        del holder[path[-1]]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(["step", "exp_avg", "strange", 7])] = copy.deepcopy(chance.choice(STRANGE))
    elif kind == 2 and isinstance(holder[path[-1]], torch.Tensor):
        holder[path[-1]] = chance.choice([torch.zeros(3), holder[path[-1]].half().flatten(), holder[path[-1]][None]])
    else:
        holder[path[-1]] = copy.deepcopy(chance.choice(STRANGE))


def test_a_thousand_mutated_states_end_in_clear_errors() -> None:
    params, optimizer = trained()
    before = snapshot(optimizer)
    chance = random.Random(1)
    refused = 0
    for _ in range(1000):
        wrong = copy.deepcopy(before)
        mutated(wrong, chance)
        try:
            optimizer.load_state_dict(wrong)
        except ValueError:
            refused += 1
            assert equal(before, optimizer.state_dict()), "refused, but the live state has changed"
            continue
        # What is accepted (another learning rate, an option's other legal value) must be steppable and finite.
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert all(bool(torch.isfinite(param).all()) for param in params)
        optimizer.load_state_dict(copy.deepcopy(before))
    assert refused >= 700


@pytest.mark.parametrize("length", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_an_error(length: float, tmp_path: Path) -> None:
    _, optimizer = trained()
    path = tmp_path / "optimizer.pt"
    torch.save(optimizer.state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * length)])
    with pytest.raises((RuntimeError, EOFError, OSError, pickle.UnpicklingError)):  # as torch has it, by the length
        torch.load(path, weights_only=True)


# ---- command line and YAML ----------------------------------------------------------------------------------------

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


def test_known_vulnerabilities_of_the_dependencies() -> None:
    """pip-audit asks a public database; where it is not installed or has no network, the reason is printed."""
    try:
        importlib.metadata.version("pip-audit")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip-audit is not installed (pip install pip-audit)")
    command = [sys.executable, "-m", "pip_audit", "--local", "--progress-spinner", "off", "--timeout", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "ConnectionError" in done.stderr or "Max retries" in done.stderr or "ServiceError" in done.stderr:
        pytest.skip(f"the database cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    ours = [line for line in done.stdout.splitlines() if line.startswith(("torch ", "scao-hf "))]
    assert not ours, "\n".join(ours)
