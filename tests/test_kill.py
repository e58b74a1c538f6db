"""Kill -9 at a random moment, start again, continue: no run is lost, and the final weights are those of a run left alone.

A few kills here; twenty under the marker ``long`` (make test-long), whose log is kept:

    python tests/test_kill.py --kills 20 --out examples/benchmarks/results/kill.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

STEPS = 60
EARLY: dict[str, Any] = {"warmup_steps": 8, "blend_steps": 4, "precond_freq": 5, "min_precond_updates": 1}
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 parameters": {},
    "int8 curvature": {"use_int8_ema": True},
    "published": {"rule": "published"},
}


def task(kind: str) -> tuple[list[torch.nn.Parameter], Any]:
    """A small LoRA-like problem and SCAO for it."""
    from scao_hf import SCAO

    draw = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if kind.startswith("bfloat16") else torch.float32
    shapes = [(8, 48), (32, 8), (8, 64), (32, 8), (32,)]
    params = [torch.nn.Parameter((torch.randn(shape, generator=draw) / 4).to(dtype)) for shape in shapes]
    return params, SCAO(params, lr=0.01, **EARLY, **KINDS[kind])


def worker(folder: Path, kind: str) -> None:
    """Train with a checkpoint after every step, from the latest complete one on; each step takes some milliseconds."""
    params, optimizer = task(kind)
    latest = folder / "checkpoint.pt"
    first = 0
    if latest.exists():
        saved = torch.load(latest, weights_only=True)
        first = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for param, value in zip(params, saved["weights"], strict=True):
                param.copy_(value)
    print(f"from {first}", flush=True)
    for step in range(first, STEPS):
        draw = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = (param.detach().float() + 0.1 * torch.randn(param.shape, generator=draw)).to(param.dtype)
        optimizer.step()
        weights = [param.detach().clone() for param in params]
        # Written next to the last one and put in its place: a kill leaves one or the other, whole.
        partial = folder / "partial.pt"
        torch.save({"step": step + 1, "optimizer": optimizer.state_dict(), "weights": weights}, partial)
        os.replace(partial, latest)
        time.sleep(0.004)


def run(folder: Path, kind: str, after: float | None) -> tuple[int, int]:
    """Start the worker; kill it ``after`` seconds from its first step, or let it end. Where it began, and its status."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(folder), "--kind", kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    began = int(process.stdout.readline().split()[1])
    if after is not None:
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
    status = process.wait(timeout=120)
    process.stdout.close()
    return began, status


def weights_of(folder: Path) -> list[torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]  # type: ignore[no-any-return]


def survive(folder: Path, kind: str, kills: int, seed: int) -> dict[str, Any]:
    """A run that is killed ``kills`` times, against one that is not."""
    chance = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    alone.mkdir()
    killed.mkdir()
    assert run(alone, kind, None) == (0, 0)
    log = []
    while sum(entry["killed"] for entry in log) < kills:
        if log and log[-1]["status"] == 0:
            # It came to its end between two kills: once more from the beginning.
            for path in killed.iterdir():
                path.unlink()
        began, status = run(killed, kind, chance.uniform(0.005, 0.35))
        log.append({"began": began, "status": status, "killed": status == -signal.SIGKILL})
    while log[-1]["status"] != 0:
        began, status = run(killed, kind, None)
        log.append({"began": began, "status": status, "killed": False})
    difference = max(
        float((a - b).float().abs().max()) for a, b in zip(weights_of(alone), weights_of(killed), strict=True)
    )
    return {"kind": kind, "kills": kills, "starts": log, "difference": difference}


def check(record: dict[str, Any]) -> None:
    assert record["difference"] == 0.0
    assert sum(entry["killed"] for entry in record["starts"]) == record["kills"]
    # A start after a kill resumes from a checkpoint, wherever that was.
    assert any(entry["began"] > 0 for entry in record["starts"])


def test_a_killed_run_ends_at_the_same_weights(tmp_path: Path) -> None:
    check(survive(tmp_path, "int8 curvature", kills=2, seed=1))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_kills(tmp_path: Path, kind: str) -> None:
    check(survive(tmp_path, kind, kills=5, seed=2))


TRAINER = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
import test_trainer as t
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

class Said(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
        time.sleep(0.05)

out = Path({out!r})
trainer = t.scao_trainer(Path({model!r}), out, save_strategy="steps", save_steps=1, save_total_limit=2)
trainer.add_callback(Said())
last = get_last_checkpoint(str(out)) if out.exists() else None
while last is not None and not (Path(last) / "trainer_state.json").exists():
    # The Trainer writes trainer_state.json last: a folder without it was cut off by the kill.
    __import__("shutil").rmtree(last)
    last = get_last_checkpoint(str(out))
print("from", last and last.rpartition("-")[2], flush=True)
trainer.train(resume_from_checkpoint=last)
t.torch.save([p.detach() for p in trainer.model.parameters() if p.requires_grad], out / "final.pt")
"""


def test_a_killed_trainer_ends_at_the_same_weights(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("peft", reason="needs peft")
    finals = []
    for name, moments in (("alone", ()), ("killed", ("step 7",))):
        tests = str(Path(__file__).resolve().parent)
        code = TRAINER.format(
            tests=tests, root=str(Path(tests).parent), out=str(tmp_path / name), model=str(tiny_llama)
        )
        for moment in (*moments, None):
            process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if moment is not None and line.strip() == moment:
                    # Within the step's pause or the writing of its checkpoint.
                    time.sleep(random.Random(moment).uniform(0, 0.15))
                    process.send_signal(signal.SIGKILL)
            status = process.wait(timeout=300)
            process.stdout.close()
            assert status == (0 if moment is None else -signal.SIGKILL)
        finals.append(torch.load(tmp_path / name / "final.pt", weights_only=True))
    for a, b in zip(*finals, strict=True):
        assert torch.equal(a, b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--kind", default="float32")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker, arguments.kind)
        return
    import tempfile

    each = -(-arguments.kills // len(KINDS))
    records = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            records.append(survive(Path(folder), kind, each, seed=3))
        check(records[-1])
        print(
            f"{kind}: {each} kills, {len(records[-1]['starts'])} starts, weights differ by {records[-1]['difference']}"
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
