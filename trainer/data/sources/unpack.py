"""Open a text file, compressed or not, as a stream that counts its bytes and yields everything before any damage."""

import bz2
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from configs.reading.parse import clip

from .damage import ERRORS, Damaged, Expands
from .zstd import ZstdStream

Compression = Literal["gzip", "zstd", "bz2", "xz"]
ENDINGS: dict[str, Compression] = {
    ".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz", ".lzma": "xz",
}  # fmt: skip
MAGIC: dict[bytes, Compression] = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh91AY&SY": "bz2",
    b"\xfd7zXZ\x00": "xz",
}
"""First bytes of a compressed file, whatever its name."""

XZ_MEMORY = 256 << 20
"""Bytes of memory that decompression may use; `xz -9` needs 65 MiB, and a file's header can ask for 4 GiB."""
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
    "bz2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY),
}
HEAD_BYTES = 1 << 18
"""Bytes that the first `Opened.stream.peek` of a file returns; fewer only if the file has no more."""


def compression_of(head: bytes) -> Compression | None:
    """A file's compression by its first bytes; None: not compressed, or not recognised."""
    if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
        return "zstd"  # a skippable frame
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)


@dataclass(frozen=True)
class Opened:
    stream: io.BufferedReader
    """The file's decompressed content. Ends where the file ends or is damaged."""
    tell: Callable[[], int]
    """Position in the file."""
    count: Callable[[int], None]
    """Counts other work than the bytes themselves towards the budget. Raises Expands."""
    damaged: Callable[[], bool]
    """Whether the stream ended because of damage."""


@contextmanager
def opened(path: str, compression: Compression | None, budget: int | None) -> Iterator[Opened]:
    """Open a file. Damage is raised at the end of the block, after everything readable has been read.

    Args:
        budget: bytes that the file may expand to; None: no limit.

    Raises:
        Expands: in the block, as soon as the budget is exceeded.
        Damaged: a zstd window is too large.
        OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException: see `reason_of`.
    """
    with ExitStack() as stack:
        raw = stack.enter_context(pa.OSFile(os.fsencode(path)))
        if budget is None and not compression:
            yield Opened(io.BufferedReader(raw, HEAD_BYTES), raw.tell, lambda size: None, lambda: False)
            return
        counted = _Counted(budget)
        tell = raw.tell
        if compression == "zstd":
            counted.stream = stack.enter_context(ZstdStream(path, raw, counted.count))
            tell = counted.stream.tell
        elif compression:
            counted.stream = _Members(raw, _DECOMPRESSORS[compression], counted.count)
        else:
            counted.stream = raw
        yield Opened(io.BufferedReader(counted, HEAD_BYTES), tell, counted.count, lambda: counted.error is not None)
        if counted.error:
            raise counted.error


def reason_of(error: Exception) -> tuple[str, str]:
    """An exception from reading as a reason, from a small set of phrases, and the exception's own message."""
    if isinstance(error, Damaged):
        return error.args
    text = clip(error, 200)
    if isinstance(error, MemoryError) or (isinstance(error, lzma.LZMAError) and "Memory usage limit" in text):
        return "takes too much memory", text
    if "requires too much memory" in text:
        return "zstd window too large", text
    if isinstance(error, EOFError) or "Truncated compressed stream" in text:
        return "truncated compressed file", text
    # Errors of the operating system have an errno; those of a decompressor have none.
    if getattr(error, "errno", None) is None:
        return "damaged compressed file", text
    return "unreadable file", text


class _Counted(io.RawIOBase):
    """A stream that raises `Expands` once more than a budget was read. It ends at any other error and keeps the error:
    raising it would lose what is still buffered between the stream and its reader."""

    def __init__(self, budget: int | None):
        self.stream: Any = None
        self.error: Exception | None = None
        self._over: Expands | None = None
        self._budget, self._left = budget, budget or 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as there is data."""
        if self._over:
            raise self._over
        filled = 0
        while filled < len(buffer) and not self.error:
            left = self._left
            try:
                size = self.stream.readinto(memoryview(buffer)[filled:])
                self.count(size)
            except Expands as error:
                # What was read before it is within the budget.
                self._left, self._over = left, error
                if not filled:
                    raise
                break
            except ERRORS as error:
                self.error = error
                break
            if not size:
                break
            filled += size
        return filled

    def count(self, size: int) -> None:
        if self._budget is not None:
            self._left -= size
            if self._left < 0:
                raise Expands(f"over {self._budget:,} bytes")


class _Members(io.RawIOBase):
    """Decompresses the members (gzip) or streams (bz2, xz) of a file one after another, and skips zeros that pad it to
    a block of a tape or a disk."""

    def __init__(self, raw: Any, make: Callable[[], Any], count: Callable[[int], None]):
        self._raw, self._make, self._count = raw, make, count
        self._member: Any = None
        self._first = True
        self._packed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._member is None and not self._next():
                return 0
            piece = self._member.decompress(self._packed, len(buffer))
            self._packed = getattr(self._member, "unconsumed_tail", b"")  # bz2 and lzma keep it themselves
            if self._member.eof:
                self._packed = self._member.unused_data
                self._member = None
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)
            if self._member and not self._fill():
                raise EOFError("it ends inside its compressed data")

    def _next(self) -> bool:
        """Start the next member, if there is one."""
        while self._packed or self._fill():
            if not self._first:
                padding = len(self._packed) - len(packed := self._packed.lstrip(b"\0"))
                self._count(padding)  # a sparse file has terabytes of it
                self._packed = packed
            if self._packed:
                self._member, self._first = self._make(), False
                return True
        return False

    def _fill(self) -> bool:
        self._packed = self._raw.read(1 << 16)
        return bool(self._packed)


def rejoined(head: bytes, stream: io.BufferedReader) -> io.BufferedReader:
    """A stream that yields again what was already read from it, then the rest."""
    return io.BufferedReader(_Rejoined(head, stream), HEAD_BYTES)


class _Rejoined(io.RawIOBase):
    def __init__(self, head: bytes, stream: io.BufferedReader):
        self._head, self._stream = memoryview(head), stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._head:
            return self._stream.readinto(buffer)
        size = min(len(buffer), len(self._head))
        buffer[:size], self._head = self._head[:size], self._head[size:]
        return size


def budget_of(size: int, path: str, expansion: int, free: int) -> int:
    """Bytes that a file may expand to: `expansion` for each byte on disk (a sparse file of a terabyte has none there),
    and at least `free`."""
    return max(free, expansion * (_stored(size, path) if size > free else size))


def _stored(size: int, path: str) -> int:
    with open(path, "rb") as file:
        if not hasattr(os, "SEEK_HOLE") or os.lseek(file.fileno(), 0, os.SEEK_HOLE) >= size:
            return size  # without holes, or the file system does not say
        return os.fstat(file.fileno()).st_blocks * 512
