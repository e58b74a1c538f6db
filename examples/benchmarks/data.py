"""The text that the benchmark tasks train on: instruction rows or plain text, split by one fixed rule.

Every function is a pure function of the file's content, so that a name and a fingerprint identify the data of a run.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import random
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "benchmarks"

HELD_OUT_ROWS = "the last tenth of the rows, at most 500"
HELD_OUT_TEXT = "the last tenth of the text"

SUMS = "sums"  # the name of the data that ``sums`` makes

Tokens = tuple[list[int], list[int]]  # a prompt and the answer that is learned


class Unusable(ValueError):
    """Data that cannot be had or learned from; the message says why and what to give instead."""


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: what to call it in a result file.
        rows: questions and answers, empty for plain text.
        text: all of it as one text.
        base: texts to pretrain a small model on before it learns to answer.
        fingerprint: of the content.
    """

    name: str
    rows: list[tuple[str, str]]
    text: str
    base: list[str]
    fingerprint: str


def demo_script(name: str) -> ModuleType:
    """A script of examples/demo as a module."""
    folder = str(Path(__file__).resolve().parents[1] / "demo")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def docstrings() -> Path:
    """The demo's instruction data, made from the standard library's docstrings when it is not there yet."""
    path = ROOT / ".cache" / "demo" / "docstrings.jsonl"
    if not path.is_file():
        subprocess.run([sys.executable, ROOT / "examples" / "demo" / "harvest_data.py"], check=True, cwd=ROOT)
    return path


def other_docstrings(answers: str) -> list[str]:
    """The docstrings of the standard library that are not part of these answers."""
    harvest = demo_script("harvest_data")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    known = re.sub(r"\s+", " ", answers)
    found = []
    for module in harvest.MODULES:
        for node in ast.walk(ast.parse(harvest.module_source(stdlib, module) or "")):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and re.sub(r"\s+", " ", text)[:40] not in known:
                found.append(text)
    return found


def sums(count: int = 10_000) -> list[tuple[str, str]]:
    """Sums of two numbers of five digits: whether an answer is right needs no judge."""
    rng = random.Random(0)
    drawn = [(rng.randrange(10_000, 100_000), rng.randrange(10_000, 100_000)) for _ in range(count)]
    return [(f"What is {a} + {b}?", str(a + b)) for a, b in drawn]


def question_answer(row: object) -> tuple[str, str]:
    """The question and the answer of one row, which has ``question``/``answer`` or ``messages``.

    Raises:
        Unusable: the row has neither.
    """
    if not isinstance(row, dict):
        raise Unusable(f"a row is {row!r:.80}: it must be an object with question and answer, or with messages")
    if "question" in row and "answer" in row:
        return str(row["question"]), str(row["answer"])
    messages = row.get("messages")
    if isinstance(messages, list) and len(messages) >= 2:
        return str(messages[-2]["content"]), str(messages[-1]["content"])
    raise Unusable(f"a row with the keys {sorted(row)} has neither question and answer nor messages")


def json_lines(path: Path, content: str) -> list[object]:
    """The rows of a .jsonl file.

    Raises:
        Unusable: a line is not JSON.
    """
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise Unusable(f"{path}, line {number}, is not JSON: {error}") from error
    return rows


def from_hub(where: str) -> tuple[list[tuple[str, str]], str]:
    """The rows, or the text, of a data set of the Hugging Face hub.

    Raises:
        Unusable: ``where`` can only be a file, which is not there; or the hub does not have it, or cannot be reached.
    """
    if Path(where).suffix in (".jsonl", ".json", ".txt", ".csv", ".parquet") or where.startswith((".", "/", "~")):
        raise Unusable(f"there is no file {where}: give a .jsonl of question/answer rows, a text file, or a hub name")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise Unusable(
            f"{where} is not a file, and the hub's data sets need a package: pip install datasets"
        ) from error
    name, _, part = where.partition(":")
    try:
        found = load_dataset(name, part or None, split="train")
    except (OSError, ValueError) as error:  # no such data set, no such part of it, no network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unusable(f"{where} is not a file, and the hub does not give it: {reason}") from error
    if "text" in found.column_names:
        return [], "".join(found["text"])
    return [question_answer(row) for row in found], ""


def load(where: str | None) -> Source:
    """Read a data set.

    Args:
        where: a ``.jsonl`` or text file, the name of a data set on the Hugging Face hub, ``sums``, or None for the demo's data.

    Returns:
        Its rows (empty for plain text) and its text.

    Raises:
        Unusable: it cannot be had, or has no row and no text.
    """
    path = docstrings() if where is None else Path(where)
    rows: list[tuple[str, str]] = []
    if where == SUMS:
        rows, content, name = sums(), "", SUMS
    elif path.is_file():
        content = path.read_text(encoding="utf-8")
        name = path.name
        if path.suffix == ".jsonl":
            rows = [question_answer(row) for row in json_lines(path, content)]
    else:
        name = str(where).partition(":")[0]
        rows, content = from_hub(str(where))
    text = "\n\n".join(f"{question}\n{answer}" for question, answer in rows) if rows else content
    if not text.strip():
        raise Unusable(f"{where} is empty: give a .jsonl of question/answer rows or a text file")
    base = other_docstrings(text) if where is None else [question for question, _ in rows[: len(rows) - held_out(rows)]]
    return Source(name, rows, text, base, hashlib.sha256(text.encode()).hexdigest()[:12])


def held_out(rows: Sequence[object]) -> int:
    """How many rows are held out, by ``HELD_OUT_ROWS``."""
    return min(500, len(rows) // 10)


def split_rows(rows: Sequence[Tokens]) -> tuple[list[Tokens], list[Tokens]]:
    """Training rows and held-out rows."""
    count = held_out(rows)
    if not count:
        raise ValueError(f"{len(rows)} rows leave none to hold out: at least 10 are needed")
    return list(rows[:-count]), list(rows[-count:])


def encode(
    rows: Sequence[tuple[str, str]], tokenize: Callable[[str], list[int]], end: int, start: Sequence[int] = ()
) -> list[Tokens]:
    """Tokenise ``Question: ... Answer: ...`` rows, each after ``start``; only the answer and the end token are learned."""
    return [
        ([*start, *tokenize(f"Question: {question}\nAnswer:")], [*tokenize(f" {answer}"), end])
        for question, answer in rows
    ]


def batch_order(rows: Sequence[Tokens], batch: int, seed: int, bucket: int = 16) -> list[list[int]]:
    """The row numbers of each batch of one epoch, rows of like length together.

    The rows are shuffled by the seed, cut into buckets of ``bucket`` batches, sorted by length inside a bucket to save
    padding, and the batches of a bucket are shuffled again. Optimizers play no part in it: one seed, one order.
    """
    rng = random.Random(seed)
    numbers = list(range(len(rows)))
    rng.shuffle(numbers)
    order: list[list[int]] = []
    for start in range(0, len(numbers), batch * bucket):
        part = sorted(numbers[start : start + batch * bucket], key=lambda row: sum(map(len, rows[row])))
        batches = [part[at : at + batch] for at in range(0, len(part) - batch + 1, batch)]
        rng.shuffle(batches)
        order += batches
    if not order:
        raise ValueError(f"{len(rows)} rows do not fill one batch of {batch}")
    return order
