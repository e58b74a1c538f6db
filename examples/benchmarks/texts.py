"""What every module of tables writes in the same way."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, ending with a line break."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def spread(values: Sequence[float], digits: int, unit: str = "", sign: bool = False) -> str:
    """Mean and, of several values, standard deviation, as text; in a word where a run has diverged, which is infinite."""
    if not math.isfinite(statistics.mean(values)):
        return "diverged"
    text = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "") + unit
