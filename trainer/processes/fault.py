"""What kind of failure an exception is, told where it is raised: whoever decides what follows reads a field."""

import torch

from .protocol import Fault

NO_MEMORY = ("out of memory", "can't allocate memory")
"""Errors of torch's CPU allocator and of CUDA's libraries, which have no type of their own."""
BROKEN = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",  # gloo
    "ncclRemoteError", "Watchdog caught collective operation timeout",
    "Connection was likely closed",  # the store that ranks meet at
)  # fmt: skip
"""gloo raises RuntimeError for all it meets; NCCL's error is of one type as well, whoever's fault it is."""


def fault_of(error: BaseException) -> Fault:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "memory"
    words = str(error)
    if any(each in words for each in BROKEN):
        return "connection"
    return "memory" if any(each in words for each in NO_MEMORY) else "error"
