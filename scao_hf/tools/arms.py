"""The runs of ``scao-hf compare``: what each is configured to do, how it is started, and what it has written down."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from axolotl_plugin.values import Findings
from scao_hf.options import did_you_mean, resolve_arguments
from scao_hf.rules import rule_of
from scao_hf.tools import ToolError, axolotl_yaml, json_rows, logged, writing
from scao_hf.tools.axolotl_keys import unknown
from scao_hf.tools.axolotl_yaml import PLUGIN, collection

#: Records a run that Axolotl makes.
ARM_PLUGIN = "scao_hf.tools.axolotl_arm.MeasurePlugin"
#: Environment variables of a run: where its measurements go, and for a script what is to be run (JSON).
FILE_VARIABLE, ARM_VARIABLE = "SCAO_COMPARE_FILE", "SCAO_COMPARE_ARM"
#: Keys of a YAML that a short run must not keep: schedules of saving and evaluating, early ends, other services.
DROPPED = (
    *("evals_per_epoch", "saves_per_epoch", "eval_strategy", "save_strategy", "save_first_step", "save_only_model"),
    *("early_stopping_patience", "load_best_model_at_end", "resume_from_checkpoint", "use_tensorboard"),
    *("hub_model_id", "hub_strategy"),
)
SERVICES = ("wandb_", "mlflow_", "comet_", "trackio_", "swanlab_", "use_wandb", "use_mlflow", "use_comet")
#: Optimizers that SCAO is compared with at most: each takes as long as SCAO.
MOST_RIVALS = 4


@dataclass(frozen=True)
class Rate:
    """A learning rate: a number, or a multiple of the configuration's own."""

    value: float
    relative: bool = False


@dataclass(frozen=True)
class Job:
    """What is compared.

    Attributes:
        source: an Axolotl YAML, or a Python script that trains with a transformers Trainer.
        steps: length of each run.
        out: folder of the comparison.
        arguments: the script's own.
        changes: keys of the YAML that are set otherwise.
    """

    source: Path
    steps: int
    out: Path
    arguments: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def script(self) -> bool:
        return self.source.suffix == ".py"

    @cached_property
    def raw(self) -> dict[str, Any]:
        """The YAML with its changes, as it was when it was first read."""
        return {**axolotl_yaml.read_yaml(self.source), **self.changes}

    @property
    def note(self) -> str | None:
        """What the reader should know about the YAML as it stands."""
        return None if self.script else axolotl_yaml.plugin_note(self.raw)

    def __post_init__(self) -> None:
        if not self.source.is_file():
            raise ToolError(f"there is no file {self.source}: pass an Axolotl YAML or a training script (.py)")
        if self.source.suffix not in (".py", ".yml", ".yaml"):
            raise ToolError(f"{self.source} is neither a YAML (.yml, .yaml) nor a Python script (.py)")
        if self.steps < 2:
            raise ToolError(
                f"--steps is {self.steps}: it must be at least 2, and above SCAO's phase 1 to show anything"
            )
        if self.script and self.changes:
            raise ToolError(
                "--set changes keys of a YAML: pass a script's arguments after --, and --seeds for more seeds"
            )
        if not self.script:
            self._check_yaml()

    def _check_yaml(self) -> None:
        """Refuse what Axolotl would ignore and what SCAO would refuse, before the others' runs have taken their time."""
        if self.arguments:
            raise ToolError("arguments after -- are for a script: change keys of a YAML with --set KEY=VALUE")
        if strange := unknown(set(self.changes) - set(axolotl_yaml.read_yaml(self.source))):
            named = ", ".join(f"{key!r}{near}" for key, near in strange.items())
            raise ToolError(
                f"--set has {named}, which Axolotl does not read; a key that is newer than this goes into the YAML"
            )
        findings = Findings()
        options = axolotl_yaml.scao_options(
            {key: value for key, value in self.raw.items() if key != "max_steps"}, findings
        )
        if problems := findings.errors + axolotl_yaml.missing_inputs(self.raw):
            raise ToolError(f"{self.source}: {'; '.join(problems)}")
        if self.raw.get("deepspeed"):
            raise ToolError(
                f"{self.source}: deepspeed: {self.raw['deepspeed']}: compare trains in one process, without DeepSpeed's "
                "launcher, where ZeRO has nothing to share out: add --set deepspeed=null"
            )
        options = resolve_arguments(options)
        start = rule_of(options, matrix=True).phase1_steps(options)
        if self.steps <= start:
            raise ToolError(
                f"--steps {self.steps} would end before SCAO's phase 2, which begins after step {start}: pass more steps, "
                "or lower scao_warmup_steps and scao_precond_freq"
            )
        if importlib.util.find_spec("axolotl") is None:
            raise ToolError("comparing with an Axolotl YAML needs axolotl: pip install 'scao-hf[axolotl]'")


