"""SCAO in transformers' Trainer and in TRL's: groups, options, logs, resume."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers")

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from scao_hf import SCAO, SCAOCallback, SCAOTrainer, SCAOTrainerMixin
from scao_hf.trainer import _about, check_scao_kwargs, optimizer_class, unwrap
from scao_hf.zero import ZeroSCAO

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


def test_a_run_begins_with_its_groups_told_and_a_rate_for_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = torch.nn.Linear(8, 4)
    optimizer = SCAO([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    schedule.base_lrs = schedule.base_lrs[:1]  # that of a checkpoint with one group, after a partial resume
    state, parts = TrainerState(max_steps=50), {"optimizer": optimizer, "model": model, "lr_scheduler": schedule}
    with caplog.at_level(logging.INFO):
        SCAOCallback().on_train_begin(arguments(tmp_path), state, TrainerControl(), **parts)
    assert "group 0: 1 parameter (32 entries) by eigenbasis, lr 0.01, weight decay 0.01\ngroup 1: 1" in caplog.text
    model.weight.grad = torch.ones(4, 8)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.25]


def test_the_report_counts_parameters_that_deepspeed_has_cut_on_loading(tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 4)
    for param in model.parameters():
        param.ds_shape, param.ds_numel = param.shape, param.numel()  # type: ignore[attr-defined]
        param.data = torch.empty(0)
    optimizer = ZeroSCAO(model.named_parameters())
    assert _about(arguments(tmp_path), model, optimizer)["parameters"] == 36


def test_callback_in_a_plain_trainer(tiny_llama: Path, tmp_path: Path) -> None:
    """With SCAO that the caller built; with AdamW the callback does nothing."""
    for kind in (SCAO, torch.optim.AdamW):
        model = lora_model(tiny_llama)
        optimizer = kind([param for param in model.parameters() if param.requires_grad], lr=1e-3)
        args = arguments(tmp_path, max_steps=2)
        trainer = Trainer(model=model, args=args, train_dataset=token_rows(tiny_llama), optimizers=(optimizer, None))
        SCAOCallback.attach(trainer)
        trainer.train()
        logged = {key for entry in trainer.state.log_history for key in entry}
        assert (logged >= METRICS) == (kind is SCAO)


def test_groups_are_those_of_the_trainer(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    args = arguments(tmp_path, weight_decay=0.1, learning_rate=3e-4, adam_epsilon=1e-6)
    trainer = SCAOTrainer(model=model, args=args, train_dataset=[], scao_kwargs={"k_max": 7})
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is SCAO
    decayed, plain, vocabulary = sorted(optimizer.param_groups, key=lambda group: (*group.keys(),).count("vocabulary"))
    assert [group["weight_decay"] for group in (decayed, plain, vocabulary)] == [0.1, 0.0, 0.1]
    assert {*decayed["param_names"], *vocabulary["param_names"]} == set(trainer.get_decay_parameter_names(model))
    assert set(vocabulary["param_names"]) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert plain["param_names"]
    assert all("norm" in name for name in plain["param_names"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert {(group["lr"], group["eps"], group["k_max"]) for group in optimizer.param_groups} == {(3e-4, 1e-6, 7)}
    assert trainer.create_optimizer(model) is optimizer  # built once


class StaticGroups(Trainer):
    """Takes the class from optim, as Unsloth does for its embedding_learning_rate."""

    def create_optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            cls, options = Trainer.get_optimizer_cls_and_kwargs(self.args)
            named = [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]
            groups = [
                {"params": [p for name, p in named if "lora_B" not in name], "weight_decay": 0.1, "lr": options["lr"]},
                {"params": [p for name, p in named if "lora_B" in name], "weight_decay": 0.0, "lr": 1e-4, "own": "B"},
                {"params": [], "weight_decay": 0.3, "lr": 1.0},
            ]
            self.optimizer = cls(groups, **options)
        return self.optimizer


class LoraPlus(Trainer):
    """Takes the class that it was given, as Axolotl's Trainers do."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        from peft.optimizers import create_loraplus_optimizer

        if self.optimizer is None:
            cls, options = self.optimizer_cls_and_kwargs or (torch.optim.AdamW, {"lr": self.args.learning_rate})
            self.optimizer = create_loraplus_optimizer(
                self.model, cls, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, **options
            )
        return self.optimizer


class OwnOptions(Trainer):
    """Sets no attribute but its own, and options of its groups."""

    def create_optimizer(self, model: Any = None) -> None:
        params = {side: [p for n, p in self.model.named_parameters() if f"lora_{side}" in n] for side in "AB"}
        groups = [{"params": params["A"], "betas": (0.5, 0.6)}, {"params": params["B"], "lr": 3e-3}]
        self.optimizer = torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.2)


