"""New environments without network: what a user's machine holds before the package is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "scao_hf", "axolotl_plugin", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in",
)  # fmt: skip


def copy_sources(folder: Path) -> Path:
    """What a checkout holds, without what was built in it."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, folder / name, ignore=built)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command without this process's settings for SCAO."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SCAO_") and k not in ("PYTHONPATH", "CXX")}
    words = [str(part) for part in command]
    return subprocess.run(words, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True)


def show_torch(python: Path) -> None:
    """Let an environment see what this one holds. A path in a .pth file does not make other .pth files run."""
    packages = next((python.parents[1] / "lib").glob("python*/site-packages"))
    (packages / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")


def setuptools_wheel(folder: Path) -> None:
    """The setuptools of this environment as a wheel, so that pip's build environment needs no network."""
    found = distribution("setuptools")
    assert found.files is not None
    with zipfile.ZipFile(folder / f"setuptools-{found.version}-py3-none-any.whl", "w") as archive:
        for file in found.files:
            if ".." not in file.parts and file.suffix != ".pyc":
                archive.write(file.locate(), str(file))
