"""Denoising: what noise is in an image, so that a sampler can make images of noise (diffusion, flow matching)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from configs import Config
from configs.sections.pairs import TASK_ENDS
from models.batch import ImageBatch
from models.generative import likeness
from models.generative.paths import Guess, Path
from models.noise import normal, uniform

from ..samples import ImageGrid
from ..task import Modules, Nets, Sums, Task, Value


class Denoising(Task):
    """The mean squared error of the prediction, each image at one time (arXiv:2006.11239, equation 14). Evaluations
    measure how alike held-out and made images are, under model.measure_samples: see `likeness.metrics`."""

    reads = "images"
    takes, gives = TASK_ENDS["denoising"]

    def __init__(self, config: Config):
        super().__init__(config)
        self.model: Any = config.model
        self.path = Path(config.model)  # type: ignore[arg-type]

    @property
    def counts(self) -> tuple[int, str]:
        return 1, "images"

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        return likeness.shapes(self.model.channels) if self.model.measure_samples else {}

    def loss(self, nets: Nets, batch: ImageBatch, phase: str) -> Sums:
        sums = self._denoised(nets, batch, batch.labels if self.model.classes else None, self.model.label_dropout)
        extra = likeness.nothing(self.model.channels, batch.images.device) if self.extra else {}
        return sums._replace(extra=extra)

    def evaluate(self, nets: Nets, batch: ImageBatch) -> Sums:
        sums = self._denoised(nets, batch, batch.labels if self.model.classes else None, 0.0)
        if not self.extra:
            return sums
        made = self.made(nets["model"], batch)
        return sums._replace(extra=likeness.sums(batch.inputs, made, batch.example_ids >= 0))

    def _denoised(self, nets: Nets, batch: ImageBatch, labels: Tensor | None, dropped: float) -> Sums:
        real, draw = (batch.example_ids >= 0).float(), self._drawer(batch)
        t = self.path.times(draw(uniform, "time", ()))
        truth = Guess(batch.inputs, draw(normal, "noise", batch.images.shape[1:]))
        if labels is not None:
            without = (draw(uniform, "label dropout", ()) < dropped) | (labels < 0)
            labels = torch.where(without, self.model.classes, labels)
        predicted = nets["model"](self.path.mixed(truth, t), t, labels).float()
        errors = (predicted - self.path.target(truth, t)).square().mean((1, 2, 3))
        return Sums((errors * real).sum(), real.sum())

    def _drawer(self, batch: ImageBatch) -> Callable[..., Tensor]:
        """Random numbers that belong to the examples: (models.noise's function, use, shape)."""
        return lambda how, use, shape: how(self.config.run.seed, batch.example_ids, use, tuple(shape))

    @torch.no_grad()
    def made(self, net: Callable[..., Any], batch: ImageBatch) -> Tensor:
        """[B, C, H, W]: an image for each example, of its label if the model knows labels, from its own noise."""
        shape, draw = batch.images.shape[1:], self._drawer(batch)
        classes, guidance = self.model.classes, self.model.guidance
        labels = torch.where(batch.labels < 0, classes, batch.labels) if classes else None

        def predict(x: Tensor, t: Tensor) -> Tensor:
            found = net(x, t, labels).float()
            if guidance == 1:
                return found
            without = net(x, t, torch.full_like(batch.labels, classes)).float()
            return without + guidance * (found - without)

        return self.path.sample(
            predict, draw(normal, "start of a sample", shape), lambda step: draw(normal, f"step {step}", shape)
        )

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        return dict(likeness.metrics(extra)) if extra else {}

    def samples(self, nets: Modules, batch: ImageBatch) -> ImageGrid:
        return ImageGrid((self.made(nets["model"], batch) + 1) / 2)
