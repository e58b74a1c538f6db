"""The cost benchmarks: loads, clocks, resumable records and tables; and the memory that SCAO's steps are allowed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

pytest.importorskip("tqdm")

import costs  # noqa: E402
import gpu  # noqa: E402
import loads  # noqa: E402
import memory  # noqa: E402
import peers  # noqa: E402
import speed  # noqa: E402
import tables  # noqa: E402

from scao_hf import SCAO, ops, stacks  # noqa: E402
from scao_hf.options import RULE_DEFAULTS  # noqa: E402
from scao_hf.rules import eigenbasis  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_reference_load_is_the_lora_of_qwen() -> None:
    with torch.device("meta"):
        model = loads.qwen()
    params = list(model.parameters())
    assert (len(params), loads.size(model), loads.shapes(model)) == (504, 29_933_568, 3)
    assert loads.size(loads.gpt2_block()) == 12 * 768**2 + (3 + 1 + 4 + 1) * 768 + 4 * 768


def stepper(times: list[float], period: int, settle: int) -> loads.Stepper:
    made = loads.Stepper("adamw", torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), period, settle)
    made.times = [(time, 2 * time) for time in times]
    return made


def test_figures_are_medians_by_place_in_the_period() -> None:
    """Two slow steps of settling, then three periods of (1, 1, 4) ms, one step disturbed, one step not timed."""
    timed = [0.001, 0.001, 0.004, 0.001, 0.9, 0.004, 0.001, 0.001, 0.004]
    found = stepper([0.5, 0.7, 0.02, *timed, math.nan], 3, 3).figures()
    assert (found["period"], found["steps"]) == (3, 9)
    assert (found["cpu_ms"], found["cpu_ms_amortised"], found["cpu_ms_worst"]) == (1.0, 2.0, 4.0)
    assert (found["wall_ms"], found["wall_ms_amortised"], found["wall_ms_worst"]) == (2.0, 4.0, 8.0)
    assert found["cpu_ms_worst_settling"] == 700.0


@pytest.mark.parametrize("spec", ["scao", "scao-pytorch", "scao-pytorch:precond_freq=4"])
def test_scao_is_timed_in_phase_two_over_whole_periods(spec: str) -> None:
    model = loads.lora(4, [(16, 16)], 1)
    made = loads.Stepper.of(spec, model)
    gradients = loads.Gradients(model)
    loads.interleave([made], gradients, periods=2)
    assert isinstance(made.optimizer, SCAO)
    assert made.optimizer.metrics()["scao/phase"] == 2 and made.optimizer.metrics()["scao/blend"] == 1
    assert made.settle % made.period == 0 and len(made.times) == made.settle + 2 * made.period


@pytest.mark.skipif("cpu" not in ops.NATIVE, reason=f"no native code: {ops.backend()['cpu']}")
def test_without_native_is_what_a_process_without_the_kernels_does() -> None:
    """The same operations, and none of them native."""
    model = loads.lora(4, [(40, 24)], 3)
    gradients = loads.Gradients(model)
    counts = {}
    for spec in ("scao", "scao-pytorch"):
        made = loads.Stepper.of(spec, model)
        for _ in range(made.settle):
            made.step(gradients)
        with made.context(), loads.Operations() as seen:
            for _ in range(made.period):  # each matrix is refreshed once
                made.optimizer.step()
        counts[spec] = seen.counts
    assert any("scao." in name for name in counts["scao"])
    assert not any("scao." in name for name in counts["scao-pytorch"])
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nimport loads\nmodel = loads.lora(4, [(40, 24)], 3)\n"
        "made, gradients = loads.Stepper.of('scao', model), loads.Gradients(model)\n"
        "for _ in range(made.settle): made.step(gradients)\n"
        "with loads.Operations() as seen:\n    for _ in range(made.period): made.optimizer.step()\n"
        "print(sum(seen.counts.values()))"
    )
    environment = {**os.environ, "SCAO_DISABLE_EXT": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(sum(counts["scao-pytorch"].values())), done.stderr[-2000:]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reduced run of speed.py and memory.py, all but the training step."""
    folder = tmp_path_factory.mktemp("costs")
    parts = "copy,load,pair,gpt2,growth"
    common = ["--parts", parts, "--reduced", "--threads", "1", "--out"]
    assert speed.main([*common, str(folder / "speed.jsonl")]) == 0
    return folder


