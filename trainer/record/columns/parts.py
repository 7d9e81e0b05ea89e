"""The parts of metrics.parquet: which there are, what is in them, and how they grow."""

import contextlib
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.files.own_files import open_file

from ..lines import METRICS
from .levels import PartLevels, stored_levels
from .parse import KEYS, MOST_NAMES, TYPES, as_numpy, parsed_lines

COLUMNS = "metrics.parquet"
TAIL = 4 << 20
"""Bytes of metrics.jsonl that may follow the last part: as much as is read in a few hundredths of a second."""
FULL = 1 << 20
"""Values of a part with which it is not added to any more."""
ROW_GROUP = 1 << 14
"""Lines of a part that are read at once."""
SHORTEST = 32
"""Bytes of a line that has step, attempt and time."""
MOST_PARTS = 100_000
FORMAT = b"2"
LEVELS = "_"
"""Before the name of a part, its levels'. What reads a folder of Parquet files skips such names."""
_NAME = re.compile(r"(\d{15})-(\d{15})\.parquet")
_LIMITS = {"thrift_string_size_limit": 1 << 24, "thrift_container_size_limit": 1 << 20}


class Part(NamedTuple):
    """The lines [start, end) of metrics.jsonl, in bytes."""

    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.start:015d}-{self.end:015d}.parquet"


class DamagedCopy(Exception):
    """Something of the copy cannot be read, or is not of this metrics.jsonl."""


class Copy:
    """The parts of a run as they were when it was made. Use it in a `with` block; parts that
    were removed since count as damaged.

    Raises:
        OSError: as it is made or used: metrics.jsonl is there, but no plain file.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.folder = -1
        with contextlib.suppress(OSError):
            self.folder = os.open(run_dir / COLUMNS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.parts = self._parts() if self.folder >= 0 else []

    def __enter__(self) -> "Copy":
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder >= 0:
            os.close(self.folder)

    @property
    def end(self) -> int:
        """Bytes of metrics.jsonl that are in parts."""
        return self.parts[-1].end if self.parts else 0

    def _parts(self) -> list[Part]:
        """Those that follow one another from the beginning on; of two that begin at the same place the longer one."""
        longest: dict[int, int] = {}
        with os.scandir(self.folder) as entries:
            for _, entry in zip(range(4 * MOST_PARTS), entries, strict=False):
                if found := _NAME.fullmatch(entry.name):
                    longest[int(found[1])] = max(int(found[2]), longest.get(int(found[1]), 0))
        parts: list[Part] = []
        start, size = 0, size_of(self.run_dir)
        while start < longest.get(start, 0) <= size:
            parts.append(Part(start, longest[start]))
            start = longest[start]
        return parts

    def open(self, part: Part) -> Any:
        """A part as a ParquetFile.

        Raises:
            DamagedCopy: it cannot be read, or is none of this metrics.jsonl. It is removed, and made again later.
        """
        import pyarrow as pa

        kinds = {name: str(pa.from_numpy_dtype(kind)) for name, kind in TYPES.items()}
        with self._sound(part):
            file = self._file(part, "")
            schema = file.schema_arrow
            sound = (
                tuple(schema.names[: len(KEYS)]) == KEYS
                and len(set(schema.names)) == len(schema.names) <= len(KEYS) + MOST_NAMES
                and all(
                    str(kind) == kinds.get(name, "double")
                    for name, kind in zip(schema.names, schema.types, strict=True)
                )
                and file.metadata.num_rows <= (part.end - part.start) // SHORTEST
            )
            if not sound:
                raise DamagedCopy(part.name)
        return file

    def read(self, part: Part, names: Sequence[str], groups: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Columns of a part, NaN where a line has no such number; those that it has not are left out.

        Args:
            groups: numbers of the row groups to read; None: all.

        Raises:
            DamagedCopy: as `open`.
        """
        file, asked = self.open(part), {*names}
        with self._sound(part):
            wanted = [name for name in file.schema_arrow.names if name in asked]
            every = groups if groups is not None else range(file.num_row_groups)
            table = file.read_row_groups(every, columns=wanted, use_threads=False)
            return {name: as_numpy(table.column(name), TYPES.get(name, float)) for name in wanted}

    def told(self, part: Part) -> tuple[list[int], int]:
        """Lines of each row group, and how many metrics of a line are in no column. Raises DamagedCopy, as `open`."""
        file = self.open(part)
        with self._sound(part):
            found = file.metadata
            rows = [found.row_group(group).num_rows for group in range(found.num_row_groups)]
            return rows, int(found.metadata[b"muster.left_out"])

    def levels(self, part: Part) -> PartLevels:
        """Raises DamagedCopy, as `open`."""
        with self._sound(part):
            file = self._file(part, LEVELS)
            if file.metadata.num_rows > part.end - part.start:
                raise DamagedCopy(part.name)
            return PartLevels(file)

    def _file(self, part: Part, prefix: str) -> Any:
        import pyarrow.parquet as pq

        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        opened = os.fdopen(os.open(prefix + part.name, flags, dir_fd=self.folder), "rb")
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise DamagedCopy(part.name)
        file = pq.ParquetFile(opened, page_checksum_verification=True, **_LIMITS)
        told = file.metadata.metadata or {}
        if told[b"muster.format"] != FORMAT or told[b"muster.lines"].decode() != _digest(self.run_dir, part):
            raise DamagedCopy(part.name)
        return file

    @contextlib.contextmanager
    def _sound(self, part: Part) -> Iterator[None]:
        """Whatever is raised as a part is read becomes DamagedCopy, and the part is removed."""
        try:
            yield
        except Exception as error:  # pyarrow raises many kinds
            self.discard(part)
            raise DamagedCopy(part.name) from error

    def discard(self, part: Part) -> None:
        """Remove a damaged part, which is made again."""
        self.parts = [each for each in self.parts if each.start < part.start]
        for prefix in ("", LEVELS):
            with contextlib.suppress(OSError):
                os.unlink(prefix + part.name, dir_fd=self.folder)


