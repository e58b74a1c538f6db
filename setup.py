"""Build of the native kernels; everything else is in pyproject.toml.

SCAO_BUILD_EXT chooses what is built: ``0`` (default) nothing, a pure Python wheel; ``cpu``; ``cuda``, both; ``auto``,
what this machine can build, saying what it leaves out. An explicit choice that cannot be met is an error.

SCAO_URL is the address of the repository on GitHub, for the links of a release: README's paths then lead to its files in the
tag of this version. Without it they stay relative.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CHOICES = ("0", "cpu", "cuda", "auto")
CSRC = Path("csrc")
TORCH_TARGET = "0x020A000000000000"  # torch 2.10: the oldest whose stable ABI has what the kernels use
TOOLKIT = Path("/usr/local/cuda")  # as a rule off PATH
CUDA_ARCHITECTURES = ("75", "80", "86", "89", "90")
NEWER_ARCHITECTURES = ("100", "120")  # where the toolkit has them; elsewhere the PTX is compiled at the first use


def choice() -> str:
    """The value of SCAO_BUILD_EXT."""
    value = os.environ.get("SCAO_BUILD_EXT", "0")
    if value not in CHOICES:
        sys.exit(f"SCAO_BUILD_EXT={value!r} is not valid: it must be one of {', '.join(CHOICES)}")
    return value


def torch_paths() -> tuple[Path, Path]:
    """Torch's include and library folders, without importing torch."""
    find = "import importlib.util as util; spec = util.find_spec('torch'); print(spec.origin if spec else '')"
    # -E: pip's build environment hides through PYTHONPATH what is installed for the same Python.
    commands = ([sys.executable, *flags, "-c", find] for flags in ((), ("-E",)))
    origins = (subprocess.run(it, capture_output=True, text=True, check=True).stdout.strip() for it in commands)
    origin = next(filter(None, origins), None)
    if origin is None:
        raise RuntimeError(
            f"torch is not installed for {sys.executable}: install torch>=2.10 first; if that is not the Python that is "
            "installed for (uv, python -m build), install 'setuptools>=77' as well and pass --no-build-isolation"
        )
    root = Path(origin).parent
    if not (root / "include/torch/csrc/stable/ops.h").exists():
        raise RuntimeError(f"the torch in {root} has no stable ABI: torch>=2.10 is needed to build the kernels")
    return root / "include", root / "lib"


def compiler() -> str:
    """The C++ compiler."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise RuntimeError(f"no C++ compiler: {name!r} is not on PATH (install g++ 11 or later, or set CXX)")
    return name


def nvcc() -> str:
    """The CUDA compiler: of CUDA_HOME if that is set, else on PATH or in the usual place."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH", os.defpath), f"{TOOLKIT}/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    if found is None:
        where = f"in {places[-1]}" if home else f"on PATH or in {places[-1]}"
        raise RuntimeError(f"no CUDA compiler: there is no nvcc {where} (install the CUDA toolkit, or set CUDA_HOME)")
    return found


