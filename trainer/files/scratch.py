"""Temporary folders that only this user can enter, of which none outlives the process that made it for long.

A process that is killed leaves its folder behind. It has held a lock in it for as long as it lived, so the next one to
make a folder can tell that nobody uses it, and removes it.
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX, LOCK = "muster-", "lock"
_NAMES = f"{PREFIX}{'?' * 8}"
"""As `tempfile.mkdtemp` makes them; other names with the prefix are not ours."""
_held: dict[Path, tuple[int, int]] = {}
"""Of each folder its lock, and the process that made it: a fork of that has no say in it."""


def make_folder(within: str | None = None) -> Path:
    """A new folder, which is removed by `remove_folder` or at the end of this process; those of killed ones go now.

    Args:
        within: where; None: the folder for temporary files.
    """
    parent = Path(within or tempfile.gettempdir())
    sweep(parent)
    if not _held:
        atexit.register(remove_folders)
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    lock = os.open(path / f".{LOCK}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    # Not filelock's, which a fork loses: of a killed process the folder stays until its forks have ended too.
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(path / f".{LOCK}", path / LOCK)  # held by the time that another process can find it
    _held[path] = lock, os.getpid()
    return path


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of `make_folder` while the block runs."""
    path = make_folder()
    try:
        yield path
    finally:
        remove_folder(path)


def remove_folder(path: Path) -> None:
    """Remove a folder that `make_folder` made, and what is in it."""
    lock, maker = _held.pop(path, (None, None))
    if lock is None or maker != os.getpid():
        return
    _remove(path)
    os.close(lock)


def remove_folders() -> None:
    """Remove those that this process has made and not removed. For ends that pass by `atexit`."""
    for path in list(_held):
        remove_folder(path)


def sweep(parent: str | Path | None = None) -> None:
    """Remove the folders that nobody holds any more from the folder for temporary files, or another."""
    for path in Path(parent or tempfile.gettempdir()).glob(_NAMES):
        with contextlib.suppress(OSError):
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                continue
            lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(lock)


def _remove(path: Path) -> None:
    """The lock goes last: a folder without one would stay for ever."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            entry.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something that cannot be removed: the next sweep tries again
        if [entry.name for entry in path.iterdir()] == [LOCK]:
            (path / LOCK).unlink(missing_ok=True)
            path.rmdir()