def test_every_part_becomes_a_table_and_nothing_is_measured_twice(
    measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = measured / "speed.jsonl"
    before = path.read_text()
    monkeypatch.setattr(speed, "measure", None)  # would fail if it were called
    assert speed.main(["--parts", "load,growth", "--reduced", "--threads", "1", "--out", str(path)]) == 0
    assert path.read_text() == before and "7 measurements, 7 finished before" in capsys.readouterr().err
    found = costs.records([path], reduced=True)
    made = costs.tables(found)
    assert set(made) == {f"speed-{name}" for name in ("load", "pair", "gpt2", "growth", "roofline")}
    assert "| `adamw` | 4 |" in made["speed-load"] and made["speed-load"].count("\n| `") == len(speed.LOAD)
    record = next(record for record in found if record["cell"]["part"] == "load")
    assert record["machine"]["threads"] == 1 and record["command"].startswith(
        "python examples/benchmarks/speed.py --parts"
    )
    assert not costs.records([path]), "reduced measurements must not get into the tables"
    plot = costs.plot(found, measured)
    assert plot is not None and plot.stat().st_size > 10_000


def test_measurements_of_other_code_are_repeated_on_request(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "speed.jsonl"
    path.write_text((measured / "speed.jsonl").read_text())
    monkeypatch.setattr(loads, "code_fingerprint", lambda: "other")
    arguments = ["--parts", "copy", "--reduced", "--threads", "1", "--out", str(path)]
    assert speed.main(arguments) == 0
    assert "of other code: see --redo-stale" in capsys.readouterr().err
    assert speed.main([*arguments, "--redo-stale"]) == 0
    found = [record for record in costs.records([path], reduced=True) if record["cell"]["part"] == "copy"]
    assert [record["versions"]["code"] for record in found] == ["other"]


@pytest.mark.parametrize("arguments", [["--parts", "lode"], ["--parts", ","], ["--threads", "0"]])
def test_a_bad_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.main(arguments)
    assert "must be" in capsys.readouterr().err


def test_growth_exponents_and_roofline_are_worked_out_from_the_records() -> None:
    assert costs.slope([(x, 3 * x**1.5) for x in (1.0, 2.0, 8.0)]) == pytest.approx(1.5)
    origin = {"machine": {"cpu": "any", "gpu": None}, "versions": {"torch": "2", "code": "a"}, "key": "k"}
    cell = {"benchmark": "speed", "threads": 1, "reduced": False}
    steps = {"cpu_ms": 8.0, "cpu_ms_amortised": 9.0, "cpu_ms_worst": 16.0}
    found = [
        {**origin, "cell": {**cell, "part": "copy"}, "bytes_per_second": 20e9},
        {**origin, "cell": {**cell, "part": "load"}, "parameters": 4_000_000, "matrices": 2, "shapes": 1,
         "unavailable": {"soap": "absent"}, "figures": {"adamw": {**steps, "cpu_ms_amortised": 4.0}, "scao": steps}},
    ]  # fmt: skip
    made = costs.tables(found)
    assert "| 1 thread | 20.0 | 4.0 | 4.0 (1.0x) | 8.0 (2.0x) | 9.0 (2.2x) |" in made["speed-roofline"]
    assert "| `scao` |  | 9 | 2.25 | 2.00 |" in made["speed-load"] and "Not run: `soap`: absent." in made["speed-load"]


class OnePair:
    """A task in the place of a language model: one LoRA layer."""

    def __init__(self) -> None:
        self.model = loads.lora(4, [(24, 16)], 1)
        self.definition = {"model": "one layer"}

    def reset(self, seed: int) -> None:
        torch.manual_seed(seed)

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        return peers.trainable(self.model)

    def loss(self, step: int) -> Tensor:
        pair = memory.pairs(self.model)[0]
        return (pair.lora_B @ (pair.lora_A @ torch.ones(24, 2))).square().mean()


def test_a_training_step_is_the_rest_and_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks

    monkeypatch.setattr(tasks, "build", lambda *_: OnePair())
    cell = {"part": "training", "rounds": 2, "optimizers": ["adamw", "scao"], "reduced": True, "threads": 1}
    result = speed.measure(cell, lambda _: None)
    period = RULE_DEFAULTS["eigenbasis"]["precond_freq"]
    assert result["figures"]["scao"]["steps"] == period and result["rest"]["wall_ms"] > 0
    record = {**result, "cell": cell, "versions": {"torch": "2", "code": "a"}, "machine": {"cpu": "c", "gpu": None}}
    record["rest"] = {"cpu_ms": 96.0}
    record["figures"] = {"adamw": {"cpu_ms_amortised": 4.0}, "scao": {"cpu_ms_amortised": 5.0}}
    assert "| 1 thread | 96 | 4.0 | 5.0 | 1.0100 |" in costs.training_table({"1 thread": record})


def test_tables_keep_sweeps_and_costs_apart(measured: Path, tmp_path: Path) -> None:
    found, cost = tables.read([measured / "speed.jsonl", BENCHMARKS / "results" / "gpt.jsonl"])
    assert found and not cost  # reduced


# Memory


def test_allocations_are_seen_in_order() -> None:
    def action() -> None:
        kept.append(torch.empty(1000))
        torch.empty(3000)
        torch.empty(500)

    kept: list[Tensor] = []
    assert memory.peak(memory.allocations(action)) == (16_000, 4_000, 12_000)
    assert memory.peak([]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("adamw", lambda r, l: 8 * r * l + 4), ("muon", lambda r, l: 4 * r * l), ("polora", None), ("scao", None)],
)
def test_state_is_counted_per_shape(spec: str, expected: Callable[[int, int], int] | None) -> None:
    cell = {"rank": 16, "reduced": True, "optimizers": [spec]}
    result = memory.state(cell, lambda _: None)
    model = memory.load(cell)
    if spec == "scao":
        matrices = sum(
            1 for _ in model.parameters()
        )  # the watch over gradients holds a counter of each besides the state
        assert result["bytes"] == result["report"]["total"] + 4 * matrices
    elif spec == "polora":
        optimizer = peers.create(spec, model, 1e-3)
        loads.Gradients(model).put(0)
        optimizer.step()
        assert result["bytes"] == peers.state_bytes(optimizer, model)
    else:
        assert expected is not None
        assert result["bytes"] == sum(expected(*param.shape) for param in model.parameters())


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({}, 8.2),
        ({"moment_dtype": "bfloat16", "use_int8_ema": True}, 4.1),
        ({"moment_dtype": "int8", "use_int8_ema": True}, 2.2),
    ],
)
def test_state_of_the_reference_load(options: dict[str, Any], target: float) -> None:
    with torch.device("meta"):
        model = loads.qwen()
    report = SCAO(model.parameters(), **options).memory_report()
    assert report["peak"] <= target * report["parameters"]