def parse_changes(pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts as a mapping, the values read as YAML."""
    changes = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        try:
            if not (key.strip() and sign):
                raise ToolError(f"--set {pair!r} is malformed: write --set KEY=VALUE")
            changes[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ToolError(f"--set {pair!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    return changes


def rivals_of(job: Job, against: str | None = None) -> list[str]:
    """What SCAO is compared with: the optimizers that are asked for, else the YAML's own, else AdamW.

    Args:
        job: what is run.
        against: names with commas.

    Raises:
        ToolError: one of them is not an optimizer.
    """
    own = "scao" if job.script else axolotl_yaml.optimizer_of({"optimizer": "scao", **job.raw})
    default = "adamw_torch" if own == "scao" else own
    names = list(dict.fromkeys(filter(None, map(str.strip, (against or default).split(",")))))
    if not names or len(names) > MOST_RIVALS:
        raise ToolError(f"--against {against!r} names {len(names)} optimizers: name 1 to {MOST_RIVALS}, with commas")
    if "scao" in names:
        raise ToolError(
            "--against scao would compare SCAO with itself: name another optimizer, for example adamw_torch"
        )
    from transformers.training_args import OptimizerNames

    known = [str(known.value) for known in OptimizerNames]
    if not set(names) <= set(known) and not job.script:
        known += axolotl_optimizers()
    if strange := [name for name in names if name not in known]:
        of = "transformers" if job.script else "Axolotl"
        meant = "; ".join(f"{name!r} is not an optimizer of {of}{did_you_mean(name, known)}" for name in strange)
        raise ToolError(f"{meant}: name another with --against")
    return names


def axolotl_optimizers() -> list[str]:
    """Those that Axolotl adds to the ones of transformers, asked of it in a process of its own."""
    code = "from axolotl.utils.schemas.enums import CustomSupportedOptimizers as known; print(*(one.value for one in known))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []


@dataclass(frozen=True)
class Arm:
    """One run: an optimizer at a learning rate; ``seed`` is added to the configuration's own."""

    job: Job
    optimizer: str
    rate: Rate
    seed: int = 0

    def config(self) -> dict[str, Any]:
        """The YAML of the run, without its folders; for a script, what ``measure.prepare_trainer`` takes."""
        steps, save = self.job.steps, max(1, self.job.steps // 4)
        if self.job.script:
            rate, scale = (None, self.rate.value) if self.rate.relative else (self.rate.value, 1.0)
            run = {"optimizer": self.optimizer, "steps": steps, "save_steps": save, "seed": self.seed}
            return {**run, "learning_rate": rate, "scale": scale}
        raw, ours = self.job.raw, self.optimizer == "scao"
        kept = {key: value for key, value in raw.items() if key not in DROPPED and not key.startswith(SERVICES)}
        if not ours:
            kept = {key: value for key, value in kept.items() if not key.startswith("scao_") or key == "scao_fuse_moe"}
        if self.optimizer != axolotl_yaml.optimizer_of(raw):
            kept.pop("optim_args", None)
        plugins = [plugin for plugin in collection(raw, "plugins", list) if plugin not in (ARM_PLUGIN, PLUGIN)]
        if ours or raw.get("scao_fuse_moe"):  # the latter acts with any optimizer
            plugins.append(PLUGIN)
        if self.rate.relative and raw.get("learning_rate") is None:
            raise ToolError(f"{self.job.source} has no learning_rate: add one, or pass --lr NUMBER")
        seed = 42 if raw.get("seed") is None else raw["seed"]  # Axolotl's default
        if not isinstance(seed, int):
            raise ToolError(f"seed is {seed!r}: it must be an integer")
        kept.pop("eval_steps", None)
        if raw.get("val_set_size") or raw.get("test_datasets"):
            kept["eval_steps"] = steps
        return {
            "dataset_prepared_path": str(self.job.out / "prepared"),
            **kept,
            "plugins": [*plugins, ARM_PLUGIN],
            "optimizer": self.optimizer,
            "learning_rate": float(raw["learning_rate"]) * self.rate.value if self.rate.relative else self.rate.value,
            "max_steps": steps,
            "logging_steps": 1,
            "save_steps": save,
            "save_total_limit": 1,
            "seed": seed + self.seed,
            "auto_resume_from_checkpoints": True,
        }

    @property
    def folder(self) -> Path:
        """Its name holds a digest of everything that defines the run, so that another run never continues in it."""
        text = json.dumps(self.config(), sort_keys=True, default=str)
        if self.job.script:  # which may say its own encoding
            text += "\0".join(
                [self.job.source.read_text(encoding="utf-8", errors="backslashreplace"), *self.job.arguments]
            )
        name = re.sub(r"[^\w.-]", "_", f"{self.optimizer}-{'x' if self.rate.relative else ''}{self.rate.value:g}")
        return self.job.out / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def command(self) -> tuple[list[str], dict[str, str]]:
        """What starts the run, after writing its configuration, and the environment that it needs."""
        config = {**self.config(), "output_dir": str(self.folder / "run")}
        environment = {FILE_VARIABLE: str(self.folder / "measurements.jsonl")}
        if self.job.script:
            words = ["scao_hf.tools.measure", str(self.job.source), *self.job.arguments]
            environment[ARM_VARIABLE] = json.dumps(config)
        else:
            path = self.folder / "config.yml"
            path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            words = ["axolotl.cli.main", "train", str(path), "--launcher", "python"]
        return [sys.executable, "-m", *words], environment


@dataclass(frozen=True)
class Outcome:
    """What a run has written down, or why there is nothing.

    Attributes:
        learning_rate: the peak rate.
        losses, seconds, data: of each step: training loss, time, checksum of the batch.
        blends: of each step, the share of SCAO's curvature in it; empty for another optimizer.
        rewards: of each step, empty where the trainer has none.
        eval_loss: at the end, None without held-out data.
        state_bytes, peak_bytes: largest optimizer state and memory.
        device: "cuda" or "cpu", which says what ``peak_bytes`` counts.
        failure: why the run is not complete, None where it is.
    """

    learning_rate: float = math.nan
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    data: list[int] = field(default_factory=list)
    _: KW_ONLY
    eval_loss: float | None = None
    state_bytes: int = 0
    peak_bytes: int = 0
    device: str = "cpu"
    blends: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def figure(self) -> str:
        """What tells how good a run is: its reward where it has one, for the loss of GRPO and the like says nothing."""
        return "reward" if self.rewards else "loss"

    @property
    def curve(self) -> list[float]:
        """That figure, of each step."""
        return self.rewards or self.losses

    @property
    def tail(self) -> list[float]:
        """The last third of the curve."""
        return self.curve[-max(1, len(self.curve) // 3) :]

    @property
    def score(self) -> float:
        """Mean of the last third, lower is better; infinite where a figure is not finite or there is none."""
        if not (self.curve and all(map(math.isfinite, self.curve))):
            return math.inf
        return fmean(self.tail) * (-1 if self.rewards else 1)


def read_outcome(path: Path, steps: int) -> Outcome:
    """What the recorder has written; the later line counts where a resumed run has repeated a step."""
    rows = json_rows(path) if path.is_file() else []
    by_step = {row["step"]: row for row in rows if "loss" in row}
    ordered = [by_step[step] for step in sorted(by_step)]
    begin: dict[str, Any] = next((row for row in rows if "begin" in row), {})
    complete = any(row.get("end") == steps for row in rows) and len(ordered) == steps

    def figures(key: str) -> list[Any]:  # of every step, nothing where a step lacks it
        values = [row.get(key) for row in ordered]
        return [] if None in values else values

    return Outcome(
        learning_rate=begin.get("learning_rate", math.nan),
        losses=list(map(logged, figures("loss"))),
        seconds=figures("seconds"),
        data=figures("data"),
        eval_loss=next((row["eval_loss"] for row in reversed(rows) if "eval_loss" in row), None),
        state_bytes=max(figures("state_bytes"), default=0),
        peak_bytes=max(figures("peak_bytes"), default=0),
        device=begin.get("device", "cpu"),
        blends=figures("blend"),
        rewards=list(map(logged, figures("reward"))),
        failure=None if complete else f"it stopped after step {len(ordered)} of {steps}",
    )


def reason(log: str) -> str:
    """What a failed run says last: the message of its exception, with the lines that belong to it."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    if not starts:
        return lines[-1] if lines else "it said nothing"
    said = " ".join(" ".join(lines[starts[-1] :][:8]).split())
    # What pydantic adds: the whole configuration, and a link.
    return re.sub(r"^[\w.]+\.(?=\w)", "", said.partition(" [type=")[0])[:600]


def run_arm(arm: Arm, progress: Callable[[Outcome], None]) -> Outcome:
    """Run one arm in a process of its own, or take it as it is where it is complete already.

    Args:
        arm: what to run.
        progress: told what is there so far, several times a second.

    Returns:
        The outcome; ``failure`` says what went wrong and where the log is.

    Raises:
        ToolError: its folder cannot be made.
    """
    folder, steps = arm.folder, arm.job.steps
    measurements, log = folder / "measurements.jsonl", folder / "log.txt"
    done = read_outcome(measurements, steps)
    if done.failure is None:
        progress(done)
        return done
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # A run is resumed only where both are there: its checkpoint and what it has written down until then.
    if not measurements.exists():
        shutil.rmtree(folder / "run", ignore_errors=True)
    elif not any((folder / "run").glob("checkpoint-*")):
        measurements.unlink()
    command, variables = arm.command()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **variables})
        try:
            while process.poll() is None:
                progress(read_outcome(measurements, steps))
                time.sleep(0.3)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    outcome = read_outcome(measurements, steps)
    progress(outcome)
    if outcome.failure is None:
        return outcome
    said = reason(log.read_text(encoding="utf-8", errors="replace"))
    return replace(outcome, failure=f"{outcome.failure}: {said} (log: {log})")
