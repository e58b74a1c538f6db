"""Judge and draw a finished run: loss, phase and rank from the Trainer's own log, next to AdamW's loss on the same batches.

Exits with status 1 when the loss did not fall or the curvature phase was not reached.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

LAST = 5  # losses whose mean is the run's result
FALL = 0.8  # the result must be below this share of the first loss


def newest_state(run: Path) -> dict[str, Any]:
    """The Trainer's state of the run's last checkpoint.

    Args:
        run: the run's ``output_dir``.

    Returns:
        The parsed ``trainer_state.json``.

    Raises:
        FileNotFoundError: the run left no checkpoint.
    """
    states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not states:
        raise FileNotFoundError(f"{run} holds no checkpoint-*/trainer_state.json: did the training finish?")
    state: dict[str, Any] = json.loads(states[-1].read_text(encoding="utf-8"))
    return state


def series(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged key."""
    rows = [(int(row["step"]), float(row[key])) for row in history if key in row]
    return [step for step, _ in rows], [value for _, value in rows]


def summary(history: list[dict[str, Any]]) -> dict[str, float]:
    """First loss, result (mean of the last losses) and the highest phase, NaN where not logged."""
    losses, phases = (series(history, key)[1] for key in ("loss", "scao/phase"))
    last = losses[-LAST:]
    return {
        "first": losses[0] if losses else float("nan"),
        "last": sum(last) / len(last) if last else float("nan"),
        "phase": max(phases) if phases else float("nan"),
    }


def faults(result: dict[str, float]) -> list[str]:
    """What a demo run must show and this one does not."""
    found = []
    if not result["last"] < FALL * result["first"]:
        found.append(
            f"the loss did not fall: the mean of the last {LAST} losses is {result['last']:.3f}, "
            f"it must be below {FALL} x the first one ({result['first']:.3f})"
        )
    if not result["phase"] >= 2:
        found.append(f"the curvature phase was not reached: the highest logged scao/phase is {result['phase']:g}")
    return found


def smooth(losses: list[float]) -> list[float]:
    """The mean of the last ``LAST`` losses at each step."""
    windows = [losses[max(0, end - LAST) : end] for end in range(1, len(losses) + 1)]
    return [sum(window) / len(window) for window in windows]


def draw(history: list[dict[str, Any]], path: Path, adamw: list[dict[str, Any]] | None = None) -> None:
    """Write the picture: the loss above, the rank and the curvature's share of the step below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss_axes, rank_axes) = pyplot.subplots(2, 1, figsize=(8, 6.5), sharex=True, height_ratios=[3, 2])
    for name, colour, log in (("AdamW", "tab:brown", adamw), ("SCAO", "tab:blue", history)):
        if log:
            steps, losses = series(log, "loss")
            loss_axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.8)
            loss_axes.plot(steps, smooth(losses), color=colour, label=f"{name}, mean of the last {LAST}")
    loss_axes.set_ylabel("training loss")
    rank_axes.plot(*series(history, "scao/rank"), color="tab:green", drawstyle="steps-post")
    rank_axes.set_ylabel("mean rank", color="tab:green")
    rank_axes.set_xlabel("step")
    blend_axes = rank_axes.twinx()
    blend_axes.plot(*series(history, "scao/blend"), color="tab:orange")
    blend_axes.set_ylim(-0.05, 1.05)
    blend_axes.set_ylabel("blend (0: AdamW, 1: curvature)", color="tab:orange")
    phase_steps, phases = series(history, "scao/phase")
    second = [step for step, phase in zip(phase_steps, phases, strict=True) if phase >= 2]
    if second:
        for axes in (loss_axes, rank_axes):
            axes.axvspan(second[0], phase_steps[-1], color="tab:orange", alpha=0.08)
        loss_axes.axvline(second[0], color="tab:orange", linestyle="--", label=f"phase 2 from step {second[0]}")
    loss_axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    """Draw the run, print its result and judge it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="the output_dir of an Axolotl or Trainer run")
    parser.add_argument("--adamw", type=Path, help="the output_dir of the same run with AdamW, drawn with it")
    arguments = parser.parse_args()
    run, adamw = arguments.run, None
    try:
        history = newest_state(run)["log_history"]
        if arguments.adamw is not None:
            adamw = newest_state(arguments.adamw)["log_history"]
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    picture = run / "loss.png"
    draw(history, picture, adamw)
    result = summary(history)
    print(
        f"\nloss:    {result['first']:.3f} at the first step, {result['last']:.3f} over the last {LAST}; "
        f"phase {result['phase']:g} reached"
    )
    if adamw is not None:
        pairs = list(zip(series(adamw, "loss")[1], series(history, "loss")[1], strict=True))
        judged = pairs[-max(1, len(pairs) // 3) :]
        first, second = (sum(values) / len(judged) for values in zip(*judged, strict=True))
        better = sum(scao < other for other, scao in judged)
        print(
            f"AdamW:   {first:.3f} over the last {len(judged)} steps, SCAO {second:.3f} on the same batches, lower on {better} "
            f"of {len(judged)}; one seed"
        )
    print(f"picture: {picture}")
    found = faults(result)
    if not (run / "adapter_model.safetensors").is_file():
        found.append(f"{run} holds no adapter_model.safetensors")
    for fault in found:
        print(f"error: {fault}", file=sys.stderr)
    if found:
        return 1
    print(f"adapter: {run}; ask it something:")
    print(f"    .venv/bin/python examples/demo/ask.py --adapter {run} 'What does `shutil.copytree` do in Python?'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