class Largest(Exception):
    """An allocation above the limit."""


def steps_within(limit: int, shape: tuple[int, int], spec: str) -> None:
    """Step one LoRA factor through every phase and raise ``Largest`` at an allocation of more than ``limit`` bytes."""
    model = memory.OneMatrix(shape)
    made, gradients = loads.Stepper.of(spec, model), loads.Gradients(model)
    kinds = set()
    for step in range(1, made.settle + made.period + 1):
        kinds.add(memory.kind_of(made, step))
        if memory.kind_of(made, step) is None:
            made.step(gradients)
            continue
        changes = memory.allocations(lambda: made.step(gradients))
        if max(changes, default=0) > limit:
            raise Largest(f"step {step}: {max(changes)} bytes, allowed are {limit}")
    assert len(kinds) == 5  # phase 1, entry, ramp, phase 2 with refreshes; and None


@pytest.mark.parametrize("spec", ["scao", "scao-pytorch", "scao:moment_dtype='int8':use_int8_ema=True"])
@pytest.mark.parametrize("shape", [(16, 700), (700, 16)])
def test_no_matrix_larger_than_the_parameter_is_formed_for_lora(spec: str, shape: tuple[int, int]) -> None:
    """Nothing has more entries than basis, momentum and step side by side, (k + 2r) l; a dense long factor has l^2.

    The noise of stochastic rounding is made in int64, 8 bytes an entry; everything else is float32.
    """
    r, l = sorted(shape)
    wide = 8 if "int8" in spec else 4
    steps_within(wide * (16 + 2 * r) * l, shape, spec)


