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
LAUNCHES = Path(__file__).parents[1] / "examples" / "benchmarks" / "launches.py"
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


#: LoRA on one layer, three shapes, a refresh in every second step: most launches in a step of phase 1, in the one that enters
#: phase 2 and in a mean one of phase 2, and most waits of the host in the latter two. More layers take few more. Natively, with
#: a mean one of the ramp before that of phase 2: a step is 3 or 5 launches a shape, the rest makes the state and refreshes it.
BOUNDS = {
    "": (126, 519, 440, 3, 2),
    "--rank 64": (126, 519, 440, 3, 2),
    "moment_dtype=int8 use_int8_ema=true": (492, 1008, 937, 3, 2),
    "blend_steps=2 --native": (24, 423, 197, 197, 3, 2, 2),
}


@pytest.mark.parametrize("options", BOUNDS)
def test_a_step_takes_few_launches_and_waits_and_nothing_in_float64(options: str) -> None:
    quick = ["warmup_steps=2", "min_precond_updates=1", "precond_freq=2", "blend_steps=0"]
    command = [sys.executable, "-W", "ignore", str(LAUNCHES), "--layers", "1", *quick, *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    figures = [[float(figure.replace(",", "")) for figure in row[1:]] for row in rows]
    launches, waits, _, decompositions, wide = zip(*figures, strict=True)
    for found, bound in zip((*launches, *waits[1:]), BOUNDS[options], strict=True):
        assert found <= bound, done.stdout
    assert waits[0] == 0 and not any(decompositions) and not any(wide), done.stdout


@pytest.mark.long
def test_the_page_shows_what_is_counted() -> None:
    code = "import launches; launches.fictive(); print(launches.page_table(36))"
    done = subprocess.run([sys.executable, "-c", code], cwd=LAUNCHES.parent, capture_output=True, text=True)
    page = (LAUNCHES.parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert done.returncode == 0 and done.stdout.strip() in page, done.stderr[-2000:] or done.stdout
