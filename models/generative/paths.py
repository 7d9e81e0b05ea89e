"""The path from an image to noise, and back: how much of each there is at a time, and the steps of the samplers."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from configs.sections.families.generative import DiffusionConfig


@lru_cache
def signal_levels(schedule: str, steps: int) -> Tensor:
    """Alpha-bar [steps + 1], float64 on the CPU: the share of the image in the variance after n steps."""
    number = torch.arange(steps + 1, dtype=torch.float64, device="cpu")
    if schedule == "linear":  # arXiv:2006.11239, section 4, which has 1,000 steps
        betas = torch.linspace(0.1 / steps, min(20 / steps, 0.999), steps, dtype=torch.float64, device="cpu")
    else:  # arXiv:2102.09672, section 3.2
        level = torch.cos((number / steps + 0.008) / 1.008 * torch.pi / 2).square()
        betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones_like(number[:1]), (1 - betas).cumprod(0)])


class Guess(NamedTuple):
    """The image and the noise that a noisy image is made of, [B, C, H, W]."""

    image: Tensor
    noise: Tensor


class Path:
    """x(t) = alpha * image + sigma * noise, from the image at t = 0 to noise at 1. Times are [B], fp32."""

    def __init__(self, config: DiffusionConfig):
        self.config, self.straight = config, config.prediction == "flow"

    def times(self, uniform: Tensor) -> Tensor:
        """Times for training, from numbers in (0, 1)."""
        steps = self.config.noise_steps
        return uniform if self.straight else (uniform * steps).ceil() / steps

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), [B, 1, 1, 1]."""
        t = t[:, None, None, None]
        if self.straight:
            return 1 - t, t
        steps = self.config.noise_steps
        level = signal_levels(self.config.schedule, steps).to(t.device)[(t * steps).round().long()]
        return level.sqrt().float(), (1 - level).sqrt().float()

    def mixed(self, guess: Guess, t: Tensor) -> Tensor:
        alpha, sigma = self.levels(t)
        return alpha * guess.image + sigma * guess.noise

    def target(self, truth: Guess, t: Tensor) -> Tensor:
        """What the network is to predict of x(t)."""
        return truth.noise if self.config.prediction == "epsilon" else self.velocity(truth, t)

    def guess(self, x: Tensor, predicted: Tensor, t: Tensor) -> Guess:
        """By a prediction for x(t). Off the straight path the image is kept in its range, as DDPM does."""
        alpha, sigma = self.levels(t)
        if self.straight:
            return Guess(x - t[:, None, None, None] * predicted, x + alpha * predicted)
        image = (
            (x - sigma * predicted) / alpha if self.config.prediction == "epsilon" else alpha * x - sigma * predicted
        )
        image = image.clamp(-1, 1)
        return Guess(image, (x - alpha * image) / sigma)

    def velocity(self, guess: Guess, t: Tensor) -> Tensor:
        """dx / d`clock`."""
        alpha, sigma = (1, 1) if self.straight else self.levels(t)
        return alpha * guess.noise - sigma * guess.image

    def clock(self, t: Tensor) -> Tensor:
        """What x(t) moves evenly by: the time on the straight path, else the angle whose cosine is alpha."""
        alpha, sigma = self.levels(t)
        return sigma if self.straight else torch.atan2(sigma, alpha)

    def step(self, x: Tensor, guess: Guess, t: Tensor, s: Tensor, fresh: Tensor | None) -> Tensor:
        """x(s) for s < t: DDIM's (arXiv:2010.02502, equation 12), with fresh noise DDPM's."""
        if fresh is None:
            return self.mixed(guess, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.levels(t), self.levels(s)
        share = (sigma_s / sigma_t).square() * (1 - (alpha_t / alpha_s).square())
        kept = (sigma_s.square() - share).clamp(min=0).sqrt()
        return alpha_s * guess.image + kept * guess.noise + share.clamp(min=0).sqrt() * fresh

    def sample(
        self, predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, fresh: Callable[[int], Tensor]
    ) -> Tensor:
        """Images from noise [B, C, H, W].

        Args:
            predict: the network: (x, t) -> its prediction.
            fresh: new noise for a step, for `ddpm`.
        """
        config, x, ones = self.config, noise, noise.new_ones(len(noise))
        count = config.sample_steps
        for number in range(count):
            t, s = (ones * (1 - n / count) for n in (number, number + 1))
            guess, last = self.guess(x, predict(x, t), t), number + 1 == count
            after = self.step(x, guess, t, s, fresh(number) if config.sampler == "ddpm" else None)
            if config.sampler == "heun" and not last:
                second = self.guess(after, predict(after, s), s)
                mean = (self.velocity(guess, t) + self.velocity(second, s)) / 2
                after = x + (self.clock(s) - self.clock(t)) * mean
            x = after
        return x
