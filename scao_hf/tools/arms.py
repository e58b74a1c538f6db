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
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from axolotl_plugin.values import Findings
from scao_hf.options import did_you_mean, resolve_arguments
from scao_hf.rules import rule_of
from scao_hf.tools import ToolError, logged
from scao_hf.tools.axolotl_keys import unknown
from scao_hf.tools.axolotl_yaml import collection, missing_inputs, optimizer_of, plugin_note, read_yaml, scao_options

ARM_PLUGIN, SCAO_PLUGIN = "scao_hf.tools.axolotl_arm.MeasurePlugin", "axolotl_plugin.SCAOPlugin"
#: Environment variables of a run: where its measurements go, and for a script what is to be run (JSON).
FILE_VARIABLE, ARM_VARIABLE = "SCAO_COMPARE_FILE", "SCAO_COMPARE_ARM"
#: Keys of a YAML that a short run must not keep: schedules of saving and evaluating, early ends, other services.
DROPPED = (
    "evals_per_epoch",
    "saves_per_epoch",
    "eval_strategy",
    "save_strategy",
    "save_first_step",
    "save_only_model",
    "early_stopping_patience",
    "load_best_model_at_end",
    "resume_from_checkpoint",
    "hub_model_id",
    "hub_strategy",
    "use_tensorboard",
)
#: Optimizers that SCAO is compared with at most: each takes as long as SCAO.
MOST_RIVALS = 4
SERVICES = ("wandb_", "mlflow_", "comet_", "trackio_", "swanlab_", "use_wandb", "use_mlflow", "use_comet")


@dataclass(frozen=True)
class Rate:
    """A learning rate: a number, or a multiple of the configuration's own."""

    value: float
    relative: bool = False

    @property
    def text(self) -> str:
        """For folders."""
        return f"{'x' if self.relative else ''}{self.value:g}"


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

    @property
    def note(self) -> str | None:
        """What the reader should know about the YAML as it stands."""
        return None if self.script else plugin_note({**read_yaml(self.source), **self.changes})

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
        if not self.script and self.arguments:
            raise ToolError("arguments after -- are for a script: change keys of a YAML with --set KEY=VALUE")
        if not self.script:
            self._check_keys()
            self._check_scao()
            if importlib.util.find_spec("axolotl") is None:
                raise ToolError("comparing with an Axolotl YAML needs axolotl: pip install 'scao-hf[axolotl]'")

    def _check_keys(self) -> None:
        """Refuse a misspelt key, which Axolotl would ignore."""
        strange = unknown(set(self.changes) - set(read_yaml(self.source)))
        if strange:
            named = ", ".join(f"{key!r}{near}" for key, near in strange.items())
            raise ToolError(
                f"--set has {named}, which Axolotl does not read; a key that is newer than this goes into the YAML"
            )

    def _check_scao(self) -> None:
        """Refuse what SCAO would refuse, before the other optimizer's run has taken its time."""
        raw = {key: value for key, value in {**read_yaml(self.source), **self.changes}.items() if key != "max_steps"}
        findings = Findings()
        passed = scao_options(raw, findings)
        if problems := findings.errors + missing_inputs(raw):
            raise ToolError(f"{self.source}: {'; '.join(problems)}")
        if raw.get("deepspeed"):
            raise ToolError(
                f"{self.source}: deepspeed: {raw['deepspeed']}: compare trains in one process, without DeepSpeed's launcher, "
                "where ZeRO has nothing to share out: add --set deepspeed=null"
            )
        options = resolve_arguments(passed)
        start = rule_of(options, matrix=True).phase1_steps(options)
        if self.steps <= start:
            raise ToolError(
                f"--steps {self.steps} would end before SCAO's phase 2, which begins after step {start}: pass more steps, "
                "or lower scao_warmup_steps and scao_precond_freq"
            )


