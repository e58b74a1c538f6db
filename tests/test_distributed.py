"""Several processes against one: DDP and FSDP2 over gloo on the CPU, with tiny models."""

from __future__ import annotations

import re
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import (
    QUICK,
    SCENARIOS,
    STEPS,
    alone,
    build,
    changed,
    counted,
    ended,
    held,
    launch,
    start,
    train_parts,
)
from torch import Tensor

from scao_hf import SCAO, create_scao_optimizer, stacks
from scao_hf.distributed.shards import size_of

sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmarks"))
from scaling import DOCUMENT, fsdp_step_bytes, renewed, shared_step_bytes, state_bytes

WORLDS = (2, 4)
#: Runs by name. The arithmetic is float64 but for those that say otherwise, so that only mistakes make a difference.
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "ddp-fp32": {"kind": "ddp", "dtype": torch.float32},
    "ddp-nan": {"kind": "ddp", "poisoned": 7},
    "ddp-lora-published": {"kind": "ddp", "lora": True, "rule": "published"},
    "ddp-shared": {"kind": "ddp", "share": True},
    "ddp-shared-fp32": {"kind": "ddp", "share": True, "dtype": torch.float32},
    "ddp-shared-nan": {"kind": "ddp", "share": True, "poisoned": 7},
    "ddp-shared-lora": {"kind": "ddp", "share": True, "lora": True, "precond_freq": 3},
    "ddp-shared-int8": {"kind": "ddp", "share": True, "use_int8_ema": True},
    "ddp-shared-deep": {"kind": "ddp", "share": True, "deep": 10},
    "fsdp-deep": {"kind": "fsdp", "deep": 10},
    "fsdp": {"kind": "fsdp"},
    "fsdp-fp32": {"kind": "fsdp", "dtype": torch.float32},
    "fsdp-nan": {"kind": "fsdp", "poisoned": 7},
    "fsdp-late": {"kind": "fsdp", "late": True},
    "fsdp-lora": {"kind": "fsdp", "lora": True},
    "fsdp-lora-fp32": {"kind": "fsdp", "lora": True, "dtype": torch.float32},
    "fsdp-lora-late": {"kind": "fsdp", "lora": True, "late": True},
    "fsdp-blocks": {"kind": "fsdp", "max_precond_dim": 5},
    "ddp-shared-experts": {"kind": "ddp", "share": True, "experts": 3},
    "fsdp-experts": {"kind": "fsdp", "experts": 3},
    "fsdp-experts-late": {"kind": "fsdp", "experts": 3, "late": True},
    "fsdp-published": {"kind": "fsdp", "rule": "published", "max_precond_dim": 5},
}
DDP: dict[str, Any] = {"kind": "ddp", "share": True, "lora": True, "dtype": torch.float32}
#: What two processes show is not shown again with four.
ON_FOUR = (
    "ddp",
    "ddp-shared-fp32",
    "ddp-shared-lora",
    "ddp-shared-deep",
    "fsdp",
    "fsdp-fp32",
    "fsdp-nan",
    "fsdp-lora",
    "fsdp-experts",
    "fsdp-deep",
)
HYBRID = {"fsdp-hybrid": {"kind": "fsdp", "lora": True, "mesh": (2, 2)}}
RUNS_ON = {2: RUNS, 4: {name: RUNS[name] for name in ON_FOUR} | HYBRID}
#: In float32 sums of other parts round otherwise, and directions of nearly equal curvature pass that on.
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Every run's end in every process, by the number of processes."""
    folder = tmp_path_factory.mktemp("distributed")
    return {world: launch("trajectories", world, folder, runs=runs) for world, runs in RUNS_ON.items()}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((value.double() - second[name].double()).abs().max()) for name, value in first.items())


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, runs in RUNS_ON.items() for name in runs])
def test_the_run_is_one_process(ends: dict[int, list[dict[str, Any]]], name: str, world: int) -> None:
    settings = {
        key: value for key, value in RUNS_ON[world][name].items() if key not in ("kind", "late", "share", "mesh")
    }
    single, _ = alone(world, **settings)
    (weights, _), *others = [results[name] for results in ends[world]]
    for other, _ in others:
        assert all(torch.equal(other[key], value) for key, value in weights.items())
    found = distance(weights, single)
    print(f"{name} on {world} processes: {found:.1e} from one process")
    assert found <= CLOSE[settings.get("dtype", torch.float64)]


