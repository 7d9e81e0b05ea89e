"""Stream the records of raw inputs: text, JSON lines and other JSON, CSV, Parquet, compressed or not."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

from configs.reading.lfs import LONGEST, POINTER, is_pointer
from configs.sections.data import LimitsConfig
from trainer.data.child import MIB

from .content import begins_as_json, foreign, json_kind
from .damage import ERRORS, Damaged, Expands
from .find import Input, is_marker
from .formats import BOM, RECORD_BYTES, Stopped, csv_rows, json_values
from .parquet import EXPANDS, RAISE, RECORD_WEIGHT, ParquetProcess
from .unpack import (
    ENDINGS,
    HEAD_BYTES,
    Opened,
    budget_of,
    compression_of,
    opened,
    reason_of,
    rejoined,
)

DOCUMENT_BYTES = 1 << 18
"""A longer document is split, at line ends if it has any, into documents of at most this many UTF-8 bytes."""

FREE_BYTES = 1 << 24
"""Bytes that any file may expand to, however small it is."""


_PLAIN = re.compile(
    rf"((^|/)[^./]+|\.(txt|text|part|data?|log|out|\d+))({'|'.join(map(re.escape, ENDINGS))})?$", re.IGNORECASE
)
"""Names that do not tell what kind of text a file holds."""


class Record(NamedTuple):
    """One undecoded document: UTF-8 text, or a JSON object that holds it."""

    path: str
    where: str
    """Position in the file: `line 3`, `row 5`, `bytes 0-262144`; empty if the whole file is the document."""
    kind: Literal["text", "json"]
    data: bytes


class Refusal(NamedTuple):
    """Something that was left out: where it is, and why."""

    path: str
    where: str
    reason: str
    """From a small set of phrases, so that refusals can be counted by reason."""
    detail: str = ""

    def __str__(self) -> str:
        place = f"{self.path} ({self.where})" if self.where else self.path
        return f"{place}: {self.reason}" + (f": {self.detail}" if self.detail else "")


class Reader:
    """Reads the records of one file after another. Use it as a context manager or call `close()`.

    Args:
        text_key: key or column that holds the text.
        limits: how far a file may expand, and what memory and time reading it may take.
    """

    def __init__(self, text_key: str, limits: LimitsConfig):
        self.text_key, self.limits = text_key, limits
        self._parquet_process = ParquetProcess()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._parquet_process.close()

    def read(self, file: Input) -> Iterator[tuple[int, Record | Refusal]]:
        """Stream a file's records in order, each with the position reached (in bytes of the file).

        If something is wrong with the file, the last item is a Refusal; the records before it are valid. Memory is
        bounded by one record.
        """
        if file.kind == "special":
            what = "a folder that cannot be read" if os.path.isdir(file.path) else "neither a file nor a folder"
            if os.path.islink(file.path) and os.path.isdir(file.path):
                what = "a link to a folder that cannot be read, or that contains the input itself"
            yield 0, Refusal(file.path, "", "unreadable file", what)
            return
        if file.kind == "beside":
            what = "it marks other files" if is_marker(file.path) else "it describes other files"
            yield file.bytes, Refusal(file.path, "", "not data", f"{what}; give it by name to read it")
            return
        if file.bytes == 0 and os.path.exists(file.path):
            yield 0, Refusal(file.path, "", "empty file")
            return
        progress = [""]
        try:
            yield from self._records(_by_content(file), progress)
        except Expands as error:
            yield file.bytes, Refusal(file.path, progress[0], EXPANDS, f"{error}{RAISE} expansion=N)")
        except (*ERRORS, Damaged) as error:
            yield file.bytes, Refusal(file.path, progress[0], *reason_of(error))

    def budget(self, file: Input) -> int:
        """Bytes that a file may expand to."""
        return budget_of(file.bytes, file.path, self.limits.expansion, FREE_BYTES)

    def _records(self, file: Input, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        if file.kind == "parquet":
            yield from self._parquet(file, progress)
            return
        with self._open(file) as unpacked:
            if unpacked.stream.peek(1).startswith(BOM):
                unpacked.stream.read(len(BOM))
            head = unpacked.stream.peek(1)
            if not head and not unpacked.damaged():
                raise Damaged("empty file", "")
            if file.compression and compression_of(head):
                raise Damaged("not text", "compressed twice; decompress it once")
            if what := foreign(head[:512]):
                raise Damaged("not text", what)
            if file.kind in ("csv", "tsv") and begins_as_json(head):
                file = file._replace(kind="jsonl")
            if file.kind in ("text", "jsonl", "json"):
                kind, unpacked = self._kind(file, unpacked)
            else:
                kind = file.kind
            read = {"jsonl": self._jsonl, "json": self._json, "csv": self._csv, "tsv": self._csv}.get(kind, self._text)
            yield from read(file, unpacked, progress)

    def _kind(self, file: Input, unpacked: Opened) -> tuple[str, Opened]:
        """The file's kind by its first bytes, and the stream from its start."""
        head = unpacked.stream.peek(1)
        plain, size, read = bool(_PLAIN.search(file.path)), HEAD_BYTES - len(BOM), b""
        while True:
            whole = len(read or head) < size
            kind = json_kind(
                read or head, whole or size >= RECORD_BYTES, file.kind, self.text_key, plain, unpacked.count
            )
            if kind:
                return kind, replace(unpacked, stream=rejoined(read, unpacked.stream)) if read else unpacked
            size *= 4
            read += unpacked.stream.read(size - len(read))

    def _text(self, file: Input, unpacked: Opened, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        carry, start = b"", 0
        while True:
            buffer = carry + unpacked.stream.read(DOCUMENT_BYTES - len(carry))
            if not buffer:
                break
            ends = len(buffer) < DOCUMENT_BYTES or not unpacked.stream.peek(1)
            size = _cut(buffer) if not ends or unpacked.damaged() else len(buffer)
            where = f"bytes {start}-{start + size}" if start or size < len(buffer) else ""
            if size:
                yield unpacked.tell(), Record(file.path, where, "text", buffer[:size])
            carry, start = buffer[size:], start + size
            progress[0] = f"after byte {start}" if start else ""
            if ends:
                break

    def _jsonl(self, file: Input, unpacked: Opened, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        number, stream, blank = 0, unpacked.stream, True
        while line := stream.readline(RECORD_BYTES):
            if not line.endswith(b"\n") and unpacked.damaged():
                break  # cut off
            number += 1
            unpacked.count(RECORD_WEIGHT)
            progress[0] = f"after line {number}"
            where = f"line {number}"
            if len(line) == RECORD_BYTES and not line.endswith(b"\n"):
                while (rest := stream.readline(RECORD_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield unpacked.tell(), Refusal(file.path, where, "record too long", f"over {RECORD_BYTES} bytes")
            elif not line.isspace():
                blank = False
                yield unpacked.tell(), Record(file.path, where, "json", line)
        if blank and not unpacked.damaged():
            raise Damaged("empty file", "")

    def _json(self, file: Input, unpacked: Opened, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        number = 0
        try:
            for number, value in enumerate(json_values(unpacked.stream, unpacked.count), 1):
                unpacked.count(RECORD_WEIGHT)
                progress[0] = f"after value {number}"
                yield unpacked.tell(), Record(file.path, f"value {number}", "json", value)
        except Stopped as error:
            if not unpacked.damaged():  # otherwise the damage is the reason, and is reported
                unread = 1 - unpacked.tell() / max(file.bytes, 1) * (1 - error.unread)
                share = f"{unread:.0%}" if unread >= 0.01 else "under 1%"
                reason, detail = error.args
                raise Damaged(reason, f"{detail}; nothing after it was read ({share} of the file)") from None
        if number == 0 and not unpacked.damaged():
            raise Damaged("empty file", "")

    def _csv(self, file: Input, unpacked: Opened, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        number = 0
        rows = csv_rows(unpacked.stream, self.text_key, file.kind == "tsv", unpacked.count, unpacked.damaged)
        for number, row in enumerate(rows, 1):
            unpacked.count(RECORD_WEIGHT)
            progress[0], where = f"after row {number}", f"row {number}"
            if isinstance(row, bytes):
                yield unpacked.tell(), Record(file.path, where, "text", row)
            elif not unpacked.damaged():
                yield unpacked.tell(), Refusal(file.path, where, *row.args)
        if number == 0 and not unpacked.damaged():
            raise Damaged("empty file", "")

    def _parquet(self, file: Input, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        if file.compression:
            yield file.bytes, Refusal(file.path, "", "compressed Parquet", "decompress it: Parquet needs random access")
            return
        memory = self.limits.memory * MIB
        bounds = (self.budget(file), RECORD_BYTES, memory, self.limits.seconds)
        for row in self._parquet_process.rows(file.path, self.text_key, *bounds):
            if row.data is None:
                yield int(file.bytes * row.done), Refusal(file.path, row.where, row.reason, row.detail)
            else:
                yield int(file.bytes * row.done), Record(file.path, row.where, "text", row.data)

    @contextmanager
    def _open(self, file: Input) -> Iterator[Opened]:
        budget = self.budget(file)
        with opened(file.path, file.compression, budget if file.compression or file.bytes > budget else None) as found:
            yield found


def _by_content(file: Input) -> Input:
    """The file with the kind and compression that its first bytes show, if they are certain."""
    with open(file.path, "rb") as opened_file:
        head = opened_file.read(LONGEST)
    if is_pointer(head):
        raise Damaged("not fetched", POINTER)
    compression = compression_of(head)
    if head.startswith(b"PARE"):
        raise Damaged("encrypted Parquet", "its footer is encrypted; write it unencrypted")
    if head.startswith(b"PAR1"):
        return file._replace(kind="parquet", compression=None)
    if begins_as_json(head):
        return file._replace(kind="text" if file.kind == "parquet" else file.kind, compression=None)
    return file._replace(compression=compression or file.compression)


def cut(data: bytes) -> Iterator[bytes]:
    """Split one UTF-8 document into consecutive pieces of at most DOCUMENT_BYTES."""
    start = 0
    while len(data) - start > DOCUMENT_BYTES:
        size = _cut(data[start : start + DOCUMENT_BYTES])
        yield data[start : start + size]
        start += size
    yield data[start:] if start else data


def _cut(buffer: bytes) -> int:
    """Where to end a piece: after the last line end, else before the last blank, else between two characters."""
    if line_end := buffer.rfind(b"\n") + 1:
        return line_end
    if (blank := buffer.rfind(b" ")) > 0:  # most tokenizers put it at the start of a word
        return blank
    for size in range(len(buffer) - 1, len(buffer) - 5, -1):
        if buffer[size] & 0xC0 != 0x80:  # the first byte of a character
            return size
    return len(buffer)  # not UTF-8: decoding says so
