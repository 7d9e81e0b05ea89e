"""The rows of runs that have ended, kept in a file of their root: a new server shows ten thousand at once."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import FailFast, Field, TypeAdapter

from configs.base import Typed
from trainer.files.durable import replace_text
from trainer.files.own_files import read_bytes
from trainer.files.plain_json import dump

from ..responses import RunRow
from .config_values import Config, Configs, Section
from .rows import FILES, LIVE, Run

KEPT = ".dashboard.json"
FORMAT = 2
MOST_BYTES = 256 << 20
Index = Annotated[int, Field(ge=0, lt=1 << 24)]


class _Kept(Typed):
    signature: Annotated[list[int], Field(min_length=2 * len(FILES), max_length=2 * len(FILES))]
    row: RunRow
    config: list[Index]
    """Of sections."""
    metrics: Index


class _File(Typed):
    format: int
    shapes: Annotated[list[list[str]], FailFast()]
    sections: Annotated[list[tuple[Index, list[Any]]], FailFast()]
    runs: dict[str, Any]
    """Of what each is, `_RUN` checks: it stops at the first that is wrong, and hands on one at a time."""


_FILE = TypeAdapter(_File)
_RUN = TypeAdapter(_Kept)


def load(root: Path, configs: Configs) -> dict[str, Run]:
    """What was kept in a root, by the runs' paths in it; empty where nothing is, or nothing that can be used."""
    try:
        kept = _FILE.validate_python(json.loads(read_bytes(root / KEPT, MOST_BYTES)), strict=False)
        if kept.format != FORMAT:
            return {}
        shapes = [configs.shape(names) for names in kept.shapes]
        sections = [
            Section(shapes[shape], tuple(values))  # whose values are others' too stand in the file once
            for shape, values in kept.sections
            if len(kept.shapes[shape]) == len(values)
        ]
        if len(sections) != len(kept.sections):
            return {}
        found = {}
        while kept.runs:
            path, value = kept.runs.popitem()
            each = _RUN.validate_python(value, strict=False)
            config = tuple(sections[number] for number in each.config)
            found[path] = Run(
                each.row.id, f"{root}/{path}", each.row.sweep, tuple(each.signature), each.row, config,
                sections[each.metrics],
            )  # fmt: skip
        return found
    except (OSError, ValueError, IndexError, RecursionError):
        return {}


def save(root: Path, runs: Sequence[Run]) -> None:
    """Keep the rows of those that are not being trained. A root that cannot be written costs time, and nothing else."""
    shapes: dict[tuple[str, ...], int] = {}
    sections: dict[int, int] = {}
    told: list[tuple[int, Sequence[Any]]] = []
    kept = {}

    def number(section: Section) -> int:
        if id(section) not in sections:
            sections[id(section)] = len(told)
            told.append((shapes.setdefault(section.keys, len(shapes)), section.values))
        return sections[id(section)]

    def numbers(config: Config) -> list[int]:
        return [number(section) for section in config]

    for run in runs:
        if run.row is not None and run.row.status not in (*LIVE, "UNREADABLE"):
            path = run.folder[len(str(root)) + 1 :]
            kept[path] = {
                "signature": run.signature,
                "row": run.row.plain(),
                "config": numbers(run.config),
                "metrics": number(run.metrics),
            }
    with contextlib.suppress(OSError, ValueError, TypeError):
        tree = {"format": FORMAT, "shapes": list(shapes), "sections": told, "runs": kept}
        replace_text(root / KEPT, dump(tree))