def parse_changes(pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts as a mapping, the values read as YAML."""
    import yaml  # type: ignore[import-untyped, unused-ignore]

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
    own = "scao" if job.script else optimizer_of({"optimizer": "scao", **read_yaml(job.source), **job.changes})
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


def _number(value: Any) -> float:
    """A number in a YAML, NaN where there is none; YAML reads 5e-4 as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _seed(raw: dict[str, Any]) -> int:
    value = raw.get("seed")
    if value is None:
        return 42  # Axolotl's default
    if not isinstance(value, int):
        raise ToolError(f"seed is {value!r}: it must be an integer")
    return value


@dataclass(frozen=True)
class Arm:
    """One run: an optimizer at a learning rate; ``seed`` is added to the configuration's own."""

    job: Job
    optimizer: str
    rate: Rate
    seed: int = 0

    def config(self) -> dict[str, Any]:
        """The YAML of the run, without its folders; for a script, what ``measure.prepare_trainer`` takes."""
        save = max(1, self.job.steps // 4)
        if self.job.script:
            rate = {"learning_rate": None, "scale": self.rate.value} if self.rate.relative else {}
            rate = rate or {"learning_rate": self.rate.value, "scale": 1.0}
            return {
                "optimizer": self.optimizer,
                "steps": self.job.steps,
                "save_steps": save,
                "seed": self.seed,
                **rate,
            }
        raw = {**read_yaml(self.job.source), **self.job.changes}
        own = str(raw.get("optimizer") or "adamw_torch").strip().lower()
        kept = {key: value for key, value in raw.items() if key not in DROPPED and not key.startswith(SERVICES)}
        plugins = [plugin for plugin in collection(raw, "plugins", list) if plugin not in (ARM_PLUGIN, SCAO_PLUGIN)]
        if self.optimizer == "scao" or raw.get("scao_fuse_moe"):  # the latter acts with any optimizer
            plugins.append(SCAO_PLUGIN)
        if self.optimizer != "scao":
            kept = {key: value for key, value in kept.items() if not key.startswith("scao_") or key == "scao_fuse_moe"}
        if self.optimizer != own:
            kept.pop("optim_args", None)
        base = _number(raw.get("learning_rate"))
        if self.rate.relative and not base > 0:
            raise ToolError(
                f"{self.job.source} has no learning_rate above 0 ({raw.get('learning_rate')!r}): add one, or pass --lr NUMBER"
            )
        kept |= {
            "plugins": [*plugins, ARM_PLUGIN],
            "optimizer": self.optimizer,
            "learning_rate": base * self.rate.value if self.rate.relative else self.rate.value,
            "max_steps": self.job.steps,
            "logging_steps": 1,
            "save_steps": save,
            "save_total_limit": 1,
            "seed": _seed(raw) + self.seed,
            "auto_resume_from_checkpoints": True,
        }
        kept.setdefault("dataset_prepared_path", str(self.job.out / "prepared"))
        if raw.get("val_set_size") or raw.get("test_datasets"):
            kept["eval_steps"] = self.job.steps
        else:
            kept.pop("eval_steps", None)
        return kept

    @property
    def folder(self) -> Path:
        """Its name holds a digest of everything that defines the run, so that another run never continues in it."""
        text = json.dumps(self.config(), sort_keys=True, default=str)
        if self.job.script:
            source = self.job.source.read_text(
                encoding="utf-8", errors="backslashreplace"
            )  # it may say its own encoding
            text += "\0".join([source, *self.job.arguments])
        name = re.sub(r"[^\w.-]", "_", f"{self.optimizer}-{self.rate.text}")
        return self.job.out / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def command(self) -> tuple[list[str], dict[str, str]]:
        """What starts the run, after writing its configuration, and the environment that it needs."""
        import yaml  # type: ignore[import-untyped, unused-ignore]

        output = str(self.folder / "run")
        environment = {FILE_VARIABLE: str(self.folder / "measurements.jsonl")}
        if self.job.script:
            environment[ARM_VARIABLE] = json.dumps({**self.config(), "output_dir": output})
            return [
                sys.executable,
                "-m",
                "scao_hf.tools.measure",
                str(self.job.source),
                *self.job.arguments,
            ], environment
        path = self.folder / "config.yml"
        path.write_text(yaml.safe_dump({**self.config(), "output_dir": output}, sort_keys=False), encoding="utf-8")
        return [sys.executable, "-m", "axolotl.cli.main", "train", str(path), "--launcher", "python"], environment


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
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be half written
    by_step = {row["step"]: row for row in rows if "loss" in row}
    ordered = [by_step[step] for step in sorted(by_step)]
    begin: dict[str, Any] = next((row for row in rows if "begin" in row), {})
    complete = any(row.get("end") == steps for row in rows) and len(ordered) == steps
    return Outcome(
        learning_rate=begin.get("learning_rate", math.nan),
        losses=[logged(row["loss"]) for row in ordered],
        seconds=[row["seconds"] for row in ordered],
        data=[row["data"] for row in ordered],
        eval_loss=next((row["eval_loss"] for row in reversed(rows) if "eval_loss" in row), None),
        state_bytes=max((row["state_bytes"] for row in ordered), default=0),
        peak_bytes=max((row["peak_bytes"] for row in ordered), default=0),
        device=begin.get("device", "cpu"),
        blends=_of_all(ordered, "blend"),
        rewards=_of_all(ordered, "reward"),
        failure=None if complete else f"it stopped after step {len(ordered)} of {steps}",
    )


def _of_all(rows: list[dict[str, Any]], key: str) -> list[float]:
    """A figure of every step, nothing where a step lacks it."""
    values = [row.get(key) for row in rows]
    return [] if None in values else [logged(value) for value in values if value is not None]


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(f"{folder} cannot be written to ({error.strerror}): choose another with --out") from error
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
    return Outcome(**{**vars(outcome), "failure": f"{outcome.failure}: {said} (log: {log})"})
