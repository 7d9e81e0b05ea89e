"""Ends a process when its parent ends, however that happens. Imports nothing that takes time."""

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread of its parent that started it ends. Linux only.

    This stays in force after `os.execv`; children do not inherit it.

    Args:
        parent: its process id, read before this process was started; if it has already ended, this process exits here.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def sweep_after(folder: str) -> None:
    """Have a folder of `scratch.make_folder` removed, and others that nobody holds, soon after this process was killed.

    A shell waits for that by reading a pipe that this process keeps open; if the folder is gone by then, it just ends.
    """
    read, _held = os.pipe()  # the write end stays open while this process lives, and no program it starts inherits it
    code = "import sys; from trainer.files.scratch import sweep; sweep(sys.argv[1]); sweep()"
    wait = 'trap "" HUP INT TERM; cat >/dev/null; [ -d "$0" ] || exit 0; sleep 2; exec "$@"'
    command = ["sh", "-c", wait, folder, sys.executable, "-P", "-c", code, os.path.dirname(folder)]
    nowhere = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    with contextlib.suppress(OSError):  # no shell: then the next start removes it
        os.posix_spawn(
            "/bin/sh", command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0), *nowhere], setpgroup=0
        )
    os.close(read)
