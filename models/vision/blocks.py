"""The blocks of convolutional networks: [B, before, H, W] -> [B, width, H / stride, W / stride]."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from configs.sections.families.stages import POOLS, Architecture, Stage
from models.noise import dropout

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU,
    "swish": nn.SiLU, "gelu": nn.GELU,
}  # fmt: skip


class PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PixelRms(nn.RMSNorm):
    """RMSNorm over the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _groups(width: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, max(width // 8, 1), width), width, eps)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "batch": nn.BatchNorm2d, "layer": PixelNorm, "rms": PixelRms, "group": _groups,
    "instance": lambda width, eps: nn.GroupNorm(width, width, eps),
}  # fmt: skip


class Scale(nn.Module):
    """A learned factor for each channel, at first small (arXiv:2103.17239)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None]


class SqueezeExcite(nn.Sequential):
    """Channels weighted by what the whole image has (arXiv:1709.01507)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(x.mean((2, 3), keepdim=True))


class Side(nn.ModuleList):
    """Branches of one input, their channels side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


class Residual(nn.Module):
    """after(x + body(x)), with a shortcut for x if the body changes its shape.

    Attributes:
        place: (number of the block's dropout, share of examples that skip the body in training).
    """

    def __init__(self, body: Iterable[nn.Module], shortcut: Iterable[nn.Module] = (), after: nn.Module | None = None):
        super().__init__()
        self.body, self.shortcut, self.after = nn.Sequential(*body), nn.Sequential(*shortcut), after or nn.Identity()
        self.place = 1, 0.0

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """`keys`: of `models.noise.dropout`."""
        change = dropout(self.body(x), keys, *self.place, dims=0)
        return self.after(change + self.shortcut(x))


class Builder:
    """Builds the blocks of an architecture."""

    def __init__(self, shape: Architecture):
        self.shape = shape

    def stage(self, stage: Stage, before: int) -> list[nn.Module]:
        """All blocks of a stage, and what pools after it."""
        block: Callable[[Stage, int, int], list[nn.Module]] = getattr(self, f"_{stage.block}")
        found: list[nn.Module] = []
        for number in range(stage.depth):
            found += block(stage, stage.gives if number else before, 1 if number else stage.stride)
        if stage.pool != "none":
            kind = nn.AvgPool2d if stage.pool == "average2" else nn.MaxPool2d
            window, padding = POOLS[stage.pool]
            found.append(kind(window, 2, padding))
        return found

    def norm(self, width: int) -> list[nn.Module]:
        return [] if self.shape.norm == "none" else [NORMS[self.shape.norm](width, self.shape.eps)]

    def activation(self) -> nn.Module:
        return ACTIVATIONS[self.shape.activation]()

    def conv(
        self, before: int, width: int, kernel: int, stride: int = 1, groups: int = 1, padding: int | None = None
    ) -> list[nn.Module]:
        """Convolution and norm."""
        around: list[nn.Module] = []
        padding = kernel // 2 if padding is None else padding
        if self.shape.tf_padding and stride == 2 and kernel > 1:
            around, padding = [nn.ZeroPad2d((kernel // 2 - 1, kernel // 2) * 2)], 0
        bias = self.shape.norm == "none"
        made = nn.Conv2d(before, width, kernel, stride, padding, groups=groups, bias=bias)
        return [*around, made, *self.norm(width)]

    def _conv(self, stage: Stage, before: int, stride: int) -> list[nn.Module]:
        return [*self.conv(before, stage.width, stage.kernel, stride, padding=stage.padding), self.activation()]

    def _patch(self, stage: Stage, before: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(before, stage.width, stride, stride), *self.norm(stage.width)]

    def _basic(self, stage: Stage, before: int, stride: int) -> list[nn.Module]:
        body = [
            *self.conv(before, stage.width, stage.kernel, stride), self.activation(),
            *self.conv(stage.width, stage.width, stage.kernel),
        ]  # fmt: skip
        return [Residual(body, self._shortcut(before, stage.width, stride), self.activation())]

    def _bottleneck(self, stage: Stage, before: int, stride: int) -> list[nn.Module]:
        inside = max(1, round(stage.width / stage.expand))
        body = [
            *self.conv(before, inside, 1), self.activation(),
            *self.conv(inside, inside, stage.kernel, stride), self.activation(),
            *self.conv(inside, stage.width, 1),
        ]  # fmt: skip
        return [Residual(body, self._shortcut(before, stage.width, stride), self.activation())]

    def _shortcut(self, before: int, width: int, stride: int) -> list[nn.Module]:
        return self.conv(before, width, 1, stride) if stride > 1 or before != width else []

    def _separable(self, stage: Stage, before: int, stride: int) -> list[nn.Module]:
        depthwise = self.conv(before, before, stage.kernel, stride, groups=before)
        return [*depthwise, self.activation(), *self.conv(before, stage.width, 1), self.activation()]

    def _inverted(self, stage: Stage, before: int, stride: int) -> list[nn.Module]:
        inside, body = max(1, round(stage.expand * before)), []
        if inside != before:
            body = [*self.conv(before, inside, 1), self.activation()]
        body += [*self.conv(inside, inside, stage.kernel, stride, groups=inside), self.activation()]
        if stage.squeeze:
            narrow = max(1, int(stage.squeeze * before))
            down, up = nn.Conv2d(inside, narrow, 1), nn.Conv2d(narrow, inside, 1)
            body.append(SqueezeExcite(down, self.activation(), up, nn.Sigmoid()))
        body += self.conv(inside, stage.width, 1)
        return [Residual(body)] if stride == 1 and before == stage.width else [nn.Sequential(*body)]

    def _convnext(self, stage: Stage, before: int, stride: int) -> list[nn.Module]:
        width, inside = stage.width, round(stage.expand * stage.width)
        down: list[nn.Module] = []
        if stride > 1 or before != width:
            down = [*self.norm(before), nn.Conv2d(before, width, stride, stride)]
        body = [
            nn.Conv2d(width, width, stage.kernel, padding=stage.kernel // 2, groups=width), *self.norm(width),
            nn.Conv2d(width, inside, 1), self.activation(), nn.Conv2d(inside, width, 1), Scale(width),
        ]  # fmt: skip
        return [*down, Residual(body)]

    def _inception(self, stage: Stage, before: int, stride: int) -> list[nn.Module]:
        assert stage.branches
        one, three_before, three, five_before, five, pooled = stage.branches

        def chain(*convs: list[nn.Module]) -> list[nn.Module]:
            return [part for conv in convs for part in (*conv, self.activation())]

        branches = [
            chain(self.conv(before, one, 1, stride)),
            chain(self.conv(before, three_before, 1), self.conv(three_before, three, 3, stride)),
            chain(self.conv(before, five_before, 1), self.conv(five_before, five, 5, stride)),
            [nn.MaxPool2d(3, stride, 1), *chain(self.conv(before, pooled, 1))],
        ]
        return [Side(nn.Sequential(*branch) for branch in branches)]
