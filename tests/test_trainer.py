"""SCAO in transformers' Trainer and in TRL's: groups, options, logs, resume."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from scao_hf import SCAO, SCAOCallback, SCAOTrainer, SCAOTrainerMixin
from scao_hf.trainer import check_scao_kwargs, refuse_parallelism, unwrap

METRICS = {"scao/rank", "scao/phase", "scao/blend", "scao/curvature_norm", "scao/captured_mass", "scao/damped"}
#: Curvature early enough for runs of a few steps.
EARLY = {"warmup_steps": 2, "precond_freq": 2, "blend_steps": 2}


def token_rows(folder: Path, size: int = 32) -> list[dict[str, list[int]]]:
    """Sentences of one length, so that the default collator needs no padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(f"the number {n:02d} is followed by {n + 1:02d}")["input_ids"] for n in range(size)]
    return [{"input_ids": row, "labels": row} for row in rows]


def lora_model(folder: Path, seed: int = 0) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))


def arguments(folder: Path, cls: type[TrainingArguments] = TrainingArguments, **changes: Any) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return cls(**{**options, **changes})


def scao_trainer(model_dir: Path, folder: Path, cls: type[Trainer] = SCAOTrainer, **changes: Any) -> Trainer:
    own = {} if cls is Trainer else {"scao_kwargs": changes.pop("scao_kwargs", EARLY)}
    args = arguments(folder, **changes)
    return cls(model=lora_model(model_dir), args=args, train_dataset=token_rows(model_dir), **own)


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def distance(first: PreTrainedModel, second: PreTrainedModel) -> float:
    other = trained(second)
    return max(float((value - other[name]).abs().max()) for name, value in trained(first).items())


