"""A family and a task in one file: a small convolutional network with BatchNorm that classifies images.

    plugins: [convnet.py]
    model: {family: convnet, classes: 10, width: 16}
    data: {path: images.parquet, images: {channels: 1}}

`model.*` are the keys of `ConvNetConfig`; the task follows from the family.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from configs.sections.family import ModelSection
from models.families import FAMILIES, Family
from models.tasks.samples import Table
from models.tasks.table import TASKS
from models.tasks.task import Modules, Nets, Sums, Task
from trainer.data.images.reader import ImageBatch


class ConvNetConfig(ModelSection):
    """Keys under `model:`."""

    default_task = "classification"

    family: str = "convnet"
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
    """From [B, C, H, W] uint8 to logits [B, classes]."""

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

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.to(self[0].weight.dtype) / 127.5 - 1)


class Classification(Task):
    """The label of an image, by cross-entropy in nats."""

    reads, takes, gives = "images", "images", "classes"
    counts = 1, "images"
    extra = {"correct": ()}

    def loss(self, nets: Nets, batch: ImageBatch, phase: str) -> Sums:
        logits = nets["model"](batch.images).float()
        loss = F.cross_entropy(logits, batch.labels, reduction="sum", ignore_index=-1)  # -1: padding
        correct = (logits.argmax(1) == batch.labels).sum()
        return Sums(loss, (batch.labels >= 0).sum(), {"correct": correct})

    def metrics(self, extra: Mapping[str, Any], weight: float) -> dict[str, Any]:
        return {"accuracy": extra["correct"] / max(weight, 1)}

    def samples(self, nets: Modules, batch: ImageBatch) -> Table:
        sure, found = nets["model"](batch.images).float().softmax(1).max(1)
        columns = [x.tolist() for x in (batch.example_ids, batch.labels, found, sure)]
        return Table(["example", "label", "found", "probability"], list(zip(*columns, strict=True)))


FAMILIES["convnet"] = Family(build=ConvNet, section=ConvNetConfig, takes="images", gives="classes")
TASKS["classification"] = Classification
