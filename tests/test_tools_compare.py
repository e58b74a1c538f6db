"""``scao-hf compare``: how runs are configured, searched, resumed and judged, and real runs of a Trainer script."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from test_tools import mistake, run

from scao_hf.tools import ToolError, arms, comparison, measure
from scao_hf.tools import page as tool_page
from scao_hf.tools.arms import Arm, Job, Outcome, Rate
from scao_hf.tools.comparison import Side
from scao_hf.tools.page import FIRST, RAMP, SECOND
from scao_hf.trainer import SCAOTrainerMixin

CONFIG = {"base_model": "any/model", "optimizer": "scao", "learning_rate": 1e-3, "scao_k_max": 8, "val_set_size": 0.1}


def job(folder: Path, **changes: Any) -> Job:
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}), encoding="utf-8")
    return Job(path, 20, folder / "out")


# --- how a run is configured


def test_arms_differ_in_the_optimizer_alone(tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    asked = job(tmp_path, plugins=["axolotl_plugin.SCAOPlugin", "some.Other"], evals_per_epoch=3, wandb_project="x")
    adamw, scao = (Arm(asked, name, Rate(1.0, relative=True)).config() for name in ("adamw_torch", "scao"))
    assert adamw["plugins"] == ["some.Other", arms.ARM_PLUGIN]
    assert scao["plugins"] == ["some.Other", "axolotl_plugin.SCAOPlugin", arms.ARM_PLUGIN]
    assert scao["scao_k_max"] == 8 and not any(key.startswith("scao_") for key in adamw)
    assert not {"evals_per_epoch", "wandb_project"} & set(scao)
    assert (scao["max_steps"], scao["logging_steps"], scao["seed"], scao["eval_steps"]) == (20, 1, 42, 20)
    ours = {"plugins", "optimizer", "scao_k_max"}
    assert {k: v for k, v in adamw.items() if k not in ours} == {k: v for k, v in scao.items() if k not in ours}
    assert comparison.parse_rate("2e-4") == Rate(2e-4)
    assert Arm(asked, "scao", Rate(0.5, relative=True)).config()["learning_rate"] == 5e-4


def test_fused_experts_are_fused_in_both_arms(tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    config = Arm(job(tmp_path, scao_fuse_moe=True, adapter="lora"), "adamw_torch", Rate(1e-3)).config()
    assert config["plugins"] == ["axolotl_plugin.SCAOPlugin", arms.ARM_PLUGIN] and config["scao_fuse_moe"]
    assert "scao_k_max" not in config


def test_a_plain_trainer_gets_scao_as_the_mixin_builds_it(tmp_path: Path) -> None:
    import transformers
    from transformers import Trainer, TrainingArguments

    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    args = TrainingArguments(str(tmp_path), adam_beta2=0.95, learning_rate=1e-3, use_cpu=True, report_to="none")
    for name, kind in (("scao", "SCAO"), ("adamw_torch", "AdamW")):
        trainer = Trainer(model=transformers.LlamaForCausalLM(config), args=args)
        asked = {"optimizer": name, "steps": 8, "save_steps": 2, "output_dir": "x", "learning_rate": None, "scale": 0.5}
        measure.prepare_trainer(trainer, {**asked, "seed": 3}, tmp_path / "m")
        assert (trainer.args.seed, args.seed, torch.initial_seed()) == (45, 42, 45)
        assert type(trainer.optimizer).__name__ == kind
        assert trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.95)
        assert (trainer.args.learning_rate, trainer.args.max_steps, args.learning_rate) == (5e-4, 8, 1e-3)


@pytest.mark.parametrize("mixin", [False, True])
def test_both_arms_have_the_parameter_groups_of_the_trainer(tmp_path: Path, mixin: bool) -> None:
    from transformers import Trainer, TrainingArguments

    class Halves(Trainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            cls, options = self.optimizer_cls_and_kwargs or Trainer.get_optimizer_cls_and_kwargs(self.args)
            weight, bias = self.model.weight, self.model.bias
            self.optimizer = cls([{"params": [weight], "lr": 3e-3}, {"params": [bias], "weight_decay": 0.5}], **options)
            return self.optimizer

    kind = type("Own", (SCAOTrainerMixin, Halves), {}) if mixin else Halves
    args = TrainingArguments(str(tmp_path), learning_rate=1e-3, use_cpu=True, report_to="none")
    asked = {"steps": 8, "save_steps": 2, "output_dir": "x", "learning_rate": None, "scale": 1.0, "seed": 0}
    for name, made in (("scao", "SCAO"), ("adamw_torch", "AdamW")):
        trainer = kind(model=torch.nn.Linear(4, 4), args=args)
        measure.prepare_trainer(trainer, {**asked, "optimizer": name}, tmp_path / "m")
        assert type(trainer.optimizer).__name__ == made
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [3e-3, 1e-3]
        assert trainer.optimizer.param_groups[1]["weight_decay"] == 0.5


def test_the_yamls_own_optimizer_is_what_scao_is_compared_with(tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    assert arms.rivals_of(job(tmp_path)) == ["adamw_torch"]
    own = job(tmp_path, optimizer="adamw_bnb_8bit", optim_args={"percentile_clipping": 95})
    assert arms.rivals_of(own) == ["adamw_bnb_8bit"] and arms.rivals_of(own, "lion_8bit") == ["lion_8bit"]
    assert "optim_args" in Arm(own, "adamw_bnb_8bit", Rate(1e-3)).config()
    assert "optim_args" not in Arm(own, "scao", Rate(1e-3)).config()
    unnamed = job(tmp_path, optimizer=None, optim_args={"foreach": True})  # Axolotl takes adamw_torch_fused then
    kept = ["optim_args" in Arm(unnamed, f"adamw_torch{kind}", Rate(1e-3)).config() for kind in ("_fused", "")]
    assert kept == [True, False]
    assert arms.rivals_of(job(tmp_path, optimizer="muon")) == ["muon"]  # Axolotl's, not one of transformers
    assert arms.rivals_of(own, "adamw_torch, muon,adamw_torch") == ["adamw_torch", "muon"]


def test_a_yaml_without_the_plugin_is_told(tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    assert "the YAML lacks `plugins: [axolotl_plugin.SCAOPlugin]`" in str(job(tmp_path, optimizer="scao").note)
    assert job(tmp_path, optimizer="scao", plugins=["axolotl_plugin.SCAOPlugin"]).note is None


def test_another_run_has_another_folder(tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    first = Arm(job(tmp_path), "scao", Rate(1e-3)).folder
    assert Arm(job(tmp_path), "scao", Rate(1e-3)).folder == first
    assert Arm(job(tmp_path, sequence_len=64), "scao", Rate(1e-3)).folder != first
    assert Arm(dataclasses.replace(job(tmp_path), steps=30), "scao", Rate(1e-3)).folder != first


def test_mistakes_of_compare(tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    path = job(tmp_path).source
    assert "there is no file" in mistake("compare", tmp_path / "nothing.yml")
    assert "--lr is 'fast'" in mistake("compare", path, "--lr", "fast")
    assert "--lr is '-1'" in mistake("compare", path, "--lr", "-1")
    assert "--steps is 1" in mistake("compare", path, "--steps", 1)
    assert "--steps 3 would end before SCAO's phase 2, which begins after step 3" in mistake(
        "compare", path, "--steps", 3
    )
    said = mistake("compare", path, "--set", "scao_kmax=8")
    assert "scao_kmax is not an option of SCAO (did you mean 'scao_k_max'?)" in said
    said = mistake("compare", path, "--set", "deepspeed=zero3.json", "--set", "rl=dpo", "--set", "scao_rho=x")
    assert "deepspeed: zero3.json: SCAO does not run" in said and "scao_rho='x' is not valid" in said
    zero2 = tmp_path / "zero2.json"
    zero2.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    said = mistake("compare", path, "--set", f"deepspeed={zero2}")
    assert "compare trains in one process" in said and "add --set deepspeed=null" in said
    said = mistake("compare", path, "--set", "base_model=./nowhere", "--set", "datasets=[{path: data/rows.jsonl}]")
    assert "./nowhere does not exist, seen from " in said and "datasets: data/rows.jsonl does not exist" in said
    assert "scao_rho='x' is not valid: it must be a number in [0, 1)" in mistake("compare", path, "--set", "scao_rho=x")
    assert "k_min=9 must not exceed k_max=8" in mistake("compare", path, "--set", "scao_k_min=9")
    assert "write --set KEY=VALUE" in mistake("compare", path, "--set", "seed")
    assert "the value is not YAML" in mistake("compare", path, "--set", "seed=[1")
    assert "arguments after -- are for a script" in mistake("compare", path, "--", "--model", "x")
    assert "--against scao would compare SCAO with itself" in mistake("compare", path, "--against", "scao")
    assert "'adamw_tor' is not an optimizer of Axolotl (did you mean 'adamw_torch'?)" in mistake(
        "compare", path, "--against", "adamw_tor"
    )
    said = mistake("compare", path, "--against", "adamw_tor,lion_8bitt")
    assert (
        "(did you mean 'adamw_torch'?); 'lion_8bitt' is not an optimizer of Axolotl (did you mean 'lion_8bit'?)" in said
    )
    assert "--against ',' names 0 optimizers: name 1 to 4" in mistake("compare", path, "--against", ",")
    said = mistake("compare", path, "--set", "sed=1", "--set", "lora_rank=4", "--set", "learning_rate=1")
    assert "--set has " in said and "'sed' (did you mean 'seed'?)" in said and "'lora_rank' (did you mean" in said
    assert "'learning_rate'" not in said
    assert "--seeds is 0: it must be at least 1" in mistake("compare", path, "--seeds", 0)
    (tmp_path / "train.py").write_text("", encoding="utf-8")
    assert "pass a script's arguments after --" in mistake("compare", tmp_path / "train.py", "--set", "seed=1")
    assert "'foo' is not an optimizer of transformers" in mistake("compare", tmp_path / "train.py", "--against", "foo")
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    assert "is neither a YAML" in mistake("compare", tmp_path / "notes.txt")
    path.write_text("optimizer: scao", encoding="utf-8")
    assert "has no base_model" in mistake("compare", path)
    path.write_text("base_model: x", encoding="utf-8")
    assert "has no learning_rate" in mistake("compare", path)
    path.write_text("base_model: any/model\nlearning_rate: fast", encoding="utf-8")
    assert "learning_rate: fast must be a finite number above 0" in mistake("compare", path)
    path.write_text("base_model: any/model\nlearning_rate: 5e-4\nplugins: one.Plugin", encoding="utf-8")
    assert "plugins is 'one.Plugin': it must be a list" in mistake("compare", path)
    path.write_text("{", encoding="utf-8")
    assert "is not a YAML file" in mistake("compare", path)


def test_a_folder_that_cannot_be_made_and_a_script_in_another_encoding(tmp_path: Path) -> None:
    script, taken = tmp_path / "train.py", tmp_path / "taken"
    script.write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    taken.write_text("a file")
    said = mistake("compare", script, "--out", taken)
    assert "cannot be written to" in said and "choose another with --out" in said


def test_seed_zero_is_a_seed(tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    for seed, expected in ({}, 42), ({"seed": 0}, 0):
        assert Arm(job(tmp_path, **seed), "scao", Rate(1e-3)).config()["seed"] == expected
        assert Arm(job(tmp_path, **seed), "scao", Rate(1e-3), seed=2).config()["seed"] == expected + 2
    with pytest.raises(ToolError, match="seed is 'x': it must be an integer"):
        Arm(job(tmp_path, seed="x"), "scao", Rate(1e-3)).config()


def test_a_yaml_needs_axolotl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    (tmp_path / "config.yml").write_text("base_model: x", encoding="utf-8")
    assert "needs axolotl: pip install 'scao-hf[axolotl]'" in mistake("compare", tmp_path / "config.yml")


# --- what a run has written down


def outcome(losses: list[float], rate: float = 1e-3, each: float = 1.0, **fields: Any) -> Outcome:
    steps = len(losses)
    return Outcome(rate, losses, [each] * steps, list(range(steps)), state_bytes=2**20, peak_bytes=2**30, **fields)


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def step_row(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "seconds": 0.5, "data": step, "state_bytes": step, "peak_bytes": 9, **more}


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    begin = {"begin": 0, "learning_rate": 0.1, "device": "cpu"}
    rows = [begin, *(step_row(step, 9.0) for step in (1, 2, 3)), {"begin": 2}, step_row(3, 1.0), step_row(4, 2.0)]
    read = arms.read_outcome(lines(tmp_path / "m", *rows), 4)
    assert read.failure == "it stopped after step 4 of 4" and read.losses == [9.0, 9.0, 1.0, 2.0]
    read = arms.read_outcome(lines(tmp_path / "m", *rows, {"step": 4, "eval_loss": 3.0}, {"end": 4}), 4)
    assert (read.failure, read.eval_loss, read.learning_rate, read.state_bytes) == (None, 3.0, 0.1, 4)
    with (tmp_path / "m").open("a") as file:
        file.write('{"step": 5, "lo')  # cut off while it was written
    assert arms.read_outcome(tmp_path / "m", 4).losses == read.losses
    assert arms.read_outcome(tmp_path / "none", 4).failure == "it stopped after step 0 of 4"


def test_a_run_is_judged_by_its_reward_where_every_step_has_one(tmp_path: Path) -> None:
    rows = [step_row(step, 0.0, reward=float(step), blend=step / 4) for step in (1, 2, 3)]
    read = arms.read_outcome(lines(tmp_path / "m", *rows), 3)
    assert (read.figure, read.curve, read.score, read.blends) == ("reward", [1.0, 2.0, 3.0], -3.0, [0.25, 0.5, 0.75])
    read = arms.read_outcome(lines(tmp_path / "m", *rows, step_row(4, 0.0, reward=None)), 4)
    assert (read.figure, read.curve, read.blends) == ("loss", [0.0] * 4, [])


def test_the_reason_is_the_message_of_the_exception() -> None:
    log = "loading\nTraceback (most recent call last):\n  File x\nValueError: this config does not work with SCAO:\n  - a\n"
    assert arms.reason(log) == "ValueError: this config does not work with SCAO: - a"
    log = "pydantic_core._core.ValidationError: 1 error for X\n  Value error, too short [type=value_error, input_value={}]"
    assert arms.reason(log) == "ValidationError: 1 error for X Value error, too short"
    assert arms.reason("one\ntwo\n\n") == "two" and arms.reason("") == "it said nothing"


def test_state_is_measured_through_wrappers_and_shared_tensors_once() -> None:
    param = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.AdamW([param])
    param.grad = torch.ones(4, 4)
    optimizer.step()
    optimizer.state[param]["again"] = optimizer.state[param]["exp_avg"]
    expected = 2 * 64 + optimizer.state[param]["step"].untyped_storage().nbytes()
    assert measure.state_bytes(type("Wrapper", (), {"optimizer": optimizer})) == expected


def test_batches_are_told_apart() -> None:
    batch = {"input_ids": torch.arange(6).view(2, 3), "weights": torch.ones(2)}
    assert measure.batch_checksum(batch) == measure.batch_checksum({**batch, "weights": torch.zeros(2)})
    assert measure.batch_checksum(batch) != measure.batch_checksum({**batch, "input_ids": batch["input_ids"].flip(0)})


def test_batches_of_prompts_are_told_apart() -> None:
    """GRPO's are lists of rows as the dataset has them."""
    rows = [{"prompt": [{"role": "user", "content": text}], "n": n, "score": 0.5} for n, text in enumerate("abc")]
    known = measure.batch_checksum(rows)
    assert known == measure.batch_checksum([{**row, "score": 0.7} for row in rows])
    assert known != measure.batch_checksum(rows[::-1])
    assert known != measure.batch_checksum([{**rows[0], "prompt": [{"role": "user", "content": "z"}]}, *rows[1:]])
    assert known != measure.batch_checksum([{**row, "n": 7} for row in rows])


