"""What the ranks of a run printed."""

import os
import re
from pathlib import Path
from typing import Any

from trainer.record.terminal import visible

from .folders import below, opened, plain_files

LOGS = "logs"
LOG = re.compile(r"attempt-(\d{1,9})-rank-(\d{1,9})\.log")
MOST_LOG = 1 << 20
"""Bytes of a log that are sent at once."""
MOST_SEARCHED = 64 << 20
"""Bytes at the end of a log that are searched."""


def log_files(run_dir: Path) -> list[tuple[int, int, str]]:
    """Attempt, rank and file of each log."""
    try:
        with below(run_dir, LOGS) as folder:
            named = [(found, name) for name, _ in plain_files(folder) if (found := LOG.fullmatch(name))]
            return sorted((int(found[1]), int(found[2]), name) for found, name in named)
    except FileNotFoundError:
        return []


def log(run_dir: Path, rank: int, tail: int, search: str, attempt: int | None = None) -> dict[str, Any]:
    """The end of what a rank printed in its newest attempt, or in another one.

    Args:
        tail: bytes at most.
        search: only lines that have this in them, whatever its case; empty: all.

    Raises:
        OSError: it cannot be read.
    """
    own = [(n, name) for n, each, name in log_files(run_dir) if each == rank and attempt in (None, n)]
    if not own:
        return {"text": "", "offset": 0, "truncated": False, "attempt": None}
    number, name = own[-1]
    tail = min(max(tail, 1), MOST_LOG)
    with below(run_dir, LOGS) as folder, opened(folder, name) as file:
        size = file.seek(0, os.SEEK_END)
        begin = max(0, size - (MOST_SEARCHED if search else tail))
        file.seek(begin)
        if search:
            wanted, lines, length = search.encode().lower(), [], 0
            for line in file.read(size - begin).splitlines(keepends=True):
                if wanted in line.lower():
                    lines.append(line)
                    length += len(line)
            truncated = begin > 0 or length > tail
            text = b"".join(lines)[-tail:]
        else:
            text, truncated = file.read(size - begin), begin > 0
    return {
        "text": visible(text.decode(errors="replace")), "offset": begin, "truncated": truncated, "attempt": number
    }  # fmt: skip
