"""This process's device, and how it is to behave: its memory on a CPU, the same bits for the same work."""

import contextlib
import ctypes
import os

import torch


def device() -> torch.device:
    """This process's device: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """On CPU, let glibc keep what torch frees for the next step instead of giving it back to the kernel.

    Every tensor above 128 kB is otherwise mapped and faulted in anew, page by page: seen to slow chains of elementwise
    operations by four. Nothing happens on another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def be_deterministic() -> None:
    """Let this process's device give the same bits for the same work, or raise where no kernel does."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    # For those who read memory that they never wrote; we don't.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
