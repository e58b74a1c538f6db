"""What a run has logged, from its trainer_state.json, and what that says in plain sentences."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from scao_hf.tools import ToolError, duration, logged, matrices

#: From how many times the median on a gradient norm counts as out of the ordinary.
PEAK = 10.0


@dataclass(frozen=True)
class Run:
    """The log of a run: numbers by key, each with its steps, and what the state file says about the whole."""

    name: str
    series: dict[str, tuple[list[int], list[float]]]
    steps: int
    max_steps: int
    matrices: matrices.Matrices | None = None

    def of(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values under a key, empty where nothing was logged under it."""
        return self.series.get(key, ([], []))

    def final(self, key: str) -> float:
        """The last finite value under a key, 0 where there is none."""
        return next(filter(math.isfinite, reversed(self.of(key)[1])), 0.0)


def find_state(run_dir: Path) -> Path:
    """The trainer_state.json of a run: its own, or that of its latest checkpoint.

    Raises:
        ToolError: there is no such folder, it is empty, or nothing in it was written by a Trainer.
    """
    if not run_dir.exists():
        raise ToolError(f"{run_dir} does not exist: pass the output_dir of a run")
    if run_dir.is_file():
        raise ToolError(f"{run_dir} is a file: pass the output_dir of the run, or its Axolotl YAML")
    own = run_dir / "trainer_state.json"
    if own.exists():
        return own
    saved = [path for path in run_dir.glob("checkpoint-*/trainer_state.json") if path.parent.name[11:].isdigit()]
    if saved:
        return max(saved, key=lambda path: int(path.parent.name[11:]))
    if compared := sorted(path for path in run_dir.glob("*/run") if path.is_dir()):
        raise ToolError(
            f"{run_dir} holds the runs of a comparison: pass one of them, {' or '.join(map(str, compared))}"
        )
    if not any(run_dir.iterdir()):
        raise ToolError(f"{run_dir} is empty: the run has saved nothing yet, or this is not its output_dir")
    raise ToolError(
        f"{run_dir} has no trainer_state.json, nor has any checkpoint-* in it: pass the output_dir of a Trainer "
        "or Axolotl run that has saved a checkpoint (save_strategy), or call trainer.save_state() at its end"
    )


def run_folder(named: Path) -> Path:
    """The folder that is meant: that of an Axolotl YAML is its output_dir."""
    if named.suffix not in (".yml", ".yaml") or not named.is_file():
        return named
    from scao_hf.tools.axolotl_yaml import read_yaml

    return Path(str(read_yaml(named).get("output_dir") or "./model-out"))


