"""timm's own optimizer tests on SCAO: tests/test_optim.py out of timm's sdist, SCAO registered as timm allows.

The sdist comes from .cache/timm, or from the package index the first time; neither timm nor its code is part of this
repository. What does not apply to SCAO is deselected by timm's own parametrization and printed with the reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("expecttest", reason="timm's tests use torch's TestCase, which needs expecttest")

ROOT = Path(__file__).resolve().parents[1]
VERSION = "1.0.31"
ARCHIVE = ROOT / ".cache" / "timm" / f"timm-{VERSION}.tar.gz"
#: Tests over the registry that do not concern SCAO.
INAPPLICABLE = {
    "foreach_parity, foreach_chunked, capturable": "SCAO has no foreach and no capturable argument",
    "the tests of one named algorithm": "they are about AdamW, Muon, Kron, Adafactor and others by name",
    "param_groups": "they are about timm's grouping, not about an optimizer",
}

#: A conftest that registers SCAO. timm's own __init__ needs torchvision, its optimizers do not.
CONFTEST = """
import sys, types
package = types.ModuleType("timm")
package.__path__ = [{timm!r}]
sys.modules["timm"] = package
models = types.ModuleType("timm.models")
models.group_parameters = None  # for grouping by layer, which no test here asks for
sys.modules["timm.models"] = models
from timm.optim import _optim_factory as factory
from scao_hf import SCAO
# The resume test compares the fields of step 3 with those of step 6: one phase has to hold both.
EARLY = dict(warmup_steps=2, blend_steps=2, precond_freq=2, min_precond_updates=1)
for name, extra in {variants!r}.items():
    factory.default_registry.register(factory.OptimInfo(
        name=name, opt_class=SCAO, description="SCAO", has_betas=True, defaults={{**EARLY, **extra}}))
import timm.optim
"""
VARIANTS = {
    "scao": {},
    "scaopublished": {"rule": "published"},
    "scaoint8": {"use_int8_ema": True},
}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not ARCHIVE.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        ARCHIVE.parent.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(
                [*command, f"timm=={VERSION}", "-d", str(ARCHIVE.parent)], capture_output=True, text=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"the package index gave no timm {VERSION} within two minutes")
        if done.returncode or not ARCHIVE.exists():
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            pytest.skip(f"no sdist of timm {VERSION}: {lines[-1]}")
    folder = tmp_path_factory.mktemp("timm")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"timm-{VERSION}"


def test_timm_tests_pass(sdist: Path) -> None:
    tests = sdist / "tests"
    (tests / "conftest.py").write_text(CONFTEST.format(timm=str(sdist / "timm"), variants=VARIANTS), encoding="utf-8")
    environment = {**os.environ, "TORCH_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *"-m pytest -q -rA -p no:cacheprovider -k scao".split(), str(tests / "test_optim.py")],
        capture_output=True,
        text=True,
        cwd=sdist,
        env=environment,
        timeout=600,
    )
    print()
    for body, reason in INAPPLICABLE.items():
        print(f"inapplicable: {body}: {reason}")
    assert done.stdout, done.stderr[-3000:]
    print(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-6000:]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped|failed)", done.stdout)}
    # The three that timm skips are foreach_parity.
    assert counts.get("passed", 0) >= 14 * len(VARIANTS) and counts.get("skipped", 0) == len(VARIANTS), done.stdout[
        -6000:
    ]
