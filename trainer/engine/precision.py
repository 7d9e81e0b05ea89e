"""Lower precision where DeepSpeed has none: bf16 copies of fp32 parameters at ZeRO-0, and fp8 matrix multiplication."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from configs import Config, ConfigError
from models.kernels.compiler import compiled
from models.moe.router import Router

FP8 = 16
"""Both sides of a matrix multiplied in fp8 must be multiples of this."""


class WorkingCopies:
    """Makes every layer of a module use copies of its parameters, which keep their names, places and fp32 gradients.

    The copies are updated once per step, not cast in every forward pass. A copy's gradient is added to its parameter's
    as soon as it is computed, so that no second set of gradients is kept. Micro-batches are summed in fp32; a parameter
    that one pass uses twice (tied embeddings) sums its two gradients in the lower precision, as at ZeRO 1 to 3. Each
    layer's class gets properties that shadow its parameters, as in torch's parametrizations. Routers get no copies:
    they compute in fp32.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.masters: list[Tensor] = []
        self.copies: list[Tensor] = []
        for layer in module.modules():
            if layer._parameters and not isinstance(layer, Router):
                masters = {name: p for name, p in layer._parameters.items() if p is not None}
                layer.working = {name: _copy(p, dtype) for name, p in masters.items()}  # type: ignore[assignment]
                layer.__class__ = _working_class(type(layer), tuple(masters))  # type: ignore[arg-type]
                self.masters += masters.values()
                self.copies += layer.working.values()  # type: ignore[operator]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current parameters; call whenever they have changed."""
        torch._foreach_copy_(self.copies, self.masters)


def _copy(master: nn.Parameter, dtype: torch.dtype) -> Tensor:
    copy = master.detach().to(dtype).requires_grad_(master.requires_grad)
    if master.requires_grad:
        copy.register_post_accumulate_grad_hook(functools.partial(_hand_over, master))
    return copy


def _hand_over(master: nn.Parameter, copy: Tensor) -> None:
    assert copy.grad is not None
    if master.grad is None:
        master.grad = (_wider()(copy.grad.view(-1)) if copy.is_cuda else copy.grad.to(master.dtype)).view_as(copy)
    else:
        _add()(master.grad.view(-1), copy.grad.view(-1)) if copy.is_cuda else master.grad.add_(copy.grad)
    copy.grad = None


@functools.cache
def _add() -> Callable[[Tensor, Tensor], Tensor]:
    """In-place addition across dtypes, compiled: torch's own kernel reads value by value if the dtypes differ."""
    return compiled(Tensor.add_, dynamic=True)


@functools.cache
def _wider() -> Callable[[Tensor], Tensor]:
    """Conversion to fp32, compiled for the same reason."""
    return compiled(Tensor.float, dynamic=True)


@functools.cache
def _working_class(kind: type[nn.Module], names: tuple[str, ...]) -> Any:
    """One class for all such layers: the compiler recompiles for every new class."""

    def working(name: str) -> property:
        return property(lambda layer: layer.working[name])

    return type(kind.__name__, (kind,), {name: working(name) for name in names})


def check_precision(module: nn.Module, config: Config) -> None:
    """Raise ConfigError if train.precision=fp8 cannot be used for the model; `module` may be on the meta device."""
    if config.train.precision != "fp8":
        return
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("train.precision=fp8 needs torchao: pip install 'muster-train[gpu]', or set it to bf16")
    linear = linear_maps(module)
    if not linear:
        raise ConfigError("train.precision=fp8: the model has no linear layer that it applies to; set it to bf16")
    for name, layer in linear.items():
        if layer.in_features % FP8 or layer.out_features % FP8:
            raise ConfigError(
                f"train.precision=fp8 needs matrices whose sides are multiples of {FP8}, but {name} is "
                f"{layer.out_features} x {layer.in_features}: change the sizes under model, or set it to bf16"
            )


def check_device(config: Config, device: torch.device) -> None:
    """Raise ConfigError if a device cannot train in train.precision."""
    if config.train.precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision=fp16 needs a GPU, but this run is on CPUs: set it to bf16 or fp32")


def multiply_in_fp8(module: nn.Module) -> None:
    """Make linear layers multiply in fp8 with torchao, each tensor scaled by its own absmax (arXiv:2209.05433).

    Weights, their names, and the dtypes of inputs and outputs do not change. Raises ConfigError on a GPU without fp8.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError(
            f"train.precision=fp8: {torch.cuda.get_device_name()} has no fp8 support; GPUs from compute capability 8.9 "
            "(L4, H100) do. Set it to bf16"
        )
    from torchao.float8 import convert_to_float8_training  # an optional package

    chosen = set(linear_maps(module))
    convert_to_float8_training(module, module_filter_fn=lambda _, name: name in chosen)


def linear_maps(module: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers inside the blocks, except routers and those with a single output."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and not isinstance(part, Router) and part.out_features > 1
        and ".layers." in f".{name}"
    }  # fmt: skip