def tensorboard_tags(folder: Path) -> dict[str, list[float]]:
    """Every scalar of the event files below ``folder``, by tag."""
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[str, list[float]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        scalars.update({tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    return scalars


def test_metrics_reach_console_history_and_tensorboard(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    calls = []
    metrics = SCAO.metrics
    monkeypatch.setattr(SCAO, "metrics", lambda self: calls.append(1) or metrics(self))
    trainer = scao_trainer(tiny_llama, tmp_path, logging_steps=3, report_to=["tensorboard"])
    before = trained(trainer.model)
    trainer.train()

    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [3, 6, 9, 12]
    assert all(entry.keys() >= METRICS for entry in steps)
    assert all(type(entry[name]) is float for entry in steps for name in METRICS)
    assert len(calls) == len(steps)  # computed once for each log, whoever reads it
    assert [entry["scao/phase"] for entry in steps] == [2.0] * 4
    assert steps[-1]["scao/blend"] == 1.0
    assert not METRICS & trainer.state.log_history[-1].keys()  # the summary of the run is no training log

    console = capsys.readouterr().out
    assert all(console.count(f"'{name}'") == len(steps) for name in METRICS)
    tags = tensorboard_tags(tmp_path / "events")
    for name in METRICS:
        assert tags[f"train/{name}"] == pytest.approx([entry[name] for entry in steps], rel=1e-6)
    assert all(float((value - before[name]).abs().max()) > 0 for name, value in trained(trainer.model).items())


def test_a_log_override_sees_no_double_entry(tiny_llama: Path, tmp_path: Path) -> None:
    class Chatty(SCAOTrainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, "own": 1.0}, *args, **kwargs)

    trainer = scao_trainer(tiny_llama, tmp_path, cls=Chatty, max_steps=3)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3
    assert all(entry.keys() >= METRICS | {"own"} for entry in steps)


def test_callback_goes_first_and_only_once(tiny_llama: Path, tmp_path: Path) -> None:
    callback = SCAOCallback()
    args = arguments(tmp_path)
    trainer = SCAOTrainer(model=lora_model(tiny_llama), args=args, callbacks=[callback], train_dataset=[])
    assert trainer.callback_handler.callbacks[0] is callback
    assert SCAOCallback.attach(trainer) is callback
    assert [type(known) for known in trainer.callback_handler.callbacks].count(SCAOCallback) == 1


def test_callback_in_a_plain_trainer(tiny_llama: Path, tmp_path: Path) -> None:
    """With SCAO that the caller built; with AdamW the callback does nothing."""
    for optimizer_class in (SCAO, torch.optim.AdamW):
        model = lora_model(tiny_llama)
        optimizer = optimizer_class([param for param in model.parameters() if param.requires_grad], lr=1e-3)
        args = arguments(tmp_path, max_steps=2)
        trainer = Trainer(model=model, args=args, train_dataset=token_rows(tiny_llama), optimizers=(optimizer, None))
        SCAOCallback.attach(trainer)
        trainer.train()
        logged = {key for entry in trainer.state.log_history for key in entry}
        assert (logged >= METRICS) == (optimizer_class is SCAO)


def test_groups_are_those_of_the_trainer(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    args = arguments(tmp_path, weight_decay=0.1, learning_rate=3e-4, adam_epsilon=1e-6)
    trainer = SCAOTrainer(model=model, args=args, train_dataset=[], scao_kwargs={"k_max": 7})
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is SCAO
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert set(decayed["param_names"]) == set(trainer.get_decay_parameter_names(model))
    assert plain["param_names"]
    assert all("norm" in name for name in plain["param_names"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert {(group["lr"], group["eps"], group["k_max"]) for group in optimizer.param_groups} == {(3e-4, 1e-6, 7)}
    assert trainer.create_optimizer(model) is optimizer  # built once


@pytest.mark.parametrize("style", ["positional", "keyword"])
def test_newer_trainers_pass_the_model(tiny_llama: Path, tmp_path: Path, style: str) -> None:
    trainer = scao_trainer(tiny_llama, tmp_path)
    other = lora_model(tiny_llama, seed=1)
    optimizer = trainer.create_optimizer(other) if style == "positional" else trainer.create_optimizer(model=other)
    # LoRA has nothing that is not decayed: the empty group is left out.
    (group,) = optimizer.param_groups
    assert {id(param) for param in group["params"]} == {id(p) for p in other.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("training", "own", "expected"),
    [
        ({}, {}, (0.9, 0.99)),
        ({}, {"rule": "published"}, (0.9, 0.999)),
        ({"adam_beta1": 0.8}, {}, (0.8, 0.99)),
        ({"adam_beta2": 0.95}, {"rule": "published"}, (0.9, 0.95)),
        ({"adam_beta1": 0.8, "adam_beta2": 0.95}, {}, (0.8, 0.95)),
        ({"adam_beta1": 0.8}, {"betas": (0.9, 0.999)}, (0.9, 0.999)),
    ],
)
def test_betas(
    tiny_llama: Path, tmp_path: Path, training: dict[str, Any], own: dict[str, Any], expected: tuple[float, float]
) -> None:
    """The training arguments count where they differ from their defaults, the rule's betas hold otherwise."""
    trainer = scao_trainer(tiny_llama, tmp_path, scao_kwargs=own, **training)
    assert trainer.create_optimizer().param_groups[0]["betas"] == expected


def test_the_callers_arguments_stay_usable_for_adamw(tiny_llama: Path, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    name = args.optim
    trainer = SCAOTrainer(model=lora_model(tiny_llama), args=args, train_dataset=[])
    assert (trainer.args.optim, args.optim) == ("scao", name)
    other = Trainer(model=lora_model(tiny_llama), args=args, train_dataset=[])
    assert isinstance(other.create_optimizer(), torch.optim.AdamW)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"k_mx": 4}, r"'k_mx' is not an option of SCAO \(did you mean 'k_max'\?\)"),
        ({"zzz": 4}, r"'zzz' is not an option of SCAO; they are: rule, warmup_steps"),
        (
            {"sparsity": 0.3},
            r"not an option of SCAO \(it belongs to the PyPI package scao, another project's: remove it",
        ),
        ({"lr": 1e-3}, r"'lr' belongs to the training arguments: set learning_rate"),
        ({"eps": 1e-3}, r"set adam_epsilon"),
        ({"rho": 2.0}, r"rho=2.0 is not valid: it must be a number in \[0, 1\)"),
        ({"rule": "best"}, r"rule='best' is not valid"),
    ],
)
def test_bad_options_are_refused_before_the_trainer_is_built(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_scao_kwargs(own)
    with pytest.raises(ValueError, match=message):
        SCAOTrainer(model=None, scao_kwargs=own)


@pytest.mark.parametrize("own", ["k_max=7", ["k_max"], 7])
def test_options_that_are_no_dict_are_refused(own: Any) -> None:
    with pytest.raises(ValueError, match=r"scao_kwargs=.* it must be a dict"):
        SCAOTrainer(model=None, scao_kwargs=own)


def test_optim_args_would_have_no_effect_and_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optim_args='k_max=7' is not read here"):
        scao_trainer(tiny_llama, tmp_path, optim_args="k_max=7")


def test_a_model_without_an_adapter_and_all_frozen_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = scao_trainer(tiny_llama, tmp_path)
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter: add an adapter"):
        trainer.create_optimizer()


def test_a_second_optimizer_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model, args = lora_model(tiny_llama), arguments(tmp_path)
    with pytest.raises(ValueError, match="pass neither optimizers nor optimizer_cls_and_kwargs"):
        SCAOTrainer(model=model, args=args, optimizer_cls_and_kwargs=(torch.optim.SGD, {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="pass neither optimizers nor optimizer_cls_and_kwargs"):
        SCAOTrainer(model=model, args=args, optimizers=(optimizer, None))


@pytest.mark.parametrize(("deepspeed", "version", "kind"), [(True, None, "DeepSpeed: ZeRO"), (False, 1, "FSDP1: it")])
def test_parallelism_that_flattens_matrices_is_refused(deepspeed: bool, version: int | None, kind: str) -> None:
    def trainer(deepspeed: bool, version: int | None) -> SimpleNamespace:
        plugin = None if version is None else SimpleNamespace(fsdp_version=version)
        accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
        return SimpleNamespace(
            is_deepspeed_enabled=deepspeed, is_fsdp_enabled=version is not None, accelerator=accelerator
        )

    with pytest.raises(ValueError, match=f"SCAO does not run under {kind} flattens .* Train with DDP, or with FSDP2"):
        refuse_parallelism(trainer(deepspeed, version))
    refuse_parallelism(trainer(False, 2))
    refuse_parallelism(trainer(False, None))


def test_unwrap() -> None:
    optimizer = SCAO([torch.nn.Parameter(torch.ones(2, 2))])
    assert unwrap(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))) is optimizer
    assert unwrap(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)) is None
    assert unwrap(None) is None


@pytest.fixture(scope="module")
def full_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """12 uninterrupted steps with a checkpoint after the 5th, between two refreshes of the basis."""
    folder = tmp_path_factory.mktemp("full")
    trainer = scao_trainer(tiny_llama, folder, save_strategy="steps", save_steps=5)
    trainer.train()
    return trainer.model, folder / "checkpoint-5"


def test_resume_gives_the_same_weights(
    tiny_llama: Path, tmp_path: Path, full_run: tuple[PreTrainedModel, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, checkpoint = full_run
    torch.load(checkpoint / "optimizer.pt", weights_only=True)
    trainer = scao_trainer(tiny_llama, tmp_path)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 12
    assert distance(trainer.model, model) == 0.0
    assert "without SCAO's state" not in caplog.text


def test_resume_without_optimizer_state_warns(
    tiny_llama: Path, tmp_path: Path, full_run: tuple[PreTrainedModel, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, checkpoint = full_run
    bare = tmp_path / "checkpoint-5"
    bare.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "optimizer.pt":
            (bare / file.name).write_bytes(file.read_bytes())
    trainer = scao_trainer(tiny_llama, tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(bare))
    assert "resuming at step 5 without SCAO's state" in caplog.text
    assert distance(trainer.model, model) > 0.0  # so the exactness above is the state's doing


def test_resume_from_adamw_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    scao_trainer(tiny_llama, tmp_path, cls=Trainer, max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="written by another optimizer"):
        scao_trainer(tiny_llama, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_run_that_ends_before_phase_2_warns(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        scao_trainer(tiny_llama, tmp_path, max_steps=2, scao_kwargs={"precond_freq": 2, "warmup_steps": 1}).train()
    assert "phase 2 begins after step 2 but the run has 2 steps" in caplog.text


def trl_dataset(rows: list[dict[str, str]]) -> Any:
    return pytest.importorskip("datasets", reason="needs datasets").Dataset.from_list(rows)


def check_trl_run(trainer: Trainer, model: PreTrainedModel, before: dict[str, Tensor]) -> None:
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 4
    assert all(entry.keys() >= METRICS for entry in steps)
    assert steps[-1]["scao/phase"] == 2.0
    assert unwrap(trainer.optimizer) is not None
    assert all(float((value - before[name]).abs().max()) > 0 for name, value in trained(model).items())


def test_trl_sft(tiny_llama: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs trl")

    class MySFT(SCAOTrainerMixin, trl.SFTTrainer):
        pass

    model = lora_model(tiny_llama)
    before = trained(model)
    trainer = MySFT(
        model=model,
        args=arguments(tmp_path, trl.SFTConfig, max_steps=4, max_length=64, bf16=False),
        train_dataset=trl_dataset([{"text": f"the number {n} is followed by {n + 1}"} for n in range(16)]),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        scao_kwargs=EARLY,
    )
    check_trl_run(trainer, model, before)


def test_trl_dpo(tiny_llama: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs trl")

    class MyDPO(SCAOTrainerMixin, trl.DPOTrainer):
        pass

    model = lora_model(tiny_llama)
    before = trained(model)
    rows = [{"prompt": f"after {n} comes ", "chosen": f"{n + 1}", "rejected": "no"} for n in range(16)]
    trainer = MyDPO(
        model=model,
        args=arguments(tmp_path, trl.DPOConfig, max_steps=4, max_length=64, bf16=False),
        train_dataset=trl_dataset(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        scao_kwargs=EARLY,
    )
    check_trl_run(trainer, model, before)
