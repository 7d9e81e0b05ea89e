"""A generator and a discriminator of images: DCGAN's (arXiv:1511.06434) or StyleGAN's generator, each told a class or
not."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from configs.sections.families.generative import GanConfig
from models.vision.blocks import PixelNorm


class Generator(nn.Module):
    """[B, latents] -> images [B, C, H, W] in [-1, 1]."""

    def __init__(self, config: GanConfig):
        super().__init__()
        widths, side = config.generator, config.image_size >> len(config.generator)
        self.labels = nn.Embedding(config.classes, config.latents) if config.classes else None
        given = config.latents * (2 if config.classes else 1)
        parts: list[nn.Module] = [
            nn.Linear(given, widths[0] * side**2, bias=False), nn.Unflatten(1, (widths[0], side, side)),
        ]  # fmt: skip
        for before, width in pairwise(widths):
            parts += [nn.BatchNorm2d(before), nn.ReLU(), nn.ConvTranspose2d(before, width, 4, 2, 1, bias=False)]
        last = nn.ConvTranspose2d(widths[-1], config.channels, 4, 2, 1)
        self.layers = nn.Sequential(*parts, nn.BatchNorm2d(widths[-1]), nn.ReLU(), last, nn.Tanh())

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        dtype: Any = self.layers[0].weight.dtype
        x = latents.to(dtype)
        return self.layers(x if self.labels is None else torch.cat([x, self.labels(labels)], 1))


class Constant(nn.Module):
    """A learned image."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, *shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """One for each of x."""
        return self.weight.expand(len(x), -1, -1, -1)


class Styled(nn.Module):
    """Adaptive instance normalisation (arXiv:1703.06868): the mean and deviation of each channel are the style's."""

    def __init__(self, styles: int, width: int):
        super().__init__()
        self.style = nn.Linear(styles, 2 * width)

    def forward(self, x: Tensor, styles: Tensor) -> Tensor:
        scale, shift = self.style(styles)[:, :, None, None].chunk(2, 1)
        return F.instance_norm(x) * (1 + scale) + shift


class StyleGenerator(nn.Module):
    """As `Generator`, by a learned image whose channels are restyled as it grows (StyleGAN, arXiv:1812.04948)."""

    def __init__(self, config: GanConfig):
        super().__init__()
        widths, side, size = config.generator, config.image_size >> len(config.generator), config.latents
        self.labels = nn.Embedding(config.classes, size) if config.classes else None
        given = [size * (2 if config.classes else 1), *[size] * config.mapping]
        self.mapping = nn.Sequential(*(part for pair in pairwise(given) for part in (nn.Linear(*pair), LEAKY())))
        self.constant, self.first = Constant(widths[0], side, side), Styled(size, widths[0])
        ends = list(pairwise((widths[0], *widths)))
        self.convs = nn.ModuleList(nn.Conv2d(before, width, 3, padding=1) for before, width in ends)
        self.styled = nn.ModuleList(Styled(size, width) for width in widths)
        self.last = nn.Conv2d(widths[-1], config.channels, 1)

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        z = F.normalize(latents) * latents.shape[1] ** 0.5
        z = z.to(self.last.weight.dtype)
        styles = self.mapping(z if self.labels is None else torch.cat([z, self.labels(labels)], 1))
        x = self.first(self.constant(z), styles)
        for conv, styled in zip(self.convs, self.styled, strict=True):
            x = styled(F.leaky_relu(conv(F.interpolate(x, scale_factor=2)), 0.2), styles)
        return self.last(x).tanh()


LEAKY = partial(nn.LeakyReLU, 0.2)
GENERATORS: dict[str, Callable[[GanConfig], nn.Module]] = {"dcgan": Generator, "style": StyleGenerator}


class Discriminator(nn.Module):
    """Images [B, C, H, W] -> logits [B] of being real."""

    def __init__(self, config: GanConfig):
        super().__init__()
        norms: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "layer": PixelNorm}
        bounded: Callable[[Any], Any] = spectral_norm if config.discriminator_norm == "spectral" else nn.Identity()
        parts: list[nn.Module] = []
        for number, (before, width) in enumerate(pairwise((config.channels, *config.discriminator))):
            parts.append(bounded(nn.Conv2d(before, width, 4, 2, 1)))
            if number and config.discriminator_norm in norms:
                parts.append(norms[config.discriminator_norm](width))
            parts.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*parts, nn.Flatten())
        features = config.discriminator[-1] * (config.image_size >> len(config.discriminator)) ** 2
        self.head = bounded(nn.Linear(features, 1))
        self.labels = nn.Embedding(config.classes, features) if config.classes else None

    def forward(self, images: Tensor, labels: Tensor | None, differentiate: bool = False) -> Any:
        """The label is judged by its product with the features (arXiv:1802.05637).

        Args:
            differentiate: return (logits, their gradients by the images, fp32). Those are taken here, as engines let no
                gradient but that of the loss pass through what they return.
        """
        x = images.to(self.head.bias.dtype)
        if differentiate:
            x = x.detach().requires_grad_()
        features = self.layers(x)
        logits = self.head(features)[:, 0]
        if self.labels is not None:
            logits = logits + (self.labels(labels) * features).sum(1)
        if not differentiate:
            return logits
        [gradients] = torch.autograd.grad(logits.float().sum(), x, create_graph=True)
        return logits, gradients.float()


class Gan(nn.Module):
    """Both networks, each with an optimizer of its own."""

    def __init__(self, config: GanConfig):
        super().__init__()
        self.generator = GENERATORS[config.generator_network](config)
        self.discriminator = Discriminator(config)
