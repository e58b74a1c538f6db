"""Where a result comes from: processor, versions, and which code of scao_hf. No host names, no paths."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import data
import peers
import torch

from scao_hf import ops

NO_PART_IN_A_STEP = ("__init__.py", "__main__.py", "reference.py", "report.py", "trainer.py", "tools")


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the run ran on: processor, threads, accelerator."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": processor(), "threads": torch.get_num_threads(), "gpu": gpu}


@functools.cache  # of the code that was imported, whatever is written to the files later
def code_fingerprint() -> str:
    """A fingerprint of scao_hf's code without its comments and docstrings, to see which code a result belongs to."""
    digest = hashlib.sha256()
    root = data.ROOT / "scao_hf"
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] in NO_PART_IN_A_STEP:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                first.value.value = ""
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def versions(optimizer: str) -> dict[str, str]:
    """Versions of all that takes part."""
    found = {"python": platform.python_version(), **peers.versions(optimizer)}
    for distribution in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    if peers.PEERS[peers.parse(optimizer)[0]][1] == ("scao-hf",):
        found["scao_hf code"] = code_fingerprint()
        found["scao_hf backend"] = json.dumps({name: kind.partition(":")[0] for name, kind in ops.backend().items()})
    return found
