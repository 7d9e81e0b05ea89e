"""Ray's folder, where no other user of this machine enters: Ray itself opens what it makes in it to everyone."""

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
"""Characters of Ray's folder: those of the socket below it may be 107."""


def ray_parent() -> Path:
    """Where the Ray of this user's clusters keeps its files, in a folder `ray`, if nothing else is said."""
    folder = tempfile.gettempdir()
    return Path(folder if len(folder) <= LONGEST - 24 else "/tmp") / f"muster-ray-{os.geteuid()}"


def ray_folder(given: str | None) -> Path:
    """Ray's folder for a machine of a cluster: one that Ray may open to everyone, as nobody else gets that far.

    Args:
        given: `--temp-dir`, which is taken as it is below a folder of this user's alone, and else becomes one.

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
                    f"--temp-dir={given} is open to other users, who could run code as this one: name a folder that "
                    f"is not there yet, or one of mode 0700"
                )
            folder = private_folder(folder, "--temp-dir=FOLDER") / "ray"
    above = folder.parent.parent
    if _writable_by_others(above) and not above.stat().st_mode & stat.S_ISVTX and not any(map(closed, above.parents)):
        raise ConfigError(f"{above} lets other users rename what is in it: name a folder elsewhere with --temp-dir")
    if len(os.fsencode(folder)) > LONGEST:
        raise ConfigError(f"--temp-dir: {folder} has more than {LONGEST} characters, too many for Ray's sockets")
    return folder


def remove_dead_sessions(folder: Path) -> None:
    """Remove what ended sessions left in Ray's folder: jobs' packages, with the secrets that were sent, and logs.

    One that is a minute old and that no process names on its command line has ended.
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
    """Whether this user alone enters a folder, or root."""
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
