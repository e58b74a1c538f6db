"""Run one Axolotl YAML with AdamW and with SCAO at the same learning rate and print both losses in one table."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from adapter import held_out_loss
from plot import LAST, newest_state, summary

OPTIMIZERS = ("adamw_torch", "scao")


def train(yaml: Path, optimizer: str, output: Path, extra: list[str]) -> float:
    """Train in a process of its own, as a user would; returns the seconds it took.

    Raises:
        subprocess.CalledProcessError: Axolotl failed.
    """
    shutil.rmtree(output, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("axolotl")), "train", str(yaml), "--launcher", "python"]
    command += [f"--optimizer={optimizer}", f"--output-dir={output}", *extra]
    print("+", " ".join(command), flush=True)
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def main() -> int:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Further options go to `axolotl train`.")
    parser.add_argument("yaml", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--held-out", type=Path, default=Path(".cache/demo/docstrings_eval.jsonl"), help="chats (default: %(default)s)"
    )
    arguments, extra = parser.parse_known_args()
    for path in (arguments.yaml, arguments.held_out):
        if not path.is_file():
            parser.error(f"{path} does not exist; `make demo-inputs` prepares what the demo needs")
    rows = []
    for optimizer in OPTIMIZERS:
        output = arguments.output / optimizer
        try:
            seconds = train(arguments.yaml, optimizer, output, extra)
            state = newest_state(output)
            held_out = held_out_loss(output, arguments.held_out)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"error: the run with {optimizer} failed: {error}", file=sys.stderr)
            return 1
        history = state["log_history"]
        rate = max(float(row["learning_rate"]) for row in history if "learning_rate" in row)
        rows.append((optimizer, rate, state["global_step"], seconds, summary(history), held_out))
    print(f"\n| optimizer | learning rate | steps | first loss | mean of last {LAST} | held-out loss | seconds |")
    print("|---|---|---|---|---|---|---|")
    for optimizer, rate, steps, seconds, result, held_out in rows:
        print(
            f"| {optimizer} | {rate:g} | {steps} | {result['first']:.4f} | {result['last']:.4f} | "
            f"{held_out:.4f} | {seconds:.0f} |"
        )
    print("\nOne seed, one learning rate, a small model: this shows that both run, not which one is better.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
