"""The PyPI package ``scao`` of another project: its options and its name are not taken for ours."""

from __future__ import annotations

import inspect

import pytest

from scao_hf import namesake
from scao_hf.options import OPTIONS


def test_the_table_holds_what_the_other_constructor_takes_and_ours_does_not() -> None:
    other = pytest.importorskip("scao", reason="needs the PyPI package scao, which `make test` installs")
    theirs = set(inspect.signature(other.SCAO).parameters) - {"params", "lr", "betas", "eps", "weight_decay"}
    assert set(namesake.FOREIGN) == theirs - set(OPTIONS)
    assert set(filter(None, namesake.FOREIGN.values())) <= set(OPTIONS)
    assert namesake.other_package() is not None and (namesake.other_package() / "optimizer.py").is_file()


def test_an_option_of_the_other_one_is_told_apart() -> None:
    assert namesake.foreign_option("sparsity") == " (it belongs to the PyPI package scao, another project's: remove it)"
    nearest = "remove it; the nearest here is scao_warmup_steps)"
    assert namesake.foreign_option("adaptive_warmup", "scao_").endswith(nearest)
    assert namesake.foreign_option("k_mx") == namesake.foreign_option("k_max") == ""
