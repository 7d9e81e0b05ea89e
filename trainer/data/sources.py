"""Find raw inputs (text, JSONL, Parquet, compressed, folders, globs, the standard library) and stream their records."""

import glob
import io
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from configs import ConfigError

DOCUMENT_BYTES = 1 << 18
"""A longer document is cut, at a line end where it has one, into documents of at most this many UTF-8 bytes."""
RECORD_BYTES = 1 << 26
"""A longer JSONL line or Parquet value is refused: it has to stand in memory as a whole."""

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_KINDS: dict[str, Literal["jsonl", "parquet"]] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}


class Input(NamedTuple):
    path: str
    kind: Literal["text", "jsonl", "parquet"]
    compression: Literal["gzip", "zstd"] | None
    bytes: int
    mtime_ns: int


class Record(NamedTuple):
    """One undecoded document: UTF-8 text, or a JSON object that holds it."""

    path: str
    where: str
    """Inside the file: `line 3`, `row 5`, `bytes 0-262144`; empty when the file is the document."""
    kind: Literal["text", "json"]
    data: bytes


class Refusal(NamedTuple):
    """Something that was left out: where it stands and why."""

    path: str
    where: str
    reason: str
    """One of few phrases, so that refusals can be counted by it."""
    detail: str = ""

    def __str__(self) -> str:
        place = f"{self.path} ({self.where})" if self.where else self.path
        return f"{place}: {self.reason}" + (f": {self.detail}" if self.detail else "")


def find_inputs(inputs: Sequence[str | Path]) -> list[Input]:
    """List the files that the inputs stand for, each once, in the order given (folders: sorted, recursive).

    Args:
        inputs: files, folders, glob patterns, or `stdlib` (the .py files of this Python's standard library).
            In folders, names that start with a dot and `__pycache__` are passed over. A file's ending tells its
            kind: .jsonl/.ndjson, .parquet, anything else is text; .gz and .zst may follow.

    Raises:
        ConfigError: an input that matches nothing.
    """
    found: dict[str, Input] = {}
    for given in inputs:
        paths = _expand(str(given))
        if not paths:
            raise ConfigError(f"input {str(given)!r}: no file, folder or glob pattern matches anything")
        for path in paths:
            found.setdefault(os.path.realpath(path), _describe(path))
    if not found:
        raise ConfigError("no input: name files, folders or glob patterns, or `stdlib`")
    return list(found.values())


def _expand(given: str) -> list[str]:
    if given == "stdlib":
        root = sysconfig.get_paths()["stdlib"]
        return [path for path in _walk(root, _STDLIB_LEFT_OUT) if path.endswith(".py")]
    if os.path.isdir(given):
        return list(_walk(given, {"__pycache__"}))
    if os.path.exists(given):
        return [given]
    return [path for match in sorted(glob.glob(given, recursive=True)) for path in _expand_match(match)]


def _expand_match(match: str) -> list[str]:
    # With `**` a glob lists a folder's files too, so folders are opened only for patterns that end at one;
    # a file found both ways counts once.
    return list(_walk(match, {"__pycache__"})) if os.path.isdir(match) else [match]


def _walk(root: str, left_out: set[str]) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in left_out and not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(folder, name)
            if not name.startswith(".") and (os.path.isfile(path) or os.path.islink(path)):
                yield path


def _describe(path: str) -> Input:
    stem, ending = os.path.splitext(path.lower())
    compression = _COMPRESSION.get(ending)
    if compression:
        ending = os.path.splitext(stem)[1]
    try:
        status = os.stat(path)
    except OSError:  # a dangling link: reading it says so
        return Input(path, "text", None, 0, 0)
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"input {path!r} is neither a file nor a folder")
    return Input(path, _KINDS.get(ending, "text"), compression, status.st_size, status.st_mtime_ns)  # type: ignore[arg-type]


def read(file: Input, text_key: str) -> Iterator[tuple[int, Record | Refusal]]:
    """Stream a file's records in order with the position (bytes of the file) reached.

    Whatever is wrong with the file ends as a Refusal; the records before it stand. Memory is bounded by one
    record (and, for Parquet, one page of the column).
    """
    if file.bytes == 0 and os.path.exists(file.path):
        yield 0, Refusal(file.path, "", "empty file")
        return
    progress = [""]
    try:
        yield from {"text": _text, "jsonl": _jsonl, "parquet": _parquet}[file.kind](file, text_key, progress)
    except (OSError, pa.ArrowException) as error:
        yield file.bytes, Refusal(file.path, progress[0], _reason(error), _short(error))


