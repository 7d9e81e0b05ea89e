"""Small parts of a decoder layer: SwiGLU, and dropout that does not depend on the topology."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.up_proj = nn.Linear(hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def dropout_keys(seed: int, sequence_ids: Tensor, length: int, first: int = 0) -> Tensor:
    """A 64-bit key for each (seed, sequence, position in the sequence).

    Args:
        sequence_ids: [B] int64, indices of the sequences in the run.
        length: T.
        first: position of the first of the T tokens.

    Returns:
        [B, T] int64.
    """
    place = torch.arange(first, first + length, device=sequence_ids.device)
    return _splitmix64(_splitmix64(sequence_ids + _wrap(seed * _GOLDEN))[:, None] + place)


def next_keys(keys: Tensor | None) -> Tensor | None:
    """The keys of the next layer."""
    return None if keys is None else _splitmix64(keys + _wrap(_GOLDEN))


def dropout(x_BTH: Tensor, keys: Tensor | None, site: int, rate: float) -> Tensor:
    """Zero a fraction `rate` of x and scale the rest; which ones depends on (key, site, channel) only.

    A counter-based hash instead of a generator: the mask is the same on any device, in any split of the batch over
    ranks, and when activation checkpointing recomputes the layer.

    Args:
        keys: [B, T] from `dropout_keys` and `next_keys`; None: no dropout (evaluation).
        site: number of this dropout within the layer.
    """
    if keys is None or rate == 0:
        return x_BTH
    keep = uniform_bits(_splitmix64(keys ^ site) if site else keys, x_BTH.shape[-1]) >= round(rate * 2**32) - 2**31
    return x_BTH * keep / (1 - rate)


def jitter(x: Tensor, keys: Tensor, width: float) -> Tensor:
    """x [..., H] times uniform noise in [1 - width, 1 + width), a function of (key, channel) only as in `dropout`."""
    uniform = uniform_bits(_splitmix64(keys ^ _JITTER), x.shape[-1]).to(torch.float32) * 2**-31
    return x * (1 + width * uniform).to(x.dtype)


def salt(number: int) -> Tensor:
    """Salt that makes `hashed` a different function: a tensor, because a compiler would recompile for each number."""
    return torch.tensor(_wrap((number + 1) * _GOLDEN), device="cpu")


def hashed(ids: Tensor, salt: Tensor) -> Tensor:
    """A non-negative int64 for each id."""
    return _splitmix64(ids + salt) & (2**63 - 1)


def uniform_bits(keys: Tensor, channels: int) -> Tensor:
    """int32 [..., channels], uniform over its range."""
    column = torch.arange(channels, dtype=torch.int32, device=keys.device) * _wrap(0x9E3779B1, 32)
    noise = _mix32(keys.to(torch.int32)[..., None] ^ column)
    noise ^= (keys >> 32).to(torch.int32)[..., None]
    return _mix32(noise)


_JITTER = 7
"""The site of the router's jitter, next to those of dropout."""
_GOLDEN = 0x9E3779B97F4A7C15


def _wrap(value: int, bits: int = 64) -> int:
    """Two's complement of `value` modulo 2^bits, as torch's signed integers hold it."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _splitmix64(x: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele et al., OOPSLA 2014) on int64; torch's products wrap around."""
    x = (x ^ _shift(x, 30, 64)) * _wrap(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27, 64)) * _wrap(0x94D049BB133111EB)
    return x ^ _shift(x, 31, 64)


def _mix32(x: Tensor) -> Tensor:
    """Finaliser `lowbias32` (Wellons, github.com/skeeto/hash-prospector) on int32."""
    x = (x ^ _shift(x, 16, 32)) * _wrap(0x7FEB352D, 32)
    x = (x ^ _shift(x, 15, 32)) * _wrap(0x846CA68B, 32)
    return x ^ _shift(x, 16, 32)


def _shift(x: Tensor, count: int, bits: int) -> Tensor:
    """Logical right shift: torch's `>>` on signed integers copies the sign bit."""
    return (x >> count) & ((1 << (bits - count)) - 1)
