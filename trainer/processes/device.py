"""This process's device, and its settings: freed memory on a CPU, deterministic kernels."""

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

    Otherwise every tensor above 128 kB is mapped and faulted in anew, page by page, which was seen to slow down chains
    of elementwise operations by a factor of four. Without effect on another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def be_deterministic() -> None:
    """Make operations on this process's device deterministic, or raise where no kernel is."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    # Only of use to code that reads memory it never wrote, which ours does not.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
