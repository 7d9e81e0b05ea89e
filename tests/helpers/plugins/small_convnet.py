"""A family in one file: a small convolutional network with BatchNorm that classifies images.

    plugins: [small_convnet.py]
    model: {family: small_convnet, classes: 10, width: 16}
    data: {path: images.parquet, images: {channels: 1}}

`model.*` are the keys of `ConvNetConfig`; the task is muster's own `classification`.
"""

from pydantic import Field
from torch import Tensor, nn

from configs.sections.family import ModelSection
from models.families import FAMILIES, Family


class ConvNetConfig(ModelSection):
    """Keys under `model:`."""

    default_task = "classification"

    family: str = "small_convnet"
    classes: int = Field(10, ge=2)
    """Number of classes; labels are below it."""
    channels: int = Field(1, ge=1)
    """Channels of an image."""
    width: int = Field(16, ge=1, le=4096)
    """Channels after the first convolution; each stage has twice as many as the one before."""
    stages: int = Field(2, ge=1, le=6)
    """Stages, each of which halves height and width."""
    frozen: int = Field(0, ge=0)
    """Number of stages, from the first, that keep their initial weights."""


class ConvNet(nn.Sequential):
    """From [B, C, H, W] in [-1, 1] to logits [B, classes]."""

    def __init__(self, config: ConvNetConfig):
        layers: list[nn.Module] = []
        before = config.channels
        for stage in range(config.stages):
            width = config.width << stage
            convolution = nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, config.classes))
        for part in list(self)[: 3 * config.frozen]:
            part.requires_grad_(False)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        return super().forward(images.to(self[0].weight.dtype))


FAMILIES["small_convnet"] = Family(build=ConvNet, section=ConvNetConfig, takes="images", gives="classes")
