"""The adversarial game: a discriminator learns to tell real images from made ones, a generator to be taken for real."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from configs import Config
from configs.sections.pairs import TASK_ENDS
from models.batch import ImageBatch
from models.generative import likeness
from models.noise import normal, uniform

from ..samples import ImageGrid
from ..task import Modules, Nets, Phase, Sums, Task, Value


def discriminator_loss(kind: str, real: Tensor, made: Tensor) -> Tensor:
    """[B], of the logits of real and of made images; for the kinds see `model.loss`."""
    if kind in ("wgan", "wgan_gp"):
        return made - real
    if kind == "hinge":
        return relu(1 - real) + relu(1 + made)
    return softplus(-real) + softplus(made)


def generator_loss(kind: str, made: Tensor) -> Tensor:
    if kind == "minimax":
        return -softplus(made)
    return softplus(-made) if kind == "non_saturating" else -made


class Adversarial(Task):
    """The discriminator's loss is the run's. Recorded besides: `fooled`, the share of made images that are judged real,
    and in evaluations how alike real and made images are (`likeness.metrics`): if the generator collapses to a few
    images, coverage falls and the Frechet distance grows."""

    reads = "images"
    takes, gives = TASK_ENDS["adversarial"]

    def __init__(self, config: Config):
        super().__init__(config)
        self.model: Any = config.model

    @property
    def counts(self) -> tuple[int, str]:
        return 1, "images"

    @property
    def phases(self) -> tuple[Phase, ...]:
        model = self.model
        rates = [{} if rate is None else {"lr": rate} for rate in (model.discriminator_lr, model.generator_lr)]
        clip = {"max_weight": model.clip} if model.loss == "wgan" else {}
        return (
            Phase("discriminator", "discriminator", rates[0] | clip | {"ema_decay": None, "swa_from": None}),
            Phase("generator", "generator", rates[1], every=model.discriminator_steps),
        )

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        return {"fooled": ()} | likeness.shapes(self.model.channels)

    def loss(self, nets: Nets, batch: ImageBatch, phase: str) -> Sums:
        real, labels = batch.example_ids >= 0, self._labels(batch)
        with torch.set_grad_enabled(phase == "generator" and torch.is_grad_enabled()):
            images = nets["generator"](self._latents(batch, phase), labels)
        made = nets["discriminator"](images, labels).float()
        if phase == "generator":
            losses = generator_loss(self.model.loss, made)
        else:
            seen = nets["discriminator"](batch.inputs, labels).float()
            losses = discriminator_loss(self.model.loss, seen, made)
            if self.model.loss == "wgan_gp" and torch.is_grad_enabled():
                losses = losses + self.model.gradient_penalty * self._steepness(nets, batch, images, labels)
        nothing = likeness.nothing(self.model.channels, batch.images.device)
        return Sums((losses * real).sum(), real.sum(), {"fooled": ((made > 0) & real).sum(), **nothing})

    def _steepness(self, nets: Nets, batch: ImageBatch, images: Tensor, labels: Tensor | None) -> Tensor:
        """How far the norm of the gradient is from 1, squared, between real and made images (arXiv:1704.00028)."""
        share = uniform(self.config.run.seed, batch.example_ids, "place between", (1, 1, 1))
        between = share * batch.inputs + (1 - share) * images.float()
        _, gradients = nets["discriminator"](between, labels, True)
        return (gradients.flatten(1).square().sum(1) + 1e-12).sqrt().sub(1).square()

    def evaluate(self, nets: Nets, batch: ImageBatch) -> Sums:
        """The discriminator's loss, without a penalty on gradients."""
        sums, labels = self.loss(nets, batch, "discriminator"), self._labels(batch)
        made = nets["generator"](self._latents(batch, "discriminator"), labels)
        alike = likeness.sums(batch.inputs, made, batch.example_ids >= 0)
        return sums._replace(extra={"fooled": sums.extra["fooled"], **alike})

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        return {"fooled": extra["fooled"] / max(weight, 1)} | likeness.metrics(extra)

    def samples(self, nets: Modules, batch: ImageBatch) -> ImageGrid:
        return ImageGrid((nets["generator"](self._latents(batch, "samples"), self._labels(batch)) + 1) / 2)

    def _labels(self, batch: ImageBatch) -> Tensor | None:
        return batch.labels.clamp(min=0) if self.model.classes else None

    def _latents(self, batch: ImageBatch, use: str) -> Tensor:
        return normal(self.config.run.seed, batch.example_ids, f"latents of {use}", (self.model.latents,))
