"""Where a result comes from: processor and versions. No host names, no paths."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peers
import torch

from scao_hf import ops


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
    # Clouds give one name to processors of several generations.
    cpu = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu}


def versions(optimizer: str) -> dict[str, str]:
    """Versions of all that takes part."""
    found = {"python": platform.python_version(), **peers.versions(optimizer)}
    for distribution in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    if peers.PEERS[peers.parse(optimizer)[0]][1] == ("scao-hf",):
        found["scao_hf backend"] = json.dumps({name: kind.partition(":")[0] for name, kind in ops.backend().items()})
    return found
