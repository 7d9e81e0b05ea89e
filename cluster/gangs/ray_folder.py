"""Ray's folder, closed to other users of this machine: Ray itself opens what it creates there to everyone."""

import contextlib
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

import psutil

from configs import ConfigError, private_folder

LONGEST = 43
"""Bytes of the path of Ray's folder: a socket's path below it may have 107."""


def ray_parent() -> Path:
    """The folder in which, by default, Ray's folder `ray` of this user's clusters is created."""
    folder = tempfile.gettempdir()
    return Path(folder if len(folder) <= LONGEST - 24 else "/tmp") / f"muster-ray-{os.geteuid()}"


def ray_folder(given: str | None) -> Path:
    """Ray's folder on a machine of a cluster: Ray may open it to everyone, as others cannot enter a folder above it.

    Args:
        given: `--temp-dir`. Used as it is below a folder that only this user can enter; otherwise it becomes such a
            folder, with Ray's folder in it.

    Raises:
        ConfigError: it is open to others, or its path is too long.
    """
    if given == "":
        raise ConfigError("--temp-dir is empty: name a folder")
    if given is None:
        folder = private_folder(ray_parent(), "--temp-dir=FOLDER") / "ray"
    else:
        folder = Path(os.path.abspath(os.path.expanduser(given)))
        if not any(closed(above) for above in folder.parents):
            if folder.exists() and not closed(folder):
                raise ConfigError(
                    f"--temp-dir={given} is open to other users, who could run code as you: choose a new folder, or "
                    f"one of mode 0700"
                )
            folder = private_folder(folder, "--temp-dir=FOLDER") / "ray"
    above = folder.parent.parent
    if _writable_by_others(above) and not above.stat().st_mode & stat.S_ISVTX and not any(map(closed, above.parents)):
        raise ConfigError(f"{above} lets other users rename what is in it: name a folder elsewhere with --temp-dir")
    if len(os.fsencode(folder)) > LONGEST:
        raise ConfigError(f"--temp-dir: {folder} has more than {LONGEST} characters, too many for Ray's sockets")
    return folder


def remove_dead_sessions(folder: Path) -> None:
    """Remove what dead sessions left in Ray's folder: jobs' packages, with any secrets in them, and logs.

    A session is dead if it is over a minute old and no process has its name on the command line.
    """
    commands = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            commands.append(" ".join(process.cmdline()))
    for session in folder.glob("session_2*"):
        with contextlib.suppress(OSError):
            found = session.lstat()
            ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            if ours and found.st_mtime < time.time() - 60 and not any(session.name in each for each in commands):
                shutil.rmtree(session, ignore_errors=True)


def closed(folder: Path) -> bool:
    """Whether only this user, or root, can enter a folder."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o077


def open_to_others(folder: Path) -> bool:
    """Whether another user of this machine can change what lies in a folder."""
    folder = folder.resolve()
    return folder.is_dir() and _writable_by_others(folder) and not any(map(closed, (folder, *folder.parents)))


def _writable_by_others(folder: Path) -> bool:
    return bool(folder.stat().st_mode & 0o022)
