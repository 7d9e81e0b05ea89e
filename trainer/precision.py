"""Copies of fp32 parameters in a lower precision, with which layers compute where ZeRO keeps none: bf16 at ZeRO-0."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.router import Router


class WorkingCopies:
    """Lets every layer of a module use copies of its parameters, which keep their names, places and fp32 gradients.

    The copies are made once a step, not in every forward pass, and a copy's gradient is added to its parameter's as
    soon as it is there, so that no second set of gradients stands. Each layer's class gets properties over its
    parameters, which is also how torch's parametrizations work. Routers keep theirs as they are: they compute in fp32.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._masters: list[Tensor] = []
        self._copies: list[Tensor] = []
        for layer in module.modules():
            if layer._parameters and not isinstance(layer, Router):
                masters = {name: p for name, p in layer._parameters.items() if p is not None}
                layer.working = {name: _copy(p, dtype) for name, p in masters.items()}  # type: ignore[assignment]
                layer.__class__ = _working_class(type(layer), tuple(masters))  # type: ignore[arg-type]
                self._masters += masters.values()
                self._copies += layer.working.values()  # type: ignore[operator]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the parameters as they are now; to be called whenever they have changed."""
        torch._foreach_copy_(self._copies, self._masters)


def _copy(master: nn.Parameter, dtype: torch.dtype) -> Tensor:
    copy = master.detach().to(dtype).requires_grad_(master.requires_grad)
    if master.requires_grad:
        copy.register_post_accumulate_grad_hook(functools.partial(_hand_over, master))
    return copy


def _hand_over(master: nn.Parameter, copy: Tensor) -> None:
    assert copy.grad is not None
    if master.grad is None:
        master.grad = copy.grad.to(master.dtype)
    else:
        _add()(master.grad.view(-1), copy.grad.view(-1)) if copy.is_cuda else master.grad.add_(copy.grad)
    copy.grad = None


@functools.cache
def _add() -> Callable[[Tensor, Tensor], Tensor]:
    """In-place addition of another type; torch's own kernel reads value by value where types differ."""
    return torch.compile(Tensor.add_, dynamic=True)


@functools.cache
def _working_class(kind: type[nn.Module], names: tuple[str, ...]) -> Any:
    """One class for all such layers: a compiler compiles again for each class it meets."""

    def working(name: str) -> property:
        return property(lambda layer: layer.working[name])

    return type(kind.__name__, (kind,), {name: working(name) for name in names})
