"""A family of two networks and a task of two phases in one file: a GAN that generates images.

    plugins: [small_gan.py]
    model: {family: small_gan, size: 12, width: 16}
    data: {path: images.parquet, images: {channels: 1}}

The discriminator and the generator have an optimizer each, with `model.discriminator_lr`, `model.generator_lr` and
otherwise the keys of `optim`. The generator is updated at every `model.generator_every`-th step.
"""

from typing import Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from configs.sections.family import ModelSection
from models.batch import ImageBatch
from models.families import FAMILIES, Family
from models.noise import normal
from models.tasks.samples import ImageGrid
from models.tasks.table import TASKS
from models.tasks.task import Modules, Nets, Phase, Sums, Task


class GanConfig(ModelSection):
    """Keys under `model:`."""

    default_task = "small_game"

    family: str = "small_gan"
    size: int = Field(12, ge=4, le=64)
    """Height and width of an image."""
    width: int = Field(16, ge=1, le=4096)
    """A quarter of the hidden units."""
    latents: int = Field(8, ge=1)
    """Size of the latent vector that an image is generated from."""
    discriminator_lr: float = Field(2e-3, gt=0)
    """Peak learning rate of the discriminator."""
    generator_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of the generator."""
    generator_every: int = Field(1, ge=1)
    """Steps of the discriminator for each of the generator."""
    spectral_norm: bool = False
    """Whether the discriminator's matrices have a spectral norm of 1 (arXiv:1802.05957)."""
    generator_ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the generator only, which then generates the samples; None: optim's."""


class Gan(nn.Module):
    """[B, latents] -> [B, 1, size, size] in [-1, 1], and that -> [B] logits of being real."""

    def __init__(self, config: GanConfig):
        super().__init__()
        hidden, pixels = 4 * config.width, config.size**2
        norm = spectral_norm if config.spectral_norm else nn.Identity()
        self.generator = nn.Sequential(
            nn.Linear(config.latents, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, pixels), nn.Tanh(), nn.Unflatten(1, (1, config.size, config.size)),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Flatten(), norm(nn.Linear(pixels, hidden)), nn.LeakyReLU(0.2), norm(nn.Linear(hidden, 1)), nn.Flatten(0)
        )


class SmallGame(Task):
    """The non-saturating game (arXiv:1406.2661, section 3): each loss a sum over a batch's images, in nats."""

    reads, takes, gives = "images", "latents and images", "images and logits"
    counts = 1, "images"
    extra = {"fooled": ()}

    @property
    def phases(self) -> tuple[Phase, ...]:
        model: Any = self.config.model
        own = {"lr": model.generator_lr} | ({"ema_decay": model.generator_ema} if model.generator_ema else {})
        return (
            Phase("discriminator", "discriminator", {"lr": model.discriminator_lr}),
            Phase("generator", "generator", own, every=model.generator_every),
        )

    def loss(self, nets: Nets, batch: ImageBatch, phase: str) -> Sums:
        real = (batch.example_ids >= 0).float()  # 0: padding
        fake = nets["generator"](self.latents(batch))
        if phase == "generator":
            logits = nets["discriminator"](fake).float()
            loss = (F.softplus(-logits) * real).sum()
        else:
            seen = nets["discriminator"](batch.images.to(fake.dtype) / 127.5 - 1).float()
            logits = nets["discriminator"](fake.detach()).float()
            loss = ((F.softplus(-seen) + F.softplus(logits)) * real).sum()
        return Sums(loss, real.sum(), {"fooled": ((logits > 0) * real).sum()})

    def samples(self, nets: Modules, batch: ImageBatch) -> ImageGrid:
        return ImageGrid((nets["generator"](self.latents(batch)) + 1) / 2)

    def latents(self, batch: ImageBatch) -> Tensor:
        model: Any = self.config.model
        dtype = {"fp32": None, "bf16": "bfloat16", "fp16": "half"}[self.config.train.kept_in]
        found = normal(self.config.run.seed, batch.example_ids, "latents", (model.latents,))
        return found if dtype is None else getattr(found, dtype)()


FAMILIES["small_gan"] = Family(build=Gan, section=GanConfig, takes="latents and images", gives="images and logits")
TASKS["small_game"] = SmallGame