@pytest.mark.long
@pytest.mark.parametrize("world", WORLDS)
def test_over_a_4_bit_base_the_run_is_one_process(tmp_path: Path, world: int) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    pytest.importorskip("axolotl", reason="needs axolotl, whose patch shards bitsandbytes' weights")
    settings = {"lora": True, "four_bit": True, "dtype": torch.float32}
    results = launch("trajectories", world, tmp_path, runs={"fsdp": {"kind": "fsdp", **settings}})
    single, _ = alone(world, **settings)
    (weights, _), *others = [each["fsdp"] for each in results]
    assert all(distance(weights, other) == 0 for other, _ in others)
    print(f"FSDP2 over a 4-bit base on {world} processes: {distance(weights, single):.1e} from one process")
    assert distance(weights, single) <= CLOSE[torch.float32]


@pytest.mark.parametrize("world", WORLDS)
def test_refreshes_and_state_are_shared_out(ends: dict[int, list[dict[str, Any]]], world: int) -> None:
    """Each process does at most its part of the refreshes, and 15 % of the whole; under FSDP2 so it is with the state."""
    with counted() as counts:
        _, optimizer = alone(world, deep=10)
    share, matrices = 1 / world + 0.15, 24
    entering = 2 * matrices  # the first bases, which DDP's processes all work out
    shared = [results["ddp-shared-deep"][1]["decomposed"] - entering for results in ends[world]]
    assert sum(shared) == counts["decomposed"] - entering
    assert max(shared) <= share * sum(shared)
    owned = [results["fsdp-deep"][1] for results in ends[world]]
    assert sum(report["decomposed"] for report in owned) == counts["decomposed"]
    assert max(report["decomposed"] for report in owned) <= share * counts["decomposed"]
    assert sum(report["held"] for report in owned) == held(optimizer) == optimizer.memory_report()["total"]
    assert all(report["held"] == report["memory"]["total"] for report in owned)
    assert max(report["held"] for report in owned) <= share * held(optimizer)
    print(f"{world} processes: {shared} of {sum(shared)} refreshes, {[each['held'] for each in owned]} bytes of state")


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_on_the_wire_are_those_of_the_plan(ends: dict[int, list[dict[str, Any]]], world: int) -> None:
    params = [param for param in build(lora=True).parameters() if param.requires_grad]
    group = SCAO(params, **{**QUICK, "precond_freq": 3}).param_groups[0]
    costs = [size_of(param, group) for param in params]
    sent = [results["fsdp-lora"][1]["sent"] for results in ends[world]]
    assert sent == [STEPS * each for each in fsdp_step_bytes(params, costs, world)]
    states = sum(state_bytes(param, group) for param in params)
    received = [results["ddp-shared-lora"][1]["received"] for results in ends[world]]
    # Nine steps of phase 2, in which every matrix has three turns.
    assert sum(received) == pytest.approx(world * 9 * shared_step_bytes(states, world, 3))


def test_the_plan_is_the_documents() -> None:
    assert renewed(DOCUMENT.read_text()) == DOCUMENT.read_text(), "run examples/benchmarks/scaling.py --write"


def test_what_cannot_be_stepped_is_refused(tmp_path: Path) -> None:
    first, second = launch("refusals", 2, tmp_path)
    words = {
        "columns": "ValueError: a parameter of shape (4, 6) has the placements (Shard(dim=1),)",
        "fsdp1": "ValueError: FSDP1 flattens",
        "fsdp1 flat": "ValueError: FSDP1 flattens",
        "zero-3": "ValueError: DeepSpeed ZeRO-3 cuts",
        "zero-1": "ValueError: the matrices of a parameter group were replaced by flat vectors, as DeepSpeed ZeRO does",
        "share sharded": "ValueError: with sharded parameters every matrix is refreshed by its owner already",
        "share different": "ValueError: the processes hold parameters of different shapes",
    }
    for results in (first, second):
        assert {name: text[: len(words[name])] for name, text in results.items() if name in words} == words
        assert "Train with DDP, or with FSDP2" in results["fsdp1"]
        assert all("scao_hf.zero.ZeroSCAO" in results[name] for name in ("zero-3", "zero-1"))
    assert all("the gradient of the parameter" in results["nan"] for results in (first, second))


