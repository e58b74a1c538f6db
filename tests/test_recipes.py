"""CONTRIBUTING's recipes, executed: what the places that they name are enough for."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from axolotl_plugin.values import Findings, read_optim_args, read_raw
from scao_hf import SCAO, options, rules
from scao_hf.blocks import Packing
from scao_hf.rules.base import NOT_NEGATIVE, Bucket, Field, Rule, Step
from scao_hf.trainer import check_scao_kwargs

CONTRIBUTING = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("recipe", "places"), [("Add an option", 2), ("Add a rule", 4)])
def test_a_recipe_names_as_many_places_in_the_code_as_it_takes(recipe: str, places: int) -> None:
    text = CONTRIBUTING.partition(f"## {recipe}\n")[2].partition("\n## ")[0].partition("Then")[0]
    assert len(set(re.findall(r"`(scao_hf/[\w/]+\.py)`", text))) == places


def test_an_option_is_read_and_checked_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each constructor, dict and YAML reads the one table."""
    monkeypatch.setitem(options.OPTIONS, "stride", options.Option(int, "of nothing", low=1))
    for defaults in {id(found): found for found in options.RULE_DEFAULTS.values()}.values():
        monkeypatch.setitem(defaults, "stride", 4)
    params = [torch.nn.Parameter(torch.randn(3, 5)) for _ in range(2)]
    optimizer = SCAO([{"params": params[:1]}, {"params": params[1:], "stride": 7}])
    assert [group["stride"] for group in optimizer.param_groups] == [4, 7]
    errors: list[str] = []
    assert read_optim_args("stride=9", errors) == {"stride": 9} and not errors
    findings = Findings()
    assert read_raw({"optimizer": "scao", "scao_stride": "9"}, findings)["scao_stride"] == 9 and not findings.errors
    check_scao_kwargs({"stride": 9})
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][1]["stride"] = 0
    for refused in (
        lambda: SCAO([{"params": params, "stride": 0}]),
        lambda: check_scao_kwargs({"stride": 0}),
        lambda: optimizer.load_state_dict(state),
    ):
        with pytest.raises(ValueError, match="stride=0 is not valid"):
            refused()
    assert read_optim_args("stride=0", errors) == {} and "stride=0 is not valid" in errors[0]


class Rows(Rule):
    """Steps by the root of each row's mean square, with a phase of plain momentum before."""

    cut_sides = 1
    fields: ClassVar[Mapping[str, Field]] = {
        "exp_avg": Field("r l", levels=2),
        "factor": Field("r 1", "curvature", NOT_NEGATIVE),
        "scale": Field("", phase=2, fill=1),
    }

    def step(self, step: Step) -> None:
        grads = step.gradients()
        step.state["factor"].lerp_(grads.square().mean(2, keepdim=True), step.weights[1])
        step.state["exp_avg"].lerp_(grads, step.weights[0])
        if step.number == self.phase1_steps(step.group):
            size, *shape = grads.shape
            fresh = self.create(size, tuple(shape), grads.dtype, grads.device, step.group, step.number)
            step.state["scale"] = fresh["scale"]
        root = (step.state["factor"] / step.bias[1]).sqrt() + step.group["eps"]
        step.write(step.state["exp_avg"] / step.bias[0] / root)

    def phase1_steps(self, group: dict[str, Any]) -> int:
        return 3

    def figures(self, bucket: Bucket) -> dict[str, Tensor]:
        zeros = torch.zeros_like(bucket.state["taken"])
        return dict.fromkeys(("rank", "captured_mass", "curvature_norm", "damped"), zeros)


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16", "int8"])
def test_a_rule_is_its_table_and_its_step(moment_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """State in both phases, fewer bits, experts, memory, figures, checkpoints and refusals follow from the table."""
    choices = (*options.RULES, "rows")
    monkeypatch.setitem(options.OPTIONS, "rule", replace(options.OPTIONS["rule"], choices=choices))
    monkeypatch.setitem(options.RULE_DEFAULTS, "rows", options.RULE_DEFAULTS["eigenbasis"])
    monkeypatch.setitem(rules._RULES, "rows", Rows())
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 40), (100, 70), (12, 48), (5,))]
    packed = {params[2]: Packing("A", 3)}

    def build(own: list[torch.nn.Parameter]) -> SCAO:
        return SCAO(own, rule="rows", moment_dtype=moment_dtype, experts={own[2]: packed[params[2]]})

    optimizer = build(params)
    for step in range(8):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        assert ("scale" in optimizer.state[params[0]]) == (step >= 2)
    assert optimizer.metrics()["scao/phase"] == 2 and len(optimizer.statistics()) == 1 + 2 + 3
    report = optimizer.memory_report()
    held = [field.nbytes for entry in optimizer.state.values() for field in entry.values() if isinstance(field, Tensor)]
    assert report["total"] == sum(held) and report["curvature"] == 4 * (8 + 70 + 12)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed, state = build(others), copy.deepcopy(optimizer.state_dict())
    resumed.load_state_dict(state)
    for _ in range(3):
        for param, other in zip(params, others, strict=True):
            param.grad = torch.randn_like(param)
            other.grad = param.grad.clone()
        optimizer.step()
        resumed.step()
    assert all(torch.equal(param, other) for param, other in zip(params, others, strict=True))
    del state["state"][0]["checksum"]
    state["state"][0]["factor"][0] = -1
    with pytest.raises(ValueError, match="saved factor holds -1; its entries must be finite and at least 0"):
        resumed.load_state_dict(state)
