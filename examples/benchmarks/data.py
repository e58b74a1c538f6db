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

Tokens = tuple[list[int], list[int]]  # a prompt and the answer that is learned


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


def question_answer(row: dict[str, object]) -> tuple[str, str]:
    """The question and the answer of one row, which has ``question``/``answer`` or ``messages``.

    Raises:
        ValueError: the row has neither.
    """
    if "question" in row and "answer" in row:
        return str(row["question"]), str(row["answer"])
    messages = row.get("messages")
    if isinstance(messages, list) and len(messages) >= 2:
        return str(messages[-2]["content"]), str(messages[-1]["content"])
    raise ValueError(f"a row with the keys {sorted(row)} has neither question and answer nor messages")


def load(where: str | None) -> Source:
    """Read a data set.

    Args:
        where: a ``.jsonl`` or text file, the name of a data set on the Hugging Face hub, or None for the demo's data.

    Returns:
        Its rows (empty for plain text) and its text.

    Raises:
        ValueError: no row or no text in it.
    """
    path = docstrings() if where is None else Path(where)
    rows: list[tuple[str, str]] = []
    if path.is_file():
        content = path.read_text(encoding="utf-8")
        name = path.name
        if path.suffix == ".jsonl":
            rows = [question_answer(json.loads(line)) for line in content.splitlines() if line.strip()]
    else:
        from datasets import load_dataset

        name, _, part = str(where).partition(":")
        found = load_dataset(name, part or None, split="train")
        plain = "text" in found.column_names
        content = "".join(found["text"]) if plain else ""
        rows = [] if plain else [question_answer(row) for row in found]
    text = "\n\n".join(f"{question}\n{answer}" for question, answer in rows) if rows else content
    if not text.strip():
        raise ValueError(f"{where} is empty: give a .jsonl of question/answer rows or a text file")
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


def encode(rows: Sequence[tuple[str, str]], tokenize: Callable[[str], list[int]], end: int) -> list[Tokens]:
    """Tokenise ``Question: ... Answer: ...`` rows; only the answer and the end token are learned."""
    return [(tokenize(f"Question: {question}\nAnswer:"), [*tokenize(f" {answer}"), end]) for question, answer in rows]


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