# --- the search, the table and the verdict


@pytest.mark.parametrize(
    ("optimum", "tried", "inside"), [(1.0, 3, True), (2.0, 4, True), (0.25, 4, True), (64.0, 5, False)]
)
def test_auto_brackets_the_best_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimum: float, tried: int, inside: bool
) -> None:
    def fake(arm: Arm, progress: Any) -> Outcome:
        return outcome([1 + abs(math.log(arm.rate.value / optimum))] * 6, rate=arm.rate.value)

    monkeypatch.setattr(comparison, "run_arm", fake)
    asked = Job.__new__(Job)
    sides = comparison.compare(asked, ("adamw_torch", "scao"), None, 3, lambda arm: lambda done: None)
    assert 2 * (tried + 2) <= comparison.most_runs(None, 3)
    for side in sides:
        assert side.best is not None and [one.learning_rate for one in side.repeats] == [side.best.learning_rate] * 2
        rates = sorted(rate.value for rate in side.runs)
        assert len(rates) == tried and side.best is not None
        assert side.place == f"best of {tried}" + ("" if inside else ", at the edge")
        assert (side.best.learning_rate == optimum) is inside


def test_a_search_ends_with_a_failure_and_shuns_a_divergence() -> None:
    first, half = Rate(1.0, relative=True), Rate(0.5, relative=True)
    assert comparison.next_rate({}) == first and comparison.next_rate({first: outcome([1.0])}) == half
    assert comparison.next_rate({first: outcome([1.0], failure="x")}) is None
    assert comparison.next_rate({first: outcome([math.nan]), half: outcome([2.0])}) == Rate(0.25, relative=True)