@pytest.mark.parametrize(("world", "mesh"), [(2, ()), (4, (2, 2))], ids=["fsdp", "hybrid"])
def test_what_one_process_cannot_do_is_the_same_error_in_all(tmp_path: Path, world: int, mesh: tuple[int, ...]) -> None:
    """And none waits for another."""
    results = launch("alone_with_it", world, tmp_path, seconds=100, mesh=mesh)
    words = {
        "nan in a whole gradient": "RuntimeError: the gradient of the parameter 'whole' of shape (8, 6) holds NaN or Inf",
        "nan in a shard": "RuntimeError: the gradient of the parameter 'cut' of shape (8, 6) holds NaN or Inf",
        "sparse": "RuntimeError: SCAO does not support sparse gradients",
        "stuck": "RuntimeError: the parameter 'whole' of shape (8, 6) has had a gradient with NaN or Inf",
        "flattened": "ValueError: the matrices of a parameter group were replaced by flat vectors",
        "no state": "ValueError: not an optimizer state: its keys are ['weights']",
        "no step": "ValueError: parameter 'cut' of shape (8, 6): the saved step is None",
        "negative": "ValueError: parameter 'whole' of shape (8, 6): saved exp_avg_sq holds -1",
    }
    last = world - 1
    for name, text in words.items():
        kind, _, message = text.partition(": ")
        assert results[last][name].startswith(text), name
        for rank in range(last):
            assert results[rank][name].startswith(f"{kind}: process {last}: {message}"), (name, rank)


@pytest.mark.long
def test_shared_refreshes_save_processor_time(tmp_path: Path) -> None:
    results = launch("seconds", 2, tmp_path, seconds=300)
    for rank, each in enumerate(results):
        print(f"process {rank}: {each['replicated']:.2f} s of processor time replicated, {each['shared']:.2f} s shared")
    assert sum(each["shared"] for each in results) < 0.9 * sum(each["replicated"] for each in results)


