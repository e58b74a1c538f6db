"""The command line: ``scao-hf plan``, ``migrate``, ``compare``, ``report`` and ``doctor``; also ``python -m scao_hf``.

Nothing here is imported by ``scao_hf`` itself, and ``typer``, ``rich``, ``matplotlib`` and ``transformers`` are
imported by the commands that need them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: The largest number in float32; what is beyond it has diverged, and sums and pictures of it would overflow.
LARGEST = 3.4e38


class ToolError(ValueError):
    """A mistake of the user's, told in one line with its fix; the command line exits with 2."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell that a file or folder under ``--out`` cannot be written to as a mistake of the user's."""
    try:
        yield
    except OSError as error:
        raise ToolError(f"{path} cannot be written to ({error.strerror}): choose another with --out") from error


def json_rows(path: Path) -> list[Any]:
    """The rows of a file of JSON lines; the last line of a run that was killed may be half written, and is left out."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def logged(value: float) -> float:
    """A figure of a run as it was logged, infinite where float32 would have it so."""
    return float(value) if not abs(value) > LARGEST else math.copysign(math.inf, value)


def duration(seconds: float) -> str:
    """A time in words: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def main() -> None:
    """Run the command line."""
    try:
        from scao_hf.tools.cli import app

        app()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "matplotlib", "yaml", "transformers", "accelerate"):
            raise
        print(
            f"scao-hf: {error.name} is not installed, which the command line needs: pip install 'scao-hf[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
