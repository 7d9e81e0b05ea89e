"""A task's samples as files that anyone can open: .txt, .png, .csv."""

import csv
import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from models.tasks.samples import ImageGrid, Sample, Text
from trainer.files.own_files import write_bytes

GAP = 1
"""Pixels between two images of a grid."""


def write_sample(sample: Sample, path: Path) -> Path:
    """Write a sample to `path` with the suffix of its kind. Returns the file. Raises OSError."""
    if isinstance(sample, Text):
        suffix, content = ".txt", sample.text.encode()
    elif isinstance(sample, ImageGrid):
        suffix, content = ".png", _png(grid(*sample))
    else:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([sample.columns, *sample.rows])
        suffix, content = ".csv", text.getvalue().encode()
    file = path.with_suffix(suffix)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, content)
    return file


def grid(images_NCHW: Tensor, across: int | None = None) -> Tensor:
    """The images tiled into one, as `ImageGrid` says: [C, H, W] uint8 on the CPU.

    Values that are not finite are black.
    """
    scaled = images_NCHW.detach().float().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).mul(255).round().byte().cpu()
    count, channels, height, width = scaled.shape
    across = across or math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    found = torch.zeros(channels, down * (height + GAP) - GAP, across * (width + GAP) - GAP, dtype=torch.uint8)
    for number, image in enumerate(scaled):
        top, left = (place * (size + GAP) for place, size in zip(divmod(number, across), (height, width), strict=True))
        found[:, top : top + height, left : left + width] = image
    return found


def _png(image_CHW: Tensor) -> bytes:
    pixels, file = image_CHW.permute(1, 2, 0).numpy(), io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()
