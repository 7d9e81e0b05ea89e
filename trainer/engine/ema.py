"""What follows the weights at every optimizer step, sharded as they are: their average, exponential (EMA) or plain, and
Lookahead's slow weights."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def ema_decay(decay: float, step: int, steps: int | None = None) -> float:
    """Decay at optimizer step `step`, counted from 1: min(decay, (1 + step) / (10 + step)), the warm-up of TensorFlow's
    ExponentialMovingAverage and of diffusers' EMAModel. With `steps` of the whole run BYOL's cosine, from `decay` at
    the first of them to 1 after the last (arXiv:2006.07733, section 3.3)."""
    if steps is None:
        return min(decay, (1 + step) / (10 + step))
    return 1 - (1 - decay) * (math.cos(math.pi * min((step - 1) / steps, 1)) + 1) / 2


class Follower:
    """A second set of the fp32 weights that an optimizer updates in this process. It starts as a copy of them.

    Args:
        optimizer: torch's own, which may update some of its parameters at a time.
        weights: all of its parameters.

    Attributes:
        step: number of the next optimizer step, to be set before it.
        every: how many steps of the run there are to one of these weights, which are due when it divides `step`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]):
        self._pairs = {id(weight): (weight, weight.detach().clone()) for weight in weights}
        self.step, self.every = 1, 1
        # The hook does not run for a skipped step, unless the optimizer itself skips it, on the device.
        optimizer.register_step_post_hook(self._update)

    def of(self, weight: Tensor) -> Tensor | None:
        """What follows one of the optimizer's parameters, in its shape; None for any other tensor."""
        return self._pairs[id(weight)][1] if id(weight) in self._pairs else None

    def follow(self, weights: list[Tensor], followers: list[Tensor], taken: float | Tensor) -> None:
        """What an optimizer step does to both; `taken`: 0 if it was skipped on the device, else 1."""
        raise NotImplementedError

    @torch.no_grad()
    def _update(self, optimizer: Any, *_: Any) -> None:
        pairs = [self._pairs[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
        skipped = getattr(optimizer, "found_inf", None)
        weights, followers = [weight for weight, _ in pairs], [follower for _, follower in pairs]
        self.follow(weights, followers, 1.0 if skipped is None else 1 - skipped)


class Ema(Follower):
    """The average of the weights.

    Args:
        decay: upper limit, see `ema_decay`.
        first: in place of a decay, the step from which on all weights count the same (optim.swa_from); before it the
            average is a copy.
        steps: see `ema_decay`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Iterable[Tensor],
        decay: float | None,
        first: int | None = None,
        steps: int | None = None,
    ):
        super().__init__(optimizer, weights)
        self._decay, self._first, self._steps = decay, first, steps

    @property
    def share(self) -> float:
        """Weight of the new values in the average at the next step, 1 - decay."""
        if self._decay is not None:
            return 1 - ema_decay(self._decay, self.step, self._steps)
        assert self._first is not None
        return 1 / max(self.step // self.every - (self._first - 1) // self.every, 1)

    def exchange(self) -> None:
        """Swap the weights and their averages, without copying."""
        for weight, average in self._pairs.values():
            weight.data, average.data = average.data, weight.data

    def follow(self, weights: list[Tensor], followers: list[Tensor], taken: float | Tensor) -> None:
        _lerp(followers, weights, self.share * taken)


class Lookahead(Follower):
    """Slow weights (arXiv:1907.08610): at every `period`-th step they go a share of the way to the weights, which then
    go on from there.

    Args:
        share: of the way.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Iterable[Tensor], period: int, share: float):
        super().__init__(optimizer, weights)
        self._period, self._share = period, share

    def follow(self, weights: list[Tensor], followers: list[Tensor], taken: float | Tensor) -> None:
        if self.step // self.every % self._period == 0:
            _lerp(followers, weights, self._share * taken)
            _lerp(weights, followers, taken)


def _lerp(those: list[Tensor], to: list[Tensor], share: float | Tensor) -> None:
    """Move tensors a share of the way to others."""
    torch._foreach_lerp_(those, to, [share] * len(those) if isinstance(share, Tensor) else share)
