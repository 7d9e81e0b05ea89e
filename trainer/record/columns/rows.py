"""The record by column: what `trainer.record.lines.read_metrics` reads, without parsing a line twice."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..lines import read_events
from .parse import KEYS, parse, parsed_lines
from .parts import Copy, DamagedCopy, joined, update_columns


class Rows(NamedTuple):
    """Lines of metrics.jsonl in the order of the file."""

    step: np.ndarray
    """[rows], as the next ones."""
    attempt: np.ndarray
    time: np.ndarray
    evaluation: np.ndarray
    """Whether it is an evaluation's."""
    values: dict[str, np.ndarray]
    """float64 by name, NaN where a line has no such number."""


def read_columns(run_dir: str | Path, names: Sequence[str], from_step: int = 0) -> dict[str, np.ndarray]:
    """The record as it counts (see `trainer.record.lines.read_metrics`) by column, also of a run that is being trained.

    Args:
        names: top-level numbers of metrics.jsonl; those in lists are there only.
        from_step: leave out what is before it.

    Returns:
        each name, and `step` and `time`: [rows] of the lines that have any of the names, in the order of steps, an
        evaluation after its step. float64, NaN where a line has no such number; `step` is int64.
    """
    rows = read_rows(run_dir, names)
    chosen = counting(rows, read_events(run_dir)) & (rows.step >= from_step)
    chosen &= np.any([~np.isnan(rows.values[name]) for name in names], axis=0) if names else True
    order = np.flatnonzero(chosen)
    order = order[np.lexsort((rows.evaluation[order], rows.step[order]))]
    return {"step": rows.step[order], "time": rows.time[order]} | {name: rows.values[name][order] for name in names}


def counting(rows: Rows, events: Sequence[dict[str, Any]]) -> np.ndarray:
    """Which lines count, [rows] of bool: as `trainer.record.lines.MetricsIndex` has it."""
    train = np.flatnonzero(~rows.evaluation)
    counts = np.ones(len(rows.step), bool)
    if len(train):
        steps = rows.step[train]
        back = np.concatenate([[False], steps[1:] <= steps[:-1]])
        least = np.full(len(rows.step) + 1, np.iinfo(np.int64).max)
        least[train[back]] = steps[back]
        later = np.minimum.accumulate(least[::-1])[::-1][1:]  # of the lines after each, the earliest step gone back to
        counts = later > rows.step
    evaluated = np.flatnonzero(rows.evaluation & counts)[::-1]
    last = evaluated[np.unique(rows.step[evaluated], return_index=True)[1]]
    counts[evaluated] = False
    counts[last] = True
    for event in events:
        if event["event"] == "rollback":
            later = (rows.attempt > event["attempt"]) | (
                (rows.attempt == event["attempt"]) & (rows.time > event["time"])
            )
            counts &= (rows.step <= event["to_step"]) | later
    return counts


def read_rows(run_dir: str | Path, names: Sequence[str]) -> Rows:
    """Every line with these numbers, superseded ones too; a copy that is missing or too old is made first."""
    return rows_of(list(_pieces(run_dir, names)), names)


def read_some_rows(run_dir: str | Path, names: Sequence[str]) -> Iterator[Rows]:
    """As `read_rows`, some lines at a time: a long record is not in memory whole."""
    for piece in _pieces(run_dir, names):
        yield rows_of([piece], names)


def _pieces(run_dir: str | Path, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    run_dir = Path(run_dir)
    with contextlib.suppress(OSError):  # a folder that cannot be written, or a disk that is full: it takes longer
        update_columns(run_dir)
    wanted = list(dict.fromkeys((*KEYS, *names)))
    end = 0
    with Copy(run_dir) as copy:
        for part in copy.parts:
            try:
                piece = copy.read(part, wanted)
            except DamagedCopy:
                break
            yield piece
            end = part.end
    for parsed in parsed_lines(run_dir, end):
        yield {name: parsed.columns[name] for name in wanted if name in parsed.columns}


def rows_of(pieces: Sequence[dict[str, np.ndarray]], names: Sequence[str] = ()) -> Rows:
    """Pieces of lines, one after the other; their columns are taken out of them."""
    pieces = pieces or [parse(b"")[0]]
    columns = joined(pieces, list(dict.fromkeys((*KEYS, *names))))
    step, attempt, time, evaluation = (columns[key] for key in KEYS)
    return Rows(step, attempt, time, evaluation, {name: columns[name] for name in names})
