"""Masked reconstruction of images (arXiv:2111.06377): the patches that were hidden, from those that were not."""

from typing import Any

import torch
from torch import Tensor

from configs.sections.pairs import TASK_ENDS
from models.batch import ImageBatch
from models.noise import dropout_keys_of, uniform
from models.vision.mae import image_of, patches_of

from ..samples import ImageGrid
from ..task import Modules, Nets, Sums, Task

SHOWN = 12
"""Images of a sample, each three times: two to a row."""


class MaskedReconstruction(Task):
    """The squared error over the hidden patches' pixels, which are in [-1, 1]. A network is called with images, the
    numbers of the patches that it sees, and dropout's keys. Those patches are a function of (seed, example), and of
    the example alone in evaluations."""

    takes, gives = TASK_ENDS["masked_reconstruction"]
    reads = "images"

    @property
    def counts(self) -> tuple[int, str]:
        return 1, "images"

    @property
    def _model(self) -> Any:
        return self.config.model

    def _seen(self, batch: ImageBatch, seed: int, use: str) -> Tensor:
        """[B, K] numbers of the patches that are not hidden."""
        lots = uniform(seed, batch.example_ids, use, (self._model.num_patches,))
        return lots.argsort(dim=1, stable=True)[:, : self._model.kept]

    def loss(self, nets: Nets, batch: ImageBatch, phase: str) -> Sums:
        seed = self.config.run.seed
        kept, keys = self._seen(batch, seed, "patches"), dropout_keys_of(seed, batch.example_ids)
        return self._compared(nets["model"](batch.inputs, kept, keys), kept, batch)

    def evaluate(self, nets: Nets, batch: ImageBatch) -> Sums:
        kept = self._seen(batch, 0, "held-out patches")
        return self._compared(nets["model"](batch.inputs, kept), kept, batch)

    def _compared(self, found_BPN: Tensor, kept_BK: Tensor, batch: ImageBatch) -> Sums:
        errors_BP = (found_BPN.float() - patches_of(batch.inputs, self._model.patch_size)).square().mean(2)
        hidden_BP = torch.ones_like(errors_BP).scatter(1, kept_BK, 0.0)
        real_B = batch.example_ids >= 0
        return Sums(((errors_BP * hidden_BP).sum(1) / hidden_BP.sum(1) * real_B).sum(), real_B.sum())

    def samples(self, nets: Modules, batch: ImageBatch) -> ImageGrid:
        """Each image as the network sees it, with the hidden patches filled in, and as it is."""
        size, kept = self._model.patch_size, self._seen(batch, 0, "held-out patches")
        whole = patches_of(batch.inputs, size)
        seen = torch.zeros_like(whole[..., :1]).scatter(1, kept[..., None], 1.0).bool()
        found = nets["model"](batch.inputs, kept).float()
        three = torch.stack([whole.where(seen, torch.zeros_like(whole)), whole.where(seen, found), whole], 1)[:SHOWN]
        return ImageGrid((image_of(three.flatten(0, 1), size) + 1) / 2)
