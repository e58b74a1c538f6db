"""What every module of tables writes in the same way: a row says what it has under which head."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence


def table(rows: Sequence[Mapping[str, object]], *below: str) -> str:
    """A Markdown table, ending with a line break.

    Args:
        rows: what to write in each column, by its head; all have the same heads, and there is at least one.
        below: caption and notes, a line each.
    """
    return grid(list(rows[0]), [[str(cell) for cell in row.values()] for row in rows], *below)


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], *below: str) -> str:
    """The same of a table in which heads come twice, or which may be empty."""
    text = "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))
    return "\n".join([text, *below]) + "\n" if below else text


def spread(values: Sequence[float], digits: int, unit: str = "", sign: bool = False) -> str:
    """Mean and, of several values, standard deviation, as text; in a word where a run has diverged, which is infinite."""
    if not math.isfinite(statistics.mean(values)):
        return "diverged"
    text = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "") + unit


def value(number: float | None, form: str) -> str:
    """A number as text, nothing for None."""
    return "" if number is None else format(number, form)


def cell(text: str) -> str:
    """A message as one cell of a table: without what Markdown or HTML would read in it."""
    return text.replace("|", "/").replace("<", "(").replace(">", ")")
