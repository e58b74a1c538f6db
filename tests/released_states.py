"""Writes tests/states: what a release saves, for the test that every later one resumes from it.

    python tests/released_states.py

Run it with the code and the torch of a release before that is published, and commit the file that it makes.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import torch

import scao_hf
from scao_hf import SCAO

FOLDER = Path(__file__).with_name("states")
EARLY: dict[str, Any] = {"warmup_steps": 4, "blend_steps": 3, "precond_freq": 3, "min_precond_updates": 1, "k_max": 4}
#: Name: options, whether parameters are in bfloat16, and the step after which the state is saved: 2 is in phase 1, 6 on
#: the ramp, 11 in phase 2.
KINDS: dict[str, tuple[dict[str, Any], bool, int]] = {
    "phase 1": ({}, False, 2),
    "ramp": ({}, False, 6),
    "default": ({}, False, 11),
    "bfloat16 parameters": ({}, True, 11),
    "int8 curvature, bfloat16 moments": ({"use_int8_ema": True, "moment_dtype": "bfloat16"}, False, 11),
    "int8 moments": ({"moment_dtype": "int8"}, False, 11),
    "published": ({"rule": "published"}, False, 11),
    "published, int8 curvature": ({"rule": "published", "use_int8_ema": True}, False, 11),
}
STEPS = 16
SHAPES = ((3, 40), (40, 3), (7,))


def task(kind: str) -> tuple[list[torch.nn.Parameter], SCAO]:
    """Parameters and their optimizer."""
    options, low, _ = KINDS[kind]
    draw = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if low else torch.float32
    params = [torch.nn.Parameter((torch.randn(shape, generator=draw) / 4).to(dtype)) for shape in SHAPES]
    return params, SCAO(params, lr=0.01, **EARLY, **options)


def train(params: list[torch.nn.Parameter], optimizer: SCAO, steps: range) -> None:
    """Pull the parameters towards zero, with noise."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = (param.detach().float() + 0.1 * torch.randn(param.shape, generator=draw)).to(param.dtype)
        optimizer.step()


def record(kind: str) -> dict[str, Any]:
    """Weights and state at the pause, and the weights at the end."""
    params, optimizer = task(kind)
    pause = KINDS[kind][2]
    train(params, optimizer, range(pause))
    saved = optimizer.state_dict()
    # Fields that are views of stacked tensors would be saved with the whole stack.
    state = {
        key: {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in entry.items()}
        for key, entry in saved["state"].items()
    }
    weights = [param.detach().clone() for param in params]
    train(params, optimizer, range(pause, STEPS))
    return {
        "optimizer": {**saved, "state": state},
        "weights": weights,
        "end": [param.detach().clone() for param in params],
    }


def main() -> None:
    """Write the file of this release and this torch."""
    FOLDER.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    name = f"scao_hf-{scao_hf.__version__}-torch-{torch.__version__.partition('+')[0]}.pt.gz"
    buffer = io.BytesIO()
    torch.save({kind: record(kind) for kind in KINDS}, buffer)
    (FOLDER / name).write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    print(f"{FOLDER / name}: {(FOLDER / name).stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
