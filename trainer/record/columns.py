"""metrics.parquet: the numbers of metrics.jsonl by column, written behind a run; a million steps open at once.

The copy has every whole line up to some byte of metrics.jsonl, superseded ones too; what follows is read from there. It
can always be made again, so nothing is lost with it: a copy that is damaged, or of another metrics.jsonl, is none.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.files.own_files import open_file

from .events import METRICS as CHECKED
from .events import RATE, wrong_metrics
from .lines import HEAD, METRICS, read_events

COLUMNS = "metrics.parquet"
TAIL = 16 << 20
"""Bytes of metrics.jsonl that may follow the copy: as much as is read in a tenth of a second."""
BLOCK = 32 << 20
"""Bytes of metrics.jsonl that are in memory at a time."""
SMALL = 1 << 20
"""Bytes that are parsed before pyarrow would be imported."""
ROW_GROUP = 1 << 16
MOST_COLUMNS = 256
SHORTEST = 32
"""Bytes of a line that has step, attempt and time."""
KEYS = ("step", "attempt", "time", "evaluation")
FORMAT = b"1"


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
    run_dir = Path(run_dir)
    with contextlib.suppress(OSError):  # a folder that cannot be written, or a disk that is full: it takes longer
        update_columns(run_dir)
    covered, table = _open(run_dir)
    parts = []
    if table is not None:
        wanted = [name for name in table.schema_arrow.names if name in (*KEYS, *names)]
        try:
            read = _page_read(partial(table.read, columns=wanted))
            parts.append(_rows({name: read.column(name).to_numpy() for name in wanted}, names))
        except DamagedCopy:
            covered = 0
            with contextlib.suppress(OSError):
                (run_dir / COLUMNS).unlink()
    parts += [_rows(_parse(block), names) for block, _ in _blocks(run_dir, covered)]
    if not parts:
        parts = [_rows(_parse(b""), names)]
    step, attempt, time, evaluation = (np.concatenate([part[i] for part in parts]) for i in range(len(KEYS)))
    values = {name: np.concatenate([part.values[name] for part in parts]) for name in names}
    return Rows(step, attempt, time, evaluation, values)


def update_columns(run_dir: Path, covered: int | None = None) -> int:
    """Bring the copy up to date if more than `TAIL` bytes have come since; one process does, another goes on without.

    Args:
        covered: bytes of metrics.jsonl that the copy has, if the caller knows.

    Returns:
        how many it has now.

    Raises:
        OSError: it could not be written; the copy is as before.
    """
    size = _size(run_dir)
    if size < (covered or 0) + TAIL:
        return covered or 0
    covered, table = _open(run_dir)
    try:
        for block, end in _blocks(run_dir, covered):
            if size < covered + TAIL or not _write(run_dir, table, block, end):
                break
            covered, table = _open(run_dir)
    except DamagedCopy:
        (run_dir / COLUMNS).unlink(missing_ok=True)
        covered = 0  # made again by the next call
    return covered


def _write(run_dir: Path, table: Any, block: bytes, end: int) -> bool:
    """Replace the copy by one that has a block more. False: another process is about it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = _parse(block)
    before = table.schema_arrow.names if table is not None else []
    names = [*KEYS, *sorted({*before, *columns} - {*KEYS})][: len(KEYS) + MOST_COLUMNS]
    kinds = {"step": pa.int64(), "attempt": pa.int64(), "evaluation": pa.bool_()}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in names])
    temporary = run_dir / f".{COLUMNS}.new"
    file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(file, "r+b") as target:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file), temporary.lstat()):
                return False  # it has just become the copy
        except OSError:
            return False
        target.truncate(0)
        with pq.ParquetWriter(target, schema, write_page_checksum=True, use_dictionary=False) as writer:
            for group in range(table.num_row_groups if table is not None else 0):
                old = _page_read(partial(table.read_row_group, group))
                writer.write_table(_fitted(old, schema), ROW_GROUP)
            new = {name: values for name, values in columns.items() if name in names}
            writer.write_table(_fitted(pa.table(new), schema), ROW_GROUP)
            writer.add_key_value_metadata(
                {"muster.format": FORMAT, "muster.bytes": str(end), "muster.end": _end(run_dir, end)}
            )
        os.replace(temporary, run_dir / COLUMNS)
    return True


def _fitted(table: Any, schema: Any) -> Any:
    import pyarrow as pa

    empty = {name: pa.nulls(table.num_rows, schema.field(name).type) for name in schema.names}
    return pa.table(
        {name: table.column(name) if name in table.column_names else empty[name] for name in schema.names}, schema
    )


