"""Convolutional networks, from LeNet to ConvNeXt, by one builder from stages."""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from configs.sections.families.convnet import ConvNetConfig
from models.init import fill_by
from models.mlp import predictor_of
from models.noise import dropout

from .blocks import Builder, Residual


class ConvNet(nn.Module):
    """From images [B, channels, H, W] in [-1, 1] to [B, outputs]."""

    def __init__(self, config: ConvNetConfig):
        super().__init__()
        self.config, self.shape = config, config.shape
        builder, before, stages = Builder(self.shape), int(config.channels), []
        for stage in self.shape.stages:
            stages.append(nn.ModuleList(builder.stage(stage, before)))
            before = stage.gives
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(before, eps=self.shape.eps) if self.shape.head_norm else nn.Identity()
        widths = (before * self.shape.grid**2, *self.shape.hidden, config.outputs)
        self.head = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.activation, self.predictor = builder.activation(), predictor_of(config)
        residual = [part for part in self.modules() if isinstance(part, Residual)]
        for number, part in enumerate(residual, 1):
            part.place = number, config.stochastic_depth * (number - 1) / max(len(residual) - 1, 1)

    def init_weights(self, seed: int) -> None:
        fill_by(self.config.init, self, seed)

    def forward(self, images: Tensor, keys: Tensor | None = None, predict: bool = False) -> Tensor:
        """`keys`: of `models.noise.dropout`; `predict`: with the predictor, see `models.mlp.Predictor`."""
        dtype: Any = self.head[0].weight.dtype  # of what an engine may have put in the parameter's place
        x = self.features(images.to(dtype), keys)
        for site, layer in enumerate(self.head):
            if site:
                x = self.activation(x)
            x = layer(dropout(x, keys, HEAD + site, self.config.dropout))
        return self.predictor(x) if predict and self.predictor else x

    def features(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """[B, channels of the last stage * grid**2]."""
        for site, stage in enumerate(self.stages):
            for block in stage.children():
                x = block(x, keys) if isinstance(block, Residual) else block(x)
            x = dropout(x, keys, STAGE + site, self.config.spatial_dropout, dims=1)
        grid = self.shape.grid
        if grid == 1:
            x = x.mean((2, 3))
        elif x.shape[2:] != (grid, grid):
            x = F.adaptive_avg_pool2d(x, grid)
        return self.norm(x.flatten(1))


STAGE, HEAD = 1 << 16, 1 << 17
"""Numbers of the first dropout of the stages and of the head, beyond those of residual blocks."""