def read_run(run_dir: Path) -> Run:
    """The log of the run in that folder.

    Raises:
        ToolError: there is none, it cannot be read, or it holds no training loss.
    """
    path = find_state(run_dir)
    series: dict[str, tuple[list[int], list[float]]] = {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        for row in state["log_history"]:
            for key, value in row.items() if isinstance(row, dict) and "step" in row else ():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    steps, values = series.setdefault(key, ([], []))
                    steps.append(int(row["step"]))
                    values.append(logged(value))
        length, planned = int(state.get("global_step") or 0), int(state.get("max_steps") or 0)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ToolError(f"{path} is damaged or no Trainer's: take that of an earlier checkpoint") from error
    if "loss" not in series:
        raise ToolError(f"{path} holds no training loss: the run ended before its first log (logging_steps)")
    found = matrices.read_matrices(path.parent)
    if found is not None and found.milliseconds:
        timed = sorted(found.milliseconds)
        series["optimizer_ms"] = (timed, [found.milliseconds[step] for step in timed])
    name = os.fsencode(run_dir.resolve().name).decode(errors="replace")  # it may hold bytes that are not text
    return Run(name, series, length or series["loss"][0][-1], planned, found)


def findings(run: Run) -> list[str]:
    """What happened, in plain sentences."""
    said = [*_loss(run), *_held_out(run), *_speed(run), *_peaks(*run.of("grad_norm"))]
    if not run.of("scao/blend")[0]:
        return [
            *said,
            "The log has no scao/ figures: the run used another optimizer, or SCAOCallback was not attached "
            "(SCAOTrainer and the Axolotl plugin attach it).",
        ]
    said += _phases(run)
    skipped = max(filter(math.isfinite, run.of("scao/skipped")[1]), default=0.0)
    if skipped:
        said.append(
            f"{skipped:.0f} times a matrix was left as it was for a step, because its gradient held NaN or Inf. In "
            "float16 a few at the start are usual (loss scaling); many mean a learning rate that is too high."
        )
    else:
        said.append("No step was skipped: every gradient was finite.")
    return said + (matrices.findings(run.matrices, bool(skipped)) if run.matrices else [])


def _loss(run: Run) -> list[str]:
    """Where the training loss went, and whether the run is whole."""
    steps, losses = run.of("loss")
    finite = [value for value in losses if math.isfinite(value)]
    said = []
    if finite:
        tenth = max(1, len(finite) // 10)
        first, last = fmean(finite[:tenth]), fmean(finite[-tenth:])
        verb = "fell" if last < first else "did not fall: it went"
        said.append(
            f"The training loss {verb} from {first:.4g} to {last:.4g} in {run.steps} steps (first and last tenth)."
        )
    if len(finite) < len(losses):
        bad = next(step for step, value in zip(steps, losses, strict=True) if not math.isfinite(value))
        said.append(f"The loss was NaN or infinite at step {bad}: lower the learning rate, or look at the data there.")
    if run.max_steps > run.steps:
        said.append(f"The log ends at step {run.steps} of {run.max_steps}: the run is not over, or was stopped.")
    return said


def _held_out(run: Run) -> list[str]:
    """A sentence about the loss on other data, where it was measured."""
    steps, losses = run.of("eval_loss")
    measured = [(loss, step) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    if not measured:
        return []
    (best, at), (last, end) = min(measured), measured[-1]
    where = "its lowest value" if best == last else f"and {best:.4g} at its lowest, at step {at}"
    return [f"The held-out loss was {last:.4g} at step {end}, {where}."]


def _speed(run: Run) -> list[str]:
    """A sentence about the time that the run took, where the log says it or its steps were timed."""
    seconds = run.final("train_runtime")
    if not seconds:
        whole = run.matrices.whole if run.matrices else []
        each = fmean(whole) / 1000 if whole else 0.0
        return [f"{len(whole)} steps took {duration(each * len(whole))}, {duration(each)} a step."] if whole else []
    trained = run.final("train_steps_per_second") * seconds or run.steps
    tokens = run.final("train_tokens_per_second") or run.final("tokens/total") / seconds
    speed = f", {tokens:,.0f} tokens/s" if tokens else ""
    return [f"Training took {duration(seconds)}, {duration(seconds / max(1.0, trained))} a step{speed}."]


def _peaks(steps: list[int], norms: list[float]) -> list[str]:
    """A sentence about the steps whose gradient norm is far above the usual."""
    finite = [value for value in norms if math.isfinite(value)]
    if len(finite) < 10:
        return []
    high = [step for step, value in zip(steps, norms, strict=True) if value > PEAK * median(finite) > 0]
    if not high:
        return []
    shown = ", ".join(map(str, high[:5])) + (f" and {len(high) - 5} more" if len(high) > 5 else "")
    return [
        f"The gradient norm was over {PEAK:.0f} times its median at step {shown}: look at the data there, or lower "
        "max_grad_norm."
    ]


def _phases(run: Run) -> list[str]:
    """When the curvature began to act, and what it was worth at the end."""
    steps, blends = run.of("scao/blend")
    second = next((step for step, blend in zip(steps, blends, strict=True) if blend > 0), None)
    full = next((step for step, blend in zip(steps, blends, strict=True) if blend >= 1), None)
    if second is None:
        return [
            f"Phase 2 was never reached in {run.steps} steps: every step was a plain AdamW step. Train longer, or "
            "lower warmup_steps, min_precond_updates or precond_freq (in a YAML scao_warmup_steps and so on)."
        ]
    effect = (
        "; the run ended on the ramp to its full effect" if full is None else f" and is in full effect from step {full}"
    )
    rank, mass = (run.series.get(key, ([], [0.0]))[1][-1] for key in ("scao/rank", "scao/captured_mass"))
    return [
        f"Phase 2, with curvature, is first logged at step {second}{effect}.",
        f"At the end {rank:.3g} directions were in use on average, holding {mass:.0%} of the measured curvature.",
    ]
