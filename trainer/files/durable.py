"""Crash-safe file writes and SHA-256 digests: after a crash a file has either its old or its new content."""

import errno
import fcntl
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .own_files import no_link

OLD = 3600.0
"""Seconds after which nobody is still writing a file under a temporary name."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, readable by its owner only, that replaces `path` at the end of the block, once it is on disk.

    It has one temporary name, so that the next write takes over what a killed one left. Where that name is not to be
    had, because another process or thread is writing or the file system has no locks, it has one of this thread's,
    and old files under such names, which nobody takes over, are removed.

    Raises:
        OSError: it cannot be written, or its temporary name is a link. `path` is as before, and so it is where
            the block raises.
    """
    temporary = path.with_name(f".{path.name}.new")
    if (file := _claimed(temporary)) is None:
        _remove_left(path)
        temporary = path.with_name(f".{path.name}.{threading.get_native_id()}")
        file = os.fdopen(no_link(str(temporary), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb")
    with file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # still locked, and so still ours
            raise
    fsync(path.parent)


def _remove_left(path: Path) -> None:
    """Remove what threads that were killed have left under names of their own."""
    begin = f".{path.name}."
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if not entry.name.startswith(begin) or not entry.name[len(begin) :].isdecimal():
                continue
            if time.time() - entry.stat(follow_symlinks=False).st_mtime > OLD:
                os.unlink(entry.path)


def _claimed(path: Path) -> BinaryIO | None:
    """A file, new or left by a writer that was killed, empty and locked until it is closed.

    None: a live process has locked it, nothing can be locked there, or it is no plain file of this user alone.
    Raises OSError if it is a link.
    """
    flags, made = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, True
    try:
        try:
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            descriptor, made = os.open(path, flags), False
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
        return None
    file = os.fdopen(descriptor, "wb")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        own = os.fstat(descriptor)
        # Its last writer may have moved it to its place, or removed it, since it was opened.
        if not os.path.samestat(own, os.lstat(path)):
            raise FileNotFoundError(path)
        if stat.S_ISREG(own.st_mode) and own.st_nlink == 1 and own.st_uid == os.geteuid():
            os.fchmod(descriptor, 0o600)
            os.ftruncate(descriptor, 0)
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # no locks here
        if made:
            path.unlink(missing_ok=True)
    file.close()
    return None


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
