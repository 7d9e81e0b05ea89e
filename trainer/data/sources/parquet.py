"""Read the text of Parquet files in a child process, `parquet_process`.

A file of 2 KB can store a text of 60 MB once and refer to it a million times, and its footer can lie about that. So the
footer is checked before anything is decompressed, the output is counted, and the process has limits.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from trainer.data.child import Child, ChildDied

RECORD_WEIGHT = 256
"""Bytes that a record counts in addition to its text, so that billions of empty records do not count as nothing."""
ITEM_WEIGHT = 32
"""Likewise for an item of a list."""
EXPANDS = "expands beyond the limit"
RAISE = " (to allow more: muster data prepare --limit"


class Row(NamedTuple):
    """A value of the column, or why there is none; `done`: share of the file's rows read so far, this one included."""

    where: str
    data: bytes | None
    reason: str = ""
    detail: str = ""
    done: float = 1.0


class ParquetProcess:
    """A child process that reads one file after another; started for the first, and again after one that kills it."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._asked = False

    def rows(self, path: str, key: str, budget: int, record_bytes: int, memory: int, seconds: int) -> Iterator[Row]:
        """Every value of a column of text. If something is wrong with the file, the last row gives the reason.

        Args:
            key: name of the column, or of a field inside it, see `columns.find_column`.
            budget: bytes that the file may expand to, see RECORD_WEIGHT.
            record_bytes: longer values are refused.
            memory: bytes of memory that reading may use, plus three times the largest column chunks of a row group.
            seconds: CPU time for each answer, plus a second per 64 MiB of those chunks.
        """
        request: list[Any] | None = [path, key, budget, record_bytes, memory, seconds]
        where = ""
        while True:
            try:
                rows, values, last = self._receive(request)
            except ChildDied as error:
                self.close()
                if "Cannot decrypt" in error.said:  # which aborts the library
                    yield Row(where, None, "encrypted Parquet", "its columns are encrypted; write them unencrypted")
                    return
                yield Row(where, None, "cannot be read", f"it {error}{RAISE} memory=MIB or --limit seconds=N)")
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
        """Request a file if one is given, else receive the next answer, which is made while the last one is in use."""
        try:
            if self._child is None:
                self._child = Child("trainer.data.sources.parquet_process")
            connection = self._child.connection
            if request:
                if self._asked:  # the previous file was not read to its end
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
