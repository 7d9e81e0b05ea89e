"""Numbers between host and device without the host's waiting: there at once, back when a later step is under way."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist


def to_device(values: Sequence[float], here: torch.device) -> Tensor:
    """Host numbers as a float64 vector on the device, which reads them from pinned memory when it gets there."""
    pinned = torch.tensor(values, dtype=torch.float64, pin_memory=here.type == "cuda")
    return pinned.to(here, non_blocking=True)


def sum_over_all(values: Sequence[float], here: torch.device) -> Tensor:
    """The sum over all processes of each one's numbers, on the device."""
    told = to_device(values, here)
    if dist.get_world_size() > 1:
        dist.all_reduce(told)
    return told


class Late:
    """A device tensor on its way to the host; nobody may write to the tensor any more."""

    def __init__(self, values: Tensor) -> None:
        self._host, self._there = values, None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def tolist(self) -> list[float]:
        """The values; waits until the device has made them."""
        if self._there:
            self._there.synchronize()
        return self._host.tolist()
