"""Contrastive learning of images (SimCLR, arXiv:2002.05709): two views of an image are told from those of others."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs import Config, ConfigError
from configs.sections.pairs import TASK_ENDS
from configs.sections.train import ViewsConfig
from models.batch import ImageBatch
from models.noise import dropout_keys_of, uniform

from ..samples import ImageGrid
from ..task import Modules, Nets, Sums, Task, Value
from .probes import knn_accuracy, linear_accuracy

PROBED = 1024
"""Most held-out images whose representations are compared with their labels."""
FAR = -1e9
"""Logit of what is not compared."""


class Contrastive(Task):
    """The cross-entropy, in nats, of finding an image's other view among all views of its micro-batch.

    The negatives are those of the micro-batch, which is the same in every topology: train.micro_batch says how many
    images there are to choose from. The network's last linear layers (`head`) are the projection head; what goes into
    them is the representation. Recorded besides: `matched`, how often the other view is the nearest; `alignment` and
    `uniformity` (arXiv:2005.10242). Evaluations classify the held-out representations by their labels, which training
    does not see: `knn_accuracy` and `probe_accuracy`, see `models.tasks.images.probes`.
    """

    takes, gives = TASK_ENDS["contrastive"]
    reads = "images"

    def __init__(self, config: Config):
        super().__init__(config)
        if config.train.micro_batch == 1:
            raise ConfigError(
                "train.micro_batch=1: contrastive learning compares the images of a micro-batch: set it to 2 or more"
            )

    @property
    def counts(self) -> tuple[int, str]:
        return 1, "images"

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """`potential`: sum of exp(-2 distance^2) over pairs of different images, and their number."""
        return {"matched": (), "alignment": (), "potential": (2,)}

    def loss(self, nets: Nets, batch: ImageBatch, phase: str) -> Sums:
        return self._told_apart(nets, batch, training=True)

    def evaluate(self, nets: Nets, batch: ImageBatch) -> Sums:
        sums = self._told_apart(nets, batch, training=False)
        seen = _representations(nets["model"], batch.inputs)
        table = seen.new_zeros(PROBED + 1, seen.shape[1] + 1)  # a row for each image, and one for all others
        rows = batch.example_ids.where((batch.labels >= 0) & (batch.example_ids < PROBED), PROBED)
        table[rows] = torch.cat([seen, batch.labels[:, None] + 1], 1)
        return sums._replace(extra={**sums.extra, "representations": table[:PROBED]})

    def _told_apart(self, nets: Nets, batch: ImageBatch, training: bool) -> Sums:
        train, seed, ids = self.config.train, self.config.run.seed, batch.example_ids
        both = torch.cat([view(batch, train.views, seed, number) for number in (0, 1)])
        keys = torch.cat([dropout_keys_of(seed + number, ids) for number in (0, 1)]) if training else None
        z_2BD = F.normalize(nets["model"](both * 2 - 1, keys).float())
        real, count = ids >= 0, len(ids)
        others = real.repeat(2) & ~torch.eye(2 * count, dtype=torch.bool, device=ids.device)
        logits = (z_2BD @ z_2BD.T / train.temperature).masked_fill(~others, FAR)
        twins = torch.arange(2 * count, device=ids.device).roll(count)
        losses = F.cross_entropy(logits, twins, reduction="none").view(2, count).mean(0)
        matched = (logits.argmax(1) == twins).view(2, count).double().mean(0)
        apart = 2 - 2 * z_2BD @ z_2BD.T
        different = real[:, None] & real & ~torch.eye(count, dtype=torch.bool, device=ids.device)
        near = (-2 * apart[:count, :count]).exp() * different
        extra = {
            "matched": (matched * real).sum(),
            "alignment": (apart.diagonal(count) * real).sum(),
            "potential": torch.stack([near.sum(), different.sum()]),
        }
        return Sums((losses * real).sum(), real.sum(), extra)

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        found: dict[str, Value] = {name: extra[name] / max(weight, 1) for name in ("matched", "alignment")}
        total, pairs = extra["potential"]
        if pairs and total:
            found["uniformity"] = math.log(total / pairs)
        if rows := [row for row in extra.get("representations", ()) if row[-1]]:
            table = torch.tensor(rows, dtype=torch.float64)
            features, labels = table[:, :-1], table[:, -1].long() - 1
            found["knn_accuracy"] = knn_accuracy(features, labels)
            found["probe_accuracy"] = linear_accuracy(features, labels)
        return found

    def samples(self, nets: Modules, batch: ImageBatch) -> ImageGrid:
        """Two views of each image, side by side."""
        views = [view(batch, self.config.train.views, self.config.run.seed, number)[:8] for number in (0, 1)]
        return ImageGrid(torch.stack(views, 1).flatten(0, 1))


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


def _representations(network: object, inputs: Tensor) -> Tensor:
    """[B, D] fp32: what goes into the network's head.

    Args:
        network: a module, or the engine of one.
    """
    found: list[Tensor] = []
    head: nn.Module = getattr(network, "module", network).head  # type: ignore[attr-defined]
    first = next(part for part in head.modules() if isinstance(part, nn.Linear))
    hook = first.register_forward_pre_hook(lambda _, given: found.append(given[0].detach().float()))
    try:
        network(inputs)  # type: ignore[operator]
    finally:
        hook.remove()
    return found[0]