@pytest.mark.parametrize(
    ("base", "rates", "decays", "betas"),
    [
        (StaticGroups, (1e-2, 1e-4), (0.1, 0.0), ((0.9, 0.99), (0.9, 0.99))),
        (LoraPlus, (1e-2, 0.16), (0.1, 0.1), ((0.9, 0.99), (0.9, 0.99))),
        (OwnOptions, (2e-3, 3e-3), (0.2, 0.2), ((0.5, 0.6), (0.9, 0.99))),
    ],
    ids=["static", "loraplus", "options"],
)
@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit", "galore_adamw_layerwise"])
def test_the_trainers_own_groups_are_kept(
    tiny_llama: Path,
    tmp_path: Path,
    base: type[Trainer],
    rates: tuple[float, float],
    decays: tuple[float, float],
    betas: tuple[Any, Any],
    optim: str,
) -> None:
    class Own(SCAOTrainerMixin, base):  # type: ignore[misc, valid-type]
        pass

    trainer = scao_trainer(tiny_llama, tmp_path, Own, optim=optim)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is SCAO
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == {name for name, param in trainer.model.named_parameters() if param.requires_grad}
    found = {
        side: {(group["lr"], group["weight_decay"], group["betas"]) for group in groups}
        for side in "AB"
        for groups in [[g for g in optimizer.param_groups if any(f"lora_{side}" in n for n in g["param_names"])]]
    }
    assert found == {side: {value} for side, value in zip("AB", zip(rates, decays, betas, strict=True), strict=True)}
    assert all(group["warmup_steps"] == 2 and group["params"] for group in optimizer.param_groups)
    assert (trainer.optimizer_cls_and_kwargs, trainer.args.optim) == (None, optim)
    if base is StaticGroups:
        assert [group.get("own") for group in optimizer.param_groups] == [None, "B"]


def test_a_class_with_the_mixin_behind_the_trainer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"write class Wrong\(SCAOTrainerMixin, StaticGroups\)"):

        class Wrong(StaticGroups, SCAOTrainerMixin):
            pass

    with pytest.raises(TypeError, match="StaticGroups before SCAOTrainerMixin and would train with its optimizer"):

        class Between(StaticGroups, SCAOTrainer):
            pass

    class Right(SCAOTrainer):
        pass

    class Further(Right):
        pass


@pytest.mark.parametrize(
    ("changes", "own", "words"),
    [
        ({"optim": "adamw_bnb_8bit"}, {}, "optim='adamw_bnb_8bit' is not used: this trainer has SCAO. SCAO's float32"),
        ({"optim": "paged_adamw_8bit"}, {}, "moment_dtype='int8' and use_int8_ema=True in scao_kwargs bring it down"),
        ({"optim": "adamw_torch_8bit"}, {"moment_dtype": "bfloat16"}, "about 4 times as large"),
        ({"optim": "paged_adamw_32bit"}, {}, "stays in GPU memory"),
        ({"optim": "paged_adamw_8bit"}, {"moment_dtype": "int8"}, None),
        ({"optim": "adafactor"}, {}, "optim='adafactor' is not used: this trainer has SCAO"),
        ({"optim": "lion_32bit"}, {}, "optim='lion_32bit' is not used"),
        ({"optim": "sgd"}, {"moment_dtype": "int8"}, "optim='sgd' is not used"),
        ({"optim_target_modules": ["q_proj"]}, {}, r"optim_target_modules=['q_proj'] is not used"),
        ({"optim": "adamw_torch"}, {}, None),
        ({}, {}, None),
    ],
)
def test_training_arguments_for_other_optimizers_are_named(
    tiny_llama: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    own: dict[str, Any],
    words: str | None,
) -> None:
    with caplog.at_level(logging.WARNING, logger="scao_hf"):
        scao_trainer(tiny_llama, tmp_path, scao_kwargs=own, **changes)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("scao_hf")]
    assert len(said) == (words is not None)
    assert words is None or words in said[0]


def test_lomo_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optim='lomo' steps inside the backward pass"):
        scao_trainer(tiny_llama, tmp_path, optim="lomo")


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


def test_the_callers_arguments_hold_and_stay_usable(tiny_llama: Path, tmp_path: Path) -> None:
    """What is changed in them before train() counts, and they can be used again, also out of training_args.bin."""
    args = arguments(tmp_path)
    name = args.optim
    trainer = SCAOTrainer(model=lora_model(tiny_llama), args=args, train_dataset=token_rows(tiny_llama))
    args.max_steps, args.learning_rate = 2, 1e-4
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 1e-4
    trainer.save_model(str(tmp_path))
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    for own in (args, trainer.args, saved):
        assert own.optim == name
        assert dataclasses.replace(own, learning_rate=1e-3).optim == name
        other = Trainer(model=lora_model(tiny_llama), args=own, train_dataset=[])
        assert isinstance(other.create_optimizer(), torch.optim.AdamW)


