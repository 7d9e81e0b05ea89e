"""Self-distillation of images (BYOL, arXiv:2006.07733): from one view, what the network's average sees in another."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from configs import Config, ConfigError
from configs.sections.pairs import TASK_ENDS
from models.batch import ImageBatch
from models.norm_memory import normalised_by_batch

from ..task import Nets, Sums
from .views import OfViews, measured


@dataclass
class TaughtImages(ImageBatch):
    """Images, and the teacher's projections of their views."""

    targets: Tensor
    """[2B, D], as `OfViews.both`."""


class SelfDistillation(OfViews):
    """The squared distance, between unit vectors, of what is predicted from an image's view to the teacher's projection
    of its other view, summed over both views. The teacher is the moving average of the weights.
    Evaluations have no teacher: they predict the network's own projections. If all images came to look alike,
    `uniformity` would rise to 0.
    """

    takes, gives = TASK_ENDS["self_distillation"]
    has_teacher = True

    def __init__(self, config: Config):
        super().__init__(config)
        if not getattr(config.model, "predictor", None):
            raise ConfigError("task=self_distillation needs a predictor: set model.predictor=[64], its hidden layer")
        if config.optim.ema_decay is None:
            raise ConfigError("task=self_distillation learns from an average of its weights: set optim.ema_decay=0.99")

    def taught(self, nets: Nets, batch: ImageBatch) -> TaughtImages:
        network: Any = nets["model"]
        with normalised_by_batch(getattr(network, "module", network)):  # as the online network is
            targets, _ = network(self.both(batch), None, True).float()
        return TaughtImages(batch.images, batch.labels, batch.example_ids, targets)

    def compared(self, nets: Nets, batch: ImageBatch, training: bool) -> Sums:
        projected, predicted = nets["model"](self.both(batch), self.keys(batch) if training else None, True).float()
        targets = batch.targets if isinstance(batch, TaughtImages) else projected.detach()
        real, count = batch.example_ids >= 0, len(batch.example_ids)
        cosines = (F.normalize(predicted) * F.normalize(targets).roll(count, 0)).sum(1)
        losses = (2 - 2 * cosines).view(2, count).sum(0)
        return Sums((losses * real).sum(), real.sum(), measured(F.normalize(projected.detach()), real))
