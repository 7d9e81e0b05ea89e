"""Small plain values between the processes of a run, as JSON in tensors: torch's object collectives would unpickle.

torch authenticates nobody: whatever joins a run's process group can send anything, and unpickling it would run code.
`refuse_pickles` disables torch's object collectives, so that no library uses them unnoticed. The private name that it
replaces is that of torch 2.11 to 2.13.
"""

import json
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d as c10d

LARGEST = 1 << 28
"""Bytes that one process may send another: more than the events of a run of years."""


def from_chief(value: Callable[[], Any]) -> Any:
    """Rank 0's value, in every process: anything that JSON holds (tuples arrive as lists), NaN and infinities included.

    Raises:
        RuntimeError: what arrived is not JSON, or too large.
    """
    chief = dist.get_rank() == 0
    mine = _encoded(value()) if chief else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([mine.numel()], device=here())
    dist.broadcast(length, src=0)
    [size] = _sizes([length])
    sent = mine.to(here()) if chief else torch.empty(size, dtype=torch.uint8, device=here())
    dist.broadcast(sent, src=0)
    return _decoded(sent, 0)


def from_all(mine: Any) -> list[Any]:
    """The values of all processes, by rank, in every process: anything that JSON holds, as with `from_chief`.

    Raises:
        RuntimeError: what arrived is not JSON, or too large.
    """
    padded, sizes = _padded(_encoded(mine))
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded)
    return [_decoded(sent[:size], rank) for rank, (sent, size) in enumerate(zip(everyone, sizes, strict=True))]


def to_chief(mine: Tensor) -> list[Tensor] | None:
    """The bytes of all processes, by rank, on rank 0; None on the others. Every process must call it.

    Args:
        mine: uint8 [n], on any device; n may differ between processes.

    Returns:
        Tensors on the CPU.

    Raises:
        RuntimeError: a process sends too many.
    """
    padded, sizes = _padded(mine)
    everyone = [torch.empty_like(padded) for _ in sizes] if dist.get_rank() == 0 else None
    dist.gather(padded, everyone, dst=0)
    return everyone and [sent[:size].cpu() for sent, size in zip(everyone, sizes, strict=True)]


def here() -> torch.device:
    """The device that the process group takes tensors from."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def refuse_pickles() -> None:
    """Make torch's object collectives raise in this process instead of running what another one sent."""
    c10d._tensor_to_object = _refuse  # type: ignore[assignment]


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError(
        "object collectives are disabled in a run: unpickling what another process sent can run code. "
        "Send tensors, or JSON with trainer.processes.collectives"
    )


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)


def _decoded(sent: Tensor, rank: int) -> Any:
    try:
        return json.loads(sent.cpu().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"rank {rank} sent something that is not JSON: {error}") from None


def _padded(mine: Tensor) -> tuple[Tensor, list[int]]:
    """(this process's bytes padded to the most of any rank, on the process group's device; number of each rank's)."""
    length = torch.tensor([mine.numel()], device=here())
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    sizes = _sizes(lengths)
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=here())
    padded[: mine.numel()] = mine
    return padded, sizes


def _sizes(lengths: list[Tensor]) -> list[int]:
    sizes = torch.cat(lengths).tolist()
    for rank, size in enumerate(sizes):
        if not 0 <= size <= LARGEST:
            raise RuntimeError(f"rank {rank} is about to send {size:,} bytes; at most {LARGEST:,} are accepted")
    return sizes
