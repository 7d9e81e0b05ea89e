"""Files below a run's folder, opened through no link on the way; whoever made the folder may have put some there."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MOST_FILES = 5000
"""Entries of one folder that are looked at."""


@contextlib.contextmanager
def below(run_dir: Path, *names: str) -> Iterator[int]:
    """A descriptor of a folder below a run's.

    Args:
        names: of the folders on the way, as this program chooses them; none comes from a request.

    Raises:
        OSError: one is not there, or is a link or no folder.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    opened = os.open(run_dir, flags)
    try:
        for name in names:
            inner = os.open(name, flags, dir_fd=opened)
            os.close(opened)
            opened = inner
        yield opened
    finally:
        os.close(opened)


def plain_files(folder: int) -> list[tuple[str, int]]:
    """Name and bytes of each plain file of an open folder, by name; of the first `MOST_FILES` entries."""
    found = []
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number >= MOST_FILES:
                break
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    found.append((entry.name, status.st_size))
    return sorted(found)


@contextlib.contextmanager
def opened(folder: int, name: str) -> Iterator[BinaryIO]:
    """A plain file of an open folder. Raises OSError, also for a link or a pipe."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{name} is not a file")
        yield file
