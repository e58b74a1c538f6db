"""DeepSpeed's ZeRO-1, 2 and 3: what its configurations may say; runs on gloo processes against one without DeepSpeed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed_model import EXACT, KEPT, OPTIONS, batch, build, groups, loss_of
from torch import Tensor, nn

from scao_hf import SCAO
from scao_hf.rules.eigenbasis import Eigenbasis
from scao_hf.zero import ZeroSCAO, _check_owned, refused

installed = importlib.util.find_spec("deepspeed") is not None
runs_deepspeed = pytest.mark.skipif(not installed, reason="needs deepspeed: make test-deepspeed installs it")
WORKER = Path(__file__).with_name("deepspeed_worker.py")
#: By whether the long basis is kept in float32: in bfloat16, gradients that differ by rounding now and then round an entry
#: of a basis the other way, the more often the larger the matrices. Measured at most 2e-6 and 2.2e-4.
FULL = {True: 5e-6, False: 1e-3}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "stage is 0: set 1, 2 or 3"),
        ({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}, "remove the section optimizer"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "DeepSpeed's Adam"),
        (
            {
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}},
                "zero_force_ds_cpu_optimizer": False,
            },
            "offload_optimizer.device is 'nvme'",
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "zero_optimization.mics_shard_size is 2"),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint is True"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients is True"),
        ({"zero_optimization": {"stage": 1}, "checkpoint": {"load_universal": True}}, "load_universal is True"),
        ({"zero_optimization": {"stage": 1}}, None),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}, "bf16": {"enabled": "auto"}},
            None,
        ),
        (
            {
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
                "zero_force_ds_cpu_optimizer": False,
            },
            None,
        ),
    ],
)
def test_configurations(config: dict[str, Any], words: str | None) -> None:
    reason = refused(config)
    assert reason is None if words is None else words in str(reason)


def test_parameters_of_any_form_become_the_groups_that_scao_makes() -> None:
    model = build(full=True)
    forms: list[Any] = [
        model.parameters(),
        model.named_parameters(),
        [{"params": list(model.parameters()), "lr": 0.5}],
        groups(model),
    ]
    for form in forms:
        form = list(form)
        expected, found = SCAO(form, k_max=3, from_scratch=False), ZeroSCAO(form, k_max=3)
        assert [group["params"] for group in found.param_groups] == [group["params"] for group in expected.param_groups]
        for ours, theirs in zip(found.param_groups, expected.param_groups, strict=True):
            assert {k: v for k, v in ours.items() if k != "params"} == {
                k: v for k, v in theirs.items() if k != "params"
            }
    with pytest.raises(ValueError, match="k_max"):
        ZeroSCAO(model.parameters(), k_max=0)


def test_without_zero_nothing_is_stepped() -> None:
    param = nn.Parameter(torch.ones(3, 4))
    param.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match="hold no flat vector of ZeRO stage 1, 2 or 3"):
        ZeroSCAO([param]).step()
    assert bool((param == 1).all())


def test_groups_are_taken_by_the_constructor_alone() -> None:
    optimizer = ZeroSCAO([nn.Parameter(torch.ones(3, 4))])
    with pytest.raises(ValueError, match="ZeroSCAO takes no groups after it was built: pass all of them"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 4))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("named", [True, False])
def test_a_state_of_what_another_process_owns_is_refused(named: bool) -> None:
    """As it is after a resume with parameters in another order, or with options by which the states have other sizes."""

    def vector(devices: str) -> SCAO:
        params = [nn.Parameter(torch.ones(3, 4, device=device)) for device in devices.split()]
        return SCAO([(f"p{index}", param) for index, param in enumerate(params)] if named else params)

    saving = vector("cpu meta cpu")
    for param in saving.param_groups[0]["params"]:
        param.grad = None if param.is_meta else torch.ones(3, 4)
    saving.step()
    for devices in ("cpu cpu meta", "cpu meta meta", "cpu cpu cpu"):
        with pytest.raises(ValueError, match="resume with the parameters in the order of the run that was saved"):
            _check_owned(vector(devices), saving.state_dict())
    same = vector("cpu meta cpu")
    for state in (saving.state_dict(), vector("cpu cpu meta").state_dict()):
        _check_owned(same, state)
        same.load_state_dict(state)


def test_a_trainer_takes_the_class_that_its_engine_needs() -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    from scao_hf.trainer import optimizer_class, unwrap

    def trainer(config: dict[str, Any]) -> Any:
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
        return SimpleNamespace(accelerator=SimpleNamespace(state=state))

    assert optimizer_class(trainer({"zero_optimization": {"stage": 3}})) is ZeroSCAO
    with pytest.raises(ValueError, match=r"does not run under this DeepSpeed configuration: .*stage is 0"):
        optimizer_class(trainer({}))
    optimizer = ZeroSCAO([nn.Parameter(torch.ones(2, 2))])
    assert unwrap(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))) is optimizer


def one_process(full: bool, frozen: bool = False, steps: int = 30, noise: int | None = None) -> dict[str, Tensor]:
    """What one process without DeepSpeed comes to; ``noise``: the seed of changes to its gradients by 1e-7 of themselves."""
    torch.manual_seed(0)
    model = build(full)
    optimizer = SCAO(groups(model, frozen), **OPTIONS)
    trained = [param for param in model.parameters() if param.requires_grad]
    norms = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = OPTIONS["lr"] * (1 - step / 60)
        optimizer.zero_grad()
        loss_of(model(batch(step, 0, 1)), step, 0, 1).backward()
        if noise is not None:
            draw = torch.Generator().manual_seed(1000 * noise + step)
            for param in trained:
                param.grad *= 1 + 1e-7 * (2 * torch.rand(param.shape, generator=draw) - 1)
        norms.append(float(nn.utils.clip_grad_norm_(trained, 0.5)))
        optimizer.step()
    assert min(norms) < 0.5 < max(norms), "some steps are clipped, some are not"
    return {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}


def zero(folder: Path, world: int, stage: int, fails: str = "", **settings: Any) -> list[dict[str, Any]]:
    """What the processes of a run report.

    Raises:
        AssertionError: it failed, or did not with the words ``fails``.
    """
    from test_distributed_trainer import launched

    folder.mkdir(exist_ok=True)
    section = {"stage": stage, **settings.pop("section", {})}
    settings["config"] = {**settings.get("config", {}), "zero_optimization": section}
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1") if world == 1 else ()
    if fails:
        with pytest.raises(AssertionError, match=fails):
            launched(world, *command, str(WORKER), str(folder), json.dumps(settings), cwd=folder)
        return []
    launched(world, *command, str(WORKER), str(folder), json.dumps(settings), cwd=folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for name in sorted(value, key=str) for part in flat(value[name])]
    return [part for each in value for part in flat(each)] if isinstance(value, (list, tuple)) else [value]


def same(first: Any, second: Any) -> bool:
    pairs = zip(flat(first), flat(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("exact", [True, False])
def test_what_rounding_of_gradients_comes_to(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    """In one process: the bounds to which several are held are those of rounding, and it is the kept bases that amplify it."""
    monkeypatch.setitem(Eigenbasis.fields, "long_vectors", EXACT if exact else KEPT)
    base = one_process(full=True)
    found = [distance(one_process(full=True, noise=seed), base) for seed in range(4)]
    print(
        f"long bases in {'float32' if exact else 'bfloat16'}: {', '.join(f'{far:.1e}' for far in found)} from each other"
    )
    assert max(found) <= FULL[exact]
    assert exact or max(found) > FULL[True]


@pytest.mark.long
@runs_deepspeed
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lora(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: int, world: int) -> None:
    """Equal to one process after 30 steps of both phases, with clipping; what is sent; resumed to the bit."""
    monkeypatch.setitem(Eigenbasis.fields, "long_vectors", EXACT)
    found = zero(tmp_path / "run", world, stage, save=14, exact=True)
    expected = one_process(full=False)
    first = found[0]
    print(f"ZeRO-{stage} on {world} processes, LoRA: {distance(first['weights'], expected):.1e} from one process")
    assert all(distance(first["weights"], other["weights"]) == 0 for other in found)
    assert distance(first["weights"], expected) <= 1e-6
    assert [report["phases"].count(2.0) for report in found if report["rows"]] == [24] * sum(
        bool(r["rows"]) for r in found
    )
    assert sorted(row["name"] for report in found for row in report["rows"]) == sorted(expected), "each has one owner"
    sent = sum(report["exchanged"] for report in found) / 30
    sizes = sorted(4 * weight.numel() for weight in expected.values())
    print(f"sent in a step by all: {sent:.0f} bytes, {sum(sizes)} bytes of parameters")
    assert {report["exchanges"] for report in found} == {60}
    if stage == 3:  # weights and gradients to the owner, weights back; the pieces differ by at most world - 1 entries
        assert abs(sent - 3 * sum(sizes) * (world - 1) / world) <= 12 * world * len(sizes)
    else:  # each of the world - 1 cuts goes through one parameter, of which the owner has at least half as much as any other
        assert sent <= 2 * sum(sizes[1 - world :])
    again = zero(tmp_path / "again", world, stage, resume=str(tmp_path / "run" / "checkpoint"), exact=True)
    for before, after in zip(found, again, strict=True):
        assert after["steps"] == 30 and len(after["norms"]) == 16
        assert same(before["weights"], after["weights"]) and same(before["state"], after["state"])


@pytest.mark.long
@runs_deepspeed
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (1, {"accumulation": 2}),
        (2, {"section": {"offload_optimizer": {"device": "cpu"}}}),
        (3, {"section": {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 200}}),
        (2, {"section": {"overlap_comm": True}, "frozen": True}),
        (3, {"section": {"offload_param": {"device": "cpu"}, "sub_group_size": 0}, "frozen": True}),
        (2, {"frozen": True, "exact": False}),
    ],
)
def test_lora_with_other_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: int, settings: dict[str, Any]
) -> None:
    exact = settings.get("exact", True)
    monkeypatch.setitem(Eigenbasis.fields, "long_vectors", EXACT if exact else KEPT)
    first, second = zero(tmp_path, 2, stage, **{"exact": exact, **settings})
    expected = one_process(full=False, frozen=settings.get("frozen", False))
    print(f"ZeRO-{stage} {settings}: {distance(first['weights'], expected):.1e} from one process")
    assert distance(first["weights"], second["weights"]) == 0
    assert distance(first["weights"], expected) <= (1e-6 if exact else 1e-4)


@pytest.mark.long
@runs_deepspeed
@pytest.mark.parametrize(
    ("stage", "zero_init", "exact"), [(2, False, True), (3, False, True), (3, True, True), (3, False, False)]
)
def test_every_weight(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: int, zero_init: bool, exact: bool
) -> None:
    """Full fine-tuning, with two parameter groups; also of a model that ``zero.Init`` has cut before the optimizer is built."""
    monkeypatch.setitem(Eigenbasis.fields, "long_vectors", EXACT if exact else KEPT)
    first, second = zero(tmp_path, 2, stage, full=True, zero_init=zero_init, exact=exact)
    far = distance(first["weights"], one_process(full=True))
    print(f"ZeRO-{stage}, every weight, long bases in {'float32' if exact else 'bfloat16'}: {far:.1e} from one process")
    assert distance(first["weights"], second["weights"]) == 0
    assert far <= FULL[exact]


@pytest.mark.long
@runs_deepspeed
@pytest.mark.parametrize(
    ("stage", "config", "most"),
    [
        (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, 0.05),
        (2, {"bf16": {"enabled": True}}, 0.05),
        (3, {"bf16": {"enabled": True}}, 0.05),
        (3, {"fp16": {"enabled": True, "initial_scale_power": 8}}, 0.02),
    ],
    ids=["1-bf16-accumulated-in-fp32", "2-bf16", "3-bf16", "3-fp16"],
)
def test_half_precision(tmp_path: Path, stage: int, config: dict[str, Any], most: float) -> None:
    """Float32 masters are stepped: as near to float32 as the rounding of activations and gradients lets it be."""
    first, second = zero(tmp_path, 2, stage, config=config)
    assert distance(first["weights"], second["weights"]) == 0
    expected = one_process(full=False)
    start = {name: param for name, param in build(full=False).named_parameters() if param.requires_grad}
    far, way = distance(first["weights"], expected), distance(start, expected)
    print(f"ZeRO-{stage} {config}: {far:.1e} from one process in float32, whose weights have moved by {way:.1e}")
    assert far <= most < 0.1 < way


@pytest.mark.long
@runs_deepspeed
def test_pieces_that_are_not_where_deepspeed_says_are_an_error(tmp_path: Path) -> None:
    zero(
        tmp_path,
        2,
        2,
        section={"round_robin_gradients": True},
        fails="DeepSpeed names other float32 weights than those",
    )


@pytest.mark.long
@runs_deepspeed
def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    zero(tmp_path / "run", 2, 2, save=8, steps=8)
    resume = str(tmp_path / "run" / "checkpoint")
    zero(tmp_path / "one", 1, 2, resume=resume, fails="DP world size of 2 but the current world size is 1")


#: What transformers fills in by itself.
AUTO = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)


@pytest.mark.long
@runs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainer_and_its_resume(tiny_llama: Path, tmp_path: Path, stage: int) -> None:
    """``TrainingArguments(deepspeed=...)``, with LoRA of PEFT; resumed from the Trainer's own checkpoint."""
    from test_distributed_trainer import CLOSE, run

    (single,) = run(tiny_llama, tmp_path / "one", "one", 1, per_device_train_batch_size=4)
    config = {**AUTO, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": stage}}
    settings = {"per_device_train_batch_size": 2, "deepspeed": config}
    first, second = run(tiny_llama, tmp_path / "zero", "deepspeed", 2, save_strategy="steps", save_steps=4, **settings)
    assert first["optimizer"] == "ZeroSCAO" and first["phases"] == [1.0] * 3 + [2.0] * 5
    assert distance(first["weights"], second["weights"]) == 0
    print(f"ZeRO-{stage} through the Trainer: {distance(first['weights'], single['weights']):.1e} from one process")
    assert distance(first["weights"], single["weights"]) <= CLOSE[2]
    checkpoint = str(tmp_path / "zero" / "out" / "checkpoint-4")
    again, _ = run(tiny_llama, tmp_path / "again", "deepspeed", 2, resume=checkpoint, **settings)
    assert same(again["weights"], first["weights"]) and again["losses"] == first["losses"]


@pytest.mark.long
@runs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_axolotl(tiny_llama: Path, tmp_path: Path, stage: int) -> None:
    """``deepspeed: file.json``, as Axolotl's own files are."""
    pytest.importorskip("axolotl", reason="needs axolotl")
    from test_distributed_trainer import CLOSE, axolotl

    file = tmp_path / f"zero{stage}.json"
    zero_section = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    file.write_text(json.dumps({**AUTO, "bf16": {"enabled": "auto"}, "zero_optimization": zero_section}))
    (single,) = axolotl(tiny_llama, tmp_path / "one", 1)
    first, second = axolotl(tiny_llama, tmp_path / "two", 2, deepspeed=str(file))
    assert first["optimizer"] == "ZeroSCAO" and first["phases"] == [1.0] * 3 + [2.0] * 5
    assert distance(first["weights"], second["weights"]) == 0
    print(f"ZeRO-{stage} through Axolotl: {distance(first['weights'], single['weights']):.1e} from one process")
    assert distance(first["weights"], single["weights"]) <= CLOSE[2]