def _text(file: Input, text_key: str, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
    with _open(file) as (stream, tell):
        carry, start = b"", 0
        while True:
            progress[0] = f"after byte {start}" if start else ""
            buffer = carry + stream.read(DOCUMENT_BYTES - len(carry))
            if not buffer:
                break
            size = _cut(buffer) if len(buffer) == DOCUMENT_BYTES else len(buffer)
            where = f"bytes {start}-{start + size}" if start or size < len(buffer) else ""
            yield tell(), Record(file.path, where, "text", buffer[:size])
            carry, start = buffer[size:], start + size
        if start == 0:
            yield file.bytes, Refusal(file.path, "", "empty file")


def _jsonl(file: Input, text_key: str, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
    with _open(file) as (stream, tell):
        number = 0
        while line := stream.readline(RECORD_BYTES):
            number += 1
            progress[0] = f"after line {number}"
            where = f"line {number}"
            if len(line) == RECORD_BYTES and not line.endswith(b"\n"):
                while (rest := stream.readline(RECORD_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield tell(), Refusal(file.path, where, "record too long", f"over {RECORD_BYTES} bytes")
            elif line.strip():
                yield tell(), Record(file.path, where, "json", line)
        if number == 0:
            yield file.bytes, Refusal(file.path, "", "empty file")


def _parquet(file: Input, text_key: str, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
    if file.compression:
        yield file.bytes, Refusal(file.path, "", "compressed Parquet", "unpack it: Parquet is read by ranges")
        return
    # Without pre_buffer a column is read page by page, not a row group at a time.
    with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as reader:
        schema, rows = reader.schema_arrow, max(reader.metadata.num_rows, 1)
        if text_key not in schema.names:
            yield (
                file.bytes,
                Refusal(file.path, "", "missing column", f"no {text_key!r} among {', '.join(schema.names)}"),
            )
            return
        kind = schema.field(text_key).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not any(
            test(kind)
            for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
        ):
            yield file.bytes, Refusal(file.path, "", "not text", f"column {text_key!r} is {kind}")
            return
        row = 0
        for batch in reader.iter_batches(batch_size=64, columns=[text_key], use_threads=False):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes: pyarrow would raise at the first value that is not UTF-8 and lose the rest.
            for value in column.cast(pa.large_binary()).to_pylist():
                row += 1
                where, position = f"row {row}", file.bytes * row // rows
                progress[0] = f"after row {row}"
                if value is None:
                    yield position, Refusal(file.path, where, "not text", "null")
                elif len(value) > RECORD_BYTES:
                    yield position, Refusal(file.path, where, "record too long", f"over {RECORD_BYTES} bytes")
                else:
                    yield position, Record(file.path, where, "text", value)
        if row == 0:
            yield file.bytes, Refusal(file.path, "", "empty file")


@contextmanager
def _open(file: Input) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
    # pyarrow's streams read concatenated gzip members and zstd frames, and raise on a truncated one.
    with ExitStack() as stack:
        raw = stack.enter_context(pa.OSFile(file.path))
        stream = raw
        if file.compression:
            stream = stack.enter_context(pa.CompressedInputStream(raw, file.compression))
        yield io.BufferedReader(stream, 1 << 18), raw.tell


def cut(data: bytes) -> Iterator[bytes]:
    """Cut one UTF-8 document into pieces of at most DOCUMENT_BYTES; together they are the whole."""
    while len(data) > DOCUMENT_BYTES:
        size = _cut(data[:DOCUMENT_BYTES])
        yield data[:size]
        data = data[size:]
    yield data


def _cut(buffer: bytes) -> int:
    """Where to end a piece: after the last line end, else between two characters."""
    line_end = buffer.rfind(b"\n") + 1
    if line_end:
        return line_end
    for size in range(len(buffer) - 1, len(buffer) - 5, -1):
        if buffer[size] & 0xC0 != 0x80:  # the first byte of a character
            return size
    return len(buffer)  # not UTF-8: decoding says so


def _reason(error: Exception) -> str:
    text = str(error)
    if "Truncated compressed stream" in text:
        return "truncated compressed file"
    if any(word in text for word in ("inflate failed", "ZSTD decompress", "decompress")):
        return "damaged compressed file"
    if any(word in text for word in ("Parquet", "parquet", "CRC", "page", "Thrift", "thrift")):
        return "damaged Parquet file"
    return "unreadable file"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
