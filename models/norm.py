"""RMSNorm, alone or followed by rotary positions, with hand-written passes on CPU.

On CPU torch has no fused kernel for either: its composite ones take more than twice the passes over memory, and round
to bf16 in between. torch.compile fuses them itself, so under it the plain formulas are used.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .rope import rotate, turn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv:1910.07467), fp32 inside as in Hugging Face."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if _by_hand(x):
            return _CpuNorm.apply(x, self.weight, self.eps, None, None)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm of each head of queries or keys (Qwen3's QK-norm), then rotary positions."""

    def forward(self, x_BTND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        if _by_hand(x_BTND):
            return _CpuNorm.apply(x_BTND, self.weight, self.eps, cos, sin)
        return rotate(super().forward(x_BTND), cos, sin)


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class _CpuNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        x32 = x.float()
        inverse = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse, cos, sin)
        y = torch.mul(x32, inverse, out=_scratch(x32, x)).mul_(weight.float())
        if cos is not None and sin is not None:
            y = turn(y, cos.float(), sin.float(), 1)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, weight, inverse, cos, sin = ctx.saved_tensors
        size = x.shape[-1]
        x32, dy32, weight32 = x.float(), dy.float(), weight.float()
        if cos is not None:
            dy32 = turn(dy32, cos.float(), sin.float(), -1)
        product = (x32 * dy32).view(-1, size)
        dot = (product @ weight32).view_as(inverse)
        dweight = inverse.view(1, -1) @ product
        dx = torch.mul(dy32, weight32, out=_scratch(dy32, dy)).mul_(inverse)
        dx.addcmul_(x32, dot.mul_(inverse.pow(3)).div_(-size))
        return dx.to(x.dtype), dweight.view(size).to(weight.dtype), None, None, None


def _scratch(converted: Tensor, original: Tensor) -> Tensor:
    """Output buffer: `converted` itself if it is a copy of `original`."""
    return converted if converted is not original else torch.empty_like(original)