def test_the_model_card_names_the_optimizer(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = scao_trainer(tiny_llama, tmp_path)
    name = trainer.args.optim
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Use scao and the args are:\nwarmup_steps=2, precond_freq=2, blend_steps=2" in card
    assert (trainer.args.optim, trainer.args.optim_args) == (name, None)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"k_mx": 4}, r"'k_mx' is not an option of SCAO \(did you mean 'k_max'\?\)"),
        ({"rank": 4}, r"'rank' is not an option of SCAO \(did you mean 'k_max'\?\)"),
        ({"zzz": 4}, r"'zzz' is not an option of SCAO; its options are: rule, from_scratch"),
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


def test_fsdp1_is_refused() -> None:
    def trainer(version: int | None) -> SimpleNamespace:
        plugin = None if version is None else SimpleNamespace(fsdp_version=version)
        return SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))

    with pytest.raises(
        ValueError, match=r"SCAO does not run under FSDP1: it flattens .* Train with DDP, or with FSDP2"
    ):
        optimizer_class(trainer(1))
    assert optimizer_class(trainer(2)) is optimizer_class(trainer(None)) is SCAO


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


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (2, "phase 2 begins after step 2 but the run has 2 steps: every step will be a plain AdamW step"),
        (3, "the run's 3 steps end in the ramp of SCAO's phase 2, where the curvature has 33 % of its effect"),
        (4, "67 % of its effect: phase 1 takes 2 steps"),
        (5, None),
    ],
    ids=["not at all", "a third", "two thirds", "long enough"],
)
def test_a_run_that_is_too_short_warns(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, words: str | None
) -> None:
    trainer = scao_trainer(tiny_llama, tmp_path, max_steps=steps)
    with caplog.at_level(logging.WARNING, logger="scao_hf"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if record.name == "scao_hf.checks"]
    assert len(said) == (words is not None)
    assert words is None or words in said[0]
    entry = trainer.state.log_history[-2]
    assert entry["scao/blend"] == pytest.approx({2: 0, 3: 1 / 3, 4: 2 / 3, 5: 1}[steps])
    # A second run resumes from there.
    caplog.clear()
    trainer.train()
    assert not [record for record in caplog.records if record.name == "scao_hf.checks" and 2 * steps >= 5]


