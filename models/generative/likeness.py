"""How alike two sets of images are, from sums over micro-batches: Frechet distance and coverage."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 4
"""Height and width that images are averaged to for the Frechet distance."""
NEAREST = 5
"""Coverage: how many neighbours an image's own set has within its radius (arXiv:2002.09797, section 3.2)."""


def shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the sums."""
    size = channels * SIDE**2 + 1
    return {"real_moments": (size, size), "made_moments": (size, size), "covered": ()}


def nothing(channels: int, device: torch.device) -> dict[str, Tensor]:
    """The sums of no image."""
    return {name: torch.zeros(shape, device=device) for name, shape in shapes(channels).items()}


def sums(real: Tensor, made: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """Of a micro-batch.

    Args:
        real, made: [B, C, H, W] in [-1, 1].
        counted: bool [B].
    """
    real, made = real[counted].float(), made[counted].float()
    found = {name: _moments(images) for name, images in (("real_moments", real), ("made_moments", made))}
    return found | {"covered": _covered(real.flatten(1), made.flatten(1))}


def metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """`frechet`: the squared 2-Wasserstein distance of normal distributions fitted to the images as small as SIDE x
    SIDE (arXiv:1706.08500, equation 6); `coverage`: the share of real images that have a made one as near as their
    neighbours within the micro-batch: low if modes are left out. Empty: no image was made."""
    real, made = (torch.tensor(found[name], dtype=torch.float64) for name in ("real_moments", "made_moments"))
    count = float(made[-1, -1])
    if count < 1:
        return {}
    (mean, spread), (other, its) = _fitted(real), _fitted(made)
    root = _root(spread)
    both = torch.linalg.eigvalsh(root @ its @ root).clamp(min=0).sqrt().sum()
    distance = (mean - other).square().sum() + spread.trace() + its.trace() - 2 * both
    return {"frechet": max(float(distance), 0.0), "coverage": found["covered"] / count}


def _moments(images: Tensor) -> Tensor:
    """[C * SIDE**2 + 1] squared, float64: products of the small images' numbers and 1."""
    x = F.adaptive_avg_pool2d(images, SIDE).flatten(1).double()
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    return x.T @ x


def _fitted(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean = moments[-1, :-1] / moments[-1, -1]
    return mean, moments[:-1, :-1] / moments[-1, -1] - torch.outer(mean, mean)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _covered(real: Tensor, made: Tensor) -> Tensor:
    if len(real) < 2:
        return real.new_zeros(())
    radius = torch.cdist(real, real).kthvalue(min(NEAREST + 1, len(real)), 1).values  # the nearest is itself
    return (torch.cdist(real, made).min(1).values <= radius).sum()