def test_a_dense_factor_of_the_long_side_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch = eigenbasis.sketch

    def dense(*arguments: Any) -> Any:
        torch.zeros(700, 700)
        return sketch(*arguments)

    monkeypatch.setattr(eigenbasis, "sketch", dense)
    with pytest.raises(Largest, match=f"step 3: {4 * 700**2} bytes"):
        steps_within(4 * 48 * 700, (16, 700), "scao-pytorch")


def test_entering_phase_two_with_encoded_moments_takes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak over the entry, state included, is a small part above what is held: one bucket is decoded at a time."""
    monkeypatch.setattr(stacks, "CPU_ENTRIES", 2**15)
    model = loads.lora(16, [(512, 512)], 16)
    params, gradients = list(model.parameters()), loads.Gradients(model)
    optimizer = SCAO(params, moment_dtype="int8", use_int8_ema=True)
    for turn in range(9):
        gradients.put(turn)
        optimizer.step()
    gradients.put(9)
    before = sum(
        field.nbytes for entry in optimizer.state.values() for field in entry.values() if isinstance(field, Tensor)
    )
    highest, _, _ = memory.peak(memory.allocations(optimizer.step))
    assert optimizer.metrics()["scao/rank"] > 0, "phase 2 was not entered in this step"
    count = loads.size(model)
    whole = optimizer.memory_report()["peak"]
    # One bucket of 32 / 4 takes at most some 100 bytes an entry while it is decoded, rounded and stepped.
    assert before + highest <= whole + 100 * 2**15 + 0.05 * count


def test_scratch_is_measured_for_each_kind_of_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "memory.jsonl"
    monkeypatch.setattr(memory, "SCRATCH", ("scao", "adamw-foreach"))
    monkeypatch.setattr(memory, "STATE", ("scao", "adamw"))
    monkeypatch.setattr(memory, "load", lambda cell: loads.lora(16, [(128, 64)], 2))
    assert memory.main(["--reduced", "--out", str(out)]) == 0
    found = costs.records([out], reduced=True)
    made = costs.tables(found)
    for kind in ("phase 1", "entry into phase 2", "ramp", "phase 2, refresh included"):
        assert f"| `scao` | {kind} |" in made["memory-scratch"]
    assert "| `adamw` | 8.00 |" in made["memory-state"]


# GPU


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: no GPU: torch ") and "NVIDIA GPU of compute capability 7.5 or later" in message
    assert gpu.main(["--check"]) == 1


def test_what_cannot_be_measured_on_a_gpu_is_said_and_the_rest_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No kernels were built, and one measurement fails: the next call tries that one again."""
    failing = True

    def measure(cell: dict[str, Any], _: object) -> dict[str, Any]:
        if cell["part"] == "load" and failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"of": cell["part"]}

    monkeypatch.setattr(gpu, "require_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(ops, "NATIVE", frozenset({"cpu"}))
    monkeypatch.setattr(gpu, "measure", measure)
    out = tmp_path / "gpu.jsonl"

    def measured() -> list[str]:
        return [json.loads(line)["of"] for line in out.read_text().splitlines()]

    assert gpu.main(["--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert measured() == ["copy", "gpt2", "qlora"] and "CUDA out of memory" in said
    assert "kernels: left out" in said and "SCAO_BUILD_EXT=cuda python setup.py" in said
    failing = False
    assert gpu.main(["--out", str(out)]) == 0 and measured()[3:] == ["load"]


def test_a_wrong_kernel_fails_every_call_until_it_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = {"passed": False, "differences": {"int8_ema_": 0.5}, "calls": {"int8_ema_": 3}, "never_called": []}
    monkeypatch.setattr(gpu, "require_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(ops, "NATIVE", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(gpu, "measure", lambda *_: verdict)
    command = ["--parts", "kernels", "--out", str(tmp_path / "gpu.jsonl")]
    for _ in range(2):
        assert gpu.main(command) == 1
        assert "int8_ema_: 3 calls, largest difference 0.5 of the largest entry" in capsys.readouterr().out


def test_the_qlora_run_of_a_gpu_record(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    rows = [{"question": f"What is {at} and {at}?", "answer": f"It is {2 * at}."} for at in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cell = {
        "part": "qlora",
        "benchmark": "gpu",
        "reduced": False,
        "device": "cpu",
        "model": str(tiny_llama),
        "steps": 14,
    }
    cell |= {"lr": 1e-2, "data": str(path), "batch": 2, "max_tokens": 64, "rank": 4, "optimizers": ["adamw", "scao"]}
    from transformers import modeling_utils

    checkpointed, checkpoint = 0, modeling_utils.checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal checkpointed
        checkpointed += 1
        return checkpoint(*arguments, **options)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    result = gpu.qlora(cell, lambda _: None, "cpu")
    runs = result["runs"]
    assert result["replaced"] == "" and len(runs["scao"]["loss"]) == 14
    assert runs["scao"]["loss"][0] == runs["adamw"]["loss"][0], "the runs must start alike"
    assert runs["scao"]["loss"][-1] < runs["scao"]["loss"][0]
    assert checkpointed == 2 * 2 * 14, "two layers, two optimizers: every forward pass of a layer is checkpointed"
    record = {**result, "cell": cell, "versions": {"torch": "2", "code": "a"}, "machine": {"cpu": "c", "gpu": "g"}}
    assert "| cpu | " in costs.tables([record])["gpu-qlora"]


def test_a_model_that_cannot_be_had_is_replaced_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Packaged:
        def to(self, dtype: torch.dtype) -> Packaged:
            return self

        def named_parameters(self) -> list[tuple[str, torch.Tensor]]:
            return []

        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)

    class Demo:
        packaged_gguf = staticmethod(lambda: "model.gguf")
        load_gguf = staticmethod(lambda _: (Packaged(), Packaged()))

    monkeypatch.setattr(gpu.data, "demo_script", lambda _: Demo)
    monkeypatch.setattr(gpu.data, "CACHE", tmp_path)
    name, why = gpu.available(str(tmp_path / "absent"))
    assert name == str(tmp_path / "smollm2-135m") and "could not be loaded" in why
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text('{"model_type": "llama"}')
    assert gpu.available(str(tmp_path / "here")) == (str(tmp_path / "here"), "")


@pytest.mark.parametrize("passed", [True, False])
def test_the_command_fails_where_a_kernel_is_wrong(
    passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(cell: dict[str, Any], _: object) -> dict[str, Any]:
        if cell["part"] == "copy":
            return {"bytes_per_second": 3e12}
        value = 1e-7 if passed else 0.1
        return {
            "calls": {"step_": 9},
            "differences": {"step_": value},
            "tolerance": 2e-5,
            "never_called": [],
            "passed": passed,
        }

    monkeypatch.setattr(gpu, "require_gpu", lambda: None)
    monkeypatch.setattr(ops, "NATIVE", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(gpu, "measure", measure)
    out = tmp_path / "gpu.jsonl"
    assert gpu.main(["--parts", "kernels,copy", "--out", str(out)]) == (0 if passed else 1)
    assert "step_: 9 calls, largest difference" in capsys.readouterr().out
    table = costs.tables(costs.records([out]))["gpu-kernels"]
    assert f"| Tesla T4 | `step_` | 9 | {'1.0e-07 | yes' if passed else '1.0e-01 | NO'} |" in table


@pytest.mark.parametrize("spec", memory.BFLOAT16[:3])
def test_state_of_parameters_in_bfloat16_is_counted_at_its_largest_too(spec: str) -> None:
    found = memory.bfloat16({"rank": 16, "reduced": True, "optimizers": [spec]}, lambda _: None)
    with torch.device("meta"):
        models = {"LoRA": loads.qwen(shrink=16), "full": loads.llama_layer(16)}
    for kind, model in models.items():
        report = SCAO(model.bfloat16().parameters(), **peers.parse(spec)[1]).memory_report()
        for measured, stated in (("bytes", "total"), ("largest", "peak")):
            assert found[kind][measured] == pytest.approx(report[stated], rel=2e-3), (kind, measured)


def test_the_faq_states_the_state_of_weights_in_bfloat16() -> None:
    with torch.device("meta"):
        params = list(loads.llama_layer().bfloat16().parameters())
    report = SCAO(params, moment_dtype="bfloat16").memory_report()
    rest, peak = (report[name] / report["parameters"] for name in ("total", "peak"))
    text = " ".join((ROOT / "docs" / "faq.md").read_text(encoding="utf-8").split())
    assert f"{peak:.2f} bytes per parameter in phase 1 and {rest:.2f} in phase 2, against AdamW's 4.00" in text
    assert SCAO(params, moment_dtype="int8").memory_report()["peak"] < 4 * report["parameters"] < report["peak"]
