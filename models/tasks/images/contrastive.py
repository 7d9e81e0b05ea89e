"""Contrastive learning of images (SimCLR, arXiv:2002.05709): two views of an image are told from those of others."""

import torch
from torch.nn import functional as F

from configs import Config, ConfigError
from configs.sections.pairs import TASK_ENDS
from models.batch import ImageBatch

from ..task import Nets, Sums
from .views import OfViews, measured

FAR = -1e9
"""Logit of what is not compared."""


class Contrastive(OfViews):
    """The cross-entropy, in nats, of finding an image's other view among all views of its micro-batch.

    The negatives are those of the micro-batch, which is the same in every topology: train.micro_batch says how many
    images there are to choose from. Recorded besides: `matched`, how often the other view is the nearest.
    """

    takes, gives = TASK_ENDS["contrastive"]

    def __init__(self, config: Config):
        super().__init__(config)
        if config.train.micro_batch == 1:
            raise ConfigError(
                "train.micro_batch=1: contrastive learning compares the images of a micro-batch: set it to 2 or more"
            )

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        return {"matched": (), **super().extra}

    def compared(self, nets: Nets, batch: ImageBatch, training: bool) -> Sums:
        z_2BD = F.normalize(nets["model"](self.both(batch), self.keys(batch) if training else None).float())
        real, count = batch.example_ids >= 0, len(batch.example_ids)
        others = real.repeat(2) & ~torch.eye(2 * count, dtype=torch.bool, device=real.device)
        logits = (z_2BD @ z_2BD.T / self.config.train.temperature).masked_fill(~others, FAR)
        twins = torch.arange(2 * count, device=real.device).roll(count)
        losses = F.cross_entropy(logits, twins, reduction="none").view(2, count).mean(0)
        matched = (logits.argmax(1) == twins).view(2, count).double().mean(0)
        extra = {"matched": (matched * real).sum(), **measured(z_2BD, real)}
        return Sums((losses * real).sum(), real.sum(), extra)
