"""Recommended options by size, as data: ``SCAO(params, lr=1e-3, **recommended(7_000_000, "published"))``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scao_hf.options import OPTIONS, RULES, check


@dataclass(frozen=True)
class Preset:
    """Options of a rule for models of fewer than so many trained parameters (None: of any number)."""

    rule: str
    below: int | None
    options: dict[str, Any]


#: What was published for the published rule, untested here beyond 5 million parameters. The other rules have no rows: options
#: that lower the loss at one size of the benchmarks have done nothing at another.
PRESETS = (
    Preset("published", 10_000_000, {"warmup_steps": 100, "precond_freq": 10, "k_max": 64, "rho": 0.999}),
    Preset("published", 300_000_000, {"warmup_steps": 500, "precond_freq": 20, "k_max": 128, "tau": 5.0, "rho": 0.999}),
    Preset(
        "published", 7_000_000_000, {"warmup_steps": 1000, "precond_freq": 50, "k_max": 256, "tau": 5.0, "rho": 0.99}
    ),
    Preset("published", None, {"warmup_steps": 2000, "precond_freq": 100, "k_max": 512, "tau": 10.0, "rho": 0.99}),
)


def recommended(parameters: int, rule: str = RULES[0]) -> dict[str, Any]:
    """The options of ``PRESETS`` for a size, as keyword arguments of ``SCAO``, ``rule`` included.

    Args:
        parameters: the number of trained parameters.
        rule: one of ``options.RULES``.

    Returns:
        A new dictionary; every option that it does not name keeps the rule's default.

    Raises:
        ValueError: an unknown rule, or no positive number of parameters.
    """
    check("rule", rule, OPTIONS["rule"])
    if isinstance(parameters, bool) or not isinstance(parameters, int) or parameters < 1:
        raise ValueError(f"parameters={parameters!r} is not valid: it must be an integer of at least 1")
    found = (p.options for p in PRESETS if p.rule == rule and (p.below is None or parameters < p.below))
    return {"rule": rule, **next(found, {})}
