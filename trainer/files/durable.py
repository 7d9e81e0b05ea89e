"""Crash-safe file writes and SHA-256 digests: after a crash a file has either its old or its new content."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .own_files import no_link


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, readable by its owner only, that replaces `path` at the end of the block, once it is on disk.

    Raises:
        OSError: it cannot be written, or its temporary name is a link. `path` is as before, and so it is where the
            block raises.
    """
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}")
    try:
        with open(temporary, "wb", opener=no_link) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file, as `replacing`."""
    with replacing(path) as file:
        file.write(content)


def replace_text(path: Path, text: str) -> None:
    """As `replace_bytes`."""
    replace_bytes(path, text.encode())


def write_durably(path: Path, value: Any) -> None:
    """Write JSON, as `replace_bytes`."""
    replace_text(path, json.dumps(value))


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
