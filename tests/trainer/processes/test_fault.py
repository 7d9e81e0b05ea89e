"""What kind of failure an exception is."""

import pytest
import torch

from trainer.processes.fault import fault_of


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory"),
        (RuntimeError("CUDA error: out of memory"), "memory"),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"), "connection"),
        (torch.distributed.DistBackendError("ncclRemoteError: A call failed"), "connection"),
        (torch.distributed.DistStoreError("Timed out waiting for clients"), "connection"),
        (torch.distributed.DistBackendError("CUDA error: an illegal memory access"), "error"),
        (ValueError("no"), "error"),
    ],
)
def test_faults(error, fault):
    assert fault_of(error) == fault


def test_the_allocators_own_words():
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert fault_of(found.value) == "memory"
