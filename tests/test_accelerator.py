"""The PyTorch code on a device that is not the CPU: no two devices in one operation, and no waiting for a number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

WORKER = Path(__file__).with_name("accelerator_worker.py")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"use_int8_ema": True, "moment_dtype": "int8"},
    {"moment_dtype": "bfloat16", "tau": 1.0, "cautious": False},
    {"rule": "published"},
    {"rule": "published", "use_int8_ema": True},
)


@pytest.fixture(scope="module")
def said() -> list[str]:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot register a backend that is written in Python")
    done = subprocess.run([sys.executable, str(WORKER), json.dumps(OPTIONS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", range(len(OPTIONS)), ids=lambda case: ",".join(OPTIONS[case]) or "default")
def test_steps_on_an_accelerator_mix_no_devices_and_wait_for_no_number(case: int, said: list[str]) -> None:
    assert not said[case], said[case]
