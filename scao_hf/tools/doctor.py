"""``scao-hf doctor``: whether the installation is sound, as a block of text for a bug report."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import scao_hf
from scao_hf import SCAO, ops, options, quantization
from scao_hf.namesake import other_package
from scao_hf.rules.published import average_codes

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "axolotl", "bitsandbytes")

#: (dtype, largest error relative to the distance covered). In float32 the long basis is kept in bfloat16: 2^-9 each.
PRECISIONS = ((torch.float64, 1e-6), (torch.float32, 0.02))

#: As much for an average in int8: each step rounds to one of 127 levels, up or down at random.
INT8_ERROR = 0.03

#: Rounding to the 16 levels of NF4 loses about a tenth.
NF4_ERROR = 0.15

_SHAPE, _STEPS = (6, 48), 30
_OPTIONS = {"warmup_steps": 4, "blend_steps": 5, "precond_freq": 3, "min_precond_updates": 1, "k_min": 2, "k_max": 4}


@dataclass(frozen=True)
class Findings:
    """What was found, row by row, and what is broken, with what to do about it."""

    rows: list[tuple[str, str]]
    problems: list[str]

    @property
    def text(self) -> str:
        """The block to paste."""
        width = max(len(name) for name, _ in self.rows)
        rows = "\n".join(f"{name:<{width}}  {text}" for name, text in self.rows)
        end = "\n".join(f"BROKEN: {problem}" for problem in self.problems) or "Nothing is broken."
        built = dict(self.rows)
        slow = [device for device in _devices() if "builds and installs it" in built.get(f"backend, {device}", "")]
        if slow:
            end += (
                f"\nSteps on {' and '.join(slow)} would be faster with native kernels: the backend row has the command."
            )
        return f"```\n{rows}\n```\n{end}"


def examine() -> Findings:
    """Look at versions, devices and backend, run the self-test, and see whether Axolotl can load the plugin."""
    lines = [
        ("scao_hf", scao_hf.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, _version(name)) for name in PACKAGES),
        ("package scao", f"in {other}: another project's" if (other := other_package()) else "not installed"),
        ("cuda", cuda_state()),
        *((f"backend, {device}", text) for device, text in ops.backend().items()),
    ]
    problems = []
    checks: dict[str, Callable[[str], tuple[str, bool]]] = {
        **{f"{rule} rule": functools.partial(self_test, rule) for rule in options.MATRIX_RULES},
        "int8 average": average_test,
    }
    for name, check in checks.items():
        for device in _devices():
            text, sound = check(device)
            lines.append((f"self-test, {name}, {device}", text))
            if not sound:
                problems.append(
                    f"the {name} is wrong on {device}: try SCAO_DISABLE_EXT=1, install scao-hf again, report it"
                )
    for device in _devices():
        text, sound = four_bit(device)
        lines.append((f"bitsandbytes in 4 bit, {device}", text))
        if not sound:
            problems.append(
                f"bitsandbytes does not work on {device}: see `python -m bitsandbytes`, and install the release for this CUDA"
            )
    plugin, sound = axolotl_plugin()
    lines.append(("axolotl plugin", plugin))
    if not sound:
        problems.append("Axolotl cannot load the plugin: pip install 'scao-hf[axolotl]' where Axolotl is installed")
    return Findings(lines, problems)


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _judged(error: float, bound: float) -> tuple[str, bool]:
    """An error in words with its bound, and whether it is within it, which NaN is not."""
    return f"{'ok' if error < bound else 'WRONG'} ({error:.1e}, bound {bound:g})", error < bound


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
        rule: one of ``options.MATRIX_RULES``.
        device: "cpu" or "cuda".

    Returns:
        The errors in words, and whether they are within bounds.
    """
    from scao_hf import reference

    weight, *grads = _gradients("cpu")
    settings: dict[str, Any] = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.01, **options.resolve(rule, _OPTIONS)}
    expected = getattr(reference, rule)(weight, grads, settings)[-1]
    distance = float((expected - weight).norm())
    said, sound = [], True
    for dtype, bound in PRECISIONS:
        param = torch.nn.Parameter(weight.to(device, dtype, copy=True))
        optimizer = SCAO([param], rule=rule, lr=0.01, **_OPTIONS)  # type: ignore[arg-type]
        for grad in grads:
            param.grad = grad.to(device, dtype)
            optimizer.step()
        error = float((param.detach().cpu().double() - expected).norm()) / distance
        text, fits = _judged(error, bound)
        sound &= fits
        said.append(f"{str(dtype).removeprefix('torch.')} {text}")
    return ", ".join(said), sound


def average_test(device: str) -> tuple[str, bool]:
    """The average in int8 (``use_int8_ema``) of one matrix over some steps against the same in float64.

    Args:
        device: "cpu" or "cuda".

    Returns:
        The error in words, and whether it is within bounds.
    """
    outers = [(grad @ grad.mT)[None] for grad in _gradients("cpu")]
    shape, weight = tuple(outers[0].shape[1:]), 0.2
    codes_shape, scales_shape = quantization.encoded_shapes(1, math.prod(shape))
    codes = torch.zeros(codes_shape, dtype=torch.int8, device=device)
    scales = torch.zeros(scales_shape, device=device)
    expected = torch.zeros_like(outers[0])
    for seed, outer in enumerate(outers):
        average_codes(codes, scales, outer.float().to(device), torch.tensor([weight], device=device), seed)
        expected.lerp_(outer, weight)
    found = quantization.decode(codes, scales, shape, torch.float32).cpu().double()
    return _judged(float((found - expected).norm() / expected.norm()), INT8_ERROR)


def four_bit(device: str) -> tuple[str, bool]:
    """Whether bitsandbytes quantises a matrix to NF4 and back on a device; in words, and whether that is as it should be.

    Args:
        device: "cpu" or "cuda".
    """
    if _version("bitsandbytes") == "not installed":
        return "not tried: bitsandbytes is not installed", True
    weight = _gradients(device)[0].float().repeat(8, 8)
    try:
        from bitsandbytes import functional

        back = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}", False
    return _judged(float((back - weight).norm() / weight.norm()), NF4_ERROR)


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
