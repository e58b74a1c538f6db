"""The option table: every value checked, errors that name value and range, defaults by rule."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scao_hf import SCAO, options


def param() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(4, 6))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"lr": -1.0}, ["lr=-1.0", "[0, inf)"]),
        ({"lr": float("nan")}, ["lr=nan", "[0, inf)"]),
        ({"lr": "1e-3"}, ["lr='1e-3'", "a number"]),
        ({"lr": np.float32(0.001)}, ["lr=", "[0, inf)", "pass float(...) of it"]),
        ({"k_max": np.int64(8)}, ["k_max=", "[1, inf)", "pass int(...) of it"]),
        ({"lr": torch.zeros(2)}, ["2 elements", "one element"]),
        ({"betas": (0.9, 1.0)}, ["betas[1]=1.0", "[0, 1)"]),
        ({"betas": (0.9,)}, ["betas=(0.9,)", "two numbers"]),
        ({"eps": 0}, ["eps=0", "[1e-30, inf)"]),
        ({"eps": 1e-46}, ["eps=1e-46", "[1e-30, inf)"]),
        ({"weight_decay": -0.1}, ["weight_decay=-0.1", "[0, inf)"]),
        ({"rule": "shampoo"}, ["rule='shampoo'", "'auto', 'eigenbasis', 'orthogonal', 'published', 'adamw'"]),
        ({"warmup_steps": -1}, ["warmup_steps=-1", "[0, inf)"]),
        ({"warmup_steps": 1.5}, ["warmup_steps=1.5", "an integer"]),
        ({"blend_steps": True}, ["blend_steps=True", "an integer"]),
        ({"precond_freq": 0}, ["precond_freq=0", "[1, inf)"]),
        ({"min_precond_updates": 0}, ["min_precond_updates=0", "[1, inf)"]),
        ({"rho": 1.0}, ["rho=1.0", "[0, 1)"]),
        ({"epsilon_sparse": 1.0}, ["epsilon_sparse=1.0", "[0, 1)"]),
        ({"k_min": 0}, ["k_min=0", "[1, inf)"]),
        ({"from_scratch": 1}, ["from_scratch=1", "True or False or None"]),
        ({"from_scratch": True, "rule": "eigenbasis"}, ["from_scratch=True", "rule='eigenbasis'", "rule='auto'"]),
        ({"k_min": 9, "k_max": 8}, ["k_min=9", "k_max=8"]),
        ({"tau": 0.0}, ["tau=0.0", "(0, inf)", "None"]),
        ({"max_precond_dim": 1}, ["max_precond_dim=1", "[2, inf)"]),
        ({"use_int8_ema": 1}, ["use_int8_ema=1", "True or False"]),
        ({"on_nonfinite": "ignore"}, ["on_nonfinite='ignore'", "'skip', 'raise'"]),
    ],
)
def test_illegal_value_is_named_with_its_range(kwargs: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        SCAO([param()], **kwargs)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["maximize", "amsgrad"])
def test_what_adamw_would_do_otherwise_in_a_group_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=True in a parameter group is not an option of SCAO"):
        SCAO([{"params": [param()], name: True}])
    SCAO(torch.optim.AdamW([param()]).param_groups)  # has both, as False


def test_an_illegal_option_of_one_group_is_an_error_and_leaves_the_optimizer_alone() -> None:
    optimizer = SCAO([param()])
    with pytest.raises(ValueError, match="precond_freq=0"):
        optimizer.add_param_group({"params": [param()], "precond_freq": 0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("rule", options.RULES)
def test_the_smallest_eps_is_none_too_small(rule: str) -> None:
    weight = torch.nn.Parameter(torch.ones(4, 24))
    optimizer = SCAO([weight], rule=rule, eps=1e-30, warmup_steps=2, precond_freq=2, min_precond_updates=1)
    for step in range(12):
        weight.grad = torch.randn(4, 24, generator=torch.Generator().manual_seed(step))
        weight.grad[0] = 0
        optimizer.step()
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("rule", options.RULES)
def test_what_is_not_passed_takes_the_rule_s_default(rule: str) -> None:
    group = SCAO([param()], rule=rule).param_groups[0]
    assert {name: group[name] for name in options.RULE_DEFAULTS[rule]} == options.RULE_DEFAULTS[rule]


def test_published_defaults_are_the_published_table() -> None:
    assert options.RULE_DEFAULTS["published"] | {"on_nonfinite": None} == {
        "betas": (0.9, 0.999),
        "from_scratch": None,
        "warmup_steps": 100,
        "blend_steps": 50,
        "min_precond_updates": 10,
        "precond_freq": 20,
        "rho": 0.999,
        "epsilon_sparse": 0.05,
        "k_min": 8,
        "k_max": 128,
        "tau": None,
        "max_precond_dim": 4096,
        "use_int8_ema": False,
        "cautious": False,
        "moment_dtype": "float32",
        "stochastic_rounding": False,
        "on_nonfinite": None,
    }


def test_a_group_with_another_rule_takes_that_rule_s_defaults() -> None:
    optimizer = SCAO([param()], precond_freq=3)
    optimizer.add_param_group({"params": [param()], "rule": "published"})
    assert optimizer.param_groups[1]["rho"] == options.RULE_DEFAULTS["published"]["rho"]
    assert optimizer.param_groups[1]["precond_freq"] == 3


def test_a_single_rank_bound_moves_the_other_default() -> None:
    assert SCAO([param()], k_max=2).param_groups[0]["k_min"] == 2
    assert SCAO([param()], k_min=40).param_groups[0]["k_max"] == 40
    groups = SCAO([{"params": [param()], "k_max": 2}, {"params": [param()], "k_min": 40}]).param_groups
    assert (groups[0]["k_min"], groups[1]["k_max"]) == (2, 40)
    with pytest.raises(ValueError, match="k_min=8 must not exceed k_max=2"):
        SCAO([{"params": [param()], "k_max": 2}], k_min=8)


@pytest.mark.parametrize("name", sorted(set(options.RULE_DEFAULTS["eigenbasis"])))
def test_none_in_a_group_is_the_rule_s_default(name: str) -> None:
    optimizer = SCAO([{"params": [param()], name: None}])
    assert optimizer.param_groups[0][name] == options.RULE_DEFAULTS["eigenbasis"][name]


def test_every_option_of_the_table_is_an_argument_and_the_reverse() -> None:
    arguments = set(inspect.signature(SCAO.__init__).parameters) - {
        "self",
        "params",
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "experts",
        "vocabulary",
        "names",
        "partial_resume",
    }
    assert arguments == set(options.OPTIONS)
    for rule in options.RULES:
        assert set(options.RULE_DEFAULTS[rule]) == set(options.OPTIONS) - {"rule"} | {"betas"}


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        ("adamw_bnb_8bit", "about 4 times as large as one in 8 bits: moment_dtype='int8' and use_int8_ema=True bring"),
        ("paged_adamw_8bit", "about 4 times"),
        ("adamw_torch_8bit", "about 4 times"),
        ("AdamW_8bit ", "about 4 times"),
        ("ao_adamw_fp8", "about 4 times"),
        ("adamw_torch_4bit", "about 8 times as large as one in 4 bits"),
        ("paged_adamw_32bit", "stays in GPU memory"),
        ("adamw_torch_fused", None),
        ("rmsprop_bnb_32bit", None),
        ("scao", None),
    ],
)
def test_a_small_state_that_scao_would_enlarge_is_known_by_its_name(optim: str, words: str | None) -> None:
    hint = options.eight_bit_hint(optim)
    assert hint is None if words is None else words in (hint or "")


def test_the_hint_names_the_options_as_they_are_written_there() -> None:
    assert "scao_moment_dtype: int8 bring it" in (options.eight_bit_hint("adamw_8bit", "scao_moment_dtype: int8") or "")


def test_the_recipe_for_an_option_is_all_that_an_option_takes(tmp_path: Path) -> None:
    """CONTRIBUTING.md's first two steps, for an option ``dummy``."""
    root = Path(__file__).parent.parent
    for package in ("scao_hf", "axolotl_plugin"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))

    def insert(path: Path, before: str, line: str) -> None:
        text = path.read_text(encoding="utf-8")
        assert before in text
        path.write_text(text.replace(before, line + before), encoding="utf-8")

    table = tmp_path / "scao_hf" / "options.py"
    insert(table, '    "rho": Option(', '    "dummy": Option(int, "does nothing", low=1),\n')
    insert(table, '    "rho": (0.9', '    "dummy": (3, 3),\n')
    insert(tmp_path / "scao_hf" / "optimizer.py", "        rho: float | None", "        dummy: int | None = None,\n")
    code = """
import torch
from scao_hf import SCAO
param = torch.nn.Parameter(torch.ones(4, 6))
assert SCAO([param]).param_groups[0]["dummy"] == 3
optimizer = SCAO([param], dummy=5)
optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(4, 6))], "rule": "published"})
assert [group["dummy"] for group in optimizer.param_groups] == [5, 5]
other = SCAO([{"params": [param]}, {"params": [torch.nn.Parameter(torch.ones(4, 6))], "rule": "published", "dummy": 7}])
other.load_state_dict(optimizer.state_dict())
assert [group["dummy"] for group in other.param_groups] == [5, 5]
optimizer.param_groups[0]["dummy"] = 0
for act in (optimizer.step, optimizer.state_dict, lambda: SCAO([param], dummy=0)):
    try:
        act()
    except ValueError as error:
        assert str(error) == "dummy=0 is not valid: it must be an integer in [1, inf)", error
    else:
        raise AssertionError(act)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
