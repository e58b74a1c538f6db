"""Every fault of examples/benchmarks/faults on SCAO: every rule, every kind of state, every common dtype survives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

from faults import FAULTS, Inapplicable, Subject  # noqa: E402
from faults.core import LR, distance  # noqa: E402
from faults.lifecycle import whole_and_parts  # noqa: E402
from survival import COMPARED, attempt, isolated, main, variants  # noqa: E402

VARIANTS = variants()
#: One of each kind in every run of the tests; all of them take minutes.
ALWAYS = {"eigenbasis", "eigenbasis int8", "eigenbasis int8 moments", "eigenbasis, bfloat16 parameters", "published"}


SUBJECTS = [
    pytest.param(each, marks=[] if each.name in ALWAYS else pytest.mark.long, id=each.name.replace(" ", "-"))
    for each in VARIANTS
]


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.filterwarnings("ignore")
def test_scao_survives(subject: Subject, name: str) -> None:
    torch.manual_seed(0)
    try:
        FAULTS[name].try_on(subject)
    except Inapplicable as reason:
        # A fault that cannot happen to SCAO tests nothing.
        pytest.fail(f"inapplicable: {reason}")


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.filterwarnings("ignore")
def test_small_batches_summed_up_give_the_weights_of_large_ones(subject: Subject) -> None:
    if subject.name in {"eigenbasis int8", "eigenbasis bfloat16 moments"}:
        pytest.skip(
            "stochastic rounding tips single entries of its state: the losses agree, which the battery asks for"
        )
    torch.manual_seed(0)
    whole, parts = whole_and_parts(subject)
    assert distance(whole.params, parts.params) <= 2 * LR


def broken_adamw(params: object, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr)  # type: ignore[arg-type]


def test_the_battery_sees_what_an_optimizer_does_not_survive() -> None:
    subject = Subject("adamw", broken_adamw)
    lost = {name for name in FAULTS if attempt(name, subject)["outcome"] == "lost"}
    assert {"nan_early", "inf_entry", "spike", "float16", "wrong_shape", "missing_key", "nan_inside", "aliased"} <= lost
    assert not lost & {"rank_one", "closure", "deep_copy", "resume_late", "twice", "scalar"}
    assert attempt("eigh_fails", subject)["outcome"] == "inapplicable"


def test_a_crash_and_a_hang_are_outcomes() -> None:
    crash = Subject("crash", lambda params, lr: torch._C._rename_privateuse1_backend and __import__("os")._exit(3))
    hang = Subject("hang", lambda params, lr: __import__("time").sleep(60))
    assert "status 3" in isolated("nan_early", crash)["reason"]
    assert "no end" in isolated("nan_early", hang, timeout=0.5)["reason"]


def test_every_rule_and_state_is_tried() -> None:
    names = {subject.name for subject in VARIANTS}
    assert len(names) == len(VARIANTS) >= 8 and names >= ALWAYS
    assert {"scao", "scao-published", "adamw", "soap", "shampoo", "scao-pypi", "adamw8bit"} <= set(COMPARED)


def test_what_is_not_tried_again_stays_in_the_file(tmp_path: Path) -> None:
    out = tmp_path / "survival.jsonl"
    arguments = ["--out", str(out), "--optimizers", "adamw"]
    assert main([*arguments, "--faults", "closure,scalar"]) == 0
    kept = {"optimizer": "soap", "fault": "scalar", "outcome": "lost", "reason": "", "versions": {}}
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(kept) + "\n")
    assert main([*arguments, "--faults", "scalar"]) == 0
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    found = [(record["optimizer"], record["fault"], record["outcome"]) for record in records]
    assert found == [("adamw", "closure", "survived"), ("soap", "scalar", "lost"), ("adamw", "scalar", "survived")]
