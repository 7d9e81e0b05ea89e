"""Networks that predict what noise is in an image: a U-Net and a Transformer (DiT), given the time and a class."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.sections.families.generative import DiffusionConfig


class ZeroConv(nn.Conv2d):
    """It begins at 0, so that a residual block begins as the identity."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ZeroLinear(nn.Linear):
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


def sinusoid(places: Tensor, width: int) -> Tensor:
    """[N] -> [N, width] fp32: cosines and sines of frequencies from 1 down to 1/10000 (arXiv:1706.03762)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=places.device) / (width // 2))
    angles = places.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class Condition(nn.Module):
    """What the network is told beside the image: the time, and the class, of which one more stands for none."""

    def __init__(self, width: int, given: int, classes: int | None):
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, given), nn.SiLU(), nn.Linear(given, given))
        self.labels = nn.Embedding(classes + 1, given) if classes else None

    def forward(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Times [B] in [0, 1], labels [B] -> [B, given]."""
        dtype: Any = self.time[0].weight.dtype
        told = self.time(sinusoid(1000 * t, self.width).to(dtype))
        return told if self.labels is None else told + self.labels(labels)


def _attention(qkv: Tensor, heads: int) -> Tensor:
    """[B, T, 3 * width] -> [B, T, width]."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ResidualBlock(nn.Module):
    """arXiv:2006.11239, appendix B: the condition is added between two convolutions."""

    def __init__(self, before: int, width: int, told: int):
        super().__init__()
        self.first = nn.Sequential(_norm(before), nn.SiLU(), nn.Conv2d(before, width, 3, padding=1))
        self.told = nn.Sequential(nn.SiLU(), nn.Linear(told, width))
        self.second = nn.Sequential(_norm(width), nn.SiLU(), ZeroConv(width, width, 3, padding=1))
        self.shortcut = nn.Conv2d(before, width, 1) if before != width else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(self.first(x) + self.told(told)[:, :, None, None])


class AttentionBlock(nn.Module):
    """Self-attention over the pixels."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, _norm(width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), ZeroConv(width, width, 1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        mixed = _attention(self.qkv(self.norm(x)).flatten(2).transpose(1, 2), self.heads)
        return x + self.out(mixed.transpose(1, 2).view_as(x))


class Resize(nn.Module):
    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return self.parts(x)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, width), width)


def _through(parts: Any, x: Tensor, told: Tensor) -> Tensor:
    for part in parts:
        x = part(x, told)
    return x


class UNet(nn.Module):
    """[B, C, H, W] -> the same: down through the levels and up again, where each step sees what the way down gave."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        widths, told = [config.width * level for level in config.levels], 4 * config.width
        self.condition = Condition(config.width, told, config.classes)
        self.first = nn.Conv2d(config.channels, config.width, 3, padding=1)

        def step(before: int, width: int) -> nn.ModuleList:
            attention = [AttentionBlock(width, config.heads)] if width == widths[-1] else []
            return nn.ModuleList([ResidualBlock(before, width, told), *attention])

        down: list[nn.Module] = []
        given, before = [config.width], config.width
        for number, width in enumerate(widths):
            if number:
                down.append(nn.ModuleList([Resize(nn.Conv2d(before, before, 3, stride=2, padding=1))]))
                given.append(before)
            for _ in range(config.depth):
                down.append(step(before, width))
                given.append(before := width)
        self.down = nn.ModuleList(down)
        self.middle = nn.ModuleList([*step(before, before), ResidualBlock(before, before, told)])
        up: list[nn.Module] = []
        for number, width in reversed(list(enumerate(widths))):
            for place in range(config.depth + 1):
                parts = step(before + given.pop(), width)
                if number and place == config.depth:
                    parts.append(Resize(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)))
                up.append(parts)
                before = width
        self.up = nn.ModuleList(up)
        self.last = nn.Sequential(_norm(before), nn.SiLU(), ZeroConv(before, config.channels, 3, padding=1))

    def forward(self, images: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Times [B] in [0, 1]; labels [B], of which `classes` stands for none."""
        told = self.condition(t, labels)
        x = self.first(images.to(told.dtype))
        given = [x]
        for parts in self.down:
            given.append(x := _through(parts, x, told))
        x = _through(self.middle, x, told)
        for parts in self.up:
            x = _through(parts, torch.cat([x, given.pop()], 1), told)
        return self.last(x)


class DiTBlock(nn.Module):
    """A Transformer block whose norms and residuals the condition shifts, scales and gates, at first to 0 (adaLN-Zero,
    arXiv:2212.09748, section 3.2)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.told = nn.Sequential(nn.SiLU(), ZeroLinear(width, 6 * width))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """x [B, T, width], told [B, width]."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.told(told)[:, None].chunk(6, 2)
        mixed = self.out(_attention(self.qkv(self.norms[0](x) * (1 + scale) + shift), self.heads))
        x = x + gate * mixed
        return x + gate_mlp * self.mlp(self.norms[1](x) * (1 + scale_mlp) + shift_mlp)


class DiT(nn.Module):
    """[B, C, H, W] -> the same, as square patches."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.size, self.width = config.patch_size, config.width
        numbers = config.channels * self.size**2
        self.condition = Condition(config.width, config.width, config.classes)
        self.first = nn.Linear(numbers, config.width)
        self.blocks = nn.ModuleList(DiTBlock(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.told, self.last = (
            nn.Sequential(nn.SiLU(), ZeroLinear(config.width, 2 * config.width)),
            ZeroLinear(config.width, numbers),
        )

    def forward(self, images: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `UNet.forward`."""
        told = self.condition(t, labels)
        patches = F.pixel_unshuffle(images.to(told.dtype), self.size)
        x = self.first(patches.flatten(2).transpose(1, 2)) + self._places(patches)
        for block in self.blocks:
            x = block(x, told)
        shift, scale = self.told(told)[:, None].chunk(2, 2)
        x = self.last(self.norm(x) * (1 + scale) + shift)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, patches.shape[2:]), self.size)

    def _places(self, patches: Tensor) -> Tensor:
        """[B, C, H, W] -> [H * W, width]: half for the row, half for the column."""
        height, width = patches.shape[2:]
        rows, columns = (sinusoid(torch.arange(n, device=patches.device), self.width // 2) for n in (height, width))
        grid = [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)]
        return torch.cat(grid, 2).flatten(0, 1).to(patches.dtype)


def build(config: DiffusionConfig) -> nn.Module:
    return (UNet if config.network == "unet" else DiT)(config)
