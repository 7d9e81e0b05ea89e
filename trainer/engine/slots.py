"""Which stretch of which parameter's fp32 weights and optimizer states a process holds, in any topology."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.checkpoint.fragments import Box, lengths, whole


@dataclass(frozen=True)
class Piece:
    """This process's slice of one parameter, before ZeRO-3 shards it."""

    name: str
    """The parameter's name in the plain model."""
    shape: tuple[int, ...]
    """Shape of the whole parameter in the plain model."""
    box: Box
    """This process's slice of the whole parameter; all of it without tensor and expert parallelism."""
    parameter: nn.Parameter
    writes: bool
    """Whether this process writes it to a checkpoint: of tensor-parallel ranks with the same slice, only one does."""


@dataclass(frozen=True)
class Slot(Piece):
    """The stretch of one parameter whose fp32 master weights and optimizer states this process holds."""

    start: int
    """First element of the stretch in the flattened slice."""
    numel: int
    owner: Tensor
    """Tensor that the optimizer keys its state by; for a frozen parameter, the tensor that holds it."""
    offset: int
    """First element of the stretch in `owner`, flattened."""
    working: Tensor | None
    """The same stretch of the working weight, 1-D, if the process holds no more of it (ZeRO-3); else None."""

    def view(self, tensor: Tensor) -> Tensor:
        """The stretch of `tensor`, which has `owner`'s size, as a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)

    def elements(self) -> Tensor:
        """int64 [numel]: the place in the flattened whole parameter of each element of the stretch."""
        left = torch.arange(self.start, self.start + self.numel, device=self.owner.device)
        if self.box == whole(self.shape):
            return left
        found, stride = torch.zeros_like(left), 1
        for (low, _), length, size in zip(self.box[::-1], lengths(self.box)[::-1], self.shape[::-1], strict=True):
            found += (left % length + low) * stride
            left, stride = left // length, stride * size
        return found
