"""What a run's task drew at its evaluations: texts, tables and pictures, as `trainer.observe.samples` writes them."""

import csv
import io
import re
import struct
from pathlib import Path
from typing import Any

from trainer.record.terminal import visible

from .folders import below, opened, plain_files

SAMPLES = "samples"
NAME = re.compile(r"step-(\d{1,15})\.(txt|csv|png)")
MOST_SAMPLES, LONGEST_TEXT = 20, 1 << 14
MOST_TABLE = 1 << 20
"""Bytes of a table that are read."""
MOST_ROWS, MOST_COLUMNS, LONGEST_CELL = 200, 50, 500
MOST_PICTURE = 8 << 20
"""Bytes of a picture that is sent."""
MOST_PIXELS = 1 << 25
"""A few bytes may say that they are a picture of gigabytes, which a browser would make room for."""
_PNG = re.compile(rb"\x89PNG\r\n\x1a\n\0\0\0\rIHDR(.{8})", flags=re.DOTALL)


def samples(run_dir: Path) -> list[dict[str, Any]]:
    """The newest ones by step: `kind` is text, table or picture. A file that is none of these says why under `wrong`.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        with below(run_dir, SAMPLES) as folder:
            newest = sorted(_named(folder))[-MOST_SAMPLES:]
            return [{"step": step} | _READERS[kind](folder, name) for step, kind, name in newest]
    except FileNotFoundError:
        return []


def picture(run_dir: Path, step: int) -> bytes:
    """The PNG file of a step. Raises OSError if there is none that can be shown."""
    with below(run_dir, SAMPLES) as folder:
        names = {own: name for own, kind, name in _named(folder) if kind == "png"}
        if step not in names:
            raise FileNotFoundError(2, "there is no image of that step")
        with opened(folder, names[step]) as file:
            content = file.read(MOST_PICTURE + 1)
    if wrong := _wrong(content):
        raise OSError(5, wrong, names[step])
    return content


def _named(folder: int) -> list[tuple[int, str, str]]:
    """Step, suffix and name of each sample."""
    found = [(NAME.fullmatch(name), name) for name, _ in plain_files(folder)]
    return [(int(match[1]), match[2], name) for match, name in found if match]


def _text(folder: int, name: str) -> dict[str, Any]:
    with opened(folder, name) as file:
        return {"kind": "text", "text": visible(file.read(LONGEST_TEXT).decode(errors="replace"))}


def _table(folder: int, name: str) -> dict[str, Any]:
    with opened(folder, name) as file:
        content = file.read(MOST_TABLE + 1)
    if more := len(content) > MOST_TABLE:
        content = content[: content.rfind(b"\n") + 1]
    text = io.StringIO(content.decode(errors="replace"), newline="")
    rows: list[list[str]] = []
    try:
        for row in csv.reader(text):
            if len(rows) > MOST_ROWS:
                more = True
                break
            rows.append([visible(cell[:LONGEST_CELL]) for cell in row[:MOST_COLUMNS]])
    except csv.Error as error:
        return {"kind": "table", "columns": [], "rows": [], "more": False, "wrong": f"{visible(name)}: {error}"}
    head, *body = rows or [[]]
    return {"kind": "table", "columns": head, "rows": body, "more": more}


def _picture(folder: int, name: str) -> dict[str, Any]:
    with opened(folder, name) as file:
        content = file.read(MOST_PICTURE + 1)
    if wrong := _wrong(content):
        return {"kind": "picture", "width": 0, "height": 0, "wrong": f"{visible(name)}: {wrong}"}
    width, height = _size(content)
    return {"kind": "picture", "width": width, "height": height}


_READERS = {"txt": _text, "csv": _table, "png": _picture}


def _size(content: bytes) -> tuple[int, int]:
    """Width and height in pixels; 0, 0: it is no PNG."""
    head = _PNG.match(content)
    return struct.unpack(">II", head[1]) if head else (0, 0)


def _wrong(content: bytes) -> str:
    """Why a picture is not shown; empty: it is."""
    width, height = _size(content)
    if not width * height:
        return "it is not a PNG image"
    if len(content) > MOST_PICTURE or width * height > MOST_PIXELS:
        return f"it is too large to be shown ({width:,} x {height:,} pixels)"
    return ""
