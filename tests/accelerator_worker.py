"""Steps of SCAO on an accelerator that does not exist: shapes, dtypes and devices are real, numbers are not.

An operation on two devices raises, one whose course depends on a number of the device, which a GPU would have to be
waited for, a decomposition on it, and a float64 tensor. Of the host's own numbers all questions are answered with yes.
The name of a backend is the process's: run as a script, with a JSON list of SCAO's options; prints a list of what went wrong.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # type: ignore[attr-defined, unused-ignore]

from scao_hf import SCAO

STEPS = 9


class Answers(TorchDispatchMode):
    """What the host asks of its own numbers, and no decomposition elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_host = not args or not isinstance(args[0], torch.Tensor) or args[0].device.type == "cpu"
        if func is torch.ops.aten._local_scalar_dense.default and on_host:
            return True
        assert on_host or "linalg_eigh" not in str(func), "a decomposition on the device"
        outcome = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(outcome) if isinstance(each, torch.Tensor)]
        wide = any(each.device.type != "cpu" and each.dtype == torch.float64 for each in made)
        assert not wide, f"{func} makes a float64 tensor, which MPS does not have"
        return outcome


def steps(device: str, **options: Any) -> int:
    """Through both phases and several refreshes; returns how many fields the state has at the end."""
    shapes = {(8, 20): torch.float32, (20, 8): torch.bfloat16, (7,): torch.float32, (100, 100): torch.float32}
    with FakeTensorMode(allow_non_fake_inputs=False), Answers():
        params = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=kind)) for shape, kind in shapes.items()]
        early = {"warmup_steps": 2, "blend_steps": 2, "precond_freq": 2, "min_precond_updates": 1}
        if "rule" not in options:
            early["from_scratch"] = False  # this device has no values to look at
        optimizer = SCAO(params, lr=1e-3, **{**early, **options})
        for _ in range(STEPS):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
            optimizer.metrics()
        fields = [field for param in params for field in optimizer.state[param].values()]
        assert all(field.device.type == device for field in fields if isinstance(field, torch.Tensor) and field.ndim)
        return len(fields)


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("fictive")
    torch.fictive.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
    said = []
    for options in json.loads(sys.argv[1]):
        try:
            said.append("" if steps("fictive", **options) else "no state")
        except Exception:
            said.append(traceback.format_exc())
    print(json.dumps(said))