def test_table_and_verdict_at_equal_steps_and_seconds(tmp_path: Path) -> None:
    slow = outcome([3 - step / 20 for step in range(40)], each=1.0, eval_loss=2.0)
    fast = outcome([3 - step / 10 for step in range(40)], each=1.5, eval_loss=1.5)
    sides = Side("adamw_torch", {Rate(1e-3): slow}), Side("scao", {Rate(1e-3): fast})
    rows = dict(comparison.summary(sides))
    assert rows["seconds"] == ["40.0", "60.0"] and rows["optimizer state"] == ["1.00 MiB", "1.00 MiB"]
    assert rows["held-out loss"] == ["2.0000", "1.5000"] and rows["peak memory of the process"] == ["1,024 MiB"] * 2
    # After 40 seconds SCAO has made 26 of its steps.
    assert rows["loss after 40.0 seconds"][1] == f"{comparison.smoothed(fast.losses)[25]:.4f}"
    assert comparison.verdict(sides) == [
        "scao against adamw_torch: loss 122.2% lower, lower on 13 of the last 13 batches, held-out loss 25.0% lower, "
        "steps 50% longer, peak memory the same: better; 1 seed.",
        "All runs have read the same batches in the same order.",
        "Another seed moves the losses too: repeat with --seeds 3 before you rely on a small gap.",
    ]
    paths = comparison.write(sides, tmp_path / "new")
    assert [path.name for path in paths] == ["comparison.json", "comparison.png", "comparison.html"]
    assert (tmp_path / "new/comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "new/comparison.html").read_text(encoding="utf-8")
    assert "1,024&nbsp;MiB" in page, "a narrow screen must not part a number from its unit"


def three_sides() -> list[Side]:
    """Two others and SCAO, whose curvature is in effect from step 22 on."""
    blends = [0.0] * 12 + [0.5] * 10 + [1.0] * 38
    return [
        Side("adamw_torch", {Rate(1e-3): noisy(0.0), Rate(2e-3): noisy(0.1, rate=2e-3)}),
        Side("muon", {Rate(1e-3): noisy(-0.2)}),
        Side("scao", {Rate(1e-3): noisy(-0.1, blends=blends)}),
    ]


def test_several_others_are_each_compared_with_scao(tmp_path: Path) -> None:
    sides = three_sides()
    said = comparison.verdict(sides)
    assert said[0].startswith("scao against adamw_torch: loss 4.9% lower") and ": better; 1 seed." in said[0]
    assert said[1].startswith("scao against muon: loss 5.5% higher") and ": worse; 1 seed." in said[1]
    assert said[2] == "All runs have read the same batches in the same order."
    rows = dict(comparison.summary(sides))
    assert all(len(values) == 3 for values in rows.values()) and rows["loss after 60 steps"]
    sides[1].runs = {Rate(1e-3): outcome([], failure="it stopped: no")}
    said = comparison.verdict(sides)
    assert said[0] == "muon failed: it stopped: no" and said[1].startswith("scao against adamw_torch")
    comparison.write(sides, tmp_path)


def test_the_page_has_the_verdict_the_figures_and_a_chart_for_each_other(tmp_path: Path) -> None:
    sides = three_sides()
    comparison.write(sides, tmp_path, "config.yml, 60 steps a run & <more>")
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert f'<p class="lead">{comparison.verdict(sides)[0]}</p>' in page
    assert "config.yml, 60 steps a run &amp; &lt;more&gt;" in page and "<td>optimizer state</td>" in page
    for title in ("Loss by step", "Loss by time", "Loss by learning rate", "scao minus muon, batch by batch"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<svg ") == 5 and "ramp" in page and "src=" not in page
    assert tool_page.bands(range(1, 5), [0.0, 0.0, 0.5, 1.0]) == [(0, 2, FIRST), (2, 3, RAMP), (3, 4, SECOND)]


def noisy(gap: float, spread: float = 0.01, **fields: Any) -> Outcome:
    """A loss with large differences between batches, the same for all, and smaller ones of its own."""
    own = torch.randn(60, generator=torch.Generator().manual_seed(1)) * spread
    shared = torch.randn(60, generator=torch.Generator().manual_seed(0))
    return outcome(
        [2.0 + float(noise) / 4 + gap + float(mine) for noise, mine in zip(shared, own, strict=True)], **fields
    )


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (
            -0.014,
            "loss 0.7% lower, lower on 20 of the last 20 batches, steps the same, peak memory the same: slightly better",
        ),
        (-0.2, "lower, lower on 20 of the last 20 batches, steps the same, peak memory the same: better; 1 seed."),
        (
            0.014,
            "loss 0.7% higher, lower on 0 of the last 20 batches, steps the same, peak memory the same: slightly worse",
        ),
        (0.2, "higher, lower on 0 of the last 20 batches, steps the same, peak memory the same: worse; 1 seed."),
        (0.0, "loss the same, lower on 0 of the last 20 batches, steps the same, peak memory the same: no difference"),
    ],
)
def test_differences_are_judged_batch_by_batch(gap: float, words: str) -> None:
    """The losses vary by 0.25 from batch to batch, far more than the gap."""
    sides = Side("adamw_torch", {Rate(1e-3): noisy(0.0)}), Side("scao", {Rate(1e-3): noisy(gap)})
    assert words in comparison.headline(*sides)


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        ((-0.02, -0.03, -0.025), "(by seed -1.0%, -1.5%, -1.2%), lower on 60 of the last 60 batches"),
        ((-0.02, -0.03, -0.025), "slightly better; 3 seeds."),
        ((-0.02, 0.03, -0.025), "no difference; 3 seeds."),
        ((0.1, 0.12, 0.09), "worse; 3 seeds."),
    ],
)
def test_several_seeds_are_judged_by_their_own_spread(gaps: tuple[float, ...], words: str) -> None:
    first, *more = (noisy(gap) for gap in gaps)
    sides = (
        Side("adamw_torch", {Rate(1e-3): noisy(0.0)}, [noisy(0.0)] * 2),
        Side("scao", {Rate(1e-3): first}, more),
    )
    assert words in comparison.headline(*sides)
    assert not any("repeat with --seeds" in sentence for sentence in comparison.verdict(sides))
    broken = dataclasses.replace(more[1], failure="it stopped: no")
    said = comparison.verdict((sides[0], Side("scao", {Rate(1e-3): first}, [more[0], broken])))
    assert said[0] == "scao failed: it stopped: no" and "; 2 seeds." in said[1]


