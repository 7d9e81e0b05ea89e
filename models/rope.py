"""Rotary positions (RoPE) and their scalings, numerically as in Hugging Face transformers."""

import math

import torch
from torch import Tensor

from configs import ModelConfig, RopeScaling


def rope_tables(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, computed in fp32 and rounded to `dtype`.

    Args:
        position_ids: [B, T] int64.

    Returns:
        cos, sin: [B, T, 1, D/2], to broadcast over heads.
    """
    head_dim = config.head_dim or config.hidden_size // config.num_heads
    inv_freq, factor = _inverse_frequencies(head_dim, config.rope_theta, config.rope_scaling, position_ids.device)
    angle_BTD = position_ids[..., None].float() * inv_freq
    cos, sin = angle_BTD.cos() * factor, angle_BTD.sin() * factor
    return cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)


def rotate(x_BTND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its position's angle (RoFormer, arXiv:2104.09864, in GPT-NeoX layout)."""
    if torch.compiler.is_compiling():
        x1, x2 = x_BTND.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return _Rotate.apply(x_BTND, cos, sin)


class _Rotate(torch.autograd.Function):
    """Autograd would keep four products of the size of x; the backward pass is the inverse rotation and needs none."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return turn(dy, cos, sin, -1), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """`rotate` without autograd, forwards (sign 1) or backwards (-1)."""
    x1, x2 = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    out1, out2 = out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin, value=sign)
    return out


def _inverse_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> tuple[Tensor, float]:
    """Radians per position for each pair [D/2], and the factor on cos and sin (yarn's attention factor)."""
    exponent = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    inv_freq = 1.0 / (theta**exponent)
    if scaling is None:
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    return _yarn(inv_freq, dim, theta, scaling), 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    original, low, high = scaling.original_max_positions, scaling.low_freq_factor, scaling.high_freq_factor
    assert original
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    stretched = torch.where(wavelength > original / low, inv_freq / scaling.factor, between)
    return torch.where(wavelength < original / high, inv_freq, stretched)


def _yarn(inv_freq: Tensor, dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """YaRN (arXiv:2309.00071, eq. 23): interpolate pairs that turn fewer than `beta_slow` times, keep those that
    turn more than `beta_fast` times within the original context, blend linearly between."""
    original = scaling.original_max_positions
    assert original

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    pair = torch.arange(dim // 2, dtype=torch.float32, device=inv_freq.device)
    interpolated = ((pair - low) / width).clamp(0, 1)
    return inv_freq / scaling.factor * interpolated + inv_freq * (1 - interpolated)
