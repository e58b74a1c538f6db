"""Make the demo's instruction data set from the docstrings of Python's standard library.

The sources are parsed, never imported, so that nothing runs and the result depends on the Python version alone.
Each row is one chat in Axolotl's ``chat_template`` format::

    {"messages": [{"role": "user", "content": "What does `textwrap.fill` do in Python?"},
                  {"role": "assistant", "content": "`textwrap.fill(text, width=70, **kwargs)`\\n\\nFill a single ..."}]}
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

# Modules whose docstrings are written as prose, present in every supported version of Python.
MODULES = (
    "abc argparse ast base64 bdb bisect bz2 calendar cmd code codecs collections compileall configparser contextlib "
    "copy csv dataclasses datetime difflib dis doctest email enum filecmp fileinput fnmatch fractions ftplib "
    "functools genericpath getpass glob gzip hashlib heapq hmac html http imaplib inspect ipaddress json linecache "
    "locale logging lzma mailbox mimetypes numbers operator optparse os pathlib pickle pkgutil platform plistlib "
    "poplib posixpath pprint pstats py_compile queue quopri random re runpy sched secrets selectors shelve shlex "
    "shutil smtplib socket socketserver sqlite3 ssl stat statistics string subprocess symtable sysconfig tarfile "
    "tempfile textwrap threading timeit token tokenize trace traceback tracemalloc types typing uuid venv warnings "
    "wave weakref webbrowser zipapp zipfile zipimport"
).split()

QUESTIONS = (
    "What does `{name}` do in Python?",
    "Explain Python's `{name}`.",
    "How is `{name}` called, and what is it for?",
    "Give the call and a short description of `{name}`.",
)
SHORTEST_ANSWER, LONGEST_ANSWER = 60, 300  # characters
# Sessions, signatures, tables of arguments and notes to the maintainers.
NOT_PROSE = re.compile(r">>>|->|--|:param|\b(TODO|XXX|deprecated)\b|[=:] *$", re.IGNORECASE)


def module_source(stdlib: Path, module: str) -> str | None:
    """The source of a standard-library module or package, None where this Python has none."""
    for path in (stdlib / f"{module}.py", stdlib / module / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def call_text(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, method: bool) -> str:
    """How the object is written down: ``name(arguments)`` for a function, the bare name for a class."""
    if isinstance(node, ast.ClassDef):
        return name
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if "property" in decorators:
        return name
    arguments = node.args
    bound = arguments.posonlyargs or arguments.args
    if method and "staticmethod" not in decorators and bound:
        del bound[0]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"{name}({ast.unparse(arguments)})"


def private_decorator(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether a decorator that belongs to the module's internals turns the object into something else."""
    return any(ast.unparse(decorator).startswith("_") for decorator in node.decorator_list)


def opening_prose(docstring: str) -> str | None:
    """The paragraphs of prose that open a docstring, each on one line; None when they make no usable answer."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        text = re.sub(r"\s+", " ", paragraph)
        if not (text.isascii() and text[:1].isupper() and text.endswith(".") and not NOT_PROSE.search(text)):
            break
        if sum(map(len, kept)) + len(text) > LONGEST_ANSWER:
            break
        kept.append(text)
    return "\n\n".join(kept) if sum(map(len, kept)) >= SHORTEST_ANSWER else None


def pairs_of(module: str, source: str) -> Iterator[tuple[str, str]]:
    """Yield (name, answer) for every public function, class and method that a module documents."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.parse(source).body:
        if not isinstance(node, definitions) or node.name.startswith("_"):
            continue
        inner = node.body if isinstance(node, ast.ClassDef) else []
        documented = [(f"{module}.{node.name}", node, False)]
        documented += [
            (f"{module}.{node.name}.{member.name}", member, True)
            for member in inner
            if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)) and not member.name.startswith("_")
        ]
        for name, definition, method in documented:
            text = opening_prose(ast.get_docstring(definition) or "")
            call = call_text(name, definition, method)
            # A private decorator or default value makes a call that nobody would write.
            if text is not None and "=_" not in call and not private_decorator(definition):
                yield name, f"`{call}`\n\n{text}"


def harvest(stdlib: Path, limit: int) -> list[dict[str, list[dict[str, str]]]]:
    """Collect at most ``limit`` rows in an order that mixes the modules and is the same on every run.

    Args:
        stdlib: the folder of the standard library's sources.
        limit: how many rows to keep.

    Returns:
        One chat per row.

    Raises:
        FileNotFoundError: ``stdlib`` holds no sources (a Python that ships without them).
    """
    found: dict[str, str] = {}
    answers: set[str] = set()
    for module in MODULES:
        source = module_source(stdlib, module)
        for name, answer in pairs_of(module, source) if source else ():
            text = answer.partition("\n\n")[2]
            # A sentence that documents many methods ("Return the name.") would be learned by heart, not understood.
            if name not in found and text not in answers:
                answers.add(text)
                found[name] = answer
    if not found:
        raise FileNotFoundError(f"{stdlib} holds no Python sources with docstrings; run this with a full CPython")
    names = sorted(found, key=lambda name: (zlib.crc32(name.encode()), name))[:limit]
    questions = [QUESTIONS[zlib.crc32(name.encode()) // 7 % len(QUESTIONS)].format(name=name) for name in names]
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": found[name]}]}
        for question, name in zip(questions, names, strict=True)
    ]


def write(path: Path, rows: list[dict[str, list[dict[str, str]]]]) -> None:
    """Write the rows as JSON lines unless the file holds them already."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        print(f"data: {path} is up to date ({len(rows)} question/answer pairs)")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written next to the target and renamed, so that a killed run never leaves half a data set behind.
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    print(f"data: wrote {len(rows)} question/answer pairs to {path}")


def main() -> int:
    """Write the training set and the held-out set; a file with the same content is left alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path(".cache/demo"), help="folder (default: %(default)s)")
    parser.add_argument("--train", type=int, default=640, help="rows to train on (default: %(default)s)")
    parser.add_argument("--eval", type=int, default=48, help="held-out rows (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.train < 1 or arguments.eval < 0:
        parser.error("--train must be at least 1 and --eval at least 0")
    rows = harvest(Path(sysconfig.get_paths()["stdlib"]), arguments.train + arguments.eval)
    if len(rows) <= arguments.eval:
        parser.error(f"the standard library gives {len(rows)} rows: --eval {arguments.eval} leaves none to train on")
    held_out = len(rows) - arguments.eval
    write(arguments.output / "docstrings.jsonl", rows[:held_out])
    write(arguments.output / "docstrings_eval.jsonl", rows[held_out:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
