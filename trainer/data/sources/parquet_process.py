"""Read the text of Parquet files within limits: `serve` runs in the child process of `parquet.ParquetProcess`.

The footer is checked before anything is decompressed, and the output is counted.
"""

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs.reading.parquet_pages import pages
from configs.reading.parse import clip
from trainer.data.child import MIB, Bounds

from .columns import Column, find_column, texts
from .damage import Damaged
from .parquet import EXPANDS, ITEM_WEIGHT, RAISE, RECORD_WEIGHT, Row

ANSWER_BYTES, ANSWER_ROWS = 1 << 20, 4096
BATCH_ROWS = 64


def serve(descriptor: int) -> None:
    """Answer requests over an inherited pipe until the other side closes it."""
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
            with pa.OSFile(os.fsencode(self.path)) as source:
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
            yield Row(self._reached(), None, "takes too much memory", f"{clip(error, 200)}{RAISE} memory=MIB)")
        except Exception as error:  # pyarrow raises many kinds, KeyError and NotImplementedError among them
            reason, detail = "damaged Parquet file", clip(error, 200)
            if getattr(error, "errno", None) is not None:
                reason = "unreadable file"
            elif "Expected all lists to be of size" in detail:
                reason = "cannot be read"
                detail = "a list of fixed size has null rows, which pyarrow cannot read: write it as a plain list"
            yield Row(self._reached(), None, reason, detail)

    def _reached(self) -> str:
        return f"after row {self.row}" if self.row else ""

    def _batch_rows(self, file: pq.ParquetFile, column: Column, source: Any) -> list[int]:
        """For each row group, how many rows to read at once. Refuses a file whose footer shows that it is too large."""
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
                raise Damaged(EXPANDS, f"its footer states {max(total, dictionary):,} bytes{RAISE} expansion=N)")
            self.largest = max(self.largest, unpacked)
            average = unpacked // max(rows, 1)
            counts.append(max(1, min(BATCH_ROWS, 4 * MIB // max(average, 1), 16 * MIB // max(dictionary, 1))))
        self.bounds.memory(self.memory + 3 * self.largest)
        self.bounds.seconds(self.seconds + self.largest / (64 * MIB))
        return counts

    def _values(self, file: pq.ParquetFile, column: Column, batch_rows: list[int]) -> Iterator[Row]:
        size, all_rows = 0, max(file.metadata.num_rows, 1)
        # Adjacent row groups with the same batch size are read together: a file can have a row group for every row.
        edges = [i for i in range(len(batch_rows)) if not i or batch_rows[i] != batch_rows[i - 1]]
        for first, end in pairwise([*edges, len(batch_rows)]):
            options = {"row_groups": list(range(first, end)), "columns": [column.path], "use_threads": False}
            for batch in file.iter_batches(batch_rows[first], **options):
                # There may be other columns whose names begin with its name and a dot.
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
