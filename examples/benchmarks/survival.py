"""Try every fault of ``faults`` on every optimizer, each in a process of its own with a time limit.

    python examples/benchmarks/survival.py --out examples/benchmarks/results/survival.jsonl
    python examples/benchmarks/tables.py --write       # then the tables in docs/survival.md and the README

One JSON line per optimizer and fault: ``survived``, ``lost`` with the reason, or ``inapplicable`` with the reason. An
optimizer whose package is not installed is named with the reason. Lines of what is not tried stay in the file. The
result is 1 if SCAO is lost anywhere.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peers
import provenance
import sweep
import torch
from faults import FAULTS, Inapplicable, Lost, Subject
from torch.optim import Optimizer

from scao_hf import SCAO, options

#: Curvature early enough to act for most of a case's 80 steps.
EARLY: dict[str, Any] = {"warmup_steps": 5, "blend_steps": 3, "min_precond_updates": 1, "precond_freq": 5}
#: Seconds of processor time, and by the clock, that a case may take: other programs may use the machine as well.
PROCESSOR_TIME, TIMEOUT = 60, 900.0


def scao(rule: str, **choice: Any) -> Callable[..., Optimizer]:
    """A builder of SCAO with one rule and early curvature."""
    return lambda params, lr: SCAO(params, lr=lr, weight_decay=0.0, rule=rule, **{**EARLY, **choice})


def variants() -> list[Subject]:
    """SCAO with both rules that gather curvature, every kind of state and every common dtype of parameters."""
    found = []
    kinds: dict[str, dict[str, Any]] = {"": {}, " int8": {"use_int8_ema": True}}
    if "moment_dtype" in options.OPTIONS:
        choices = options.OPTIONS["moment_dtype"].choices
        kinds |= {f" {choice} moments": {"moment_dtype": choice} for choice in choices if choice != "float32"}
    for rule in ("eigenbasis", "published"):  # those with a curvature, which half of the faults aim at
        for words, choice in kinds.items():
            found.append(Subject(f"{rule}{words}", scao(rule, **choice)))
        for dtype in (torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            found.append(Subject(f"{rule}, {name} parameters", scao(rule), dtype))
    return found


def soap(params: Any, lr: Any) -> Optimizer:
    """SOAP as pytorch-optimizer has it."""
    return peers.imported("pytorch_optimizer", "pytorch-optimizer").SOAP(
        params, lr=lr, weight_decay=0.0, precondition_frequency=5
    )


def shampoo(params: Any, lr: Any) -> Optimizer:
    """Scalable Shampoo as pytorch-optimizer has it."""
    return peers.imported("pytorch_optimizer", "pytorch-optimizer").ScalableShampoo(
        params,
        lr=lr,
        weight_decay=0.0,
        graft_type=3,
        start_preconditioning_step=5,
        preconditioning_compute_steps=5,
    )


def scao_pypi(params: Any, lr: Any) -> Optimizer:
    """The public ``scao`` package from PyPI, which is another project's."""
    return peers.imported("scao", "scao").SCAO(
        params, lr=lr, weight_decay=0.0, warmup_steps=5, blend_steps=3, precond_freq=5, min_precond_updates=1
    )


def adamw8bit(params: Any, lr: Any) -> Optimizer:
    """bitsandbytes' 8-bit AdamW, with the small parameters of the cases in 8 bit too."""
    return peers.imported("bitsandbytes", "bitsandbytes").optim.AdamW8bit(
        params, lr=lr, weight_decay=0.0, min_8bit_size=1
    )


def adamw(params: Any, lr: Any) -> Optimizer:
    """torch's own."""
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


#: name in the table -> (builder, name in ``peers`` whose versions say what ran)
COMPARED: dict[str, tuple[Callable[..., Optimizer], str]] = {
    "scao": (scao("eigenbasis"), "scao"),
    "scao int8": (scao("eigenbasis", use_int8_ema=True), "scao"),
    "scao-published": (scao("published"), "scao-published"),
    "adamw": (adamw, "adamw"),
    "soap": (soap, "soap"),
    "shampoo": (shampoo, "shampoo"),
    "scao-pypi": (scao_pypi, "scao-pypi"),
    "adamw8bit": (adamw8bit, "adamw8bit"),
}


