"""Small plain values between the processes of a run: JSON in tensors, where torch's object collectives would unpickle.

torch asks nobody who they are: who joins the process group of a run can send it whatever he likes, and a pickle would
run as code. So that no library does it unseen, `refuse_pickles` shuts torch's object collectives. The private name that
it replaces is torch's in 2.11 to 2.13.
"""

import json
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d as c10d

LARGEST = 1 << 28
"""Bytes that one process may send another: a run's events of years are fewer."""


def from_chief(value: Callable[[], Any]) -> Any:
    """Rank 0's value, in every process: what JSON holds (tuples arrive as lists), NaN and infinities too.

    Raises:
        RuntimeError: what came is no JSON, or too much.
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
    """What each process has, by rank, in every process: what JSON holds, as with `from_chief`.

    Raises:
        RuntimeError: what came is no JSON, or too much.
    """
    padded, sizes = _padded(_encoded(mine))
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded)
    return [_decoded(sent[:size], rank) for rank, (sent, size) in enumerate(zip(everyone, sizes, strict=True))]


def to_chief(mine: Tensor) -> list[Tensor] | None:
    """The bytes that each process has, by rank, in rank 0; None in the others. Every process must call it.

    Args:
        mine: uint8 [n], on whatever device; n is each process's own.

    Returns:
        Tensors on the CPU.

    Raises:
        RuntimeError: they are too many.
    """
    padded, sizes = _padded(mine)
    everyone = [torch.empty_like(padded) for _ in sizes] if dist.get_rank() == 0 else None
    dist.gather(padded, everyone, dst=0)
    return everyone and [sent[:size].cpu() for sent, size in zip(everyone, sizes, strict=True)]


def here() -> torch.device:
    """Where the process group takes tensors from."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def refuse_pickles() -> None:
    """Let torch's object collectives raise in this process rather than run what another one sent."""
    c10d._tensor_to_object = _refuse  # type: ignore[assignment]


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError(
        "object collectives are shut in a run: they unpickle what another process sent, and run it. "
        "Send tensors, or JSON by trainer.processes.collectives"
    )


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)


def _decoded(sent: Tensor, rank: int) -> Any:
    try:
        return json.loads(sent.cpu().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"rank {rank} sent what is no JSON: {error}") from None


def _padded(mine: Tensor) -> tuple[Tensor, list[int]]:
    """(bytes at the length of the longest, on the process group's device; how many those of each rank are)."""
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
            raise RuntimeError(f"rank {rank} is about to send {size:,} bytes; at most {LARGEST:,} are taken")
    return sizes
