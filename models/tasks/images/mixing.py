"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899): each example is mixed with the next one of its micro-batch.

A micro-batch is the same examples in every topology, so the partners are as well.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from configs.sections.train import TrainConfig
from models.batch import ImageBatch, RowBatch
from models.noise import uniform

TRIES = 32
"""Of drawing a share, each of which is accepted with a probability of 1/2 or more."""


class Mix(NamedTuple):
    inputs: Tensor
    """[B, ...], mixed."""
    partner: Tensor
    """[B] int64: with which of the B examples each is mixed; padding with itself."""
    share: Tensor
    """[B] fp32: how much of the example is left; 1 - share is of the partner."""


def mixed(batch: ImageBatch | RowBatch, train: TrainConfig, seed: int) -> Mix:
    """The inputs of a micro-batch, mixed by `train.mixup`, by `train.cutmix`, or where both are set by either of them
    with equal probability: a function of (seed, example) and of the micro-batch's other examples."""
    inputs, ids = batch.inputs, batch.example_ids
    partner = _next_of(batch.labels >= 0)
    other, cuts = inputs[partner], uniform(seed, ids, "mixup or cutmix", (1,))[:, 0] < 0.5
    ways = [name for name in ("mixup", "cutmix") if getattr(train, name)]
    found: list[tuple[Tensor, Tensor]] = []
    for name in ways:
        share = beta(seed, ids, name, getattr(train, name))
        kept = share if name == "mixup" else _outside_of_boxes(share, seed, ids, inputs.shape)
        kept = kept.view(len(ids), *kept.shape[1:], *[1] * (inputs.dim() - kept.dim()))
        found.append((kept * inputs + (1 - kept) * other, kept.flatten(1).mean(1)))
    if len(found) == 1:
        return Mix(found[0][0], partner, found[0][1])
    (smooth, first), (cut, second) = found
    return Mix(cut.where(cuts.view(-1, *[1] * (inputs.dim() - 1)), smooth), partner, second.where(cuts, first))


def beta(seed: int, example_ids: Tensor, use: str, alpha: float) -> Tensor:
    """[B] fp32 of Beta(alpha, alpha), alpha <= 1, as `models.noise.uniform` (Joehnk, 1964)."""
    x, y = uniform(seed, example_ids, use, (2, TRIES)).double().log().div(alpha).unbind(1)  # logarithms
    first = (x.exp() + y.exp() <= 1).int().argmax(1, keepdim=True)
    return torch.sigmoid(x.gather(1, first) - y.gather(1, first))[:, 0].float()


def _next_of(real: Tensor) -> Tensor:
    """[B] int64: the next real example of each, after the last one the first; of any other itself."""
    places = torch.arange(len(real), device=real.device)
    in_order = torch.argsort((~real).int(), stable=True)
    after = in_order[real.cumsum(0) % real.sum().clamp(min=1)]
    return after.where(real, places)


def _outside_of_boxes(share: Tensor, seed: int, example_ids: Tensor, shape: torch.Size) -> Tensor:
    """[B, 1, H, W] fp32: 0 in a box at random with this share of the pixels outside of it, so far as it is in the
    image, and 1 outside of it."""
    inside, places = [], uniform(seed, example_ids, "place of the box", (2,))
    for size, centre in zip(shape[-2:], places.unbind(1), strict=True):
        middle, half = (centre * size).floor(), ((1 - share).sqrt() * size).floor() / 2
        pixels = torch.arange(size, device=share.device)
        low, high = ((middle + way * half).floor()[:, None] for way in (-1, 1))
        inside.append((pixels >= low) & (pixels < high))
    return (~(inside[0][:, None, :, None] & inside[1][:, None, None, :])).float()