def test_checkpoints_are_cut_anew(tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 1 processes, nested and flattened: the state stays the same to the bit, and so does what follows."""
    folders = [tmp_path / name for name in "abc"]
    (((weights, state), whole),) = launch("checkpoint", 1, tmp_path, steps=range(7), target=folders[0], after=5)
    moves = [
        launch("checkpoint", 2, tmp_path, steps=range(0), source=folders[0], target=folders[1], flat=(False, True)),
        launch("checkpoint", 4, tmp_path, steps=range(0), source=folders[1], target=folders[2], flat=(True, False)),
        launch("checkpoint", 1, tmp_path, steps=range(7, 7), source=folders[2], after=5),
    ]
    for results in moves:
        for (moved_weights, moved_state), _ in results:
            assert distance(moved_weights, weights) == 0
            assert distance(moved_state, state) == 0
    end = moves[-1][0][1]
    assert distance(end[0], whole[0]) == 0 < distance(end[0], weights)
    assert distance(end[1], whole[1]) == 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_go_from_any_kind_of_run_to_any_other(tmp_path: Path) -> None:
    """One process, DDP, and FSDP2 of one layer or of all, in phase 2 and each into new optimizers: the same to the bit."""
    here = partial(SCENARIOS["replicated"], 0, 1)
    folders = [tmp_path / name for name in "abcd"]
    expected = here(steps=range(7), target=folders[0])
    both = launch("replicated", 2, tmp_path, steps=range(0), source=folders[0], target=folders[1])
    both += launch("replicated", 2, tmp_path, steps=range(0), source=folders[1], target=folders[2], mixed=True)
    moved = launch("checkpoint", 2, tmp_path, steps=range(0), source=folders[2], target=folders[3])
    for weights, state in [*both, *(results[0] for results in moved), here(steps=range(0), source=folders[3])]:
        assert distance(weights, expected[0]) == 0 and distance(state, expected[1]) == 0
    end, whole = here(steps=range(7, STEPS), source=folders[3]), here(steps=range(STEPS))
    assert distance(end[0], whole[0]) == 0 < distance(end[0], expected[0])


@pytest.mark.parametrize("share", [False, True], ids=["fsdp", "ddp-shared"])
def test_a_killed_process_ends_the_others_and_the_run_goes_on_to_the_same_end(tmp_path: Path, share: bool) -> None:
    """Nobody waits for a dead process, and what was saved before is enough: not a bit is lost."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    where, processes = start("killed", 2, tmp_path, {"folder": folder, "every": 3, "at": 7, "share": share})
    assert not ended(processes, seconds=60)
    assert processes[1].exitcode == -signal.SIGKILL and processes[0].exitcode == 1
    assert (where / "0.error").exists() and not (where / "0.pt").exists()
    if share:
        ends = launch("gone_on", 2, tmp_path, source=folder / "6.pt", first=6)
        whole = [each["run"][0] for each in launch("trajectories", 2, tmp_path, runs={"run": DDP})]
    else:
        runs = [
            launch("checkpoint", 2, tmp_path, steps=range(first, STEPS), source=source)
            for first, source in ((0, None), (6, folder / "6"))
        ]
        whole, ends = ([each[0][0] for each in run] for run in runs)
    assert all(distance(end, other) == 0 for end, other in zip(ends, whole, strict=True))


def test_state_dicts_of_one_process_and_of_several(tmp_path: Path) -> None:
    weights, optimizer = alone(2, steps=7)
    expected, _ = alone(2)
    first, second = launch("forms", 2, tmp_path, single={"weights": weights, "state": optimizer.state_dict()})
    for results in (first, second):
        assert distance(results["from one"], expected) <= 1e-10
        assert distance(results["from full"], expected) <= 1e-10
        assert results["unchanged"] and len(results["refused"]) == 4
        assert all(results["foreign"]) and set(results["kept"]) == {STEPS + 2}
    damaged, number, mixed, rule = second["refused"]
    assert "the saved bytes do not fit their checksum" in damaged
    assert "torch.uint8 (3,), expected" in number
    assert "besides its bytes there must be a step" in mixed
    assert "belongs to rule='published'" in rule
    told = [[re.sub(r"^process \d: ", "", text) for text in results["refused"]] for results in (first, second)]
    assert told[0] == told[1]
    # What get_optimizer_state_dict has gathered loads into one process.
    model = build()
    model.load_state_dict(weights)
    merged = create_scao_optimizer(model, lr=0.02, **QUICK)
    merged.load_state_dict(first["full"])
    train_parts(model, merged, range(7, STEPS), 2)
    assert distance(dict(model.named_parameters()), expected) == 0


def test_a_state_keeps_its_owner_when_options_and_groups_change(tmp_path: Path) -> None:
    """Who owns what is balanced by the sizes of the states, which options and the parameters of a group decide."""
    found = launch("moved", 2, tmp_path)
    for how, most in (("edited", 1e-2), ("removed", 1e-10), ("loaded", 1e-10)):
        expected, steps = changed(how, 0, 2, several=False)
        print(f"{how}: {distance(found[0][how][0], expected):.1e} from one process")
        assert all(distance(each[how][0], found[0][how][0]) == 0 for each in found)
        assert all(each[how][1] == steps for each in found)
        assert distance(found[0][how][0], expected) <= most


def test_a_partial_resume_of_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is common is loaded from every form of state dict; what one process cannot load is refused in all."""
    monkeypatch.setattr(stacks, "CPU_ENTRIES", 1)  # as in the processes
    _, optimizer = alone(2, lora=True, dtype=torch.float32, steps=7)
    first, second = launch("partial", 2, tmp_path, saved_to=tmp_path / "saved", single=optimizer.state_dict())
    common = {"0.lora_B.weight", "2.lora_A.weight", "2.lora_B.weight"}
    expected = {name: state for name, state in first["before"].items() if name in common}
    for results in (first, second):
        for form in ("several", "full", "converted", "one"):
            loaded, steps = results[form]
            assert distance(loaded, expected) == 0, form
            assert steps == [9, 2, 9, 9, 2, 2]
        assert distance(results["read"], {k: v for k, v in first["before"].items() if k != "0.lora_A.weight"}) == 0
        assert len(results["warnings"]) == 4 and set(results["warnings"]) == {
            "partial_resume: the state of 3 parameters is loaded; new or never stepped, and without state: "
            "['2.base.weight']; of another shape or other options, and without state: ['4.lora_A.weight', "
            "'4.lora_B.weight']; only in the saved state, frozen or removed since: ['0.lora_A.weight']"
        }
    assert "no parameter of the saved state has the name and shape of one here" in second["refused"][0]
    assert first["refused"][0] == f"process 1: {second['refused'][0]}"
    for results in (first, second):
        assert "different states of [\"parameter '0.lora_B.weight' of shape (13, 3)\"]: give" in results["refused"][1]
