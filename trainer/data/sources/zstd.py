"""Decompress a zstd file up to any damage: frames with windows of any size, one after another, and zero padding."""

import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa

from .damage import ERRORS, Damaged

_WINDOW_LOG, _LARGEST_WINDOW_LOG = 27, 31
"""Log2 of the largest window that pyarrow and the zstd command accept by default, and the command with --long."""
_AT_ONCE = 1 << 12
_MOST_BLOCKS = 1 << 22
"""Most blocks to walk over: 512 GiB at 128 KiB each. A file may have any number of four-byte blocks."""


class ZstdStream(io.RawIOBase):
    """Decompresses with pyarrow. If that fails, it inspects the file's frames and continues with the zstd command,
    which supports larger windows and yields everything before damage, or with pyarrow up to where padding begins.

    Args:
        raw: the file at `path`.
        count: counts padding towards a budget.
    """

    def __init__(self, path: str, raw: pa.NativeFile, count: Callable[[int], None]):
        self._path, self._raw, self._count = path, raw, count
        self._stream: Any = pa.CompressedInputStream(raw, "zstd")
        self._given = 0
        self._frames: Frames | None = None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell() if isinstance(self._stream, _ZstdCommand) else self._raw.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            size = self._stream.readinto(memoryview(buffer)[:_AT_ONCE])
        except ERRORS as error:
            if self._frames:
                if self._frames.padded and isinstance(self._stream, _ZstdCommand):
                    return 0  # the padding is all that it complains about
                raise
            self._go_on(error)
            return self.readinto(buffer)
        self._given += size
        return size

    def _go_on(self, error: Exception) -> None:
        with open(self._path, "rb") as file:
            self._frames = frames = frames_of(file.fileno(), self._count)
        large, command = frames.window > 1 << _WINDOW_LOG, shutil.which("zstd")
        if large and (frames.window > 1 << _LARGEST_WINDOW_LOG or not command):
            way = "`zstd --ultra --long=31` does not make one" if command else "install the zstd command to read it"
            raise Damaged("zstd window too large", f"{frames.window >> 20:,} MiB; {way}") from None
        self._stream.close()
        if frames.padded and not large:
            self._raw = pa.OSFile(os.fsencode(self._path))
            self._stream = pa.CompressedInputStream(self._raw.get_stream(0, frames.end), "zstd")
        elif command:
            log = _LARGEST_WINDOW_LOG if large else _WINDOW_LOG
            self._stream = _ZstdCommand(command, self._path, log)
        else:
            raise error
        passed, again = 0, bytearray(1 << 16)
        while passed < self._given:
            size = self._stream.readinto(memoryview(again)[: self._given - passed])
            if not size:
                raise error
            passed += size

    def close(self) -> None:
        self._stream.close()
        self._raw.close()
        super().close()


class Frames(NamedTuple):
    end: int
    """Where the last whole frame ends."""
    window: int
    """Largest window of any frame, in bytes."""
    padded: bool
    """Whether there are only zeros after the last frame."""


def frames_of(file: int, count: Callable[[int], None]) -> Frames:
    """The frames of a zstd file (RFC 8878, section 3), without decompressing it.

    Args:
        file: file descriptor.
        count: called with the number of zeros after the last frame.
    """
    at, window, size = 0, 0, os.fstat(file).st_size
    for _ in range(_MOST_BLOCKS):
        head = os.pread(file, 18, at)
        if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50 and len(head) >= 8:  # a skippable frame
            end: int | None = at + 8 + int.from_bytes(head[4:8], "little")
        elif head.startswith(b"\x28\xb5\x2f\xfd") and len(head) > 5:
            window = max(window, _window(head))
            end = _end_of_frame(file, at, head, size)
        else:
            break
        if end is None or end > size:
            return Frames(at, window, padded=False)
        at = end
    rest = size - at
    while rest:
        piece = os.pread(file, min(rest, 1 << 20), size - rest)
        if not piece or piece.count(0) < len(piece):
            return Frames(at, window, padded=False)
        count(len(piece))
        rest -= len(piece)
    return Frames(at, window, padded=True)


def _window(head: bytes) -> int:
    if head[4] & 0x20:  # a single segment, as large as its content
        return _content_size(head)
    # Section 3.1.1.1.2: the window descriptor, an exponent and eighths.
    base = 1 << (10 + (head[5] >> 3))
    return base + (base >> 3) * (head[5] & 7)


def _sizes(flags: int) -> tuple[int, int, int]:
    """Lengths in bytes of the window descriptor, dictionary ID and content size in a frame's header."""
    single = flags >> 5 & 1
    return 1 - single, (0, 1, 2, 4)[flags & 3], (single, 2, 4, 8)[flags >> 6]


def _content_size(head: bytes) -> int:
    descriptor, dictionary, content = _sizes(head[4])
    start = 5 + descriptor + dictionary
    return int.from_bytes(head[start : start + content], "little") + (256 if content == 2 else 0)


def _end_of_frame(file: int, at: int, head: bytes, size: int) -> int | None:
    """Offset where a frame ends; None if that is beyond the file's end, or after too many blocks."""
    at += 5 + sum(_sizes(head[4]))
    for _ in range(_MOST_BLOCKS):
        if at + 3 > size:
            return None
        block = int.from_bytes(os.pread(file, 3, at), "little")
        at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)  # an RLE block stores one byte
        if block & 1:
            return at + (4 if head[4] & 4 else 0)
    return None


class _ZstdCommand(io.RawIOBase):
    """Decompresses with the zstd command."""

    def __init__(self, command: str, path: str, window_log: int):
        self._file, self._errors = open(path, "rb"), tempfile.TemporaryFile()  # noqa: SIM115
        options = [command, "-dcq", f"--long={window_log}", "--no-progress"]
        self._process = subprocess.Popen(
            options, stdin=self._file, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0
        )

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return os.lseek(self._file.fileno(), 0, os.SEEK_CUR)

    def readinto(self, buffer: Any) -> int:
        size = self._process.stdout.readinto(buffer)  # type: ignore[union-attr]
        if not size and self._process.wait():
            self._errors.seek(0)
            said = (
                " ".join(self._errors.read(500).decode(errors="replace").split()).removeprefix("/*stdin*\\ :").strip()
            )
            raise EOFError(said) if "end" in said else OSError(said)
        return size

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for each in (self._process.stdout, self._file, self._errors):
            each.close()  # type: ignore[union-attr]
        super().close()
