"""Every run of a folder in one row each: of those whose record is as it was, the row of the last time."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from configs.base import MOST, Typed
from trainer.files.durable import replace_text
from trainer.files.own_files import read_bytes
from trainer.files.plain_json import dump

from .lines import EVENTS, METRICS, summary

KEPT = ".summaries.json"
MOST_BYTES = 256 << 20
Whole = Annotated[int, Field(ge=-MOST, lt=MOST)]
Signature = tuple[Whole, Whole, Whole, Whole]
"""Time of change in nanoseconds and size of events.jsonl, and of metrics.jsonl: whatever is recorded changes a size."""


class Row(Typed):
    """As `trainer.record.lines.summary`."""

    name: str
    status: str
    reason: str | None
    step: Whole
    loss: float | None
    eval_loss: float | None
    tokens: float | None
    weight: float | None
    unit: str
    attempts: Whole
    wall_time: float
    updated: float | None


class _Kept(Typed):
    signature: Annotated[Signature, Field(strict=False)]
    row: Row


_ALL = TypeAdapter(dict[str, _Kept])


def summaries(root: Path, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """`summary` of each of these folders of runs in `root`; one that cannot be read is named on stderr and left out.

    What was read is kept in a file of `root`, but for runs that are being trained, whose state is their process's too.
    A folder that cannot be written costs time, and nothing else.
    """
    kept = _read(root)
    found, now = {}, {}
    for folder in folders:
        signature = _signature(folder)
        known = kept.get(folder.name)
        if known and known.signature == signature:
            now[folder.name], found[folder] = known, known.row.model_dump()
            continue
        try:
            found[folder] = summary(folder)
        except OSError as error:
            print(f"muster: {error.filename or folder}: {error.strerror}", file=sys.stderr)
            continue
        if found[folder]["status"] != "RUNNING":
            with contextlib.suppress(ValidationError):  # a record that holds something odd
                now[folder.name] = _Kept(signature=signature, row=Row(**found[folder]))
    if now != kept:
        with contextlib.suppress(OSError):
            # Not by pydantic, which refuses a name that is no UTF-8.
            replace_text(root / KEPT, dump({name: each.model_dump() for name, each in now.items()}))
    return list(found.values())


def _read(root: Path) -> dict[str, _Kept]:
    try:
        return _ALL.validate_python(json.loads(read_bytes(root / KEPT, MOST_BYTES)))
    except (OSError, ValueError, RecursionError):
        return {}


def _signature(folder: Path) -> Signature:
    found = []
    for name in (EVENTS, METRICS):
        try:
            status = os.lstat(os.path.join(folder, name))
            found += [status.st_mtime_ns, status.st_size]
        except OSError:
            found += [0, -1]
    return found[0], found[1], found[2], found[3]
