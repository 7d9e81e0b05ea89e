"""What this machine has: processors, memory, accelerators. Reads /proc and cgroups; torch only for GPUs."""

import contextlib
import os
from pathlib import Path

import psutil

from .share import Node

CGROUP = Path("/sys/fs/cgroup")


def cpus() -> int:
    """Processors this process may use: its affinity mask, under a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # cgroup v1 or none, or no quota ("max")
        pass
    return count


def memory_bytes() -> int:
    """Memory this process may use: the machine's, under a container's limit."""
    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int((CGROUP / "memory.max").read_text()))
    return total


def gpus() -> list[str]:
    """Names of the GPUs that torch sees."""
    import torch  # a second to import, and only some commands need it

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def this_node() -> Node:
    import torch  # as above; counting does not start CUDA, asking for a name does

    return Node(cpus(), torch.cuda.device_count())