def test_a_run_without_matrices_is_told(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from peft import LoraConfig, get_peft_model

    def said(model: PreTrainedModel) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="scao_hf"):
            SCAOTrainer(
                model=model, args=arguments(tmp_path, max_steps=2), train_dataset=token_rows(tiny_llama)
            ).train()
        return [record.getMessage() for record in caplog.records if record.name.startswith("scao_hf")]

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.warns(RuntimeWarning, match="every step will be AdamW's: .* A LoRA needs a rank of at least 2"):
        assert said(get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"]))) == []

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for name, param in model.named_parameters():
        param.requires_grad_("norm" in name)
    assert said(model) == ["none of the 5 parameters is a matrix, so that every step is a plain AdamW step"]


def test_the_orthogonal_rule_has_no_length_to_reach(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args, own = arguments(tmp_path, max_steps=2), {"rule": "orthogonal"}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    trainer = SCAOTrainer(model=model, args=args, train_dataset=token_rows(tiny_llama), scao_kwargs=own)
    with caplog.at_level(logging.WARNING, logger="scao_hf"):
        trainer.train()
    assert not [record for record in caplog.records if record.name.startswith("scao_hf")]
    plain = {
        name
        for name, param in model.named_parameters()
        if param.ndim == 2 and "exp_avg_sq" in trainer.optimizer.state[param]
    }
    assert plain == {"model.embed_tokens.weight", "lm_head.weight"}


def test_another_adapter_between_two_runs(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from peft import LoraConfig

    trainer = scao_trainer(tiny_llama, tmp_path, max_steps=5)
    model = trainer.model
    model.add_adapter("two", LoraConfig(r=4, target_modules=["q_proj"]))
    trainer.train()
    model.set_adapter("two")
    with pytest.raises(RuntimeError, match="all parameters of the optimizer are frozen"):
        trainer.train()

    # Whoever leaves the first one trainable as well.
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    with (
        caplog.at_level(logging.WARNING, logger="scao_hf"),
        pytest.raises(RuntimeError, match="no gradient has reached any parameter of the optimizer"),
    ):
        trainer.train()
    (said,) = [record.getMessage() for record in caplog.records if record.name == "scao_hf.checks"]
    assert "4 trainable parameters are not in the optimizer and do not train: " in said
    assert "lora_A.two.weight" in said

    model.set_adapter("two")
    trainer.optimizer = None  # as the messages say
    before = trained(model)
    trainer.train()
    assert {name.split(".")[-2] for name in before} == {"two"}
    assert all(float((value - before[name]).abs().max()) > 0 for name, value in trained(model).items())


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


def test_trl_reinforcement(tiny_llama: Path, tmp_path: Path) -> None:
    """Trainers that generate their own answers."""
    trl = pytest.importorskip("trl", reason="needs trl")
    for name in ("GRPO", "RLOO"):

        class Own(SCAOTrainerMixin, getattr(trl, f"{name}Trainer")):  # type: ignore[misc]
            pass

        model = lora_model(tiny_llama)
        before = trained(model)
        config = getattr(trl, f"{name}Config")
        trainer = Own(
            model=model,
            reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
            args=arguments(tmp_path, config, max_steps=4, max_completion_length=4, num_generations=2, bf16=False),
            train_dataset=trl_dataset([{"prompt": f"after {n} comes "} for n in range(16)]),
            processing_class=AutoTokenizer.from_pretrained(tiny_llama),
            scao_kwargs=EARLY,
        )
        check_trl_run(trainer, model, before)


def test_trl_kto(tiny_llama: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs trl")

    class Own(SCAOTrainerMixin, trl.KTOTrainer):
        pass

    model = lora_model(tiny_llama)
    before = trained(model)
    rows = [{"prompt": f"after {n} comes ", "completion": f"{n + 1}", "label": n % 2 == 0} for n in range(16)]
    trainer = Own(
        model=model,
        args=arguments(tmp_path, trl.KTOConfig, max_steps=4, max_length=64, bf16=False),
        train_dataset=trl_dataset(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        scao_kwargs=EARLY,
    )
    check_trl_run(trainer, model, before)


def test_trl_ppo_builds_its_optimizer_in_the_constructor(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ppo = pytest.importorskip("trl.experimental.ppo", reason="needs trl with its PPO")
    from transformers import AutoModelForSequenceClassification

    class Own(SCAOTrainerMixin, ppo.PPOTrainer):
        pass

    def scorer() -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = trl_dataset([{"input_ids": [5, 6, 7, 8]}] * 8)
    options = {"total_episodes": 6, "response_length": 4, "num_sample_generations": 0, "max_steps": -1}
    trainer = Own(
        args=arguments(tmp_path, ppo.PPOConfig, learning_rate=1e-3, bf16=False, **options),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(tiny_llama),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_llama),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=data,
        eval_dataset=data,
        scao_kwargs=EARLY,
    )
    with caplog.at_level(logging.WARNING, logger="scao_hf"):
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss/policy_avg" in entry]
    assert len(entries) == 3  # batches of answers, with four steps each
    assert all(entry.keys() >= METRICS for entry in entries)
    assert entries[-1]["scao/blend"] == 1.0
    assert not [record for record in caplog.records if record.name == "scao_hf.checks"]


def test_the_class_of_the_optimizer_and_the_callback_in_any_trainer(tiny_llama: Path, tmp_path: Path) -> None:
    """Without a class of one's own: what docs/getting-started.md shows."""
    trl = pytest.importorskip("trl", reason="needs trl")
    kwargs = {"lr": 1e-2, **EARLY}
    for cls, config, rows in (
        (Trainer, TrainingArguments, token_rows(tiny_llama)),
        (trl.SFTTrainer, trl.SFTConfig, trl_dataset([{"text": f"the number {n}"} for n in range(16)])),
    ):
        own = {} if cls is Trainer else {"processing_class": AutoTokenizer.from_pretrained(tiny_llama)}
        model = lora_model(tiny_llama)
        before = trained(model)
        args = arguments(tmp_path, config, max_steps=4, bf16=False)
        trainer = cls(model=model, args=args, train_dataset=rows, optimizer_cls_and_kwargs=(SCAO, kwargs), **own)
        SCAOCallback.attach(trainer)
        check_trl_run(trainer, model, before)


def test_metrics_behind_accelerates_wrapper() -> None:
    from accelerate import Accelerator

    model = torch.nn.Linear(6, 5)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, SCAO(model.parameters(), **EARLY))
    for _ in range(3):
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    assert optimizer.optimizer.metrics()["scao/phase"] == 2.0
    assert unwrap(optimizer) is optimizer.optimizer
