"""Find raw inputs (text, JSONL, Parquet, compressed, folders, globs, the standard library) and stream their records."""

import glob
import io
import os
import stat
import sysconfig
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from configs import ConfigError
from configs.data import LimitsConfig

from .child import MIB
from .parquet import EXPANDS, RAISE, RECORD_WEIGHT, ParquetProcess

DOCUMENT_BYTES = 1 << 18
"""A longer document is cut, at a line end where it has one, into documents of at most this many UTF-8 bytes."""
RECORD_BYTES = 1 << 26
"""A longer JSONL line or Parquet value is refused: it has to stand in memory as a whole."""

FREE_BYTES = 1 << 24
"""What any file may unpack to, however small."""

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_KINDS: dict[str, Literal["jsonl", "parquet"]] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}


class Input(NamedTuple):
    path: str
    kind: Literal["text", "jsonl", "parquet", "special"]
    """special: a folder that cannot be read, or neither a file nor a folder."""
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
        return list(_walk(given))
    if os.path.lexists(given):
        return [given]
    return [path for match in sorted(set(_matches(given))) for path in _expand_match(match)]


def _expand_match(match: str) -> list[str]:
    # With `**` a glob lists a folder's files too, so folders are opened only for patterns that end at one;
    # a file found both ways counts once.
    return list(_walk(match)) if os.path.isdir(match) else [match]


def _matches(pattern: str) -> list[str]:
    """As `glob.glob(pattern, recursive=True)`, which with a few links that lead in circles never ends."""
    before, recursive, after = _at_stars(pattern)
    if not recursive:
        return glob.glob(pattern)
    found = []
    for root in _matches(before) if glob.has_magic(before) else [before]:
        for folder, names in _tree(root, follow=True):
            if after:
                found += _matches(os.path.join(glob.escape(folder), after))
            else:
                found += [os.path.join(folder, name) for name in names or ()]
    return found


def _at_stars(pattern: str) -> tuple[str, bool, str]:
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return pattern, False, ""
    at = parts.index("**")
    return os.sep.join(parts[:at]) + os.sep * (parts[0] == "" and at == 1), True, os.sep.join(parts[at + 1 :])


def _walk(root: str, left_out: Container[str] = ("__pycache__",)) -> Iterator[str]:
    for folder, names in _tree(root, left_out):
        if names is None:
            yield folder  # to be refused by name
        else:
            yield from (os.path.join(folder, name) for name in names)


def _tree(root: str, left_out: Container[str] = (), follow: bool = False) -> Iterator[tuple[str, list[str] | None]]:
    """Every folder from `root` down, each once, with the sorted names of what is in it and no folder; None where it
    cannot be read. Names that start with a dot are passed over.

    Unlike os.walk's its depth has no limit, and links to folders that are followed may lead in circles.
    """
    waiting, seen = [root], set()
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder or os.curdir)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            names = sorted(name for name in os.listdir(folder or os.curdir) if not name.startswith("."))
        except OSError:
            yield folder, None
            continue
        paths = [os.path.join(folder, name) for name in names]
        folders = {path for path in paths if os.path.isdir(path)}
        waiting += [
            path
            for path, name in zip(paths[::-1], names[::-1], strict=True)
            if path in folders and name not in left_out and (follow or not os.path.islink(path))
        ]
        yield folder, [name for path, name in zip(paths, names, strict=True) if path not in folders]


def _describe(path: str) -> Input:
    stem, ending = os.path.splitext(path.lower())
    compression = _COMPRESSION.get(ending)
    if compression:
        ending = os.path.splitext(stem)[1]
    try:
        status = os.stat(path)
    except OSError:  # a dangling link: reading it says so
        return Input(path, "text", None, 0, 0)
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device: reading it may never end
        return Input(path, "special", None, 0, status.st_mtime_ns)
    return Input(path, _KINDS.get(ending, "text"), compression, status.st_size, status.st_mtime_ns)  # type: ignore[arg-type]


