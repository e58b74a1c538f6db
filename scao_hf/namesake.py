"""The PyPI package ``scao``, another project's optimizer, which Axolotl after 0.19 takes for ``optimizer: scao``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

#: What its constructor takes (0.2.4) and this SCAO does not, with the nearest option of this one, if there is one.
FOREIGN = {
    "use_newton_schulz": "",
    "async_precond": "",
    "beta3": "",
    "sparsity": "",
    "noise_std_init": "",
    "noise_anneal": "",
    "noise_relative": "",
    "lars_coeff": "",
    "lookahead_k": "",
    "lookahead_alpha": "",
    "dynamic_sparsity": "",
    "adaptive_warmup": "warmup_steps",
    "warmup_stability_threshold": "warmup_steps",
    "warmup_patience": "warmup_steps",
    "lazy_precond": "precond_freq",
    "lazy_delta_threshold": "precond_freq",
    "lazy_max_skip": "precond_freq",
    "use_gsnr_clip": "",
    "gsnr_threshold": "",
    "adaptive_rank": "epsilon_sparse",
    "preconditioner_enabled": "",
    "factor_mode": "",
    "curvature_mode": "",
    "curvature_rank": "k_max",
    "update_rule": "rule",
}


def foreign_option(name: str, prefix: str = "") -> str:
    """Whose option this is and what to do, in parentheses; an empty string for one that is not in ``FOREIGN``.

    Args:
        name: without the prefix.
        prefix: what stands before the options of this SCAO where the message is read.
    """
    if name not in FOREIGN:
        return ""
    nearest = f"; the nearest here is {prefix}{FOREIGN[name]}" if FOREIGN[name] else ""
    return f" (it belongs to the PyPI package scao, another project's: remove it{nearest})"


def other_package() -> Path | None:
    """The folder of the package ``scao`` where one can be imported; it is looked up, not imported."""
    found = importlib.util.find_spec("scao")
    return Path(found.origin).parent if found and found.origin else None