def attempt(name: str, subject: Subject) -> dict[str, str]:
    """One fault on one optimizer, in this process."""
    torch.manual_seed(0)
    try:
        FAULTS[name].try_on(subject)
    except Inapplicable as reason:
        return {"outcome": "inapplicable", "reason": str(reason)}
    except Lost as reason:
        return {"outcome": "lost", "reason": str(reason)}
    except Exception as error:  # whatever an optimizer raises under a fault is the finding
        text = " ".join(str(error).split())[:100]
        return {"outcome": "lost", "reason": f"{type(error).__name__}: {text}" if text else type(error).__name__}
    return {"outcome": "survived", "reason": ""}


def _child(pipe: Connection, name: str, subject: Subject) -> None:
    logging.disable()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_TIME, PROCESSOR_TIME + 5))
    pipe.send(attempt(name, subject))


def isolated(name: str, subject: Subject, timeout: float = TIMEOUT) -> dict[str, str]:
    """One fault on one optimizer in a process of its own: a crash or a hang is an outcome too."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(theirs, name, subject), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            return {"outcome": "lost", "reason": f"no end after {timeout:g} s"}
        return ours.recv()  # type: ignore[no-any-return]
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGXCPU:
            return {"outcome": "lost", "reason": f"no end after {PROCESSOR_TIME} s of processor time"}
        return {"outcome": "lost", "reason": f"the process died with status {child.exitcode}"}
    finally:
        child.kill()
        child.join()
        ours.close()


def missing(build: Callable[..., Optimizer]) -> str | None:
    """Why an optimizer cannot be tried at all, or None."""
    try:
        optimizer = build([parameter := torch.nn.Parameter(torch.ones(32, 32))], 1e-3)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except peers.Unavailable as reason:
        return str(reason)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return f"does not run here: {error}"
    return None


def keep_others(path: Path, names: list[str], faults: list[str]) -> None:
    """Drop what a result file has of the optimizers and faults that are about to be tried again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        record = json.loads(line)
        if record["optimizer"] not in names or record.get("fault", faults[0]) not in faults:
            kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the battery."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=sweep.writable,
        default=Path("runs/benchmarks/survival.jsonl"),
        help="result file, added to (default: %(default)s)",
    )
    parser.add_argument("--optimizers", default=",".join(COMPARED), help="of: " + ", ".join(COMPARED))
    parser.add_argument("--faults", default=",".join(FAULTS), help="all, or of: " + ", ".join(FAULTS))
    arguments = parser.parse_args(argv)
    names, faults = arguments.optimizers.split(","), arguments.faults.split(",")
    for flag, given, known in (("--optimizers", names, COMPARED), ("--faults", faults, FAULTS)):
        for name in given:
            if name not in known:
                parser.error(f"{flag}: {name!r} is not one of {', '.join(known)}")
    torch.set_num_threads(1)
    logging.disable()
    warnings.simplefilter("ignore")
    keep_others(arguments.out, names, faults)
    lost = False
    for name in names:
        build, peer = COMPARED[name]
        reason = missing(build)
        if reason is not None:
            print(f"{name}: not tried: {reason}")
            sweep.append(arguments.out, {"optimizer": name, "unavailable": reason})
            continue
        subject = Subject(name, build)
        versions = provenance.versions(peer)
        start = time.monotonic()
        found = []
        for fault in faults:
            found.append({"fault": fault, **isolated(fault, subject)})
            sweep.append(arguments.out, {"optimizer": name, **found[-1], "versions": versions})
        counted = [entry for entry in found if entry["outcome"] != "inapplicable"]
        survived = sum(entry["outcome"] == "survived" for entry in counted)
        print(f"{name}: {survived} of {len(counted)} in {time.monotonic() - start:.0f} s", flush=True)
        for entry in counted:
            if entry["outcome"] == "lost":
                print(f"    {FAULTS[entry['fault']].title}: {entry['reason']}")
        lost |= peer in ("scao", "scao-published") and survived < len(counted)
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
