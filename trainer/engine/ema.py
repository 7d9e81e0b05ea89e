"""Average of the weights, exponential (EMA) or plain: updated at every optimizer step, sharded like the weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def ema_decay(decay: float, step: int) -> float:
    """Decay at optimizer step `step`, counted from 1: min(decay, (1 + step) / (10 + step)), the warm-up of TensorFlow's
    ExponentialMovingAverage and of diffusers' EMAModel."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """The average of the fp32 weights that an optimizer updates in this process. It starts as a copy of the weights.

    Args:
        optimizer: torch's own, which may update some of its parameters at a time.
        weights: all of its parameters.
        decay: upper limit, see `ema_decay`.
        first: in place of a decay, the step from which on all weights count the same (optim.swa_from); before it the
            average is a copy.

    Attributes:
        step: number of the next optimizer step, to be set before it.
        every: how many steps of the run there are to one of these weights, which are due when it divides `step`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: Iterable[Tensor], decay: float | None, first: int | None = None
    ):
        self._pairs = {id(weight): (weight, weight.detach().clone()) for weight in weights}
        self._decay, self._first, self.step, self.every = decay, first, 1, 1
        # The hook does not run for a skipped step, unless the optimizer itself skips it, on the device.
        optimizer.register_step_post_hook(self._update)

    @property
    def share(self) -> float:
        """Weight of the new values in the average at the next step, 1 - decay."""
        if self._decay is not None:
            return 1 - ema_decay(self._decay, self.step)
        assert self._first is not None
        return 1 / max(self.step // self.every - (self._first - 1) // self.every, 1)

    def of(self, weight: Tensor) -> Tensor | None:
        """The average of one of the optimizer's parameters, in its shape; None for any other tensor."""
        return self._pairs[id(weight)][1] if id(weight) in self._pairs else None

    def exchange(self) -> None:
        """Swap the weights and their averages, without copying."""
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