class Reader:
    """Reads the records of one file after the other. Use it as a context manager or call `close()`.

    Args:
        text_key: column of a Parquet file that holds the text.
        limits: what a file may unpack to and take.
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
        """Stream a file's records in order with the position (bytes of the file) reached.

        Whatever is wrong with the file ends as a Refusal; the records before it stand. Memory is bounded by one
        record.
        """
        if file.kind == "special":
            what = "a folder that cannot be read" if os.path.isdir(file.path) else "neither a file nor a folder"
            yield 0, Refusal(file.path, "", "unreadable file", what)
            return
        if file.bytes == 0 and os.path.exists(file.path):
            yield 0, Refusal(file.path, "", "empty file")
            return
        progress = [""]
        try:
            yield from {"text": self._text, "jsonl": self._jsonl, "parquet": self._parquet}[file.kind](file, progress)
        except _Expands as error:
            yield file.bytes, Refusal(file.path, progress[0], EXPANDS, str(error))
        except (OSError, pa.ArrowException) as error:
            yield file.bytes, Refusal(file.path, progress[0], _reason(error), " ".join(str(error).split())[:200])

    def budget(self, file: Input) -> int:
        """Bytes that a file may unpack to."""
        stored = _stored(file) if file.bytes > FREE_BYTES else file.bytes
        return max(FREE_BYTES, self.limits.expansion * stored)

    def _text(self, file: Input, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        with self._open(file) as (stream, tell, _):
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

    def _jsonl(self, file: Input, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        with self._open(file) as (stream, tell, count):
            number = 0
            while line := stream.readline(RECORD_BYTES):
                number += 1
                count(RECORD_WEIGHT)
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

    def _parquet(self, file: Input, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        if file.compression:
            yield file.bytes, Refusal(file.path, "", "compressed Parquet", "unpack it: Parquet is read by ranges")
            return
        memory = self.limits.memory * MIB
        bounds = (self.budget(file), RECORD_BYTES, memory, self.limits.seconds)
        for row in self._parquet_process.rows(file.path, self.text_key, *bounds):
            if row.data is None:
                yield int(file.bytes * row.done), Refusal(file.path, row.where, row.reason, row.detail)
            else:
                yield int(file.bytes * row.done), Record(file.path, row.where, "text", row.data)

    @contextmanager
    def _open(self, file: Input) -> Iterator[tuple[io.BufferedReader, Callable[[], int], Callable[[int], None]]]:
        """The unpacked stream, the position in the file, and what counts towards its budget beside the bytes."""
        # pyarrow's streams read concatenated gzip members and zstd frames, and raise on a truncated one.
        with ExitStack() as stack:
            raw = stack.enter_context(pa.OSFile(file.path))
            budget, unpacked = self.budget(file), raw
            if file.compression:
                unpacked = stack.enter_context(pa.CompressedInputStream(raw, file.compression))
            elif file.bytes <= budget:
                yield io.BufferedReader(raw, 1 << 18), raw.tell, lambda size: None
                return
            counted = _Counted(unpacked, budget)
            yield io.BufferedReader(counted, 1 << 18), raw.tell, counted.count


def _stored(file: Input) -> int:
    """Bytes of a file that are on the disk: a sparse one of a terabyte takes none."""
    with open(file.path, "rb") as opened:
        if not hasattr(os, "SEEK_HOLE") or os.lseek(opened.fileno(), 0, os.SEEK_HOLE) >= file.bytes:
            return file.bytes  # without holes, or its file system does not tell
        return os.fstat(opened.fileno()).st_blocks * 512


class _Expands(Exception):
    pass


class _Counted(io.RawIOBase):
    """A stream that ends in `_Expands` when more than a budget was read."""

    def __init__(self, stream: Any, budget: int):
        self._stream, self._budget, self._left = stream, budget, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._stream.readinto(buffer)
        self.count(size)
        return size

    def count(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise _Expands(f"over {self._budget:,} bytes{RAISE} expansion=N)")


def cut(data: bytes) -> Iterator[bytes]:
    """Cut one UTF-8 document into pieces of at most DOCUMENT_BYTES; together they are the whole."""
    start = 0
    while len(data) - start > DOCUMENT_BYTES:
        size = _cut(data[start : start + DOCUMENT_BYTES])
        yield data[start : start + size]
        start += size
    yield data[start:] if start else data


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
