"""Files of a run or sweep: its owner's, written through no link, and read within bounds."""

import errno
import os
import stat
import tempfile
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from configs import ConfigError

LONGEST_LINE = 16 << 20
"""Most bytes of a line of a record; a step with a thousand experts in each of a hundred layers has some 2 MB."""


def require_own(folder: Path, without: Collection[str] = ()) -> None:
    """Look at every file below a folder, which need not exist; call before anything is written there.

    What is above it is the user's: `run.root` may lead over links to another disk.

    Args:
        without: names in the folder whose files are not looked at.

    Raises:
        ConfigError: one is a link, a pipe or a device, or belongs to another user.
    """
    mine = os.geteuid()
    for path, found in _below(folder, without):
        if stat.S_ISLNK(found.st_mode):
            what = f"is a link to {os.readlink(path)}"
        elif not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
            what = "is neither a file nor a folder"
        elif found.st_uid != mine and found.st_uid != (mine := _owner_of_new(folder)):
            what = f"belongs to user {found.st_uid}, not to you ({mine})"
        else:
            continue
        raise ConfigError(
            f"{path} {what}: nothing is written to a folder that may lead elsewhere.\n"
            f"Remove it if it is yours, or choose another name or root of the run or sweep"
        )


def _below(folder: Path, without: Collection[str]) -> Iterator[tuple[str, os.stat_result]]:
    """The folder and all below it, each with what `lstat` says; a folder before what is in it."""
    try:
        found = folder.lstat()
    except OSError:
        return  # it is not there, or cannot be: whoever writes to it says why
    yield str(folder), found
    folders = [str(folder)]
    while folders:
        above = folders.pop()
        try:
            entries = list(os.scandir(above))
        except OSError:
            continue  # another process has just removed it
        for entry in entries:
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield entry.path, found
            if stat.S_ISDIR(found.st_mode) and not (above == str(folder) and entry.name in without):
                folders.append(entry.path)


def _owner_of_new(folder: Path) -> int:
    """Owner that our files should have there: a network file system may map this user to another id."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return os.geteuid()


def make_empty(folder: Path) -> None:
    """Make the folder of an export. Raises ConfigError if it is there with something in it, or cannot be made."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        full = any(folder.iterdir())
    except FileExistsError:
        raise ConfigError(f"--out {folder}: there is a file of that name") from None
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be created ({error.strerror})") from None
    if full:
        raise ConfigError(f"--out {folder}: the folder is not empty")


def open_file(path: Path) -> BinaryIO:
    """Open a plain file for reading. Raises OSError for anything else, and for a link: neither waits nor leads away."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most: int) -> bytes:
    """What stands in a plain file. Raises OSError, also where it has more bytes than `most`."""
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"over {most:,} bytes", str(path))
    return content


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, each with its end; one of more than LONGEST_LINE in pieces of as many bytes."""
    return iter(partial(file.readline, LONGEST_LINE), b"")


def no_link(path: str, flags: int) -> int:
    """`open(..., opener=no_link)` opens what is named itself, or raises OSError (ELOOP); what is new is its owner's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, or write it anew, but not through a link."""
    with open(path, "wb", opener=no_link) as file:
        file.write(content)
