"""Some records of a metrics.jsonl, evenly over the file: a long run's has many GB, and its lists are in no column."""

import os
from pathlib import Path
from typing import Any

from trainer.files.own_files import open_file
from trainer.record.events import wrong_metrics
from trainer.record.lines import parse_line

WHOLE = 1 << 16
"""Bytes for each record wanted up to which the file is read from its beginning."""
LONGEST = 4 << 20
"""Bytes of a line that is looked at here."""


def sample_records(path: Path, most: int) -> list[dict[str, Any]]:
    """At most so many records of training steps, the last among them, as they count: in the order of steps.

    Raises:
        OSError: it is no plain file.
    """
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            lines = _all(file, size, most) if size <= (1 << 20) else _spread(file, size, most)
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    for line in lines:
        if b'"eval_loss"' in line or (record := parse_line(line)) is None or wrong_metrics(record):
            continue
        while found and found[-1]["step"] >= record["step"]:  # the run went back
            found.pop()
        found.append(record)
    return found


def _all(file: Any, size: int, most: int) -> list[bytes]:
    file.seek(0)
    data = file.read(size)
    lines = [line for line in data[: data.rfind(b"\n") + 1].splitlines() if b'"eval_loss"' not in line]
    count = min(most, len(lines))
    return [lines[(number + 1) * len(lines) // count - 1] for number in range(count)]


def _spread(file: Any, size: int, most: int) -> list[bytes]:
    """The whole line after each of as many places, and the last one."""
    lines, end = [], 0
    for number in range(most - 1):
        file.seek(max(size * number // most, end))
        if number:
            file.readline(LONGEST)
        for _ in range(2):  # the second where the first is an evaluation's
            line = file.readline(LONGEST)
            end = file.tell()
            if b'"eval_loss"' not in line:
                break
        if line.endswith(b"\n"):
            lines.append(line)
    block = 1 << 16
    while block <= 1 << 24:
        file.seek(max(size - block, 0))
        tail = [each for each in file.read(block).split(b"\n")[1:-1] if b'"eval_loss"' not in each]
        if tail:
            return [*lines, tail[-1]]
        block *= 4
    return lines