def test_rewards_are_better_where_they_are_higher() -> None:
    rewards = [{"rewards": [start + step / 40 for step in range(40)]} for start in (-1.0, -0.5)]
    sides = Side("adamw_torch", {Rate(1e-3): outcome([0.0] * 40, **rewards[0])}), Side("scao")
    sides[1].runs[Rate(1e-3)] = outcome([0.0] * 40, **rewards[1])
    said = comparison.headline(*sides)
    assert "reward 0.5 higher, higher on 13 of the last 13 batches" in said and said.endswith(": better; 1 seed.")
    assert dict(comparison.summary(sides))["reward after 40 steps"] == ["-0.0750", "0.4250"]


@pytest.mark.parametrize(
    ("scao", "words"),
    [
        (outcome([math.nan] * 40), "The loss of scao was NaN or infinite"),
        (dataclasses.replace(outcome([1.0] * 40), data=[7] * 40), "have NOT read the same batches"),
        (
            outcome([3.0] * 40, blends=[0.0] * 40),
            "scao has not reached phase 2 in 40 steps: all of them were plain AdamW steps",
        ),
        (
            outcome([3.0] * 40, blends=[0.0] * 10 + [0.5] * 12 + [1.0] * 18),
            "22 of the 40 steps were AdamW steps or the ramp to SCAO's curvature",
        ),
        (outcome([], failure="it stopped: ValueError: no"), "scao failed: it stopped: ValueError: no"),
    ],
)
def test_verdict_names_what_is_wrong(scao: Outcome, words: str, tmp_path: Path) -> None:
    adamw = outcome([3 - step / 20 for step in range(40)])
    sides = Side("adamw_torch", {Rate(1e-3): adamw}), Side("scao", {Rate(1e-3): scao})
    said = " ".join(comparison.verdict(sides))
    assert words in said
    assert ("scao against adamw_torch" in said) is (bool(scao.blends))
    rows = dict(comparison.summary(sides))
    assert rows["loss, last third of the steps"][0] == f"{adamw.score:.4f}"
    comparison.write(sides, tmp_path)


