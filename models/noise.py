"""Random numbers that belong to an example: a function of (seed, example index, use), never of a rank or of time."""

import hashlib
import math

import torch
from torch import Tensor

from .decoder.layers import dropout as of_tokens
from .decoder.layers import dropout_keys, hashed, salt, uniform_bits


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


def normal_of_elements(seed: int, use: str, elements: Tensor) -> Tensor:
    """fp32, standard normal: a function of (seed, use, element) only, whichever elements are asked for.

    Args:
        elements: int64, places in a tensor.
        use: of any length.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}:{use}".encode()).digest()[:8], "little") >> 1
    bits = hashed(elements + key, salt(0))  # 63 of them: half for each of two uniform numbers
    first, second = ((half.double() + 0.5) * 2**-31 for half in (bits >> 32, bits & (2**31 - 1)))
    return (first.log().mul(-2).sqrt() * torch.cos(2 * math.pi * second)).float()


def dropout_keys_of(seed: int, example_ids: Tensor) -> Tensor:
    """[B] int64 for `dropout`: one for each (seed, example)."""
    return _keys(seed, example_ids, "dropout")


def keys_of_parts(keys: Tensor, example: Tensor) -> Tensor:
    """[N] int64: a key for each part of an example, such as a node of a graph, by its place in the example.

    Args:
        keys: [B] from `dropout_keys_of`.
        example: [N] int64, which of the B examples a part belongs to, in ascending order.
    """
    sizes = torch.zeros_like(keys).index_add(0, example, torch.ones_like(example))
    place = torch.arange(len(example), device=example.device) - (sizes.cumsum(0) - sizes)[example]
    return hashed(keys[example] + place, salt(0))


def dropout(x: Tensor, keys: Tensor | None, site: int, rate: float, dims: int | None = None) -> Tensor:
    """Zero a fraction `rate` of x and scale the rest; which ones depends on (key, site, place in the example) only.

    Args:
        x: [B, ...].
        keys: [B] from `dropout_keys_of`; None: no dropout (evaluation).
        site: number of this dropout within the network, from 1.
        dims: dimensions after the first that have values of their own: 1 drops whole channels (spatial dropout,
            arXiv:1411.4280), 0 whole examples (stochastic depth, arXiv:1603.09382); None: all.
    """
    if keys is None or rate == 0:
        return x
    shape = x.shape[1:] if dims is None else x.shape[1 : 1 + dims]
    ones = x.new_ones(len(x), 1, math.prod(shape))
    kept = of_tokens(ones, keys[:, None], site, rate)
    return x * kept.view(len(x), *shape, *[1] * (x.dim() - 1 - len(shape)))


def _keys(seed: int, example_ids: Tensor, use: str) -> Tensor:
    number = int.from_bytes(use.encode()[:61], "little") % (2**61 - 1)  # a prime: every character counts
    return dropout_keys(seed + number, example_ids, 1)[:, 0]
