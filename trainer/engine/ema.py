"""Exponential moving average (EMA) of the weights: updated by the optimizer's steps, sharded as its weights are."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def ema_decay(decay: float, step: int) -> float:
    """Decay of the step of this number, from 1: min(decay, (1 + step) / (10 + step)), the warm-up of TensorFlow's
    ExponentialMovingAverage and of diffusers' EMAModel."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """The average of the fp32 weights that an optimizer of this process steps. It begins with the weights as they are.

    Args:
        optimizer: torch's, which may step some of its parameters at a time.
        weights: all of its parameters.
        decay: the limit of `ema_decay`.

    Attributes:
        step: number of the optimizer step that comes next, to be set before it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Iterable[Tensor], decay: float):
        self._pairs = {id(weight): (weight, weight.detach().clone()) for weight in weights}
        self._decay, self.step = decay, 1
        # Not called for a step that is skipped, unless the optimizer itself does, on the device.
        optimizer.register_step_post_hook(self._update)

    @property
    def share(self) -> float:
        """Of what is new in the average, in the step that comes next."""
        return 1 - ema_decay(self._decay, self.step)

    def of(self, weight: Tensor) -> Tensor | None:
        """The average of one of the optimizer's parameters, of its shape; None for any other tensor."""
        return self._pairs[id(weight)][1] if id(weight) in self._pairs else None

    def exchange(self) -> None:
        """Put the averages in place of the weights, and the weights in place of the averages; nothing is copied."""
        for weight, average in self._pairs.values():
            weight.data, average.data = average.data, weight.data

    @torch.no_grad()
    def _update(self, optimizer: Any, *_: Any) -> None:
        pairs = [self._pairs[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
        weights, averages = [weight for weight, _ in pairs], [average for _, average in pairs]
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is None:
            torch._foreach_lerp_(averages, weights, self.share)
        else:
            torch._foreach_lerp_(averages, weights, [self.share * (1 - skipped)] * len(weights))
