"""The recommended options by size: every row builds an optimizer that steps into its second phase."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scao_hf import SCAO
from scao_hf.options import RULE_DEFAULTS, RULES
from scao_hf.presets import PRESETS, Preset, recommended


@pytest.mark.parametrize("preset", PRESETS, ids=[f"{preset.rule}-{preset.below}" for preset in PRESETS])
def test_every_row_is_constructed_and_steps(preset: Preset) -> None:
    size = (preset.below or 10**12) - 1
    options = recommended(size, preset.rule)
    assert options == {"rule": preset.rule, **preset.options}
    torch.manual_seed(0)
    model = nn.Linear(12, 8)
    optimizer = SCAO(model.parameters(), lr=1e-2, **options)
    before = model.weight.detach().clone()
    model(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    assert torch.isfinite(model.weight).all() and not torch.equal(model.weight, before)
    for name, value in preset.options.items():
        assert optimizer.param_groups[0][name] == value


def test_rows_take_over_at_their_bounds() -> None:
    assert recommended(9_999_999, "published")["warmup_steps"] == 100
    assert recommended(10_000_000, "published")["warmup_steps"] == 500
    assert recommended(7_000_000_000, "published")["k_max"] == 512
    assert recommended(5) == {"rule": "auto"}


def test_a_rule_with_rows_has_one_for_every_size_in_rising_order() -> None:
    for rule in {preset.rule for preset in PRESETS}:
        bounds = [preset.below for preset in PRESETS if preset.rule == rule]
        assert bounds and bounds[-1] is None and bounds[:-1] == sorted(filter(None, bounds))
    assert all(recommended(1000, rule) == {"rule": rule} for rule in RULES if rule != "published")
    assert all(set(preset.options) <= set(RULE_DEFAULTS[preset.rule]) for preset in PRESETS)


def test_what_is_returned_can_be_changed() -> None:
    recommended(1000, "published")["warmup_steps"] = 1
    assert recommended(1000, "published")["warmup_steps"] == 100


@pytest.mark.parametrize("parameters", [0, -5, 1.5, True, "7B"])
def test_a_number_of_parameters_is_needed(parameters: object) -> None:
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        recommended(parameters)  # type: ignore[arg-type]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="rule='shampoo'"):
        recommended(1000, "shampoo")
