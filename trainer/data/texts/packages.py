"""Functions of Python's standard library as they are written, labelled by the package that they stand in."""

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
"""In the order of the classes."""
SHORTEST = 4
"""Fewest lines."""


def functions() -> pa.Table:
    """The functions of `PACKAGES` in this machine's standard library; of equal ones the first."""
    found: dict[str, int] = {}
    for label, package in enumerate(PACKAGES):
        for path in sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py")):
            for function in _functions(path.read_text(encoding="utf-8")):
                found.setdefault(function, label)
    return pa.table({"text": list(found), "label": pa.array(found.values(), pa.int64())})


def _functions(source: str) -> Iterator[str]:
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own = lines[node.lineno - 1 : node.end_lineno]
            if len(own) >= SHORTEST:
                yield textwrap.dedent("".join(own))
