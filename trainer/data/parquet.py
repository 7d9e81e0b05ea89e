"""Read the text of Parquet files in a child process: `ParquetProcess` asks, `serve` reads.

A file of 2 KB can hold a text of 60 MB once and name it a million times, and what its footer says of that can be a lie.
So the footer is checked before anything is unpacked, what comes out is counted, and the process is bounded.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .child import MIB, Bounds, Child, ChildDied
from .columns import Column, find_column, texts
from .pages import pages
from .unpack import Damaged

RECORD_WEIGHT = 256
"""Bytes that a record counts beside its text, so that billions of empty ones are no small file."""
ITEM_WEIGHT = 32
"""Likewise of what stands in a list."""
EXPANDS = "unpacks to too much"
RAISE = " (`muster data prepare` has --limit"
ANSWER_BYTES, ANSWER_ROWS = 1 << 20, 4096
BATCH_ROWS = 64


class Row(NamedTuple):
    """A value of the column, or why there is none; `done`: the share of the file's rows that are read with it."""

    where: str
    data: bytes | None
    reason: str = ""
    detail: str = ""
    done: float = 1.0


class ParquetProcess:
    """A child process that reads one file after the other; started with the first, and anew after one that ends it."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._asked = False

    def rows(self, path: str, key: str, budget: int, record_bytes: int, memory: int, seconds: int) -> Iterator[Row]:
        """Every value of a column of text. Whatever is wrong with the file is a last row with its reason.

        Args:
            key: name of the column, or of a field within it, see `columns.find_column`.
            budget: bytes that it may unpack to, see RECORD_WEIGHT.
            record_bytes: a longer value is refused.
            memory: bytes that reading it may take, and three times its largest part.
            seconds: processor time to get on with it, and a second for each 64 MiB of its largest part.
        """
        request: list[Any] | None = [path, key, budget, record_bytes, memory, seconds]
        where = ""
        while True:
            try:
                rows, values, last = self._receive(request)
            except ChildDied as error:
                self.close()
                yield Row(where, None, "cannot be read", f"it {error}{RAISE} memory=MIB, seconds=N)")
                return
            request = None
            start = 0
            for place, size, *rest in rows:
                data = None if size is None else values[start : start + size]
                start += size or 0
                where = f"after {place}"
                yield Row(place, data, *rest)
            if last:
                return

    def _receive(self, request: list[Any] | None) -> tuple[list[Any], bytes, bool]:
        """Ask for a file if there is one, else take the next answer, which is being made while the last one is used."""
        try:
            if self._child is None:
                self._child = Child("parquet")
            connection = self._child.connection
            if request:
                if self._asked:  # the reader of the file before left off
                    connection.recv_bytes(), connection.recv_bytes()
                connection.send_bytes(json.dumps(request).encode())
            self._asked = True
            rows, last = json.loads(connection.recv_bytes())
            values = connection.recv_bytes()
            self._asked = not last
            if not last:
                connection.send_bytes(b"null")
            return rows, values, last
        except (EOFError, OSError):
            assert self._child is not None
            raise self._child.died() from None

    def close(self) -> None:
        if self._child:
            self._child.close()
        self._child, self._asked = None, False


def serve(descriptor: int) -> None:
    """Answer the requests that come over an inherited pipe until the other side closes it."""
    connection, bounds = Connection(descriptor), Bounds()
    reader: _Reader | None = None
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        if request:
            reader = _Reader(bounds, *request)
        assert reader is not None
        rows, values, last = reader.answer()
        connection.send_bytes(json.dumps([rows, last]).encode())
        connection.send_bytes(values)


class _Reader:
    def __init__(self, bounds: Bounds, path: str, key: str, budget: int, record_bytes: int, memory: int, seconds: int):
        self.path, self.key, self.budget, self.record_bytes = path, key, budget, record_bytes
        self.bounds, self.memory, self.seconds = bounds, memory, seconds
        self.row, self.largest = 0, 0
        self.rows = self._guarded()

    def answer(self) -> tuple[list[Any], bytes, bool]:
        self.bounds.memory(self.memory + 3 * self.largest)
        self.bounds.seconds(self.seconds + self.largest / (64 * MIB))
        rows, values, size = [], [], 0
        for row in self.rows:
            rows.append((row.where, None if row.data is None else len(row.data), *row[2:]))
            if row.data is not None:
                values.append(row.data)
                size += len(row.data)
            if size >= ANSWER_BYTES or len(rows) == ANSWER_ROWS:
                return rows, b"".join(values), False
        return rows, b"".join(values), True

    def _guarded(self) -> Iterator[Row]:
        try:
            # Without pre_buffer a column is read page by page, not a row group at a time.
            with pa.OSFile(self.path) as source:
                options = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
                with pq.ParquetFile(source, **options) as file:
                    leaves = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
                    column = find_column(file.schema_arrow, leaves, self.key)
                    yield from self._values(file, column, self._batch_rows(file, column, source))
            if self.row == 0:
                yield Row("", None, "empty file")
        except Damaged as error:
            yield Row(self._reached(), None, *error.args)
        except MemoryError as error:
            yield Row(self._reached(), None, "takes too much memory", f"{_short(error)}{RAISE} memory=MIB)")
        except Exception as error:  # pyarrow raises many kinds, KeyError and NotImplementedError among them
            reason = "damaged Parquet file" if getattr(error, "errno", None) is None else "unreadable file"
            yield Row(self._reached(), None, reason, _short(error))

    def _reached(self) -> str:
        return f"after row {self.row}" if self.row else ""

    def _batch_rows(self, file: pq.ParquetFile, column: Column, source: Any) -> list[int]:
        """For each row group, how many rows to unpack at once. Refuses what the footer shows to be too much."""
        metadata, total, counts = file.metadata, 0, []
        leaves = [i for i in range(metadata.num_columns) if column.holds(metadata.schema.column(i).path)]
        for group in range(metadata.num_row_groups):
            rows, unpacked, dictionary, items = metadata.row_group(group).num_rows, 0, 0, 0
            for chunk in map(metadata.row_group(group).column, leaves):
                unpacked += chunk.total_uncompressed_size
                items += max(chunk.num_values - rows, 0)
                if chunk.has_dictionary_page:
                    start = chunk.dictionary_page_offset
                    found = pages(source, start, chunk.data_page_offset - start)
                    dictionary = max([dictionary, *(page.unpacked for page in found)])
            if rows < 0 or unpacked < 0:
                raise Damaged("damaged Parquet file", f"row group {group} has {rows} rows in {unpacked} bytes")
            total += unpacked + rows * RECORD_WEIGHT + items * ITEM_WEIGHT
            if total > self.budget or dictionary > self.budget:
                raise Damaged(EXPANDS, f"its footer tells of {max(total, dictionary):,} bytes{RAISE} expansion=N)")
            self.largest = max(self.largest, unpacked)
            average = unpacked // max(rows, 1)
            counts.append(max(1, min(BATCH_ROWS, 4 * MIB // max(average, 1), 16 * MIB // max(dictionary, 1))))
        self.bounds.memory(self.memory + 3 * self.largest)
        self.bounds.seconds(self.seconds + self.largest / (64 * MIB))
        return counts

    def _values(self, file: pq.ParquetFile, column: Column, batch_rows: list[int]) -> Iterator[Row]:
        size, all_rows = 0, max(file.metadata.num_rows, 1)
        # Neighbours that are read alike are read together: a file can have a row group for every row.
        edges = [i for i in range(len(batch_rows)) if not i or batch_rows[i] != batch_rows[i - 1]]
        for first, end in pairwise([*edges, len(batch_rows)]):
            options = {"row_groups": list(range(first, end)), "columns": [column.path], "use_threads": False}
            for batch in file.iter_batches(batch_rows[first], **options):
                # Beside it there may be others whose names begin with its name and a dot.
                for value in texts(batch.column(batch.schema.names.index(column.name)), column.within):
                    self.row += 1
                    size += RECORD_WEIGHT + len(value or b"")
                    if size > self.budget:
                        self.row -= 1
                        raise Damaged(EXPANDS, f"over {self.budget:,} bytes{RAISE} expansion=N)")
                    where, done = f"row {self.row}", self.row / all_rows
                    if value is None:
                        yield Row(where, None, "not text", "null", done)
                    elif len(value) > self.record_bytes:
                        yield Row(where, None, "record too long", f"over {self.record_bytes} bytes", done)
                    else:
                        yield Row(where, value, done=done)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