def test_the_time_of_all_runs_is_estimated_from_the_first_steps() -> None:
    assert comparison.estimate(outcome([1.0] * 3), 400) == ""
    said = "about {} of training in all, besides loading and evaluation"
    assert comparison.estimate(outcome([1.0] * 9, each=0.5), 400) == "0.5 s a step: " + said.format("3 min 20 s")
    assert said.format("1 h 40 min") in comparison.estimate(outcome([1.0] * 9, each=30.0), 200)


# --- real runs

SCRIPT = """
import os, sys
from pathlib import Path
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from scao_hf import SCAOTrainer

class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if Path("stop").exists() and "scao" in args.output_dir and state.global_step == 8:
            raise RuntimeError("the power went out")

rows = [{"input_ids": [1] + [3 + (n * k) % 200 for k in range(12)], "labels": [3 + (n * k) % 200 for k in range(13)]}
        for n in range(64)]
arguments = TrainingArguments("never", learning_rate=float(sys.argv[2]), max_steps=3, use_cpu=True, report_to="none",
                              per_device_train_batch_size=2, seed=5, warmup_steps=2)
chosen = {"warmup_steps": 3, "precond_freq": 3, "blend_steps": 2}
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
trainer = SCAOTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[Stop()], scao_kwargs=chosen)
trainer.train()
Path("saved").touch()
"""


