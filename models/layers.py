"""Small parts of a decoder layer: RMSNorm, SwiGLU and dropout that does not depend on the topology."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv:1910.07467), fp32 inside as in Hugging Face."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _CpuRMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _CpuRMSNorm(torch.autograd.Function):
    """By hand: on CPU torch has no fused kernel, and its composite one makes twice the passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        y = torch.mul(x32, inverse, out=_scratch(x32, x)).mul_(weight.float())
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, weight, inverse = ctx.saved_tensors
        size = x.shape[-1]
        x32, dy32, weight32 = x.float(), dy.float(), weight.float()
        product = (x32 * dy32).view(-1, size)
        dot = (product @ weight32).view_as(inverse)
        dweight = inverse.view(1, -1) @ product
        dx = torch.mul(dy32, weight32, out=_scratch(dy32, dy)).mul_(inverse)
        dx.addcmul_(x32, dot.mul_(inverse.pow(3)).div_(-size))
        return dx.to(x.dtype), dweight.view(size).to(weight.dtype), None


def _scratch(converted: Tensor, original: Tensor) -> Tensor:
    """Memory to write to: `converted` itself where it is a copy of `original`."""
    return converted if converted is not original else torch.empty_like(original)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.up_proj = nn.Linear(hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def dropout_rows(seed: int, sequence_ids: Tensor, length: int) -> Tensor:
    """A random 64-bit key for each (seed, sequence, place in the sequence).

    Args:
        sequence_ids: [B] int64, indices of the sequences in the run.

    Returns:
        [B, T] int64.
    """
    place = torch.arange(length, device=sequence_ids.device)
    return _splitmix64(_splitmix64(sequence_ids + _wrap(seed * _GOLDEN))[:, None] + place)


def dropout(x_BTH: Tensor, rows: Tensor | None, site: int, rate: float) -> Tensor:
    """Zero a share `rate` of x and scale the rest; which ones depends on (seed, sequence, place, site, channel) only.

    A counter-based hash instead of a generator: the mask is the same on any device, in any split of the batch
    over ranks, and when activation checkpointing computes the layer again.

    Args:
        rows: [B, T] from `dropout_rows`; None: no dropout (evaluation).
        site: number of this dropout within the model.
    """
    if rows is None or rate == 0:
        return x_BTH
    key = _splitmix64(rows + _wrap(site * _GOLDEN))
    column = torch.arange(x_BTH.shape[-1], dtype=torch.int32, device=x_BTH.device) * _wrap(0x9E3779B1, 32)
    noise = _mix32(key.to(torch.int32)[..., None] ^ column)
    noise ^= (key >> 32).to(torch.int32)[..., None]
    keep = _mix32(noise) >= round(rate * 2**32) - 2**31
    return x_BTH * keep / (1 - rate)


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
