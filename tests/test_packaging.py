"""Wheel and source distribution, built and installed outside the checkout: complete, working, native where asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from environments import ROOT, copy_sources, run, setuptools_wheel, show_torch

import scao_hf
from scao_hf import ops

pytest.importorskip("setuptools", minversion="77")

COMPILER = os.environ.get("CXX", "g++")

STEPS = """
import pathlib, sys
import torch
import scao_hf
from scao_hf import SCAO

assert pathlib.Path(scao_hf.__file__).is_relative_to(sys.prefix), scao_hf.__file__
torch.manual_seed(0)
a, b = torch.nn.Parameter(torch.randn(4, 40)), torch.nn.Parameter(torch.zeros(30, 4))
inputs, target = torch.randn(40, 64), torch.randn(30, 64)
optimizer = SCAO([a, b], lr=0.05, warmup_steps=5, precond_freq=5)
losses = []
for _ in range(30):
    optimizer.zero_grad()
    loss = (b @ (a @ inputs) - target).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.95 * losses[0], losses
assert optimizer.metrics()["scao/phase"] == 2
print(scao_hf.backend()["cpu"])
"""


def wheel(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel from a folder or a source distribution, with the setuptools and torch of this environment."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out)
    return run(*pip, *options, source, cwd=out.parent, **environment)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_sources(tmp_path_factory.mktemp("sources"))
    (folder / "tests").mkdir()
    shutil.copy(__file__, folder / "tests")
    return folder


@pytest.fixture(scope="module")
def sdist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    out = tmp_path_factory.mktemp("sdist")
    build = f"import setuptools.build_meta as backend; backend.build_sdist({str(out)!r})"
    done = run(sys.executable, "-c", build, cwd=sources)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def plain_wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip install .` makes."""
    out = tmp_path_factory.mktemp("plain") / "wheels"
    done = wheel(sources, out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl"))


def installed(built: Path, folder: Path) -> Path:
    """The interpreter of a new environment that holds the wheel and, of the rest, what this environment has."""
    made = run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    assert made.returncode == 0, made.stderr
    python = folder / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    done = run(*pip, "install", "--no-deps", "--no-index", built, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    show_torch(python)
    return python


@pytest.fixture(scope="module")
def plain(plain_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(plain_wheel, tmp_path_factory.mktemp("plain-env"))


@pytest.fixture(scope="module")
def native(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with torch, in which the command of the documentation has installed the package."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no C++ compiler {COMPILER!r} on this machine")
    folder = tmp_path_factory.mktemp("native")
    made = run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    assert made.returncode == 0, made.stderr
    python = folder / "env" / "bin" / "python"
    show_torch(python)
    setuptools_wheel(folder)
    # What is tested is whether the command works, not how fast the kernels are: -O1 takes less than half the time to compile.
    quick = folder / "compiler"
    quick.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O1\n')
    quick.chmod(0o755)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    done = run(
        *("sh", "-c", ops.BUILD_COMMAND.format("cpu")),
        cwd=folder / sdist.name.removesuffix(".tar.gz"),
        CXX=str(quick),
        PATH=f"{python.parent}:{os.environ['PATH']}",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(folder),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return python


def modules(root: Path) -> set[str]:
    """Every Python file of the two packages."""
    found = (path for name in ("scao_hf", "axolotl_plugin") for path in (root / name).rglob("*.py"))
    return {str(path.relative_to(root)) for path in found}


def test_the_wheel_holds_the_packages_and_nothing_else(plain_wheel: Path) -> None:
    names = set(zipfile.ZipFile(plain_wheel).namelist())
    assert plain_wheel.name.endswith("-py3-none-any.whl")
    assert {name for name in names if name.endswith(".py")} == modules(ROOT)
    assert {"scao_hf/py.typed", "axolotl_plugin/py.typed"} <= names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"scao_hf", "axolotl_plugin"}
    metadata = zipfile.ZipFile(plain_wheel).read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Dist: torch>=2.6" in metadata


def test_the_source_distribution_holds_the_kernels(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert modules(ROOT) | native | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_wheels_are_the_same_to_the_byte_whoever_builds_them_of_what(
    sources: Path, sdist: Path, tmp_path: Path
) -> None:
    """Of the checkout and of the source distribution, in other folders; the permissions are those of the builder's umask."""
    built = []
    for name, source in (("first", sources), ("second", sdist)):
        out = tmp_path / name / "wheels"
        out.parent.mkdir()
        done = wheel(source, out, SOURCE_DATE_EPOCH="1700000000", SCAO_URL="https://github.com/a/b/")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        built.append(next(out.glob("*.whl")))
    contents = [{name: file.read(name) for name in file.namelist()} for file in map(zipfile.ZipFile, built)]
    assert contents[0] == contents[1]
    assert built[0].read_bytes() == built[1].read_bytes()
    metadata = next(text for name, text in contents[0].items() if name.endswith("/METADATA")).decode()
    tag = f"v{scao_hf.__version__}"
    assert f"](https://github.com/a/b/blob/{tag}/docs/getting-started.md#4-watch)" in metadata
    assert f"](https://github.com/a/b/raw/{tag}/docs/pictures/loss.svg)" in metadata
    assert not re.findall(r"\]\((?!https://)[^)]*\)", metadata), "links that lead nowhere from PyPI"
    assert f"Project-URL: Changelog, https://github.com/a/b/blob/{tag}/CHANGELOG.md" in metadata


def test_the_source_distribution_is_the_checkout(sources: Path, sdist: Path) -> None:
    """Every file of it is one that git knows, byte for byte, but for what setuptools writes."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split()
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2]: archive.extractfile(member) for member in archive if member.isfile()}
        found = {name: file.read() for name, file in files.items() if file is not None}
    written = {name for name in found if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert found.keys() - written <= set(listed)
    assert not [name for name in found if name.startswith("tests/")], (
        "setuptools takes a part of them, which does not run"
    )
    assert not [name for name in found.keys() - written if found[name] != (sources / name).read_bytes()]


def test_the_plain_wheel_steps_outside_the_checkout(plain: Path, tmp_path: Path) -> None:
    done = run(plain, "-I", "-c", STEPS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    built = f"`{ops.BUILD_COMMAND.format('cpu')}` builds and installs it"
    assert done.stdout == f"pytorch: not built (in a clone of the repository, {built})\n"


def test_the_plain_wheel_brings_its_command(plain: Path, tmp_path: Path) -> None:
    done = run(plain.parent / "scao-hf", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "plan" in done.stdout, done.stderr[-2000:]


def test_required_kernels_that_are_absent_are_an_error(plain: Path, tmp_path: Path) -> None:
    done = run(plain, "-I", "-c", "import scao_hf", cwd=tmp_path, SCAO_REQUIRE_EXT="cpu")
    assert done.returncode != 0
    assert "ImportError: SCAO_REQUIRE_EXT=cpu: no native cpu kernels: not built (in a clone" in done.stderr


def test_the_command_that_the_documentation_prints_installs_native_kernels(native: Path, tmp_path: Path) -> None:
    packages = next((native.parents[1] / "lib").glob("python*/site-packages"))
    assert (packages / "scao_hf" / "_C_cpu.so").exists()
    about = next(packages.glob("scao_hf-*.dist-info/WHEEL")).read_text()
    assert "Root-Is-Purelib: false" in about and "Tag: py3-none-linux_" in about
    done = run(native, "-I", "-c", STEPS, cwd=tmp_path, SCAO_REQUIRE_EXT="cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "native\n"


def test_native_kernels_can_be_switched_off(native: Path, tmp_path: Path) -> None:
    done = run(native, "-I", "-c", STEPS, cwd=tmp_path, SCAO_DISABLE_EXT="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "pytorch: SCAO_DISABLE_EXT is set\n"


def test_a_wheel_that_cannot_have_its_kernels_is_not_built(sources: Path, tmp_path: Path) -> None:
    done = wheel(sources, tmp_path / "wheels", SCAO_BUILD_EXT="cpu", CXX="no-such-compiler")
    assert done.returncode != 0 and not list(tmp_path.rglob("*.whl"))
    expected = "SCAO_BUILD_EXT=cpu: building scao_hf._C_cpu failed: no C++ compiler: 'no-such-compiler' is not on PATH"
    assert expected in done.stdout + done.stderr
