"""Small networks and images for the tasks that compare views."""

import torch

from models.batch import ImageBatch
from models.families import build
from models.init import fill

FAMILIES = {
    "convnet": {"channels": 1, "stages": [{"width": 4, "pool": "max2"}, {"width": 8}], "hidden": [6], "outputs": 5},
    "mlp": {"inputs": 144, "hidden": [8], "outputs": 5},
    "vit": {
        "channels": 1,
        "image_size": 12,
        "patch_size": 4,
        "num_layers": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "outputs": 5,
    },
}


def network(learned):
    module = build(learned.config.model)
    fill(module, 0)
    return module


def images(count=6, padding=1) -> ImageBatch:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 12, 12), generator=draw, dtype=torch.uint8)
    labels, ids = torch.arange(count) % 3, torch.arange(count) + 10
    labels[count - padding :] = ids[count - padding :] = -1
    return ImageBatch(pixels, labels, ids)
