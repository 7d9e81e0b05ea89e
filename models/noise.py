"""Random numbers that belong to an example: a function of (seed, example index, use), never of a rank or of time."""

import math

import torch
from torch import Tensor

from .decoder.layers import dropout_keys, uniform_bits


def uniform(seed: int, example_ids: Tensor, use: str, shape: tuple[int, ...]) -> Tensor:
    """[B, *shape] fp32 in (0, 1), on the device of `example_ids`, the same on any device and in any split of a batch.

    Args:
        seed: of the run.
        example_ids: [B] int64, see `MicroBatch`.
        use: purpose, such as `latents`; each use draws different numbers.
    """
    bits = uniform_bits(_keys(seed, example_ids, use), math.prod(shape))
    return ((bits.double() + 2**31 + 0.5) * 2**-32).float().clamp(max=1 - 2**-24).view(len(example_ids), *shape)


def normal(seed: int, example_ids: Tensor, use: str, shape: tuple[int, ...]) -> Tensor:
    """[B, *shape] fp32, standard normal, as `uniform` (Box and Muller, 1958)."""
    radius = uniform(seed, example_ids, f"{use}/radius", shape).log().mul(-2).sqrt()
    return radius * torch.cos(2 * math.pi * uniform(seed, example_ids, f"{use}/angle", shape))


def _keys(seed: int, example_ids: Tensor, use: str) -> Tensor:
    number = int.from_bytes(use.encode()[:64], "little") % 2**61
    return dropout_keys(seed + number, example_ids, 1)[:, 0]