def _open(run_dir: Path) -> tuple[int, Any]:
    """Bytes of metrics.jsonl that the copy has, and the copy; 0 and None: there is none that can be used."""
    path = run_dir / COLUMNS
    if path.is_symlink() or not path.is_file():
        return 0, None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        limits = {"thrift_string_size_limit": 1 << 24, "thrift_container_size_limit": 1 << 20}
        table = pq.ParquetFile(open_file(path), page_checksum_verification=True, **limits)
        told, schema = table.metadata.metadata or {}, table.schema_arrow
        covered = int(told[b"muster.bytes"])
        kinds = {"step": pa.int64(), "attempt": pa.int64(), "evaluation": pa.bool_()}
        sound = (
            told[b"muster.format"] == FORMAT
            and tuple(schema.names[: len(KEYS)]) == KEYS
            and len(set(schema.names)) == len(schema.names) <= len(KEYS) + MOST_COLUMNS
            and all(field.type == kinds.get(field.name, pa.float64()) for field in schema)
            and table.metadata.num_rows <= covered // SHORTEST
            and 0 < covered <= _size(run_dir)
            and told[b"muster.end"].decode() == _end(run_dir, covered)
        )
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return 0, None
    return (covered, table) if sound else (0, None)


class DamagedCopy(Exception):
    """A page of the copy cannot be read."""


def _page_read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # pyarrow raises many kinds
        raise DamagedCopy from error


def _end(run_dir: Path, end: int) -> str:
    """What tells one metrics.jsonl from another: the digest of its first and last bytes before the end of the copy."""
    with open_file(run_dir / METRICS) as file:
        first = file.read(min(end, 4096))
        file.seek(max(end - 4096, 0))
        return hashlib.sha256(first + file.read(min(end, 4096))).hexdigest()


def _size(run_dir: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / METRICS).stat().st_size
    return 0


def _blocks(run_dir: Path, offset: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines from there on, about `BLOCK` bytes at a time, each with where it ends in the file."""
    with contextlib.suppress(FileNotFoundError), open_file(run_dir / METRICS) as file:
        file.seek(offset)
        while block := file.read(BLOCK):
            whole = block.rfind(b"\n") + 1
            if not whole and len(block) < BLOCK:
                return  # the last line is being written, or torn
            whole = whole or len(block)  # of no line that a run writes
            offset += whole
            file.seek(offset)
            yield block[:whole], offset


def _rows(columns: dict[str, np.ndarray], names: Sequence[str]) -> Rows:
    absent = np.full(len(columns["step"]), np.nan)
    step, attempt, time, evaluation = (columns[key] for key in KEYS)
    return Rows(step, attempt, time, evaluation, {name: columns.get(name, absent) for name in names})


def _parse(block: bytes) -> dict[str, np.ndarray]:
    """The columns of some whole lines; of a line that readers leave out nothing but its keys."""
    lines = [line for line in block.split(b"\n") if line.endswith((b"}", b"}\r")) and HEAD.match(line)]
    columns = _parse_fast(lines) if lines and len(block) > SMALL else None
    columns = columns or _parse_slowly(lines)
    columns["evaluation"] = np.array([b'"eval_loss"' in line for line in lines], bool)
    return columns


def _parse_slowly(lines: Sequence[bytes]) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {
        "step": np.zeros(len(lines), np.int64),
        "attempt": np.zeros(len(lines), np.int64),
        "time": np.zeros(len(lines)),
    }
    for row, line in enumerate(lines):
        head = HEAD.match(line)
        assert head
        columns["step"][row], columns["attempt"][row], columns["time"][row] = int(head[1]), int(head[2]), float(head[3])
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict) or wrong_metrics(record):
            continue
        for name, value in record.items():
            if name in KEYS or not isinstance(value, int | float):
                continue
            if name not in columns:
                if len(columns) >= MOST_COLUMNS:
                    continue
                columns[name] = np.full(len(lines), np.nan)
            with contextlib.suppress(OverflowError):  # a whole number of a thousand digits
                columns[name][row] = value
    return columns


def _parse_fast(lines: Sequence[bytes]) -> dict[str, np.ndarray] | None:
    """As `_parse_slowly`, in C; None: something is in them that a run does not write."""
    import pyarrow as pa
    import pyarrow.json

    data = b"\n".join(lines) + b"\n"
    try:
        options = pyarrow.json.ReadOptions(block_size=len(data) + 1)
        table = pyarrow.json.read_json(io.BytesIO(data), read_options=options)
    except pa.ArrowException:
        return None
    if table.num_rows != len(lines) or table.num_columns > MOST_COLUMNS:
        return None
    columns = {}
    rates = [name for name in table.column_names if name.endswith(RATE)]
    checks = {*CHECKED, *rates, *(name.removesuffix(RATE) for name in rates)}
    for name in table.column_names:
        column, kind = table.column(name), table.schema.field(name).type
        if (
            pa.types.is_integer(kind)
            or pa.types.is_floating(kind)
            or pa.types.is_boolean(kind)
            or pa.types.is_null(kind)
        ):
            columns[name] = column.cast(pa.int64() if name in KEYS[:2] else pa.float64(), safe=False).to_numpy()
            if pa.types.is_boolean(kind) and name in checks:
                return None
        elif name in checks:
            return None
    checked = [columns[name] for name in ("time", *checks) if name in columns]
    if any((np.abs(values) >= 1e18).any() for values in checked) or any(
        table.column(key).null_count for key in KEYS[:3]
    ):
        return None
    if any(pa.types.is_boolean(table.schema.field(key).type) for key in KEYS[:3]) or columns["time"].dtype != float:
        return None
    return columns
