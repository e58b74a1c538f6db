"""What SECURITY.md says about the code: none is made of data, a step opens nothing, no dependency is known to be bad."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for name in ("scao_hf", "axolotl_plugin") for path in (ROOT / name).rglob("*.py"))


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


def test_known_vulnerabilities_of_the_dependencies() -> None:
    """pip-audit (make audit) asks a public database; where it is not installed or cannot ask, the reason is printed."""
    own = ROOT / ".cache" / "audit" / "bin" / "pip-audit"
    program = str(own) if own.exists() else shutil.which("pip-audit")
    if program is None:
        pytest.skip("pip-audit is not installed (make audit)")
    command = [program, "--path", sysconfig.get_path("purelib"), "--progress-spinner", "off", "--timeout", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    said = done.stdout + done.stderr
    if done.returncode not in (0, 1) or re.search(r"^torch +.*could not be audited", said, re.MULTILINE):
        pytest.skip(f"the database cannot be reached, or knows nothing of torch: {said.strip().splitlines()[-1]}")
    ours = [line for line in done.stdout.splitlines() if line.startswith(("torch ", "scao-hf "))]
    assert not ours, "\n".join(ours)
