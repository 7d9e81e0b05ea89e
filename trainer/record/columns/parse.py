"""Lines of metrics.jsonl as columns, some at a time: memory stays bounded whatever a line holds."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.files.own_files import LONGEST_LINE, open_file

from ..events import METRICS as CHECKED
from ..events import RATE, wrong_metrics
from ..lines import HEAD, METRICS

BLOCK = 4 << 20
"""Bytes of metrics.jsonl that are read at a time; more where a line has more."""
SMALL = 1 << 20
"""Bytes that are parsed before pyarrow would be imported."""
MOST_VALUES = 1 << 23
"""Lines times values of what is parsed at once, which bounds lines times columns."""
MOST_NAMES = 10_000
"""Metrics of some lines; of more, the rest are counted and not read."""
TYPES: dict[str, type] = {"step": int, "attempt": int, "time": float, "evaluation": bool}
KEYS = tuple(TYPES)
"""What every line has; all else is float."""


class Parsed(NamedTuple):
    """Some whole lines."""

    columns: dict[str, np.ndarray]
    """[lines] each: `step` and `attempt` int64, `time` float64, `evaluation` bool; others float64, NaN where a line has
    no such number."""
    end: int
    """Where they end in the file."""
    left_out: int
    """Metrics above `MOST_NAMES`."""


def parsed_lines(run_dir: Path, offset: int) -> Iterator[Parsed]:
    """The whole lines from there on. Raises OSError: it is no plain file."""
    with contextlib.suppress(FileNotFoundError), open_file(run_dir / METRICS) as file:
        while True:
            file.seek(offset)
            block = file.read(BLOCK)
            while b"\n" not in block and len(block) < LONGEST_LINE and (more := file.read(BLOCK)):
                block += more
            whole = block.rfind(b"\n") + 1
            if not whole and len(block) < LONGEST_LINE:
                return  # the last line is being written, or torn
            block = block[: whole or len(block)]  # without an end: of no line that a run writes
            quick = len(block) > SMALL
            for piece in _pieces(block):
                offset += len(piece)
                columns, left_out = parse(piece, quick)
                yield Parsed(columns, offset, left_out)


def _pieces(block: bytes) -> Iterator[bytes]:
    lines = block.count(b"\n")
    # Every value has a colon. bytes.count would take six times as long.
    values = int(np.count_nonzero(np.frombuffer(block, np.uint8) == ord(":")))
    if lines < 2 or lines * values <= MOST_VALUES:
        yield block
        return
    middle = block.find(b"\n", len(block) // 2) + 1
    if middle in (0, len(block)):
        middle = block.rfind(b"\n", 0, len(block) // 2) + 1
    yield from _pieces(block[:middle])
    yield from _pieces(block[middle:])


def parse(block: bytes, quick: bool = False) -> tuple[dict[str, np.ndarray], int]:
    """The columns of some whole lines, and how many metrics are above `MOST_NAMES`.

    Of a line that readers leave out nothing but its keys.
    """
    lines = [line for line in block.split(b"\n") if line.endswith((b"}", b"}\r")) and HEAD.match(line)]
    found = _parse_quickly(lines) if lines and quick else None
    columns, left_out = (found, 0) if found else _parse_slowly(lines)
    columns["evaluation"] = np.array([b'"eval_loss"' in line for line in lines], bool)
    return columns, left_out


def _parse_slowly(lines: Sequence[bytes]) -> tuple[dict[str, np.ndarray], int]:
    columns: dict[str, np.ndarray] = {
        "step": np.zeros(len(lines), np.int64),
        "attempt": np.zeros(len(lines), np.int64),
        "time": np.zeros(len(lines)),
    }
    left_out: set[str] = set()
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
            if name in KEYS or not (value is None or isinstance(value, int | float)):
                continue
            if name not in columns:
                if len(columns) >= MOST_NAMES + len(KEYS) - 1:
                    left_out.add(name)
                    continue
                columns[name] = np.full(len(lines), np.nan)
            if value is not None:
                with contextlib.suppress(OverflowError):  # a whole number of a thousand digits
                    columns[name][row] = value
    return columns, len(left_out)


def _parse_quickly(lines: Sequence[bytes]) -> dict[str, np.ndarray] | None:
    """As `_parse_slowly`, in C; None: something is in them that a run does not write."""
    import pyarrow as pa
    import pyarrow.json

    data = b"\n".join(lines) + b"\n"
    try:
        options = pyarrow.json.ReadOptions(block_size=len(data) + 1, use_threads=False)
        table = pyarrow.json.read_json(pa.BufferReader(data), read_options=options)
    except pa.ArrowException:
        return None
    if table.num_rows != len(lines) or table.num_columns > MOST_NAMES:
        return None
    if any(name not in table.column_names or table.column(name).null_count for name in KEYS[:3]):
        return None
    if [str(table.schema.field(name).type) for name in KEYS[:3]] != ["int64", "int64", "double"]:
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
            columns[name] = as_numpy(column, int if name in KEYS[:2] else float)
            if pa.types.is_boolean(kind) and name in checks:
                return None
        elif name in checks:
            return None
    checked = [columns[name] for name in ("time", *checks) if name in columns]
    if any((np.abs(values) >= 1e18).any() for values in checked):
        return None
    return columns


def as_numpy(column: Any, kind: type = float) -> np.ndarray:
    """A column of Arrow's, of numbers, truths or nulls; NaN where it is null.

    What Arrow has for it would import pandas, and makes a process that reads a little larger by half.
    """
    parts = [np.zeros(0, kind), *(_chunk_as_numpy(chunk, kind) for chunk in column.chunks)]
    return np.concatenate(parts) if len(parts) != 2 else parts[1]


def _chunk_as_numpy(chunk: Any, kind: type) -> np.ndarray:
    begin, end = chunk.offset, chunk.offset + len(chunk)
    if str(chunk.type) == "null":
        return np.full(len(chunk), np.nan, kind)
    present, data = chunk.buffers()
    if str(chunk.type) == "bool":
        values = _bits(data, begin, end)
    else:
        values = np.frombuffer(data, np.dtype(str(chunk.type)))[begin:end] if data else np.zeros(0)
    values = values.astype(kind, copy=False)
    if chunk.null_count:
        values = np.where(_bits(present, begin, end), values, np.nan)
    return values


def _bits(buffer: Any, begin: int, end: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(buffer, np.uint8), count=end, bitorder="little")[begin:].view(bool)
