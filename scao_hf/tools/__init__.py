"""The command line: ``scao-hf plan``, ``migrate``, ``compare``, ``report`` and ``doctor``; also ``python -m scao_hf``.

Nothing here is imported by ``scao_hf`` itself, and ``typer``, ``rich``, ``matplotlib`` and ``transformers`` are
imported by the commands that need them.
"""

from __future__ import annotations

import math
import sys

#: The largest number in float32; what is beyond it has diverged, and sums and pictures of it would overflow.
LARGEST = 3.4e38


class ToolError(ValueError):
    """A mistake of the user's, told in one line with its fix; the command line exits with 2."""


def logged(value: float) -> float:
    """A figure of a run as it was logged, infinite where float32 would have it so."""
    return float(value) if not abs(value) > LARGEST else math.copysign(math.inf, value)


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