def update_columns(run_dir: str | Path, covered: int | None = None) -> int:
    """Bring the copy up to date if more than `TAIL` bytes were appended since, unless another process is doing so.

    Args:
        covered: bytes of metrics.jsonl that the copy has, if the caller knows.

    Returns:
        how many it has now.

    Raises:
        OSError: it could not be written; what was there is as before.
    """
    run_dir = Path(run_dir)
    if size_of(run_dir) < (covered or 0) + TAIL:
        return covered or 0
    with Copy(run_dir) as copy:
        if size_of(run_dir) < copy.end + TAIL:
            return copy.end
    old = run_dir / COLUMNS
    if not old.is_dir() or old.is_symlink():  # an older version's, in one file
        old.unlink(missing_ok=True)
        old.mkdir(mode=0o700)
    with Copy(run_dir) as copy, _only_one(copy.folder) as free:
        if free:
            copy.parts = copy._parts()  # another may just have been about it
            _extend(copy)
        return copy.end


@contextlib.contextmanager
def _only_one(folder: int) -> Iterator[bool]:
    """Lock the open folder. filelock takes a path, which may lead elsewhere by now."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(".lock", flags, 0o600, dir_fd=folder)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(file)


def _extend(copy: Copy) -> None:
    """Write parts of all whole lines that are not in one yet."""
    pieces: list[dict[str, np.ndarray]] = []
    start, end, left_out = copy.end, copy.end, 0
    if copy.parts and (last := _small(copy, copy.parts[-1])) is not None:
        pieces, start = [last[0]], copy.parts[-1].start
        left_out = last[1]
    for columns, piece_end, more_left_out in parsed_lines(copy.run_dir, end):
        if pieces and _names([*pieces, columns]) > MOST_NAMES:
            _write(copy, Part(start, end), pieces, left_out)
            pieces, start, left_out = [], end, 0
        pieces.append(columns)
        end, left_out = piece_end, max(left_out, more_left_out)
        if _values(pieces) >= FULL:
            _write(copy, Part(start, end), pieces, left_out)
            pieces, start, left_out = [], end, 0
    if pieces and end > copy.end:
        _write(copy, Part(start, end), pieces, left_out)
    used = {prefix + part.name for part in copy.parts for prefix in ("", LEVELS)}
    for name in os.listdir(copy.folder):
        if _NAME.fullmatch(name.removeprefix(LEVELS)) and name not in used:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=copy.folder)


def _small(copy: Copy, part: Part) -> tuple[dict[str, np.ndarray], int] | None:
    """The columns of a part that can be added to, and how many metrics it leaves out."""
    try:
        file, (_, left_out) = copy.open(part), copy.told(part)
        if file.metadata.num_rows * file.metadata.num_columns >= FULL:
            return None
        return copy.read(part, file.schema_arrow.names), left_out
    except DamagedCopy:
        return None


def _names(pieces: Sequence[Mapping[str, np.ndarray]]) -> int:
    return len(set().union(*pieces)) - len(KEYS)


def _values(pieces: Sequence[Mapping[str, np.ndarray]]) -> int:
    return sum(len(piece["step"]) for piece in pieces) * (_names(pieces) + len(KEYS))


def joined(pieces: Sequence[dict[str, np.ndarray]], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of several pieces of lines one after the other, NaN where a piece has no such column.

    They are taken out of the pieces, so that they are in memory once.
    """
    rows = [len(piece["step"]) for piece in pieces]
    return {
        name: np.concatenate([
            piece.pop(name) if name in piece else np.full(count, np.nan)
            for piece, count in zip(pieces, rows, strict=True)
        ])
        for name in names
    }  # fmt: skip