def test_a_script_is_compared_resumed_and_a_failed_arm_leaves_the_other(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    Path("train.py").write_text(SCRIPT, encoding="utf-8")
    Path("stop").touch()
    command = ("compare", "train.py", "--steps", 12, "--out", "out", "--", tiny_llama, "0.01")
    broken = run(*command)
    assert broken.exit_code == 1, broken.output
    assert broken.output.count("Running adamw_torch") == broken.output.count("Running scao") == 1
    assert "scao failed: it stopped after step 8 of 12: RuntimeError: the power went out" in broken.output
    assert "adamw_torch" in broken.output and Path("out/comparison.png").is_file()
    Path("stop").unlink()
    adamw = next(Path("out").glob("adamw_torch-*")) / "measurements.jsonl"
    before = adamw.read_bytes()

    done = run(*command)
    assert done.exit_code == 0, done.output
    assert adamw.read_bytes() == before, "a finished run was run again"
    written = [
        json.loads(line) for line in next(Path("out").glob("scao-*/measurements.jsonl")).read_text().splitlines()
    ]
    assert [row["begin"] for row in written if "begin" in row] == [0, 6]  # the checkpoint of a quarter of the run
    found = {entry["optimizer"]: entry for entry in json.loads(Path("out/comparison.json").read_text())}
    assert found["scao"]["data"] == found["adamw_torch"]["data"] and len(set(found["scao"]["data"])) == 12
    assert found["scao"]["losses"][:2] == found["adamw_torch"]["losses"][:2]
    assert found["scao"]["losses"][-1] != found["adamw_torch"]["losses"][-1]
    assert found["scao"]["state_bytes"] > 0 and found["scao"]["learning_rate"] == 0.01
    assert found["scao"]["blends"][-1] == 1 and not found["adamw_torch"]["blends"]
    assert not Path("never").exists() or not any(Path("never").iterdir())
    assert not Path("saved").exists()
    again = [row["loss"] for row in written if row.get("step") in (7, 8)]
    assert again[:2] == again[2:], "the steps after the checkpoint went another way than before"


def preference_rows(chars: str = "ab") -> dict[str, list[str]]:
    prompts = [f"count {n}: " for n in range(32)]
    return {"prompt": prompts, "chosen": [chars[0] * (3 + n % 4) for n in range(32)], "rejected": ["zz"] * 32}


@pytest.mark.parametrize("kind", ["DPO", "GRPO", "RLOO"])
def test_trainers_of_trl_are_measured(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    common = {"max_steps": 4, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "seed": 3}
    on_policy = {"num_generations": 2, "max_completion_length": 8}
    outcomes = []
    for name in ("adamw_torch", "scao"):
        options = {**common, **({} if kind == "DPO" else on_policy)}
        trainer = getattr(trl, f"{kind}Trainer")(
            model=str(tiny_llama),
            args=getattr(trl, f"{kind}Config")(str(tmp_path / "own"), per_device_train_batch_size=2, **options),
            train_dataset=datasets.Dataset.from_dict(preference_rows()),
            **(
                {} if kind == "DPO" else {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}
            ),
        )
        arm = {"optimizer": name, "steps": 4, "save_steps": 4, "output_dir": str(tmp_path / name), "seed": 0}
        measure.prepare_trainer(trainer, {**arm, "learning_rate": 1e-3, "scale": 1.0}, tmp_path / f"{name}.jsonl")
        trainer.train()
        outcomes.append(arms.read_outcome(tmp_path / f"{name}.jsonl", 4))
    assert [one.failure for one in outcomes] == [None, None]
    assert outcomes[0].data == outcomes[1].data and len(set(outcomes[0].data)) > 1
    assert {one.figure for one in outcomes} == {"loss" if kind == "DPO" else "reward"}
    assert outcomes[1].blends == pytest.approx([0.0] * 3 + [1 / 3]) and outcomes[0].blends == []


def test_an_interruption_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("axolotl")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "run_arm", interrupt)
    result = run("compare", job(tmp_path).source, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "repeat the command to resume" in result.stderr


def test_a_comparison_that_cannot_be_written_tells_its_verdict_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("axolotl")
    monkeypatch.setattr(comparison, "run_arm", lambda *_: outcome([3 - step / 20 for step in range(40)]))
    (tmp_path / "out" / "comparison.json").mkdir(parents=True)
    result = run("compare", job(tmp_path).source, "--out", tmp_path / "out", "--steps", 40)
    assert result.exit_code == 2 and "scao against adamw_torch" in result.output, result.output
    assert "out cannot be written to (Is a directory)" in result.stderr
