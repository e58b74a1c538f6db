"""Trajectories to the bit, for a change that must not change a step: every rule, path and kind of state.

Bits differ between processors and releases of torch, so that none are kept in the repository. On one machine:

    git stash; python tests/test_golden.py --write before.json; git stash pop
    python tests/test_golden.py --compare before.json
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from scao_hf import SCAO, ops, options
from scao_hf.blocks import Packing, unpack

#: Both orientations, twice the same shape, a side above max_precond_dim, vectors.
SHAPES = ((8, 40), (40, 8), (8, 40), (16, 300), (90, 70), (130, 80), (11,), (3, 4, 5))
#: Both phases, the ramp and refreshes; a gradient with NaN and one that is far too large, one that is missing, and a resume.
STEPS, BROKEN, HUGE, MISSING, RESUMED = 27, 6, 9, 15, 17
EARLY = {"lr": 3e-3, "weight_decay": 0.1, "warmup_steps": 4, "blend_steps": 4, "precond_freq": 4}
PACKINGS = (Packing("A", 3), Packing("B", 3))


def cases() -> Iterator[dict[str, Any]]:
    """Options of SCAO, and ``native``, ``dtype`` of the parameters and whether some are ``packed``."""
    for rule in options.RULES:
        for native in (True, False):
            base = {"rule": rule, "native": native, "dtype": "float32", "packed": False}
            for moments in options.OPTIONS["moment_dtype"].choices:
                for int8 in (False, True):
                    for dtype in ("float32", "bfloat16"):
                        yield {**base, "moment_dtype": moments, "use_int8_ema": int8, "dtype": dtype}
                yield {**base, "moment_dtype": moments, "use_int8_ema": moments == "int8", "packed": True}
            yield {**base, "dtype": "float64"}
            yield {**base, "tau": 0.7}
            yield {**base, "betas": (0.0, 0.3)}
            yield {**base, "cautious": False, "blend_steps": 0, "k_max": 80}


def digest(native: bool, dtype: str, packed: bool, **chosen: Any) -> str:
    """A hash of all weights after every step, and of the state at the end."""
    generator, kind = torch.Generator().manual_seed(7), getattr(torch, dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    params = [torch.nn.Parameter(draw(*shape).to(kind)) for shape in SHAPES]
    stacked = [torch.nn.Parameter(draw(*shape).to(kind)) for shape in ((12, 48), (48, 12))] if packed else []
    experts = dict(zip(stacked, PACKINGS, strict=False))
    groups = [{"params": params[:4]}, {"params": params[4:] + stacked, "weight_decay": 0.0}]
    found = hashlib.sha256()
    with mock.patch.object(ops, "NATIVE", ops.NATIVE if native else frozenset()):
        optimizer = SCAO(groups, experts=experts, **{**EARLY, **chosen})
        for step in range(STEPS):
            for index, param in enumerate(params + stacked):
                grad = draw(*param.shape) * (1 + index)
                if (step, index) == (BROKEN, 1):
                    grad.view(-1)[3] = float("nan")
                if (step, index) == (HUGE, 3):
                    grad *= 1e6
                if param in experts and step % 4 < 3:  # an expert without tokens
                    unpack(grad, experts[param])[step % 4] = 0
                param.grad = None if (step, index) == (MISSING, 2) else grad.to(kind)
            optimizer.step()
            for param in params + stacked:
                found.update(param.detach().double().numpy().tobytes())
            if step == RESUMED:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param in params + stacked:
        for name, value in sorted(optimizer.state[param].items()):
            found.update(f"{name} {value if name == 'step' else value.dtype}".encode())
            if name != "step":
                found.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("rule", options.RULES)
def test_a_trajectory_is_the_same_twice_and_another_with_other_options(rule: str) -> None:
    base = {"rule": rule, "native": True, "dtype": "bfloat16", "packed": True, "moment_dtype": "int8"}
    first = digest(**base)
    assert digest(**base) == first != digest(**base, betas=(0.8, 0.9))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="record the trajectories of this code")
    parser.add_argument("--compare", type=Path, help="name the cases whose bits differ from a record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {json.dumps(case): digest(**case) for case in cases()}
    if arguments.write:
        arguments.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    before = json.loads(arguments.compare.read_text(encoding="utf-8")) if arguments.compare else {}
    differ = [case for case in before if found.get(case) != before[case]]
    print(*differ, f"{len(found)} cases, {len(differ)} of {len(before)} recorded ones differ", sep="\n")
    return bool(differ)


if __name__ == "__main__":
    raise SystemExit(main())
