"""``scao-hf doctor``: whether the installation is sound, as a block of text for a bug report."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import scao_hf
from scao_hf import SCAO, options

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "axolotl", "bitsandbytes")

#: (dtype, largest error relative to the distance covered). In float32 the long basis is kept in bfloat16: 2^-9 each.
PRECISIONS = ((torch.float64, 1e-6), (torch.float32, 0.02))

_SHAPE, _STEPS = (6, 48), 30
_OPTIONS = {"warmup_steps": 4, "blend_steps": 5, "precond_freq": 3, "min_precond_updates": 1, "k_min": 2, "k_max": 4}


@dataclass(frozen=True)
class Findings:
    """The text to paste, and whether something is broken."""

    text: str
    broken: bool


def examine() -> Findings:
    """Look at versions, devices and backend, run the self-test, and see whether Axolotl can load the plugin."""
    lines = [
        ("scao_hf", scao_hf.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, _version(name)) for name in PACKAGES),
        ("cuda", cuda_state()),
        *((f"backend, {device}", text) for device, text in _backend().items()),
    ]
    problems = []
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for rule in options.RULES:
        for device in devices:
            text, sound = self_test(rule, device)
            lines.append((f"self-test, {rule}, {device}", text))
            if not sound:
                problems.append(
                    f"the {rule} rule is wrong on {device}: try SCAO_DISABLE_EXT=1, install scao-hf again, report it"
                )
    plugin, sound = axolotl_plugin()
    lines.append(("axolotl plugin", plugin))
    if not sound:
        problems.append("Axolotl cannot load the plugin: pip install 'scao-hf[axolotl]' where Axolotl is installed")
    width = max(len(name) for name, _ in lines)
    rows = "\n".join(f"{name:<{width}}  {text}" for name, text in lines)
    end = "\n".join(f"BROKEN: {problem}" for problem in problems) or "Nothing is broken."
    return Findings(f"```\n{rows}\n```\n{end}", bool(problems))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cuda_state() -> str:
    """Devices, or why there are none."""
    if torch.version.cuda is None:
        return f"none: torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"none: torch is built for CUDA {torch.version.cuda} but finds no device (driver? CUDA_VISIBLE_DEVICES?)"
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory, capability = device.total_memory / 2**30, f"{device.major}.{device.minor}"
        found.append(f"{device.name}, {memory:.1f} GiB, compute capability {capability}")
    return f"CUDA {torch.version.cuda}: {'; '.join(found)}"


def _backend() -> dict[str, str]:
    from scao_hf import ops

    return ops.backend()


def _gradients(device: str) -> list[Tensor]:
    """Gradients with a decaying spectrum and a steady mean, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -1.5, _SHAPE[1], dtype=torch.float64)
    mean = torch.randn(_SHAPE, generator=generator, dtype=torch.float64)
    noise = (torch.randn(_SHAPE, generator=generator, dtype=torch.float64) for _ in range(_STEPS + 1))
    return [((mean + draw) * scale).to(device) for draw in noise]


def self_test(rule: str, device: str) -> tuple[str, bool]:
    """Steps through both phases of a rule against the float64 reference.

    Args:
        rule: one of ``options.RULES``.
        device: "cpu" or "cuda".

    Returns:
        The errors in words, and whether they are within bounds.
    """
    from scao_hf import reference

    references = {"published": reference.published, "eigenbasis": reference.eigenbasis}
    weight, *grads = _gradients("cpu")
    settings: dict[str, Any] = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.01, **options.resolve(rule, _OPTIONS)}
    expected = references[rule](weight, grads, settings)[-1]
    distance = float((expected - weight).norm())
    said, sound = [], True
    for dtype, bound in PRECISIONS:
        param = torch.nn.Parameter(weight.to(device, dtype, copy=True))
        optimizer = SCAO([param], rule=rule, lr=0.01, **_OPTIONS)  # type: ignore[arg-type]
        for grad in grads:
            param.grad = grad.to(device, dtype)
            optimizer.step()
        error = float((param.detach().cpu().double() - expected).norm()) / distance
        fits = error < bound  # False for NaN
        sound &= fits
        said.append(f"{str(dtype).removeprefix('torch.')} {'ok' if fits else 'WRONG'} ({error:.1e}, bound {bound:g})")
    return ", ".join(said), sound


def axolotl_plugin() -> tuple[str, bool]:
    """Whether Axolotl's own loader takes the plugin; in words, and whether that is as it should be.

    In a process of its own: importing Axolotl changes the one that it is imported into.
    """
    if _version("axolotl") == "not installed":
        return "not tried: axolotl is not installed", True
    code = "from axolotl.integrations.base import load_plugin as f; print(f('axolotl_plugin.SCAOPlugin'))"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "not loaded: importing axolotl took more than 300 seconds", False
    if done.returncode == 0 and "SCAOPlugin" in done.stdout:
        return "loads", True
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"does not load: {last}", False
