"""BatchNorm whose running statistics are the same in every topology: updated once per step, not per process.

Each BatchNorm normalises over a micro-batch, which is the same examples whatever the topology. Its running statistics
move once per step, by the mean of the micro-batches' statistics over all processes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

Shapes = dict[str, tuple[int, ...]]
Layer = TypeVar("Layer", bound=nn.Module)
MOMENTUM = 0.1
"""torch's default, for layers without a momentum (`momentum=None`: a cumulative mean, which cannot be updated once per
step)."""


def batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """(name, layer) of every layer that keeps running statistics."""
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and part.track_running_stats:
            yield name, part


def by_full_name(
    modules: Mapping[str, nn.Module], layers: Callable[[nn.Module], Iterable[tuple[str, Layer]]]
) -> dict[str, Layer]:
    """What `layers` yields of each module as (name, layer), by names with the module's prefix before them."""
    return {
        ".".join(filter(None, (prefix, name))): layer
        for prefix, module in modules.items()
        for name, layer in layers(module)
    }


class NormTap:
    """Collects the statistics of every BatchNorm layer's training passes.

    torch would move a layer's running statistics in each pass. With a momentum of 1, starting from zero, it leaves the
    pass's own statistics there instead, to be collected.

    Args:
        modules: of the model, by the name prefix of their parts.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._layers = by_full_name(modules, batch_norms)
        self._momentum = {name: layer.momentum or MOMENTUM for name, layer in self._layers.items()}
        self._heard: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            layer.momentum = 1.0
            _keep_in_fp32(layer)
            layer.register_forward_pre_hook(_from_zero)
            layer.register_forward_hook(self._listener(name))

    def __bool__(self) -> bool:
        return bool(self._layers)

    @property
    def extra(self) -> Shapes:
        """Names and shapes of what `collect` returns: [2, channels] and the number of passes."""
        found: Shapes = {}
        for name, layer in self._layers.items():
            found |= {f"{name}.statistics": (2, layer.num_features), f"{name}.passes": ()}
        return found

    def fresh(self) -> dict[str, list]:
        """Memory before the first step: mean 0, variance 1."""
        return {
            key: [value] * layer.num_features
            for name, layer in self._layers.items()
            for key, value in ((f"{name}.running_mean", 0.0), (f"{name}.running_var", 1.0))
        }

    def known(self) -> Shapes:
        return {key: (len(value),) for key, value in self.fresh().items()}

    def collect(self, real: Tensor) -> list[Tensor]:
        """Sums of the passes since the last call, float64, in the order of `extra`; of a batch that is all padding 0.

        Args:
            real: scalar bool on the device: whether the batch has an example.
        """
        heard, self._heard = self._heard, {}
        found: list[Tensor] = []
        for name, layer in self._layers.items():
            sums = heard.get(name)
            if sums is None:
                sums = torch.zeros(2 * layer.num_features + 1, dtype=torch.float64, device=_mean(layer).device)
            sums = torch.where(real, sums, torch.zeros_like(sums))
            found += [sums[:-1], sums[-1]]
        return found

    def after_step(self, memory: dict[str, Tensor], extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Running statistics after a step: unchanged for layers without a training pass."""
        found = dict(memory)
        for name, share in self._momentum.items():
            passes = extra[f"{name}.passes"]
            statistics = extra[f"{name}.statistics"] / passes.clamp(min=1)
            for key, now in zip((f"{name}.running_mean", f"{name}.running_var"), statistics, strict=True):
                found[key] = torch.where(passes > 0, (1 - share) * memory[key] + share * now, memory[key])
        return found

    def tell(self, memory: Mapping[str, Tensor]) -> None:
        """Put running statistics into the layers, where evaluation uses them."""
        for name, layer in self._layers.items():
            _mean(layer).copy_(memory[f"{name}.running_mean"])
            _var(layer).copy_(memory[f"{name}.running_var"])

    def _listener(self, name: str) -> Callable[[_BatchNorm, object, object], None]:
        def listen(layer: _BatchNorm, args: object, output: object) -> None:
            if layer.training and torch.is_grad_enabled():
                one = torch.ones(1, dtype=torch.float64, device=_mean(layer).device)
                sums = torch.cat([_mean(layer).double(), _var(layer).double(), one])
                self._heard[name] = self._heard[name] + sums if name in self._heard else sums

        return listen


@contextmanager
def normalised_by_batch(module: nn.Module) -> Iterator[None]:
    """Within it, BatchNorm normalises over the micro-batch though the module is in evaluation mode. Running statistics
    are to be told again afterwards."""
    layers = [layer for _, layer in batch_norms(module) if not layer.training]
    for layer in layers:
        layer.train()
    yield
    for layer in layers:
        layer.eval()


def _mean(layer: _BatchNorm) -> Tensor:
    """Write to a layer's buffer without autograd's knowledge: a later backward pass has it saved, but does not use it
    in training."""
    assert layer.running_mean is not None
    return layer.running_mean.data


def _var(layer: _BatchNorm) -> Tensor:
    assert layer.running_var is not None
    return layer.running_var.data


def _keep_in_fp32(layer: _BatchNorm) -> None:
    """Let a layer take its statistics in fp32, and hold them so, whatever comes in: as under torch's autocast."""
    for name in ("running_mean", "running_var"):
        layer.register_buffer(name, getattr(layer, name).float())
    plain = layer.forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return plain(x)
        weight, bias = (None if each is None else each.float() for each in (layer.weight, layer.bias))
        return F.batch_norm(x, layer.running_mean, layer.running_var, weight, bias, layer.training, 1.0, layer.eps)

    layer.forward = forward  # type: ignore[assignment, method-assign]


def _from_zero(layer: _BatchNorm, args: object) -> None:
    if layer.training:
        _mean(layer).zero_()
        _var(layer).zero_()
