"""The benchmark of mixtures of experts: what it repeats, its tables, and what its committed record has to show."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"
sys.path.insert(0, str(FOLDER))

import moe  # noqa: E402
import moe_layers  # noqa: E402
import moe_tables  # noqa: E402
import moe_tasks  # noqa: E402
import peers  # noqa: E402
import sweep  # noqa: E402


def records(path: Path) -> list[dict[str, Any]]:
    return list(sweep.read(path)[0].values())


def test_a_run_is_made_once_for_each_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, float, int]] = []

    def run(name: str, lr: float, seed: int) -> dict[str, float]:
        made.append((name, lr, seed))
        return {"loss": abs(lr - 2e-2) + seed + (name == "adamw")}

    monkeypatch.setattr(moe_tasks, "toy", run)
    monkeypatch.setattr(moe, "SEEDS", {"toy": 2})
    out = tmp_path / moe_tables.FILE
    assert moe.main(["toy", "--out", str(out)]) == moe.main(["toy", "--out", str(out)]) == 0
    assert len(made) == len(set(made)) == 2 * len(moe.RATES["toy"]) * 3
    first = records(out)[1]
    assert first["cell"]["options"]["behaviour"] == peers.behaviour("eigenbasis", ())
    assert {"machine", "versions", "command", "figures"} <= set(first) and first["versions"]["code"]
    table = moe_tables.tables([out])["moe-toy"]
    assert (
        "| `adamw` | 0.02 | 1.500 ± 0.707 |" in table and "| `scao` | 0.02 | 0.500 ± 0.707 | 0.250 ± 0.354x |" in table
    )
    # Another rule is another run, and the table counts it alone.
    monkeypatch.setattr(peers, "behaviour", lambda *_: "another")
    monkeypatch.setattr(moe, "SEEDS", {"toy": 1})
    moe.main(["toy", "--out", str(out)])
    assert len(made) == 2 * len(moe.RATES["toy"]) * 3 + 2 * len(moe.RATES["toy"])
    assert "| `scao` | 0.02 | 0.000 | 0.000x |" in moe_tables.tables([out])["moe-toy"]


def test_times_of_other_code_are_repeated_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(moe_layers, "four_bit", lambda experts: {"experts": experts})
    out = str(tmp_path / moe_tables.FILE)
    moe.main(["four-bit", "--out", out])
    monkeypatch.setattr(moe, "code_fingerprint", lambda: "another")
    moe.main(["four-bit", "--out", out])
    assert "timed with other code, see --redo-stale" in capsys.readouterr().err
    moe.main(["four-bit", "--out", out, "--redo-stale"])
    lines = [json.loads(line) for line in Path(out).read_text(encoding="utf-8").splitlines()]
    assert [line["versions"]["code"] == "another" for line in lines] == [False, True]
    assert len(records(Path(out))) == 1


def test_every_part_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real measurements, made small."""
    pytest.importorskip("bitsandbytes")
    for module, name, value in (
        (moe, "RATES", {"toy": (1e-2,), "small": (1e-2,)}),
        (moe, "SEEDS", {"toy": 1, "small": 1}),
        (moe, "LAYERS", (4,)),
        (moe_tasks, "TOY_STEPS", 15),
        (moe_tasks, "LM_STEPS", 12),
        (moe_tasks, "PRETRAIN_STEPS", 2),
        (moe_layers, "HIDDEN", 64),
        (moe_layers, "INNER", 64),
        (moe_layers, "LAYER_TOKENS", 16),
    ):
        monkeypatch.setattr(module, name, value)
    out = tmp_path / moe_tables.FILE
    assert moe.main([*moe.PARTS, "--out", str(out)]) == 0
    found = records(out)
    assert [record["cell"]["part"] for record in found] == ["toy"] * 3 + ["small"] * 2 + ["forward", "four-bit"]
    assert all(0 < record["figures"]["loss"] < 8 for record in found[:5])
    ms, extra = found[5]["figures"]["ms"], found[5]["figures"]["extra_bytes"]
    assert set(ms) == {*moe_layers.FLOORS, "fused", "grouped_mm", "eager", "batched_mm"}
    assert set(extra) == set(ms) - {"batched_mm"} and min(extra.values()) > 0
    assert found[5]["figures"]["gradient_difference"] < 1e-5 > found[6]["figures"]["gradient_difference"]
    assert set(moe_tables.tables([out])) == {f"moe-{part}" for part in moe.PARTS}


def test_the_committed_record_has_what_the_documentation_says() -> None:
    found = records(moe.OUT)
    trained: dict[str, dict[str, dict[float, list[float]]]] = {"toy": {}, "small": {}}
    for record in found:
        cell = record["cell"]
        if cell["part"] in trained:
            by_rate = trained[cell["part"]].setdefault(cell["optimizer"], {})
            by_rate.setdefault(cell["lr"], []).append(record["figures"]["loss"])
    for part, names in trained.items():
        for rates in names.values():
            assert {len(losses) for losses in rates.values()} == {moe.SEEDS[part]}
            best = min(rates, key=lambda lr: mean(rates[lr]))
            assert min(rates) < best < max(rates), "the best rate has none beyond it"
    best = {name: min(map(mean, rates.values())) for name, rates in trained["toy"].items()}
    assert best["scao"] <= 0.8 * best["adamw"] and best["scao"] < best["scao, one matrix"]
    layers = {r["cell"]["experts"]: r["figures"] for r in found if r["cell"]["part"] == "forward"}
    for experts, eager, grouped in ((16, 3.5, 1.4), (64, 8.0, 2.0)):
        ms, extra = layers[experts]["ms"], layers[experts]["extra_bytes"]
        assert ms["eager"] >= eager * ms["fused"] and ms["grouped_mm"] >= grouped * ms["fused"]
        assert extra["fused"] <= 0.45 * extra["grouped_mm"]
        assert ms["fused"] <= 1.25 * ms["without LoRA"]
    coded = next(record["figures"] for record in found if record["cell"]["part"] == "four-bit")
    assert coded["bytes_of_bfloat16"] <= 0.29 and coded["ms"]["nf4"] <= 1.25 * coded["ms"]["float32"]
