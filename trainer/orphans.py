"""Lets a process end with the one that started it, however that ends. Imports nothing that takes time."""

import contextlib
import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent's thread that started it is gone. Linux only.

    It holds for a program that this process turns into (`os.execv`), and not for its own children.

    Args:
        parent: process id, taken before this process was started: if it is gone already, this process ends here.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