def toolkit_of(nvcc: str) -> Path:
    """The toolkit's folder; nvcc says it itself, as the file on PATH may be a wrapper script."""
    plan = subprocess.run([nvcc, "-dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    tops = [line.removeprefix("#$ TOP=") for line in plan.stderr.splitlines() if line.startswith("#$ TOP=")]
    return Path(tops[0] if tops else Path(nvcc).parent.parent).resolve()


class BuildKernels(build_ext):
    """Calls g++ and nvcc: torch's own CUDAExtension refuses to build with a torch for the CPU."""

    def run(self) -> None:
        """Build every chosen part; under ``auto`` a part that cannot be built is named and left out."""
        for extension in self.extensions:
            try:
                self.build_extension(extension)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                message = f"building {extension.name} failed: {error}"
                if choice() != "auto":
                    sys.exit(f"SCAO_BUILD_EXT={choice()}: {message}")
                print(f"SCAO_BUILD_EXT=auto: left out: {message}", file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        """No Python module: the file is loaded with torch.ops.load_library."""
        return os.path.join(*fullname.split(".")) + ".so"

    def get_outputs(self) -> list[str]:
        """Only what was built (``auto`` may leave something out)."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """In-place builds write to the source folder directly."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one shared object."""
        root = Path() if self.inplace else Path(self.build_lib)
        target = root / self.get_ext_filename(ext.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            build_cuda(target, Path(folder)) if ext.name.endswith("cuda") else build_cpu(target)


def call(*command: str | Path) -> None:
    """Run a compiler and show what it runs."""
    print(*command, flush=True)
    subprocess.run([str(part) for part in command], check=True)


def build_cpu(target: Path) -> None:
    """The eigensolver. On x86-64 it needs AVX2, as any processor since 2015 has: scao_hf/ops.py asks for it."""
    include, lib = torch_paths()
    machine = ["-march=x86-64-v3"] if platform.machine() in ("x86_64", "AMD64") else []
    call(compiler(), "-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-Wall", "-Wextra",
         "-fvisibility=hidden", *machine, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", include, "-shared",
         CSRC / "eigh.cpp", "-o", target, f"-L{lib}", "-ltorch_cpu")  # fmt: skip


def build_cuda(target: Path, folder: Path) -> None:
    """Device code for every architecture, and the glue. Links a stand-in for libtorch_cuda, which a CPU torch lacks."""
    include, lib = torch_paths()
    toolkit = toolkit_of(nvcc())
    known = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    newer = [arch for arch in NEWER_ARCHITECTURES if f"compute_{arch}" in known]
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (*CUDA_ARCHITECTURES, *newer)]
    gencode.append(f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}")
    device = folder / "launch.o"
    call(nvcc(), "-std=c++17", "-O3", "-Xcompiler", "-fPIC", *gencode, "-c", CSRC / "launch.cu", "-o", device)
    stand_in = folder / "libtorch_cuda.so"
    (folder / "empty.cpp").write_text("")
    call(compiler(), "-shared", "-fPIC", folder / "empty.cpp", "-o", stand_in)
    define = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
    cuda_lib = next((path for path in (toolkit / "lib64", toolkit / "lib") if path.exists()), toolkit / "lib64")
    call(compiler(), "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", define, "-DUSE_CUDA", "-isystem", include,
         f"-I{toolkit}/include", "-shared", CSRC / "cuda.cpp", device, "-o", target, f"-L{lib}", "-ltorch_cpu",
         f"-L{folder}", "-Wl,--no-as-needed", "-ltorch_cuda", f"-L{cuda_lib}", "-lcudart_static", "-ldl", "-lrt",
         "-lpthread")  # fmt: skip


class KernelWheel(bdist_wheel):
    """The kernels are not a Python module, and torch's stable ABI serves every Python: only the platform counts."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3."""
        return ("py3", "none", super().get_tag()[2])


def version() -> str:
    """The version, without importing torch."""
    found = re.search(r'^__version__ = "(.+)"$', Path("scao_hf/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def readme(repository: str | None) -> str:
    """README with links that lead somewhere from PyPI's page too, where the repository is known."""
    text = Path("README.md").read_text(encoding="utf-8")
    if repository is None:
        return text

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match[2].endswith(".svg") else "blob"
        return f"{match[1]}{repository}/{kind}/v{version()}/{match[2]}"

    # [text](path), ![text](path), src="path", srcset="path"; not an address, not a place on the page itself.
    return re.sub(r'(\]\(|src(?:set)?=")(?![a-z]+:|#)([^)"\s]+)', absolute, text)


def urls(repository: str | None) -> dict[str, str]:
    """The links at the side of PyPI's page."""
    if repository is None:
        return {}
    at = {"Documentation": "blob/v{}/docs/index.md", "Changelog": "blob/v{}/CHANGELOG.md", "Issues": "issues"}
    return {"Repository": repository} | {name: f"{repository}/{path.format(version())}" for name, path in at.items()}


REPOSITORY = os.environ.get("SCAO_URL", "").rstrip("/") or None
PARTS = {"0": [], "cpu": ["_C_cpu"], "cuda": ["_C_cpu", "_C_cuda"], "auto": ["_C_cpu", "_C_cuda"]}
setup(
    ext_modules=[Extension(f"scao_hf.{name}", sources=[]) for name in PARTS[choice()]],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": KernelWheel},
    long_description=readme(REPOSITORY),
    long_description_content_type="text/markdown",
    project_urls=urls(REPOSITORY),
)
