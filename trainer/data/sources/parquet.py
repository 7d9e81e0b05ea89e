"""Read the text of Parquet files in a child process, `parquet_process`.

A file of 2 KB can hold a text of 60 MB once and name it a million times, and what its footer says of that can be a lie.
So the footer is checked before anything is unpacked, what comes out is counted, and the process is bounded.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from trainer.data.child import Child, ChildDied

RECORD_WEIGHT = 256
"""Bytes that a record counts beside its text, so that billions of empty ones are no small file."""
ITEM_WEIGHT = 32
"""Likewise of what stands in a list."""
EXPANDS = "unpacks to too much"
RAISE = " (`muster data prepare` has --limit"


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
                if "Cannot decrypt" in error.said:  # which aborts the library
                    yield Row(where, None, "encrypted Parquet", "its columns are encrypted; write them in plain")
                    return
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
                self._child = Child("trainer.data.sources.parquet_process")
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
