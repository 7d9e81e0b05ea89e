"""Classifies an exception where it is raised, so that what decides on a restart reads a field, not a text."""

import torch

from .protocol import Fault

NO_MEMORY = ("out of memory", "can't allocate memory")
"""Errors of torch's CPU allocator and of CUDA's libraries, which have no type of their own."""
BROKEN = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",  # gloo
    "ncclRemoteError", "Watchdog caught collective operation timeout",
    "Connection was likely closed",  # the rendezvous store
)  # fmt: skip
"""gloo raises RuntimeError for every failure; NCCL has one type of error too, whatever the cause."""


def fault_of(error: BaseException) -> Fault:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "memory"
    words = str(error)
    if any(each in words for each in BROKEN):
        return "connection"
    return "memory" if any(each in words for each in NO_MEMORY) else "error"
