"""The request to stop a run: a file in its folder that other processes write and each of its own checks for."""

import os
from pathlib import Path

from trainer.files.durable import replace_text
from trainer.files.own_files import read_bytes

STOP = "stop"
LONGEST_REASON = 4096
"""Bytes of a reason that are written and read."""


def request_stop(run_dir: Path, reason: str = "") -> None:
    """Ask a run to write a checkpoint and exit; each of its processes sees this at its next step.

    Args:
        reason: why muster itself asks, in order to start the run again; a request that is there already stays.
            Empty: the user asks, which overrules any other request.
    """
    path = run_dir / STOP
    if not reason:
        replace_text(path, "")
        return
    ready = run_dir / f".{STOP}.reason"
    replace_text(ready, reason.encode()[:LONGEST_REASON].decode(errors="ignore"))
    try:
        os.link(ready, path)  # whole or not at all: an empty file would be the user's request
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.replace(ready, path)
    ready.unlink(missing_ok=True)


def stop_requested(run_dir: Path) -> bool:
    return (run_dir / STOP).exists()


def take_stop(run_dir: Path) -> str | None:
    """Remove the request to stop and return its reason; None if there is none.

    A file that cannot be read, such as a link, counts as the user's request.
    """
    taken = run_dir / f".{STOP}.taken"
    try:
        os.rename(run_dir / STOP, taken)  # first: a request that arrives while this one is read is not lost
    except FileNotFoundError:
        return None
    try:
        return read_bytes(taken, LONGEST_REASON).decode(errors="replace")
    except OSError:
        return ""
    finally:
        taken.unlink(missing_ok=True)
