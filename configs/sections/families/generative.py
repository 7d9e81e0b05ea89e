"""Keys of the families that learn to make their examples: autoencoders, GANs and diffusion models."""

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from configs.base import Size
from configs.sections.family import ModelSection

from .stages import Activation, Norm

Widths = Annotated[tuple[Size, ...], Field(max_length=1000)]


class AutoencoderConfig(ModelSection):
    """An encoder and a decoder of rows or images, with a bottleneck between them."""

    default_task: ClassVar[str] = "reconstruction"

    family: str = "autoencoder"
    network: Literal["mlp", "conv"] = "mlp"
    """mlp: of rows, or of images as rows of pixels; conv: convolutional, of square images."""
    inputs: Size = 64
    """Numbers of an example: feature columns of a row, or channels * height * width of an image."""
    channels: Literal[1, 3] = 3
    """Of an image: that of data.images.channels."""
    hidden: Widths = (128,)
    """Widths of the encoder's hidden layers; with conv channels of its stages, each of which halves height and width.
    The decoder mirrors them."""
    activation: Activation = "relu"
    """Of the hidden layers."""
    norm: Norm = "none"
    """Before each activation."""
    latents: Size = 16
    """Numbers that an example is encoded as; with conv and vq, numbers at each pixel of the last stage."""
    bottleneck: Literal["plain", "vae", "vq"] = "plain"
    """plain: the latents as they are; vae: a normal distribution over them, at first the standard one
    (arXiv:1312.6114); vq: the nearest of model.codes learned vectors (arXiv:1711.00937)."""
    input_noise: float = Field(0.0, ge=0, le=1e6)
    """Standard deviation of noise that is added to the inputs, but not to what is to be reconstructed: a denoising
    autoencoder (Vincent et al., 2008)."""
    beta: float = Field(1.0, ge=0, le=1e6)
    """vae: weight of the KL divergence from the standard normal distribution (beta-VAE, Higgins et al., 2017)."""
    sparsity: Literal["none", "l1", "kl"] = "none"
    """plain: l1: the latents' absolute values are penalised; kl: the latents are between 0 and 1, and the divergence of
    each one's mean over a micro-batch from model.sparsity_target is penalised."""
    sparsity_weight: float = Field(0.1, ge=0, le=1e6)
    """Weight of the sparsity penalty."""
    sparsity_target: float = Field(0.05, gt=0, lt=1)
    """kl: what the mean of each latent should be."""
    contractive: float = Field(0.0, ge=0, le=1e6)
    """plain: weight of the squared Frobenius norm of the latents' Jacobian (Rifai et al., 2011), estimated with one
    random projection of each example."""
    codes: Size = 64
    """vq: vectors in the codebook."""
    commitment: float = Field(0.25, ge=0, le=1e6)
    """vq: weight of the latents' squared distance to their code, beside that of the code to them."""

    @property
    def differentiates(self) -> bool:
        return self.contractive > 0

    @property
    def side(self) -> int:
        """Height and width of an image of so many inputs and channels, rounded down."""
        return math.isqrt(self.inputs // self.channels)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.network == "conv":
            if not self.hidden:
                raise ValueError("model.hidden is empty: model.network=conv needs a stage at least")
            if self.channels * self.side**2 != self.inputs:
                raise ValueError(
                    f"model.inputs ({self.inputs}) is not model.channels ({self.channels}) times a square, as "
                    "model.network=conv needs: set model.inputs to channels * height * width of an image"
                )
            if self.side % 2 ** len(self.hidden):
                raise ValueError(
                    f"model.hidden has {len(self.hidden)} stages, each of which halves an image, but {self.side} pixels"
                    f" cannot be halved {len(self.hidden)} times: set data.images.size, or fewer stages"
                )
        for key in ("sparsity", "contractive"):
            if self.bottleneck != "plain" and getattr(self, key) not in ("none", 0):
                raise ValueError(f"model.{key} is for model.bottleneck=plain, not {self.bottleneck}: leave it out")
        return self
