"""Which stretch of which parameter's fp32 weights and optimizer states a process holds, at any topology."""

from dataclasses import dataclass

from torch import Tensor, nn

from trainer.checkpoint.fragments import Box


@dataclass(frozen=True)
class Piece:
    """What this process holds of one parameter: at ZeRO-3 still to be shared out, else as it is used."""

    name: str
    """The plain model's own name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the whole parameter in the plain model."""
    box: Box
    """The slice of it that is this process's parameter: all of it, without tensor and expert parallelism."""
    parameter: nn.Parameter
    writes: bool
    """Whether a checkpoint takes it from this process; other tensor-parallel ranks hold the same."""


@dataclass(frozen=True)
class Slot(Piece):
    """The stretch of one parameter whose fp32 master weights and optimizer states this process holds."""

    start: int
    """First element, in the flattened slice, of the stretch."""
    numel: int
    owner: Tensor
    """Tensor that the optimizer keys its state by; of a parameter that nothing trains, what holds it."""
    offset: int
    """First element of the stretch in `owner`, flattened."""
    working: Tensor | None
    """The same stretch of the working weight, 1-D, where a process holds no more of it (ZeRO-3)."""

    def view(self, tensor: Tensor) -> Tensor:
        """The stretch of `tensor`, which has `owner`'s size, as a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)
