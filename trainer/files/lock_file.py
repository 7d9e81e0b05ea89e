"""Lock files: held by at most one process, and released however that process ends."""

from pathlib import Path

from filelock import FileLock


def lock_file(path: Path, patience: float | None = None, poll: float = 0.05) -> FileLock:
    """A context manager that holds the lock; what stands in the file stays, and a process that is forked holds nothing.

    It is `flock`, on every file system that has it: elsewhere an OSError, and no lock by the file's existence, which
    would outlive its process.

    Args:
        patience: seconds to wait for whoever holds it; None: for ever.
        poll: seconds between two tries.

    Raises:
        filelock.Timeout: when it is entered, another holds it for as long. An OSError, too.
        OSError: when it is entered, the path is a link or cannot be opened, or the file system has no locks.
    """
    return FileLock(
        path, timeout=-1 if patience is None else patience, mode=0o600, poll_interval=poll, fallback_to_soft=False
    )
