"""Two random views of each image, and what tasks have in common that compare them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.sections.train import ViewsConfig
from models.batch import ImageBatch
from models.noise import dropout_keys_of, uniform

from ..samples import ImageGrid
from ..task import Modules, Nets, Sums, Task, Value
from .probes import knn_accuracy, linear_accuracy

PROBED = 1024
"""Most held-out images whose representations are compared with their labels."""


class Probed(Task):
    """A network's last linear layers (`head`) are the projection head; what goes into them is the representation.
    Evaluations classify the held-out representations by their labels, which training does not see: `knn_accuracy` and
    `probe_accuracy`, see `models.tasks.images.probes`."""

    reads = "images"

    @property
    def counts(self) -> tuple[int, str]:
        return 1, "images"

    def probed(self, sums: Sums, network: Any, batch: ImageBatch) -> Sums:
        """Sums of an evaluation, and with them the representations."""
        seen = representations(network, batch.inputs)
        table = seen.new_zeros(PROBED + 1, seen.shape[1] + 1)  # a row for each image, and one for all others
        rows = batch.example_ids.where((batch.labels >= 0) & (batch.example_ids < PROBED), PROBED)
        table[rows] = torch.cat([seen, batch.labels[:, None] + 1], 1)
        return sums._replace(extra={**sums.extra, "representations": table[:PROBED]})

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        found = super().metrics({name: value for name, value in extra.items() if name != "representations"}, weight)
        if rows := [row for row in extra.get("representations", ()) if row[-1]]:
            table = torch.tensor(rows, dtype=torch.float64)
            features, labels = table[:, :-1], table[:, -1].long() - 1
            found["knn_accuracy"] = knn_accuracy(features, labels)
            found["probe_accuracy"] = linear_accuracy(features, labels)
        return found


class OfViews(Probed):
    """Recorded besides the loss: `alignment` and `uniformity` of the projections (arXiv:2005.10242)."""

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """`potential`: sum of exp(-2 distance^2) over pairs of different images, and their number."""
        return {"alignment": (), "potential": (2,)}

    def both(self, batch: ImageBatch) -> Tensor:
        """[2B, C, H, W] in [-1, 1]: the first view of each image, then the second of each."""
        views, seed = self.config.train.views, self.config.run.seed
        return torch.cat([view(batch, views, seed, number) for number in (0, 1)]) * 2 - 1

    def keys(self, batch: ImageBatch) -> Tensor:
        """[2B] of dropout, as `both`."""
        return torch.cat([dropout_keys_of(self.config.run.seed + number, batch.example_ids) for number in (0, 1)])

    def compared(self, nets: Nets, batch: ImageBatch, training: bool) -> Sums:
        """The loss of a micro-batch's views."""
        raise NotImplementedError

    def loss(self, nets: Nets, batch: ImageBatch, phase: str) -> Sums:
        return self.compared(nets, batch, training=True)

    def evaluate(self, nets: Nets, batch: ImageBatch) -> Sums:
        return self.probed(self.compared(nets, batch, training=False), nets["model"], batch)

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        found = super().metrics({name: value for name, value in extra.items() if name != "potential"}, weight)
        total, pairs = extra["potential"]
        if pairs and total:
            found["uniformity"] = math.log(total / pairs)
        return found

    def samples(self, nets: Modules, batch: ImageBatch) -> ImageGrid:
        """Two views of each image, side by side."""
        views = ((self.both(batch) + 1) / 2).unflatten(0, (2, -1))[:, :8]
        return ImageGrid(views.transpose(0, 1).flatten(0, 1))


def measured(z_2BD: Tensor, real: Tensor) -> dict[str, Tensor]:
    """`OfViews.extra` of normalised projections of both views; `real`: bool [B], false for padding."""
    one, other = z_2BD.chunk(2)
    different = real[:, None] & real & ~torch.eye(len(real), dtype=torch.bool, device=real.device)
    near = (4 * one @ one.T - 4).exp() * different
    alignment = ((2 - 2 * (one * other).sum(1)) * real).sum()
    return {"alignment": alignment, "potential": torch.stack([near.sum(), different.sum()])}


def view(batch: ImageBatch, how: ViewsConfig, seed: int, number: int) -> Tensor:
    """A random view of each image, [B, C, H, W] in [0, 1]: a function of (seed, image, number).

    The image is cropped, rotated and mirrored; then brightness, contrast and, in colour, saturation change.
    """
    images = batch.images.float() / 255
    draw = uniform(seed, batch.example_ids, f"view {number}", (9,)).T
    area, aspect = how.crop + (1 - how.crop) * draw[0], (4 / 3) ** ((2 * draw[1] - 1) * (how.crop < 1))
    high, wide = ((area * aspect**power).sqrt().clamp(max=1) for power in (1, -1))
    angle = math.radians(how.rotate) * (2 * draw[4] - 1)
    mirror = 1 - 2 * (draw[5] < 0.5).float() if how.flip else torch.ones_like(wide)
    cos, sin = angle.cos(), angle.sin()
    down, right = ((1 - size) * (2 * place - 1) for size, place in ((high, draw[2]), (wide, draw[3])))
    where = torch.stack([wide * cos * mirror, -high * sin, right, wide * sin * mirror, high * cos, down], 1)
    grid = F.affine_grid(where.view(-1, 2, 3), list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, align_corners=False)
    light, contrast, colour = (
        (1 + how.jitter * (2 * each - 1))[:, None, None, None] for each in (draw[6], draw[7], draw[8])
    )
    seen = seen * light
    mean = seen.mean((1, 2, 3), keepdim=True)
    seen = mean + (seen - mean) * contrast
    grey = seen.mean(1, keepdim=True)
    return (grey + (seen - grey) * colour).clamp(0, 1)


def representations(network: Any, inputs: Tensor) -> Tensor:
    """[B, D] fp32: what goes into the network's head; of patches that go into it one by one their mean.

    Args:
        network: a module, or the engine of one.
    """
    found: list[Tensor] = []
    head: nn.Module = getattr(network, "module", network).head
    first = next(part for part in head.modules() if isinstance(part, nn.Linear))
    hook = first.register_forward_pre_hook(lambda _, given: found.append(given[0].detach().float()))
    try:
        network(inputs)
    finally:
        hook.remove()
    return found[0].mean(1) if found[0].dim() == 3 else found[0]
