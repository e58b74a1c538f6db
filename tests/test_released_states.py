"""What older releases and other versions of torch have saved can be resumed: tests/states, which only ever grows."""

from __future__ import annotations

import copy
import gzip
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from released_states import EARLY, FOLDER, KINDS, STEPS, task, train
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import scao_hf
from scao_hf import SCAO, options
from scao_hf.checkpoint import VERSION
from scao_hf.distributed.shards import size_of, to_bytes

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


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.removesuffix(".pt.gz"))
@pytest.mark.parametrize("kind", ["default", "bfloat16 parameters", "int8 moments", "published"])
def test_distributed_checkpoints_of_it_load(path: Path, kind: str, tmp_path: Path) -> None:
    """Bytes by name with the groups of that release, read into an optimizer of a rule and with options that it did not have."""
    params, optimizer = task(kind)
    new = {"stochastic_rounding": True, "partial_resume": True} | ({} if kind == "published" else {"rule": "auto"})
    module = torch.nn.ParameterList(params)
    live = SCAO(module.named_parameters(), lr=0.01, **{**EARLY, **KINDS[kind][0], **new})
    saved = read(path)[kind]["optimizer"]
    entries = {}
    for index, param in enumerate(params):
        entry, step = saved["state"][index], saved["state"][index]["step"]
        fields = {name: value for name, value in entry.items() if name not in ("step", "checksum")}
        entries[str(index)] = {"step": step, "bytes": to_bytes(fields, step, size_of(param, live.param_groups[0]))}
    (group,) = saved["param_groups"]
    groups = [{**group, "params": [*entries], "param_names": [*entries]}]
    dcp.save({"optimizer": {"state": entries, "param_groups": groups}}, checkpoint_id=tmp_path)
    state = {"optimizer": get_optimizer_state_dict(module, live)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(module, live, state["optimizer"])
    optimizer.load_state_dict(saved)
    assert live.state.keys() == optimizer.state.keys() == set(params)
    for param in params:
        assert live.state[param].keys() == optimizer.state[param].keys()
        for name, value in optimizer.state[param].items():
            assert torch.equal(torch.as_tensor(live.state[param][name]), torch.as_tensor(value)), name
    assert not live.param_groups[0][
        "stochastic_rounding"
    ]  # the options of a checkpoint, and their defaults, come first
    train(params, live, range(2))


def test_options_that_are_newer_than_the_file_have_their_defaults() -> None:
    saved = read(FILES[0])["default"]["optimizer"]
    for name in ("cautious", "moment_dtype", "on_nonfinite"):
        del saved["param_groups"][0][name]
    params, optimizer = task("default")
    optimizer.load_state_dict(saved)
    defaults = options.RULE_DEFAULTS["eigenbasis"]
    assert all(optimizer.param_groups[0][name] == defaults[name] for name in ("cautious", "moment_dtype"))
    train(params, optimizer, range(2))
