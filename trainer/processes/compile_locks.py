"""Removes stale locks of killed compilations, on which torch and DeepSpeed would wait for ever."""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from configs import ConfigError

LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "ramfs"}
"""File systems that no other machine writes to."""
OF_A_CONTAINER = {"overlay", "tmpfs", "ramfs"}
"""Those that a container does not share."""
INIT_NAMESPACE = 0xEFFFFFFC
"""Inode of a machine's initial PID namespace (the kernel's PROC_PID_INIT_INO), which sees all processes."""
COMPILES = 900.0
"""Seconds that a compilation may take; DeepSpeed's longest here took 110."""
SETTLES = 0.5
"""Seconds between two looks: a process that releases a lock closes it a moment before removing it."""


class Lock(NamedTuple):
    """Attributes:
    state: `held` by a process of this machine; `stale`: held by nobody; `unknown`: that cannot be told from here.
    why: the reason, for `unknown`.
    """

    path: Path
    state: Literal["held", "stale", "unknown"]
    why: str = ""


def mend_compile_locks() -> list[Path]:
    """Remove the locks that nobody holds any more, and say so on stderr; call it before anything may compile.

    torch's FileBaton creates the file `lock` beside what it compiles, keeps it open meanwhile, and waits as long as the
    file exists. So a lock that no process has open is stale, provided that all processes that may have it open can be
    seen.

    Returns:
        The locks that were removed.

    Raises:
        ConfigError: a lock is older than any compilation takes, and whether it is held cannot be told from here.
    """
    if not Path("/proc/self/fd").is_dir():
        return []
    stale = {lock.path: _identity(lock.path) for lock in map(look, locks()) if lock.state == "stale"}
    if stale:
        time.sleep(SETTLES)
    removed = []
    for lock in map(look, locks()):
        if lock.state == "unknown":
            _refuse_old(lock)
        elif lock.state == "stale" and stale.get(lock.path, ()) == _identity(lock.path):
            with contextlib.suppress(FileNotFoundError):  # another process of this run was quicker
                lock.path.unlink()
                removed.append(lock.path)
                print(
                    f"removed {lock.path}: a compilation that was killed left it, and no process holds it",
                    file=sys.stderr,
                )
    return removed


def locks() -> list[Path]:
    """Every lock of torch's extensions, for every version of torch."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root, depth = (Path(given), "*/lock") if given else (Path(cache) / "torch_extensions", "*/*/lock")
    return sorted(root.glob(depth)) if root.is_dir() else []


def look(path: Path) -> Lock:
    """Whether a lock is held."""
    path, owner = path.resolve(), -1
    with contextlib.suppress(OSError):
        owner = path.stat().st_uid
    holder, unseen = _holder(path)
    if holder:
        return Lock(path, "held")
    kind = file_system(path)
    if kind not in LOCAL:
        why = f"other machines may write to its file system ({kind})"
    elif os.stat("/proc/self/ns/pid").st_ino != INIT_NAMESPACE and kind not in OF_A_CONTAINER:
        why = "this container does not see the machine's other processes"
    elif owner != os.getuid():
        why = "it is another user's"
    elif unseen:
        why = f"the open files of process {unseen} cannot be listed"
    else:
        return Lock(path, "stale")
    return Lock(path, "unknown", why)


def _holder(path: Path) -> tuple[int | None, int | None]:
    """(a process that has the file open, a process of this user whose open files cannot be listed)."""
    wanted, unseen = _identity(path), None
    for pid in psutil.pids():
        try:
            mine = os.stat(f"/proc/{pid}").st_uid == os.getuid()
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    if os.path.basename(os.readlink(entry.path)) == path.name and _inode(entry.path) == wanted:
                        return pid, None
        except PermissionError:
            unseen = pid if mine and pid != 1 else unseen  # PID 1, often protected, compiles nothing
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return None, unseen


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        return _inode(path)
    return None


def _inode(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def file_system(path: Path) -> str:
    """Type of the file system that an absolute path lies on."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def _refuse_old(lock: Lock) -> None:
    try:
        age = time.time() - lock.path.stat().st_mtime
    except FileNotFoundError:
        return
    hint = f"if no process compiles there, remove {lock.path}"
    if age > COMPILES:
        raise ConfigError(
            f"{lock.path} is the lock of a compilation that began {age / 60:.0f} min ago; this run would wait for it "
            f"for ever.\nWhether anybody holds it cannot be told from here, as {lock.why}: {hint}"
        )
    print(f"{lock.path}: somebody may have been compiling there for {age:.0f} s ({lock.why}); {hint}", file=sys.stderr)
