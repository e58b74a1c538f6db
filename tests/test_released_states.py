"""What older releases and other versions of torch have saved can be resumed: tests/states, which only ever grows."""

from __future__ import annotations

import copy
import gzip
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from released_states import FOLDER, KINDS, STEPS, task, train

import scao_hf
from scao_hf import options
from scao_hf.checkpoint import VERSION

FILES = sorted(FOLDER.glob("*.pt.gz"))
#: In learning rates. Another torch or other kernels round otherwise: one entry of a cautious step may turn, or a code
#: of int8, which is rounded at random. Measured: 0.023.
CLOSE = 0.1
#: The same for files from before the second moments were damped (U14), whose steps were others. Measured: 0.47.
CLOSE_UNDAMPED = 0.6


def read(path: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=True)  # type: ignore[no-any-return]


def test_this_release_has_left_its_states() -> None:
    assert [path for path in FILES if path.name.startswith(f"scao_hf-{scao_hf.__version__}-")], (
        "a new release: run tests/released_states.py and commit what it writes"
    )
    versions = {each["optimizer"]["param_groups"][0]["scao_version"] for path in FILES for each in read(path).values()}
    assert VERSION in versions, "a new layout: run tests/released_states.py, and let load_state_dict read the old ones"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.removesuffix(".pt.gz"))
@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_to_the_bit_and_goes_on(path: Path, kind: str) -> None:
    saved = read(path)[kind]
    params, optimizer = task(kind)
    with torch.no_grad():
        for param, value in zip(params, saved["weights"], strict=True):
            param.copy_(value)
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for index, param in enumerate(params):
        entry, live = saved["optimizer"]["state"][index], optimizer.state[param]
        assert live.keys() == entry.keys() - {"checksum"}
        assert all(torch.equal(torch.as_tensor(live[name]), torch.as_tensor(entry[name])) for name in live)
    train(params, optimizer, range(KINDS[kind][2], STEPS))
    steps, close = STEPS - KINDS[kind][2], CLOSE_UNDAMPED if "undamped" in path.name else CLOSE
    for param, end, start in zip(params, saved["end"], saved["weights"], strict=True):
        far = (param.detach() - end).float().square().mean().sqrt() / 0.01
        print(f"{far:.2g} learning rates from where the writer has ended after {steps} steps")
        assert far <= close < (start - end).float().square().mean().sqrt() / 0.01


def test_options_that_are_newer_than_the_file_have_their_defaults() -> None:
    saved = read(FILES[0])["default"]["optimizer"]
    for name in ("cautious", "moment_dtype", "on_nonfinite"):
        del saved["param_groups"][0][name]
    params, optimizer = task("default")
    optimizer.load_state_dict(saved)
    defaults = options.RULE_DEFAULTS["eigenbasis"]
    assert all(optimizer.param_groups[0][name] == defaults[name] for name in ("cautious", "moment_dtype"))
    train(params, optimizer, range(2))
