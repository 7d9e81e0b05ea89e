"""Autoencoders: an encoder, a bottleneck (plain, of a VAE or of a VQ-VAE) and a decoder."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from configs.sections.families.generative import AutoencoderConfig
from configs.sections.families.stages import Architecture, Stage
from models.mlp import NORMS
from models.vision.blocks import ACTIVATIONS, Builder


class Gaussian(nn.Module):
    """A normal distribution over the latents, by its mean and logarithmic variance (arXiv:1312.6114)."""

    def forward(self, encoded: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        """[B, 2 * latents] -> (a sample of the latents; mean and logarithmic variance, fp32)."""
        mean, log_variance = encoded.float().chunk(2, 1)
        sample = mean if noise is None else mean + (log_variance / 2).exp() * noise
        return sample.to(encoded.dtype), mean, log_variance


class Codebook(nn.Module):
    """The nearest of the learned vectors, through which gradients pass straight (arXiv:1711.00937, section 3.2)."""

    def __init__(self, codes: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(codes, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, encoded: Tensor, noise: None) -> tuple[Tensor, ...]:
        """[B, size, ...] -> (codes for the decoder; encoded and codes, [B, ..., size] fp32; their numbers [B, ...])."""
        x, weight = encoded.movedim(1, -1).float(), self.weight.float()
        distances = x.square().sum(-1, keepdim=True) - 2 * x @ weight.T + weight.square().sum(-1)
        numbers = distances.argmin(-1)
        codes = weight[numbers]
        straight = x + (codes - x).detach()
        return straight.movedim(-1, 1).to(encoded.dtype), x, codes, numbers


class Plain(nn.Module):
    """The latents as they are, or squashed to between 0 and 1."""

    def __init__(self, squashed: bool):
        super().__init__()
        self.squash = nn.Sigmoid() if squashed else nn.Identity()

    def forward(self, encoded: Tensor, noise: None) -> tuple[Tensor, ...]:
        latents = self.squash(encoded)
        return latents, latents.float()


class Autoencoder(nn.Module):
    """Of rows [B, inputs], or images [B, channels, side, side] in [-1, 1]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        latents = config.latents
        encoded = 2 * latents if config.bottleneck == "vae" else latents
        self.encoder, self.decoder = (_conv if config.network == "conv" else _mlp)(config, encoded)
        kinds: dict[str, Callable[[], nn.Module]] = {
            "plain": lambda: Plain(config.sparsity == "kl"),
            "vae": Gaussian,
            "vq": lambda: Codebook(config.codes, latents),
        }
        self.bottleneck = kinds[config.bottleneck]()

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in: of a layer's weight, in whose place an engine may have put a copy."""
        return self.decoder[-1].weight.dtype  # type: ignore[index, union-attr, return-value]

    def decoded(self, latents: Tensor) -> Tensor:
        return self.decoder(latents.to(self.dtype))

    def forward(
        self, inputs: Tensor, noise: Tensor | None = None, projection: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """(the reconstruction, in the shape of the inputs; what the bottleneck gives besides).

        Args:
            noise: [B, latents] standard normal, for a VAE; None: the mean.
            projection: [B, latents]: the gradient of its product with the plain latents by the inputs is given last. It
                is taken here, as engines let no gradient but that of the loss pass through what they return.
        """
        x = inputs.to(self.dtype)
        if projection is not None:
            x = x.detach().requires_grad_()
        code, *more = self.bottleneck(self.encoder(x), noise)
        if projection is not None:
            [gradient] = torch.autograd.grad((code.float() * projection).sum(), x, create_graph=True)
            more.append(gradient.float())
        return self.decoder(code).view_as(inputs), *more


def _mlp(config: AutoencoderConfig, encoded: int) -> tuple[nn.Module, nn.Module]:
    def layers(*widths: int) -> list[nn.Module]:
        *hidden, last = pairwise(widths)
        found: list[nn.Module] = []
        for before, width in hidden:
            linear = nn.Linear(before, width, bias=config.norm == "none")
            found += [linear, NORMS[config.norm](width), ACTIVATIONS[config.activation]()]
        return [*found, nn.Linear(*last)]

    encoder = nn.Sequential(nn.Flatten(), *layers(config.inputs, *config.hidden, encoded))
    return encoder, nn.Sequential(*layers(config.latents, *reversed(config.hidden), config.inputs))


def _conv(config: AutoencoderConfig, encoded: int) -> tuple[nn.Module, nn.Module]:
    builder = Builder(Architecture(stages=(Stage(),), norm=config.norm, activation=config.activation))
    down: list[nn.Module] = []
    for before, width in pairwise((config.channels, *config.hidden)):
        down += [*builder.conv(before, width, 3, stride=2), builder.activation()]
    up: list[nn.Module] = []
    for before, width in pairwise((*reversed(config.hidden), config.hidden[0])):
        up += [nn.Upsample(scale_factor=2), *builder.conv(before, width, 3), builder.activation()]
    up.append(nn.Conv2d(config.hidden[0], config.channels, 3, padding=1))
    side, last = config.side // 2 ** len(config.hidden), config.hidden[-1]
    if config.bottleneck == "vq":
        return nn.Sequential(*down, nn.Conv2d(last, encoded, 1)), nn.Sequential(nn.Conv2d(config.latents, last, 1), *up)
    return (
        nn.Sequential(*down, nn.Flatten(), nn.Linear(last * side**2, encoded)),
        nn.Sequential(
            nn.Linear(config.latents, last * side**2), nn.Unflatten(1, (last, side, side)), builder.activation(), *up
        ),
    )