def _write(copy: Copy, part: Part, pieces: Sequence[dict[str, np.ndarray]], left_out: int) -> None:
    """Write a part and its levels, in place of the one that began where it begins."""
    import pyarrow as pa

    names = [*KEYS, *sorted(set().union(*pieces) - {*KEYS})]
    columns = joined(pieces, names)
    told = {"muster.format": FORMAT, "muster.lines": _digest(copy.run_dir, part), "muster.left_out": str(left_out)}
    levels, more_told = stored_levels(columns, ROW_GROUP)
    _replace(copy, LEVELS + part.name, pa.table(levels), told | more_told)
    arrays = {name: pa.array(values, from_pandas=name not in KEYS) for name, values in columns.items()}
    delta = {"step": "DELTA_BINARY_PACKED", "attempt": "DELTA_BINARY_PACKED"}
    _replace(copy, part.name, pa.table(arrays), told, column_encoding=delta)
    copy.parts = [each for each in copy.parts if each.start < part.start] + [part]


def _replace(copy: Copy, name: str, table: Any, told: dict[str, Any], **how: Any) -> None:
    import pyarrow.parquet as pq

    temporary = ".new"  # there is one writer
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    how |= {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True, "compression": "lz4"}
    with (
        os.fdopen(os.open(temporary, flags, 0o600, dir_fd=copy.folder), "wb") as target,
        pq.ParquetWriter(target, table.schema, store_schema=False, **how) as writer,
    ):
        writer.write_table(table, ROW_GROUP)
        writer.add_key_value_metadata(told)
    os.replace(temporary, name, src_dir_fd=copy.folder, dst_dir_fd=copy.folder)


def _digest(run_dir: Path, part: Part) -> str:
    """What tells one metrics.jsonl from another: of the first and last bytes of a part's lines."""
    with open_file(run_dir / METRICS) as file:
        file.seek(part.start)
        first = file.read(min(part.end - part.start, 4096))
        file.seek(max(part.end - 4096, part.start))
        return hashlib.sha256(first + file.read(part.end - file.tell())).hexdigest()


def size_of(run_dir: Path) -> int:
    """Bytes of metrics.jsonl; 0: there is none."""
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / METRICS).stat().st_size
    return 0
